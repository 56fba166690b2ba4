"""`phifleet-agent stick`: an order that was carried here, and the report that is carried back."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from agent.cli.local import Outer, ask, settings_of, state_dir_option
from agent.contract.exit_codes import ExitCode
from agent.contract.messages import State
from agent.contract.stick import REPORTS
from agent.errors import AgentError
from agent.platform.files import reason, write_atomic

#: Seconds between two looks at the agent.
POLL_S = 0.5


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--json", "as_json", is_flag=True, help="The agent's status at the end, as one JSON object.")
@state_dir_option
@click.pass_obj
def stick(outer: Outer, /, folder: Path, state_dir: Path | None, as_json: bool) -> None:
    """Take the order that a stick has for this device, and write the device's report on it.

    FOLDER is where the stick is mounted, as `phifleet stick write` filled it. The agent verifies, proves and watches as
    with an order from the network, and takes nothing else from the network meanwhile. Leave the stick in until this
    command ends; interrupted, it gives the stick back and the device keeps what it has.
    """
    home = settings_of(outer, state_dir=state_dir).state_dir
    begun = ask(home, "stick", str(folder.resolve()))
    click.echo(f"{begun['device']}: order {begun['deployment']}, good until {begun['expires_at']}", err=True)
    with _taken_out(home, folder, str(begun["device"])):
        found = _followed(home)
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False))
    outcome = found["stick"]["outcome"]
    if outcome == State.COMMITTED:
        click.echo(f"committed: serves {(found.get('serving') or {}).get('artifact', '-')}", err=True)
        return
    failure = found.get("failure") or {}
    why = found["stick"].get("reason") or failure.get("message") or "see phifleet-agent logs"
    click.echo(f"{outcome}: {why}", err=True)
    sys.exit(ExitCode.FAILED)


def _followed(home: Path) -> dict[str, Any]:
    """Return the agent's status once the order has ended, telling each change."""
    told = ""
    while True:
        found = ask(home, "status")
        now = found.get("stick")
        if now is None:
            raise AgentError("the stick was taken out by another command")
        if "outcome" in now:
            return found
        if found["deployment"] == now["deployment"] and (line := _line(found)) != told:
            told = line
            click.echo(line, err=True)
        time.sleep(POLL_S)


def _line(found: dict[str, Any]) -> str:
    progress, waiting = found.get("progress") or {}, found.get("waiting") or {}
    line = str(found["state"])
    if found["state"] == State.TRANSFERRING and progress.get("bytes_total"):
        line += f" {10 * (10 * progress['bytes_done'] // progress['bytes_total'])}%"
    return line + (f": {waiting['message']}" if waiting else "")


@contextmanager
def _taken_out(home: Path, folder: Path, device: str) -> Iterator[None]:
    """However it ends, the agent lets go of the stick, and its report is written on it."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(AgentError):  # what ended it is what is told
            ask(home, "stick-end")
        raise
    report = ask(home, "stick-end")["report"]
    path = folder / REPORTS / f"{device}.json"
    try:
        write_atomic(path, json.dumps(report).encode())
    except OSError as error:
        raise AgentError(f"the report cannot be written to {path}: {reason(error, folder)}") from error
    click.echo(f"report written: {path}", err=True)
