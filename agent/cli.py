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
from agent.daemon.control import FILE as CONTROL_FILE
from agent.errors import AgentError, ConfigError
from agent.settings import AgentSettings
from agent.store.journal import FileJournal

Outer = tuple[Path | None, dict[str, Any]]


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
@click.pass_obj
def status(outer: Outer, as_json: bool) -> None:
    """What this device serves, where its deployment stands, and how well inference runs."""
    settings = settings_of(outer)
    try:
        found = ask(settings.state_dir, "status")
    except NotRunningError as error:
        found = {"running": False, "reason": str(error), "journal": _journal(settings.state_dir)}
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False))
        return
    for line in _lines(found):
        click.echo(line)


def _journal(state_dir: Path) -> dict[str, Any] | None:
    document = FileJournal(state_dir / "journal").load()
    return None if document is None else dict(json.loads(document))


def _lines(found: dict[str, Any], indent: str = "") -> Iterator[str]:
    for name, value in found.items():
        if isinstance(value, dict):
            yield f"{indent}{name}:"
            yield from _lines(value, indent + "  ")
        elif value not in (None, [], ()):
            yield f"{indent}{name:<16} {value}"


@click.command()
@click.option("-n", "count", type=click.IntRange(1), default=50, show_default=True, help="Lines, the newest.")
@click.option("-f", "--follow", is_flag=True, help="Go on as lines come, until interrupted.")
@click.option("--deployment", help="Only lines of this deployment.")
@click.pass_obj
def logs(outer: Outer, count: int, follow: bool, deployment: str | None) -> None:
    """The agent's own log, also where no journal keeps it."""
    path = settings_of(outer).state_dir / "logs" / "agent.log"
    if not path.exists():
        raise ConfigError(f"there is no log at {path}; has the agent run with this --state-dir?")
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
@click.pass_obj
def rollback(outer: Outer) -> None:
    """Serve the artifact before, or give up the deployment under way."""
    click.echo(ask(settings_of(outer).state_dir, "rollback")["ok"])


@click.command()
@click.pass_obj
def pause(outer: Outer) -> None:
    """Take no new orders until `resume`; what serves goes on serving. Survives a restart."""
    click.echo(ask(settings_of(outer).state_dir, "pause")["ok"])


@click.command()
@click.pass_obj
def resume(outer: Outer) -> None:
    """Take orders again, the newest that came meanwhile first."""
    click.echo(ask(settings_of(outer).state_dir, "resume")["ok"])


@click.command()
@click.argument("prompt", required=False)
@click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True)
@click.pass_obj
def chat(outer: Outer, prompt: str | None, max_tokens: int) -> None:
    """Talk to the model that serves: one PROMPT, or line by line until end of file."""
    settings = settings_of(outer)
    found = ask(settings.state_dir, "status")
    serving = found.get("serving")
    if not serving:
        raise AgentError(f"no model serves: {found.get('failure') or 'no order yet'}")
    from agent.chatting import Conversation

    key = settings.api_keys[0].get_secret_value() if settings.api_keys else None
    conversation = Conversation(str(found["endpoint"]), str(serving["model"]), key, max_tokens)
    for line in [prompt] if prompt else _prompts():
        for piece in conversation.say(line):
            sys.stdout.write(piece)
            sys.stdout.flush()
        click.echo()
        click.echo(conversation.figures, err=True)


def _prompts() -> Iterator[str]:
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line
