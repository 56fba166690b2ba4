"""`phifleet simulate`: devices that are not there, to try rollouts and to size a set-up."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import tempfile
import tomllib
from pathlib import Path

import click
from pydantic import ValidationError

from agent.contract.base import explain
from fleet.cli.context import Context, actor
from fleet.core.rollouts import State
from fleet.daemon.run import link_settings
from fleet.demo.simulator import Behaviour, Fault, FaultsFile, SimulatedDevice, Simulation, Slow
from fleet.errors import UsageError
from fleet.operations.fleet import Fleet, require_fleet
from fleet.profiles_loader import load_profile


@click.command()
@click.option("--devices", type=click.IntRange(1, 100_000), default=1000, show_default=True, help="How many.")
@click.option("--rollout", "story", is_flag=True, help="A fleet of its own, and a rollout that stops itself; then end.")
@click.option("--slower", type=click.FloatRange(0), default=20.0, show_default=True, help="Of --rollout, in percent.")
@click.option("--profile", "profiles", multiple=True, help="Of the devices, in turn; iot-x86 unless given.")
@click.option("--slow", multiple=True, metavar="ARTIFACT:PROFILE:PERCENT", help="Slower on artifacts that begin so.")
@click.option(
    "--failing", type=click.FloatRange(0, 100), default=0.0, show_default=True, help="Percent of orders that fail."
)
@click.option(
    "--interval", type=click.FloatRange(0.1), default=10.0, show_default=True, help="Seconds between reports."
)
@click.option("--noise", type=click.FloatRange(0, 100), default=5.0, show_default=True, help="Of a figure, in percent.")
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="Reports a second of all, instead of --interval.")
@click.option(
    "--faults",
    "faults_file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="TOML: what goes wrong when, for which devices (docs/operations.md).",
)
@click.option("--seed", type=int, default=1, show_default=True, help="The same seed draws the same devices.")
@click.pass_obj
def simulate(context: Context, /, devices: int, story: bool, slower: float, **given: object) -> None:
    """Run simulated devices against the fleet's broker, until interrupted; or a whole story with --rollout.

    They speak the real protocol; only the model is drawn. Their names are sim-0000 and so on; those that are not in
    the fleet yet are added. Meant for a broker without certificates, such as the embedded one.
    """
    seed = int(str(given["seed"]))
    if story:
        _story(devices, slower / 100, seed)
        return
    require_fleet(context.settings)
    rate = given["rate"]
    behaviour = Behaviour(
        seed=seed,
        interval_s=float(str(given["interval"])) if rate is None else devices / float(str(rate)),
        faults=_faults(given["faults_file"]),  # type: ignore[arg-type]
        noise=float(str(given["noise"])) / 100,
        failing=float(str(given["failing"])) / 100,
        slow=tuple(_slow(text) for text in given["slow"]),  # type: ignore[attr-defined]
    )
    names = [str(name) for name in given["profiles"]] or ["iot-x86"]  # type: ignore[attr-defined]
    with Fleet(context.settings) as fleet:
        known = {row.id: row.profile for row in fleet.registry.devices.all()}
        chosen: dict[str, str] = {}
        for number in range(devices):
            name, profile = f"sim-{number:04}", names[number % len(names)]
            chosen[name] = known.get(name, profile)
            if name not in known:
                fleet.registry.devices.add(name, load_profile(profile), None, actor())
    simulated = [SimulatedDevice(name, profile, behaviour) for name, profile in chosen.items()]
    click.echo(f"{devices} simulated devices speak to {context.settings.broker_url}; Ctrl-C ends them")
    asyncio.run(_until_interrupted(Simulation(link_settings(context.settings, "simulator"), simulated)))


async def _until_interrupted(simulation: Simulation) -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):  # Windows
            loop.add_signal_handler(number, stop.set)
    try:
        await simulation.run(stop)
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None
    click.echo(f"{simulation.published} messages were published")


def _story(devices: int, slower: float, seed: int) -> None:
    from fleet.demo.story import tell

    with tempfile.TemporaryDirectory(prefix="phifleet-simulated-") as folder:
        ended = tell(Path(folder), devices, slower, seed, lambda line: click.echo(f"  {line}"))
    state = ended.rollout.state
    click.echo(
        f"the rollout is {state.replace('_', ' ')} after {ended.seconds:.0f} s, in wave {ended.rollout.wave + 1}"
    )
    for text in ended.findings:
        click.echo(f"  {text}")
    click.echo(f"{ended.on_the_old_model} of {ended.devices} devices serve what they served before")
    if slower >= 0.1 and (state is not State.TAKEN_BACK or ended.on_the_old_model != ended.devices):
        raise click.exceptions.Exit(1)


def _faults(file: Path | None) -> tuple[Fault, ...]:
    if file is None:
        return ()
    try:
        return FaultsFile.model_validate(tomllib.loads(file.read_text(encoding="utf-8"))).fault
    except ValidationError as error:
        raise UsageError(f"{file}: {explain(error)}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{file}: cannot be read: {error}") from None


def _slow(text: str) -> Slow:
    parts = text.rsplit(":", 2)
    try:
        artifact, profile, percent = parts
        return Slow(artifact, profile, float(percent) / 100)
    except ValueError:
        raise UsageError(f"--slow {text!r}: write ARTIFACT:PROFILE:PERCENT, such as phi-new:*:20") from None
