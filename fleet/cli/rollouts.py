"""`phifleet rollout`: change the model on many devices, in waves that stop by themselves when devices run worse."""

from __future__ import annotations

import contextlib
import json
import re
import time
from datetime import datetime
from typing import Any

import click
from pydantic import ValidationError
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from agent.contract.base import explain
from fleet.api.client import Client, pages
from fleet.cli import completion
from fleet.cli.artifacts import wide_console
from fleet.cli.context import Context, actor
from fleet.cli.deploy import alias_option
from fleet.core.evidence import Gate
from fleet.core.rollout_spec import RolloutSpec, Wave
from fleet.core.rollouts import State
from fleet.errors import UsageError
from fleet.operations.names import check_name
from fleet.registry.rollouts import DeviceStage

REFRESH_S = 1.0
_COLOURS = {State.COMPLETED: "green", State.ABORTED: "yellow", State.INCOMPLETE: "red", State.TAKEN_BACK: "red"}

Rollout = dict[str, Any]


@click.group()
def rollout() -> None:
    """Change the model on many devices, in waves that stop by themselves when devices run worse than before."""


_options = [
    click.argument("artifacts", nargs=-1, required=True, shell_complete=completion.artifacts),
    click.option("--selector", required=True, help="Which devices, such as 'profile=pi-5 and label.site=lyon'."),
    click.option("--waves", default="100%", show_default=True, help="Such as 5,10%,100%, or a selector in quotes."),
    click.option("--bake", type=click.FloatRange(0), default=300.0, show_default=True, help="Seconds after each wave."),
    click.option(
        "--margin", type=click.FloatRange(0, min_open=True), default=5.0, show_default=True, help="In percent."
    ),
    click.option("--no-gate", is_flag=True, help="Let no figure of the devices stop it."),
    click.option("--approval", is_flag=True, help="A person lets each wave after the first begin."),
    click.option("--concurrency", type=click.IntRange(1), help="Devices that change at a time."),
    click.option("--rate", type=click.FloatRange(0, min_open=True), help="Orders a minute."),
    click.option(
        "--window",
        "windows",
        multiple=True,
        metavar="DAYS HH:MM-HH:MM ZONE",
        help="Order devices only then, such as 'mon-fri 22:00-05:00 Europe/Paris'; more than once.",
    ),
    alias_option,
    click.option(
        "--retries", type=click.IntRange(0, 10), default=0, show_default=True, help="For a device that failed."
    ),
    click.option("--wave-deadline", type=click.FloatRange(0, min_open=True), help="Seconds; 7 days unless given."),
    click.option("--probation", type=click.FloatRange(0), help="Seconds of health; as the profile has it."),
    click.option("--dynamic", is_flag=True, help="The last wave takes devices too that are meant only later."),
    click.option("--on-stop", type=click.Choice(["revert", "keep"]), default="revert", show_default=True),
    click.option("--priority", type=click.IntRange(0, 100), default=50, show_default=True),
]


def _with_options(command: Any) -> Any:
    for option in reversed(_options):
        command = option(command)
    return command


@rollout.command("plan")
@_with_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.pass_obj
def plan_command(context: Context, /, as_json: bool, **given: Any) -> None:
    """Say which devices each wave would take, with which variant, and which slowdown so many devices can show."""
    with context.client() as client:
        found = client.call("POST", "/rollouts/plan", {"rollout": "plan", "spec": _spec(given)})
    if as_json:
        click.echo(json.dumps(found))
        return
    wide_console().print(_plan_table(found))
    for device, why in list(found["unfit"].items())[:20]:
        click.echo(f"no variant fits {device}: {why}")
    if found["taken"]:
        click.echo(f"{len(found['taken'])} devices are in another rollout: {', '.join(found['taken'][:20])}")


@rollout.command("start")
@click.option("--name", help="What the rollout is called; drawn from the time unless given.")
@_with_options
@click.pass_obj
def start_command(context: Context, /, name: str | None, **given: Any) -> None:
    """Begin a rollout; the controller moves it."""
    name = check_name("--name", name or f"r-{actor().at:%Y%m%d-%H%M%S}")
    with context.client() as client:
        started = client.call("POST", "/rollouts", {"rollout": name, "spec": _spec(given)})
    began = started["rollout"]
    click.echo(f"rollout {began} has begun; follow it with `phifleet rollout watch {began}`")


@rollout.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON array.")
@click.pass_obj
def list_command(context: Context, as_json: bool) -> None:
    """List the hundred newest rollouts, newest first."""
    with context.client() as client:
        rows = client.call("GET", "/rollouts")["items"]
    if as_json:
        click.echo(json.dumps(rows))
        return
    table = Table("rollout", "state", "wave", "devices", "begun (UTC)", "by", "reason", box=None)
    for one in rows:
        wave = f"{one['wave']} of {len(one['waves'])}"
        state = Text(_words(one), _COLOURS.get(State(one["state"]), ""))
        began = f"{datetime.fromisoformat(one['created_at']):%Y-%m-%d %H:%M}"
        table.add_row(one["rollout"], state, wave, one["selector"], began, one["created_by"], one["reason"])
    wide_console().print(table)


@rollout.command("status")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.pass_obj
def status_command(context: Context, name: str, as_json: bool) -> None:
    """Show where a rollout stands."""
    with context.client() as client:
        found = _get(client, name)
        if as_json:
            click.echo(json.dumps(found | {"device_stages": list(pages(client, f"/rollouts/{name}/devices"))}))
            return
    wide_console().print(_screen(found))


@rollout.command("watch")
@click.argument("name")
@click.pass_obj
def watch_command(context: Context, name: str) -> None:
    """Follow a rollout until it is over; exit code 9 where it did not complete."""
    console = Console()
    with context.client() as client, contextlib.suppress(KeyboardInterrupt):
        with Live(console=console, auto_refresh=False) if console.is_terminal else contextlib.nullcontext() as live:
            state = None
            while not (one := _get(client, name))["final"]:
                if live is not None:
                    live.update(_screen(one), refresh=True)
                elif one["state"] != state:
                    click.echo(f"{_words(one)}, wave {one['wave']} of {len(one['waves'])}")
                state = one["state"]
                time.sleep(REFRESH_S)
        console.print(_screen(one))
        if one["state"] != State.COMPLETED:
            raise click.exceptions.Exit(9)


@rollout.command("explain")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.pass_obj
def explain_command(context: Context, name: str, as_json: bool) -> None:
    """Print the evidence: how devices run now against before, and what stopped it."""
    with context.client() as client:
        one = _get(client, name)
    found = one["findings"] or {}
    if as_json:
        click.echo(json.dumps({"rollout": name, "state": one["state"], "reason": one["reason"], **found}))
        return
    click.echo(f"{name} is {_words(one)}" + (f": {one['reason']}" if one["reason"] else ""))
    for finding in found.get("findings", []):
        click.echo(f"{'stops  ' if finding['stops'] else '       '}{finding['text']}")
    if not found:
        click.echo("no device has been compared yet: each side needs its requests first")


@rollout.command("pause")
@click.argument("name")
@click.pass_obj
def pause_command(context: Context, name: str) -> None:
    """Order no further device until it is resumed; what is under way goes on."""
    _control(context, name, action="pause")


@rollout.command("resume")
@click.argument("name")
@click.pass_obj
def resume_command(context: Context, name: str) -> None:
    """Go on where it was paused."""
    _control(context, name, action="resume")


@rollout.command("approve")
@click.argument("name")
@click.pass_obj
def approve_command(context: Context, name: str) -> None:
    """Let the next wave begin."""
    _control(context, name, action="approve")


@rollout.command("abort")
@click.argument("name")
@click.option(
    "--revert/--keep", "revert", required=True, help="Devices that have changed go back, or keep what they have."
)
@click.option("--reason", default="the operator aborted it", help="For the record.")
@click.pass_obj
def abort_command(context: Context, name: str, revert: bool, reason: str) -> None:
    """End it."""
    _control(context, name, action="abort", revert=revert, reason=reason)


def _control(context: Context, name: str, **control: Any) -> None:
    with context.client() as client:
        after = client.call("POST", f"/rollouts/{name}/control", control)
    click.echo(f"rollout {name} is {_words(after)}")


def _get(client: Client, name: str) -> Rollout:
    found: Rollout = client.call("GET", f"/rollouts/{name}")
    return found


def _words(one: Rollout) -> str:
    return str(one["state"]).replace("_", " ")


def _spec(given: dict[str, Any]) -> dict[str, Any]:
    """Return the options as a rollout's specification; names in it are the server's to understand.

    Raises:
        UsageError: the options contradict each other.
    """
    try:
        spec = RolloutSpec(
            selector=given["selector"],
            artifacts=tuple(given["artifacts"]),
            waves=tuple(_wave(text) for text in _split(given["waves"])),
            bake_s=given["bake"],
            gate=None if given["no_gate"] else Gate(margin=given["margin"] / 100),
            approval=given["approval"],
            concurrency=given["concurrency"],
            rate_per_minute=given["rate"],
            windows=given["windows"],
            aliases=given["aliases"],
            retries=given["retries"],
            probation_s=given["probation"],
            on_stop=given["on_stop"],
            priority=given["priority"],
            dynamic=given["dynamic"],
            **({"wave_deadline_s": given["wave_deadline"]} if given["wave_deadline"] else {}),
        )
    except ValidationError as error:
        raise UsageError(f"this rollout cannot be: {explain(error)}") from None
    return spec.model_dump(mode="json")


def _split(text: str) -> list[str]:
    """Split at commas outside parentheses and double quotes."""
    return [part.strip() for part in re.findall(r'(?:"[^"]*"|\([^)]*\)|[^,])+', text) if part.strip()]


def _wave(text: str) -> Wave:
    if text.endswith("%"):
        if not re.fullmatch(r"\d{1,3}(\.\d{1,9})?", text[:-1]):
            raise UsageError(f"--waves: {text!r} is no percentage")
        return Wave(percent=float(text[:-1]))
    if re.fullmatch(r"[0-9]{1,12}", text):
        return Wave(devices=int(text))
    return Wave(selector=text)


def _plan_table(found: dict[str, Any]) -> Table:
    table = Table(
        "wave", "devices", "profile, variant", "slowdown per token that it can show", "bytes", "time", box=None
    )
    for number, wave in enumerate(found["waves"], 1):
        for index, (cohort, count) in enumerate(sorted(wave["cohorts"].items())):
            effect = wave["detectable"].get(cohort)
            seen = f"{effect:.0%} and more" if effect is not None else "none: too few devices"
            first = (f"{number} ({wave['wave']})", _transfer(wave)) if index == 0 else ("", ("", ""))
            table.add_row(first[0], str(count), cohort, seen, *first[1])
        if not wave["cohorts"]:
            table.add_row(f"{number} ({wave['wave']})", "0", "", "")
    return table


def _transfer(wave: dict[str, Any]) -> tuple[str, str]:
    """At most, and at least: devices have some of it already, and links do not always carry what a profile says."""
    seconds = wave["transfer_s"]
    return f"{wave['size_bytes'] / 1e6:,.0f} MB", f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


def _screen(one: Rollout) -> Group:
    lines: list[Any] = [_headline(one)]
    table = Table("wave", *(stage.value for stage in DeviceStage), box=None)
    for index, (wave, stages) in enumerate(zip(one["waves"], one["stages"], strict=True)):
        table.add_row(f"{index + 1} ({wave})", *(str(stages.get(stage.value, "-")) for stage in DeviceStage))
    lines.append(table)
    found = (one["findings"] or {}).get("findings", [])
    lines += [Text(finding["text"], "red") for finding in found if finding["stops"]]
    return Group(*lines)


def _headline(one: Rollout) -> Text:
    text = f"{one['rollout']}: {_words(one)}, wave {one['wave']} of {len(one['waves'])}"
    if one["opens_at"] is not None:
        text += f"; orders nothing until {datetime.fromisoformat(one['opens_at']):%Y-%m-%d %H:%M} UTC, its next window"
    if one["due_at"] is not None and not one["final"]:
        text += f"; until {datetime.fromisoformat(one['due_at']):%Y-%m-%d %H:%M} UTC at the latest"
    return Text(text + (f"; {one['reason']}" if one["reason"] else ""), _COLOURS.get(State(one["state"]), ""))
