"""`phifleet-agent`: the command line."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from pydantic import TypeAdapter, ValidationError

from agent import settings as config
from agent.cli import local, stick
from agent.compose import compose, host_settings
from agent.contract.base import DeviceId
from agent.contract.enrolment import EnrolmentToken
from agent.contract.exit_codes import ExitCode
from agent.contract.manifest import Manifest
from agent.daemon.agent import Agent
from agent.endpoint.openai.chat import render
from agent.errors import AgentError, ConfigError
from agent.platform import facts, lock, logs
from agent.platform.arguments import hoisted
from agent.platform.clock import SystemClock
from agent.runtimes.host.probing import Prober, RuntimeReport
from agent.settings import AgentSettings
from agent.store.artifacts import ArtifactStore
from agent.trust import enrolment, identity

#: They take a value, and are accepted after the command too.
GLOBAL_OPTIONS = ("--config", "--state-dir", "--log-level", "--log-format")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", "file", type=click.Path(path_type=Path), help="TOML file of settings.")
@click.option("--state-dir", type=click.Path(path_type=Path), help="Folder of artifacts, journal, trust and identity.")
@click.option("--log-level", help="debug, info, warning or error.")
@click.option("--log-format", help="auto, json or console.")
@click.version_option(version("phifleet"), prog_name="phifleet-agent")
@click.pass_context
def cli(ctx: click.Context, /, file: Path | None, **flags: Any) -> None:
    """Runs Phi on this device, as the fleet orders it."""
    ctx.obj = (file, flags)


@cli.command()
@click.option(
    "--bundle", type=click.Path(path_type=Path), help="From `phifleet device add`; needed at the first start."
)
@local.state_dir_option
@click.option("--broker", help="mqtt, mqtts, ws or wss://host:port; else the bundle's.")
@click.option("--host", help="Address the endpoint listens on.")
@click.option("--port", type=int, help="TCP port of the endpoint; 0 takes a free one.")
@click.option("--unix-socket", type=click.Path(path_type=Path), help="Listen on this Unix socket instead.")
@click.option("--show-config", is_flag=True, help="Print each setting and where it came from, then end.")
@click.pass_obj
def run(outer: local.Outer, /, bundle: Path | None, show_config: bool, **flags: Any) -> None:
    """Run the agent in the foreground, as a service manager wants it."""
    file, common = outer
    settings, source = config.load(common | {name: value for name, value in flags.items() if value is not None}, file)
    if show_config:
        for name, value, origin in config.provenance(settings, source):
            click.echo(f"{name} = {value}    ({origin})")
        return
    with lock.hold(settings.state_dir):
        logs.configure(settings.log_level, settings.log_format, settings.state_dir / "logs")
        asyncio.run(_run(settings, _identity(settings, bundle)))


@cli.command()
@local.state_dir_option
@click.option("--bundle", type=click.Path(path_type=Path), help="From `phifleet device add`.")
@click.option("--url", help="With --token: the controller's API, https://HOST:PORT.")
@click.option("--token", "token_text", help="From `phifleet device token`; - reads it from standard input.")
@click.option("--id", "device", help="With --token: the device's id; else this machine's host name.")
@click.option("--replace", is_flag=True, help="Even if this device is enrolled as another, or in another fleet.")
@click.pass_obj
def enrol(
    outer: local.Outer,
    /,
    bundle: Path | None,
    url: str | None,
    token_text: str | None,
    device: str | None,
    replace: bool,
    state_dir: Path | None,
) -> None:
    """Say who this device is, where its broker is, and what it believes: by a bundle, or by a token.

    With a token the key is made here and never leaves this machine. If an operator has to accept it, this waits.
    """
    settings = local.settings_of(outer, state_dir=state_dir)
    if (bundle is None) == (token_text is None):
        raise ConfigError("enrol takes --bundle FILE, or --url URL and --token TOKEN")
    if bundle is not None:
        if url is not None or device is not None:
            raise ConfigError("--url and --id go with --token; the bundle says both")
        who = identity.enrol(identity.read_bundle(bundle), settings.state_dir, replace=replace)
    else:
        asking = _asking(url, token_text or "", device)
        with lock.hold(settings.state_dir):
            identity.refuse_unless_free(settings.state_dir, asking.device, replace=replace)
            found = enrolment.enrol_by_token(asking, settings.state_dir, _tell_waiting, time.sleep)
            who = identity.enrol(found, settings.state_dir, replace=replace)
            enrolment.remember_controller(settings.state_dir, asking.url, asking.token)
            enrolment.forget_key(settings.state_dir)
    click.echo(f"enrolled as {who.device} ({who.profile}); broker {who.broker}; state in {settings.state_dir}")


def _asking(url: str | None, token_text: str, device: str | None) -> enrolment.Asking:
    if url is None:
        raise ConfigError("--token goes with --url, the address of the controller's API")
    try:
        token = EnrolmentToken.parse(sys.stdin.readline() if token_text == "-" else token_text)  # noqa: S105 - no password
        found = TypeAdapter(DeviceId).validate_python(device or enrolment.default_device())
    except ValidationError:
        hint = "" if device else ", so name one with --id"
        what = device or f"the host name {socket.gethostname()}"
        raise ConfigError(
            f"{what!r} is no device id{hint}: lower case letters, digits and dashes, 63 at most"
        ) from None
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return enrolment.Asking(url, token, found)


def _tell_waiting() -> None:
    click.echo(
        "waiting until an operator accepts this machine (`phifleet device accept ID`); Ctrl-C ends the waiting, and the"
        " same command goes on with it",
        err=True,
    )


@cli.command()
@local.state_dir_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
@click.pass_obj
def probe(outer: local.Outer, /, state_dir: Path | None, as_json: bool) -> None:
    """What this device is, which runtimes work on it and why others do not, and what each measured."""
    settings = local.settings_of(outer, state_dir=state_dir)
    logs.configure("warning", settings.log_format, settings.state_dir / "logs")
    store = ArtifactStore(settings.state_dir)
    models = [(manifest, folder) for digest in store.digests() for manifest, folder in _complete(store, digest)]
    reports = asyncio.run(Prober(models, render, host_settings(settings)).reports())
    found = facts.collect(
        "this-device", "", version("phifleet"), settings.state_dir, [each.fact for each in reports], SystemClock().now()
    )
    told = found.model_dump(mode="json", exclude={"version", "device", "profile", "runtimes"})
    told["runtimes"] = {each.fact.name: _told(each) for each in reports}
    for line in [json.dumps(told)] if as_json else local.lines(told):
        click.echo(line)


def _complete(store: ArtifactStore, digest: str) -> list[tuple[Manifest, Path]]:
    """Only bytes that are still those of the manifest are loaded."""
    manifest, folder = store.manifest(digest), store.path(digest)
    if manifest is None or folder is None:
        return []
    store.verify(digest)
    return [(manifest, folder)]


def _told(report: RuntimeReport) -> dict[str, Any]:
    fact = report.fact.model_dump(mode="json", exclude={"name", "reason"})
    proof = report.proof.model_dump(mode="json", exclude={"runtime"}) if report.proof else None
    return {
        **fact,
        "reason": report.reason,
        "artifact": report.artifact,
        "measured": proof,
        "measured_before": report.kept,
    }


for _command in (local.status, local.logs, local.rollback, local.pause, local.resume, local.chat, stick.stick):
    cli.add_command(_command)


def _identity(settings: AgentSettings, bundle: Path | None) -> identity.Identity:
    if bundle is None:
        return identity.load(settings.state_dir)
    return identity.enrol(identity.read_bundle(bundle), settings.state_dir)


async def _run(settings: AgentSettings, who: identity.Identity) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            loop.add_signal_handler(number, stop.set)
        except NotImplementedError:  # Windows
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop.set))
    await Agent(compose(settings, who)).run(stop)


def main() -> None:
    """The command line; an error that we know is a line, not a traceback."""
    try:
        cli.main(hoisted(sys.argv[1:], GLOBAL_OPTIONS), standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(ExitCode.INTERRUPTED)
    except AgentError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # `phifleet-agent logs | head`: nobody reads any more
        sys.stderr.close()
        sys.exit(ExitCode.NOBODY_READS)
    except OSError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(ExitCode.FAILED)


if __name__ == "__main__":
    main()
