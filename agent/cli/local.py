"""Commands for the person at the device: they talk to the running agent, or read what it left on the disk."""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from agent import settings as config
from agent.contract.exit_codes import ExitCode
from agent.daemon.control import FILE as CONTROL_FILE
from agent.errors import AgentError
from agent.settings import AgentSettings
from agent.store.journal import FileJournal

Outer = tuple[Path | None, dict[str, Any]]


state_dir_option = click.option(
    "--state-dir", type=click.Path(path_type=Path), help="Folder of artifacts, journal, trust and identity."
)


class NotRunningError(AgentError):
    """No agent answers on this device."""


def settings_of(outer: Outer, **flags: Any) -> AgentSettings:
    """The settings as the running agent reads them.

    Raises:
        ConfigError: a value is wrong.
    """
    file, common = outer
    settings, _ = config.load(common | {name: value for name, value in flags.items() if value is not None}, file)
    return settings


def ask(state_dir: Path, command: str) -> dict[str, Any]:
    """Ask the running agent.

    Raises:
        NotRunningError: it does not answer.
        AgentError: it refuses; says why.
    """
    try:
        where = json.loads((state_dir / CONTROL_FILE).read_bytes())
        with socket.create_connection(("127.0.0.1", where["port"]), timeout=15) as connection:
            connection.sendall(json.dumps({"token": where["token"], "command": command}).encode() + b"\n")
            answer: dict[str, Any] = json.loads(connection.makefile("rb").readline())
    except (OSError, ValueError, KeyError) as error:
        hint = f"no agent answers for {state_dir}; start it with `phifleet-agent run`, or name its --state-dir"
        raise NotRunningError(hint) from error
    if "error" in answer:
        raise AgentError(str(answer["error"]))
    return answer


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
@state_dir_option
@click.pass_obj
def status(outer: Outer, /, state_dir: Path | None, as_json: bool) -> None:
    """What this device serves, where its deployment stands, and how well inference runs."""
    settings = settings_of(outer, state_dir=state_dir)
    try:
        found = ask(settings.state_dir, "status")
    except NotRunningError as error:
        found = {"running": False, "reason": str(error), "remembered": _remembered(settings.state_dir)}
    for line in [json.dumps(found, ensure_ascii=False)] if as_json else lines(found):
        click.echo(line)
    if not found["running"]:
        sys.exit(ExitCode.NOT_RUNNING)


def _remembered(state_dir: Path) -> dict[str, Any] | None:
    """What the journal says, in short."""
    document = FileJournal(state_dir / "journal").load()
    if document is None:
        return None
    found = json.loads(document)
    artifacts = {name: (found.get(name) or {}).get("id") for name in ("committed", "previous")}
    return {"state": found.get("state"), "sequence": found.get("newest_sequence"), **artifacts}


def lines(found: dict[str, Any], indent: str = "") -> Iterator[str]:
    """For people: a name and a value a line; what is empty is left out."""
    for name, value in found.items():
        if isinstance(value, dict):
            yield f"{indent}{name}:"
            yield from lines(value, indent + "  ")
        elif value not in (None, [], ()):
            yield f"{indent}{name:<16} {round(value, 2) if isinstance(value, float) else value}"


@click.command()
@click.option("-n", "count", type=click.IntRange(1), default=50, show_default=True, help="Lines, the newest.")
@click.option("-f", "--follow", is_flag=True, help="Go on as lines come, until interrupted.")
@click.option("--deployment", help="Only lines of this deployment.")
@state_dir_option
@click.pass_obj
def logs(outer: Outer, /, state_dir: Path | None, count: int, follow: bool, deployment: str | None) -> None:
    """The agent's own log, also where no journal keeps it."""
    path = settings_of(outer, state_dir=state_dir).state_dir / "logs" / "agent.log"
    if not path.exists():
        raise AgentError(f"there is no log at {path}; has the agent run with this --state-dir?")
    with path.open(encoding="utf-8", errors="replace") as source:
        kept = [line for line in source if _of(line, deployment)][-count:]
        sys.stdout.writelines(kept)
        while follow:
            line = source.readline()
            if not line:
                time.sleep(0.3)
            elif _of(line, deployment):
                sys.stdout.write(line)
                sys.stdout.flush()


def _of(line: str, deployment: str | None) -> bool:
    return deployment is None or f'"deployment": "{deployment}"' in line


@click.command()
@state_dir_option
@click.pass_obj
def rollback(outer: Outer, /, state_dir: Path | None) -> None:
    """Serve the artifact before, or give up the deployment under way."""
    click.echo(ask(settings_of(outer, state_dir=state_dir).state_dir, "rollback")["ok"])


@click.command()
@state_dir_option
@click.pass_obj
def pause(outer: Outer, /, state_dir: Path | None) -> None:
    """Take no new orders until `resume`; what serves goes on serving. Survives a restart."""
    click.echo(ask(settings_of(outer, state_dir=state_dir).state_dir, "pause")["ok"])


@click.command()
@state_dir_option
@click.pass_obj
def resume(outer: Outer, /, state_dir: Path | None) -> None:
    """Take orders again, the newest that came meanwhile first."""
    click.echo(ask(settings_of(outer, state_dir=state_dir).state_dir, "resume")["ok"])


@click.command()
@click.argument("prompt", required=False)
@click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True)
@click.option(
    "--temperature",
    type=click.FloatRange(0, 2),
    help="How freely words are drawn; 0 takes the likeliest. Without it the model's own setting holds.",
)
@state_dir_option
@click.pass_obj
def chat(
    outer: Outer, /, state_dir: Path | None, prompt: str | None, max_tokens: int, temperature: float | None
) -> None:
    """Talk to the model that serves: one PROMPT, or line by line until end of file."""
    settings = settings_of(outer, state_dir=state_dir)
    found = ask(settings.state_dir, "status")
    serving = found.get("serving")
    if not serving:
        raise AgentError(f"no model serves: {found.get('failure') or 'no order yet'}")
    from agent.cli.conversation import Conversation

    key = _own_key(settings)
    conversation = Conversation(str(found["endpoint"]), str(serving["model"]), key, max_tokens, temperature)
    for line in [prompt] if prompt else _prompts():
        for piece in conversation.say(line):
            sys.stdout.write(piece)
            sys.stdout.flush()
        click.echo()
        click.echo(conversation.figures, err=True)


def _own_key(settings: AgentSettings) -> str | None:
    """A key that is there to be read; None where none is asked for.

    Raises:
        AgentError: only digests of keys are there.
    """
    secrets = [key.secret.get_secret_value() for key in settings.api_keys]
    plain = next((secret for secret in secrets if not secret.startswith("sha256:")), None)
    if secrets and plain is None:
        raise AgentError("the configuration holds digests of keys only: add a key in plain text for this device itself")
    return plain


def _prompts() -> Iterator[str]:
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line
