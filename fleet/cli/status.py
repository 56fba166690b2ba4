"""`phifleet status`: every device, what it runs, how far it is, and how well it does."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fleet.cli.context import Context
from fleet.cli.describe import describe, held, paused
from fleet.core.deployments import Stage
from fleet.registry import Registry
from fleet.registry.models import DeploymentRow, DeviceRow

MIB = 1024 * 1024
REFRESH_S = 1.0
HELD = "held: the person at the device paused it"
PAUSED = "paused by the person at the device: new orders are held"
#: Columns of a terminal that has room for digest and runtime.
WIDE = 115

_STYLES = {Stage.COMMITTED: "green", Stage.FAILED: "red", Stage.ROLLED_BACK: "yellow", Stage.SUPERSEDED: "dim"}


@click.command()
@click.argument("devices", nargs=-1)
@click.option("--once", is_flag=True, help="Print the table once. So it is when not on a terminal.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, once.")
@click.pass_obj
def status(context: Context, devices: tuple[str, ...], once: bool, as_json: bool) -> None:
    """Show the fleet: presence, deployment, speed. Live on a terminal until interrupted; DEVICES narrows it."""
    with contextlib.closing(context.open_registry()) as registry:
        if as_json:
            click.echo(json.dumps(document(_rows(registry, devices))))
            return
        console = Console()
        if once or not console.is_terminal:
            rows = _rows(registry, devices)
            console.print(view(rows, console.width) if rows else "no devices yet; add one with `phifleet device add`")
            return
        # An interrupt is how a person ends it, and no failure.
        with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(view(_rows(registry, devices), console.width), refresh=True)
                time.sleep(REFRESH_S)


Row = tuple[DeviceRow, DeploymentRow | None]


def _rows(registry: Registry, names: tuple[str, ...]) -> list[Row]:
    devices = [registry.device(name) for name in names] if names else registry.devices()
    newest = registry.newest()
    return [(row, newest.get(row.id)) for row in devices]


def document(rows: Sequence[Row]) -> dict[str, Any]:
    """The same as JSON; names of fields are those of the wire contract."""
    return {
        "at": datetime.now(UTC).isoformat(),
        "devices": [describe(row, order) | {"health": row.health} for row, order in rows],
    }


def view(rows: Sequence[Row], width: int) -> RenderableType:
    """One line a device, and below the table why something failed: a reason is longer than any column."""
    made = Table(box=None, pad_edge=False)
    wide = width >= WIDE
    for name in ("device", "", "state", "progress", *(("digest", "runtime") if wide else ())):
        made.add_column(name, no_wrap=True)
    for name in ("TTFT ms", "TPOT ms", "tokens/s") if wide else ("TTFT", "TPOT", "tok/s"):
        made.add_column(name, justify="right", no_wrap=True)
    for row, order in rows:
        made.add_row(*_cells(row, order, wide))
    reasons = [
        Text.assemble((row.id, "yellow"), f": {HELD if held(row, order) else PAUSED}")
        for row, order in rows
        if paused(row)
    ]
    reasons += [
        Text.assemble((f"{row.id}: {order.failure_code}", "red"), f": {order.failure_message}")
        for row, order in rows
        if order and order.failure_code
    ]
    return Group(made, *reasons)


def _cells(row: DeviceRow, order: DeploymentRow | None, wide: bool) -> list[str | Text]:
    health, proof = row.health or {}, (order.proof if order else None) or {}
    words = ("online", "offline") if wide else ("on", "off")
    cells: list[str | Text] = [
        row.id,
        Text(words[0], "green") if row.online else Text(words[1], "dim"),
        _state(row, order),
        progress_text(order.progress) if order and order.stage == Stage.TRANSFERRING else "",
    ]
    if wide:
        cells += [(order.served_digest or "-")[:12] if order else "-", (order.runtime if order else None) or "-"]
    return [
        *cells,
        _figure(health.get("ttft_ms_p50") or proof.get("ttft_ms")),
        _figure(health.get("tpot_ms_p50") or proof.get("tpot_ms")),
        _figure(health.get("tokens_per_s")),
    ]


def _state(row: DeviceRow, order: DeploymentRow | None) -> str | Text:
    if held(row, order):
        return Text("paused", "yellow")
    return Text(order.stage, _STYLES.get(Stage(order.stage), "cyan")) if order else "-"


def progress_text(progress: dict[str, Any] | None) -> str:
    """Such as ``63% of 86.0 MiB, 41.2 MiB/s``."""
    if not progress or not progress["bytes_total"]:
        return ""
    total, seconds = progress["bytes_total"], progress["seconds"]
    rate = f", {progress['bytes_received'] / MIB / seconds:.1f} MiB/s" if seconds > 0 else ""
    return f"{progress['bytes_done'] / total:.0%} of {total / MIB:.1f} MiB{rate}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
