"""`phifleet status`: every device, what it runs, how far it is, and how well it does."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fleet.cli.context import Context
from fleet.core.deployments import Stage
from fleet.operations.fleet import Fleet
from fleet.operations.views import DeviceView, describe_fleet, device_views

MIB = 1024 * 1024
REFRESH_S = 1.0
HELD = "held: the person at the device paused it"
EMPTY = "no devices yet; add one with `phifleet device add`"
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
    with Fleet(context.settings) as fleet:
        if as_json:
            click.echo(json.dumps(describe_fleet(device_views(fleet.registry, devices), datetime.now(UTC))))
            return
        console = Console()
        if once or not console.is_terminal:
            views = device_views(fleet.registry, devices)
            console.print(table(views, console.width) if views else EMPTY)
            return
        # An interrupt is how a person ends it, and no failure.
        with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(table(device_views(fleet.registry, devices), console.width), refresh=True)
                time.sleep(REFRESH_S)


def table(views: Sequence[DeviceView], width: int) -> RenderableType:
    """One line a device, and below the table why something failed: a reason is longer than any column."""
    made = Table(box=None, pad_edge=False)
    wide = width >= WIDE
    for name in ("device", "", "state", "progress", *(("digest", "runtime") if wide else ())):
        made.add_column(name, no_wrap=True)
    for name in ("TTFT ms", "TPOT ms", "tokens/s") if wide else ("TTFT", "TPOT", "tok/s"):
        made.add_column(name, justify="right", no_wrap=True)
    for view in views:
        made.add_row(*_cells(view, wide))
    return Group(made, *_reasons(views))


def _reasons(views: Sequence[DeviceView]) -> Iterator[Text]:
    for view in views:
        if view.paused:
            yield Text.assemble((view.device.id, "yellow"), f": {HELD if view.held else PAUSED}")
    for view in views:
        row = view.deployment
        if row and row.failure_code:
            yield Text.assemble((f"{row.device}: {row.failure_code}", "red"), f": {row.failure_message}")


def _cells(view: DeviceView, wide: bool) -> list[str | Text]:
    row, deployment = view.device, view.deployment
    health, proof = row.health or {}, (deployment.proof if deployment else None) or {}
    words = ("online", "offline") if wide else ("on", "off")
    transferring = deployment is not None and deployment.stage == Stage.TRANSFERRING
    cells: list[str | Text] = [
        row.id,
        Text(words[0], "green") if row.online else Text(words[1], "dim"),
        _state(view),
        progress_text(deployment.progress) if deployment and transferring else "",
    ]
    if wide:
        digest, runtime = (deployment.served_digest, deployment.runtime) if deployment else (None, None)
        cells += [(digest or "-")[:12], runtime or "-"]
    return [
        *cells,
        _figure(health.get("ttft_ms_p50") or proof.get("ttft_ms")),
        _figure(health.get("tpot_ms_p50") or proof.get("tpot_ms")),
        _figure(health.get("tokens_per_s")),
    ]


def _state(view: DeviceView) -> str | Text:
    if view.held:
        return Text("paused", "yellow")
    row = view.deployment
    return Text(row.stage, _STYLES.get(Stage(row.stage), "cyan")) if row else "-"


def progress_text(progress: dict[str, Any] | None) -> str:
    """Such as ``63% of 86.0 MiB, 41.2 MiB/s``."""
    if not progress or not progress["bytes_total"]:
        return ""
    total, seconds = progress["bytes_total"], progress["seconds"]
    rate = f", {progress['bytes_received'] / MIB / seconds:.1f} MiB/s" if seconds > 0 else ""
    return f"{progress['bytes_done'] / total:.0%} of {total / MIB:.1f} MiB{rate}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
