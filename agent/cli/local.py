"""Commands for the person at the device: they talk to the running agent, or read what it left on the disk."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import click

from agent import settings as config
from agent.cli.conversation import Conversation
from agent.contract.exit_codes import ExitCode
from agent.daemon.control import FILE as CONTROL_FILE
from agent.errors import AgentError
from agent.settings import AgentSettings
from agent.store.journal import FileJournal

Outer = tuple[Path | None, dict[str, Any]]
#: Seconds that a running agent may take for an answer.
ANSWER_TIMEOUT_S = 15.0
#: Seconds between two looks at a log that has nothing new.
FOLLOW_S = 0.3


state_dir_option = click.option(
    "--state-dir", type=click.Path(path_type=Path), help="Folder of artifacts, journal, trust and identity."
)


class NotRunningError(AgentError):
    """No agent answers on this device."""


def settings_of(outer: Outer, **flags: Any) -> AgentSettings:
    """Return the settings as the running agent reads them.

    Raises:
        ConfigError: a value is wrong.
    """
    file, common = outer
    settings, _ = config.load(common | {name: value for name, value in flags.items() if value is not None}, file)
    return settings


def ask(state_dir: Path, command: str, argument: str = "") -> dict[str, Any]:
    """Ask the running agent.

    Raises:
        NotRunningError: it does not answer.
        AgentError: it refuses; says why.
    """
    port, token = _control(state_dir)
    try:
        connection = socket.create_connection(("127.0.0.1", port), timeout=ANSWER_TIMEOUT_S)
    except OSError as error:
        # What is left of an agent that was killed: its file, and nobody at the port.
        raise NotRunningError(_not_running(state_dir)) from error
    try:
        with connection:
            connection.sendall(json.dumps({"token": token, "command": command, "argument": argument}).encode() + b"\n")
            line = connection.makefile("rb").readline()
    except TimeoutError:
        raise AgentError(f"the agent runs, and has not answered `{command}` within {ANSWER_TIMEOUT_S:g} s") from None
    except OSError as error:
        raise AgentError(f"the connection to the agent broke: {error.strerror or error}") from error
    try:
        answer: dict[str, Any] = json.loads(line)
    except ValueError:
        raise AgentError(
            f"the agent ended the connection without an answer to `{command}`; "
            "`phifleet-agent status` shows whether it runs"
        ) from None
    if "error" in answer:
        raise AgentError(str(answer["error"]))
    return answer


def _control(state_dir: Path) -> tuple[int, str]:
    """Port and token of the running agent, which only its own user may read."""
    path = state_dir / CONTROL_FILE
    try:
        where = json.loads(path.read_bytes())
        return int(where["port"]), str(where["token"])
    except PermissionError as error:
        raise _not_permitted(path, "so it is not known whether an agent runs") from error
    except FileNotFoundError as error:
        raise NotRunningError(_not_running(state_dir)) from error
    except OSError as error:
        raise AgentError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise AgentError(f"{path} is damaged; start the agent again") from error


def _not_permitted(path: Path, consequence: str = "") -> AgentError:
    """Return what every command says of a file that this user may not read."""
    return AgentError(
        f"{path} may not be read by this user{', ' if consequence else ''}{consequence}; "
        "run the command as the agent's user, for example with sudo -u phifleet-agent"
    )


def _not_running(state_dir: Path) -> str:
    return f"no agent answers for {state_dir}; start it with `phifleet-agent run`, or name its --state-dir"


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
    """Return what the journal says, in short."""
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
    try:
        source = path.open("rb")
    except FileNotFoundError:
        raise AgentError(f"there is no log at {path}; has the agent run with this --state-dir?") from None
    except PermissionError as error:
        raise _not_permitted(path) from error
    except OSError as error:
        raise AgentError(f"the log {path} cannot be read: {error.strerror or error}") from None
    with source:
        # To the last whole line: what is half written is shown when it is whole.
        newest: deque[str] = deque(maxlen=count)
        for line in _whole_lines(source):
            if _of(line, deployment):
                newest.append(line)
        sys.stdout.writelines(newest)
        sys.stdout.flush()
        for line in _following(path, source) if follow else ():
            if _of(line, deployment):
                sys.stdout.write(line)
                sys.stdout.flush()


def _whole_lines(source: BinaryIO) -> Iterator[str]:
    """Lines to the end of the file; one that is half written stays to be read."""
    while True:
        start = source.tell()
        line = source.readline()
        if not line.endswith(b"\n"):
            source.seek(start)
            return
        yield line.decode(errors="replace")


def _following(path: Path, source: BinaryIO) -> Iterator[str]:
    """Lines as they come, for ever.

    When the log is rotated, the old file is read to its end first, then the one that was rotated meanwhile, if there
    is one, then the new file. The caller closes ``source``; what is opened here is closed here.
    """
    with contextlib.ExitStack() as opened:
        while True:
            yield from _whole_lines(source)
            time.sleep(FOLLOW_S)
            try:
                current = path.stat()
            except OSError:  # between the renaming of the old file and the first line of the new one
                continue
            if _is_file(current, source):
                if current.st_size < source.tell():  # cut short in place
                    source.seek(0)
                continue
            yield from _whole_lines(source)  # what was written before the renaming, after our look
            rotated = path.with_name(path.name + ".1")
            with contextlib.suppress(OSError), rotated.open("rb") as between:
                if not _is_file(rotated.stat(), source):
                    yield from _whole_lines(between)
            with contextlib.suppress(FileNotFoundError):  # renamed once more: the next turn finds it
                fresh = path.open("rb")
                opened.close()
                source = opened.enter_context(fresh)


def _is_file(status: os.stat_result, source: BinaryIO) -> bool:
    return os.path.samestat(status, os.fstat(source.fileno()))


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
    key = _own_key(settings)
    conversation = Conversation(str(found["endpoint"]), str(serving["model"]), key, max_tokens, temperature)
    if prompt:
        _answer(conversation, prompt)
        return
    for line in _prompts(conversation):
        try:
            _answer(conversation, line)
        except AgentError as error:
            if not sys.stdin.isatty():
                raise
            conversation.forget_last()  # one refused question ends no conversation
            click.echo(f"\n[{error}]", err=True)
        except KeyboardInterrupt:  # ends the answer, and not the conversation
            conversation.forget_last()
            click.echo("\n[answer stopped; Ctrl-D or /bye ends the conversation]", err=True)


def _answer(conversation: Conversation, text: str) -> None:
    for piece in conversation.say(text):
        sys.stdout.write(piece)
        sys.stdout.flush()
    click.echo()
    if conversation.cut:
        click.echo("[the answer was cut at the limit of tokens; --max-tokens allows more]", err=True)
    click.echo(conversation.figures, err=True)


def _own_key(settings: AgentSettings) -> str | None:
    """Return a key that is there to be read; None where none is asked for.

    Raises:
        AgentError: only digests of keys are there.
    """
    secrets = [key.secret.get_secret_value() for key in settings.api_keys]
    plain = next((secret for secret in secrets if not secret.startswith("sha256:")), None)
    if secrets and plain is None:
        raise AgentError("the configuration holds digests of keys only: add a key in plain text for this device itself")
    return plain


HELP = """/clear forgets the conversation, /bye ends it, /? shows this.
Ctrl-C stops an answer, Ctrl-D ends the conversation."""


def _prompts(conversation: Conversation) -> Iterator[str]:
    """Yield what goes to the model: lines that begin with a slash are commands, and never do."""
    typed = sys.stdin.isatty()
    if typed:
        with contextlib.suppress(ImportError):  # line editing and history, where the platform has them
            import readline  # noqa: F401
        click.echo(HELP, err=True)
    while True:
        try:
            line = input("> " if typed else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            if not typed:
                raise
            click.echo("", err=True)
            continue
        if line in ("/bye", "/exit", "/quit"):
            return
        if line == "/clear":
            conversation.clear()
            click.echo("[the conversation is forgotten]", err=True)
        elif line.startswith("/"):
            unknown = "" if line in ("/?", "/help") else f"no command is named {line.split()[0]}\n"
            click.echo(unknown + HELP, err=True)
        elif line:
            yield line
