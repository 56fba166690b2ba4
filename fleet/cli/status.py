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

from fleet.api.client import Client, pages
from fleet.cli import completion
from fleet.cli.context import Context
from fleet.core.deployments import WAITING, Stage
from fleet.core.freshness import Presence, age_s
from fleet.operations.fleet import Fleet
from fleet.operations.views import ControllerView, DeviceView, FleetView, age_text, describe_fleet, fleet_view
from fleet.registry.rows import revoked_text

MIB = 1024 * 1024
REFRESH_S = 1.0
HELD = "held: the person at the device paused it"
EMPTY = "no devices yet; add one with `phifleet device add`"
PAUSED = "paused by the person at the device: new orders are held"
#: Columns of a terminal that has room for digest and runtime.
WIDE = 115

_STYLES = {Stage.COMMITTED: "green", Stage.FAILED: "red", Stage.ROLLED_BACK: "yellow", Stage.SUPERSEDED: "dim"}


@click.command()
@click.argument("devices", nargs=-1, shell_complete=completion.devices)
@click.option("--once", is_flag=True, help="Print the table once. So it is when not on a terminal.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, once.")
@click.pass_obj
def status(context: Context, devices: tuple[str, ...], once: bool, as_json: bool) -> None:
    """Show the fleet: the controller, and of each device presence, deployment, speed, and the age of its figures.

    Live on a terminal until interrupted; DEVICES narrows it. Figures that have missed three of their intervals are
    marked as stale, and presence is unknown while no controller is connected to the broker.
    """
    if context.settings.server is not None:
        with context.client() as client:
            _print_remote(client, devices, as_json)
        return
    with Fleet(context.settings) as fleet:
        if as_json:
            click.echo(json.dumps(describe_fleet(fleet_view(fleet.registry, datetime.now(UTC), devices))))
            return
        console = Console()
        if once or not console.is_terminal:
            console.print(screen(fleet_view(fleet.registry, datetime.now(UTC), devices), console.width))
            from fleet.operations.ends import warnings  # reads signed metadata, which the JSON does without

            for line in warnings(fleet, datetime.now(UTC)):
                console.print(Text(line, "red"))
            return
        # An interrupt is how a person ends it, and no failure.
        with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
            while True:
                view = fleet_view(fleet.registry, datetime.now(UTC), devices)
                live.update(screen(view, console.width), refresh=True)
                time.sleep(REFRESH_S)


def screen(view: FleetView, width: int) -> RenderableType:
    """Return the controllers, the table, and below it why something failed: a reason is longer than any column."""
    lines = [_controller_line(controller) for controller in view.controllers]
    if not view.controllers:
        lines = [Text("controller: none has ever run on this database; start `phifleet serve`", "yellow")]
    return Group(*lines, table(view.devices, width) if view.devices else EMPTY)


def _controller_line(view: ControllerView) -> Text:
    row, age = view.row, age_text(view.age_s)
    if not view.running:
        how = "was stopped" if row.stopped_at else "was heard of last"
        ago = f"controller: not running; it {how} {age} ago on {row.host}"
        return Text(f"{ago}. What follows is of that time.", "red")
    where = f"controller: running on {row.host} (process {row.pid}), seen {age} ago; broker {row.broker} "
    if row.connected_since:
        return Text(f"{where}connected")
    return Text(f"{where}does not answer: {row.broker_error or 'no reason known'}", "red")


def table(views: Sequence[DeviceView], width: int) -> RenderableType:
    """Return one line a device."""
    made = Table(box=None, pad_edge=False)
    wide = width >= WIDE
    for name in ("device", "", "state", "progress", *(("digest", "runtime") if wide else ())):
        made.add_column(name, no_wrap=True)
    for name in ("TTFT ms", "TPOT ms", "tokens/s", "age") if wide else ("TTFT", "TPOT", "tok/s", "age"):
        made.add_column(name, justify="right", no_wrap=True)
    for view in views:
        made.add_row(*_cells(view, wide))
    return Group(made, *_reasons(views))


def _reasons(views: Sequence[DeviceView]) -> Iterator[Text]:
    for view in views:
        row, deployment = view.device, view.deployment
        if row.revoked_at:
            yield Text.assemble((row.id, "red"), f": {revoked_text(row.revoked_at)}")
        if view.paused:
            yield Text.assemble((row.id, "yellow"), f": {HELD if view.held else PAUSED}")
        if deployment and deployment.publish_error and not row.revoked_at:
            yield Text.assemble((row.id, "red"), f": the broker has not taken its order: {deployment.publish_error}")
        if deployment and deployment.failure_code:
            colour = "yellow" if Stage(deployment.stage) in WAITING else "red"
            yield Text.assemble((f"{row.id}: {deployment.failure_code}", colour), f": {deployment.failure_message}")


def _cells(view: DeviceView, wide: bool) -> list[str | Text]:
    deployment = view.deployment
    transferring = deployment is not None and deployment.stage == Stage.TRANSFERRING
    cells: list[str | Text] = [
        view.device.id,
        _presence(view, wide),
        _state(view),
        progress_text(deployment.progress) if deployment and transferring else "",
    ]
    if wide:
        digest, runtime = (deployment.served_digest, deployment.runtime) if deployment else (None, None)
        cells += [(digest or "-")[:12], runtime or "-"]
    return [*cells, *_figures(view)]


def _presence(view: DeviceView, wide: bool) -> Text:
    if view.device.revoked_at:
        return Text("revoked", "red")
    words = {
        Presence.ONLINE: ("online", "on", "green"),
        Presence.OFFLINE: ("offline", "off", "dim"),
        Presence.UNKNOWN: ("unknown", "?", "yellow"),
    }
    long, short, style = words[view.presence]
    return Text(long if wide else short, style)


def _figures(view: DeviceView) -> list[str | Text]:
    """Of the health report; before there is any, of the proof."""
    health, deployment = view.device.health, view.deployment
    if health is None:
        proof = (deployment.proof if deployment else None) or {}
        age = age_s(deployment.reported_at, view.at) if deployment and proof else None
        return [_figure(proof.get("ttft_ms")), _figure(proof.get("tpot_ms")), "-", f"{age_text(age)}"]
    figures = [_figure(health.get(name)) for name in ("ttft_ms_p50", "tpot_ms_p50", "tokens_per_s")]
    age_cell = age_text(view.health_age_s)
    if not view.health_stale:
        return [*figures, age_cell]
    return [Text(text, "dim") for text in (*figures, f"{age_cell}, stale")]


def _state(view: DeviceView) -> str | Text:
    if view.held:
        return Text("paused", "yellow")
    row = view.deployment
    return Text(row.stage, _STYLES.get(Stage(row.stage), "cyan")) if row else "-"


def progress_text(progress: dict[str, Any] | None) -> str:
    """Return text such as ``63% of 86.0 MiB, 41.2 MiB/s``."""
    if not progress or not progress["bytes_total"]:
        return ""
    total, seconds = progress["bytes_total"], progress["seconds"]
    rate = f", {progress['bytes_received'] / MIB / seconds:.1f} MiB/s" if seconds > 0 else ""
    return f"{progress['bytes_done'] / total:.0%} of {total / MIB:.1f} MiB{rate}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _print_remote(client: Client, names: Sequence[str], as_json: bool) -> None:
    found = client.call("GET", "/status")
    shown = [client.call("GET", f"/devices/{name}") for name in names] if names else list(pages(client, "/devices"))
    if as_json:
        click.echo(json.dumps(found | {"devices": shown}))
        return
    console, table = Console(), Table("device", "presence", "state", "artifact", "runtime", "failure", box=None)
    for one in shown:
        order = one["deployment"] or {}
        failure = order.get("failure") or {}
        columns = (order.get("state"), order.get("artifact"), order.get("runtime"), failure.get("message"))
        table.add_row(one["device"], one["presence"], *(str(value or "-") for value in columns))
    running = [one for one in found["controllers"] if one["running"]]
    hosts = ", ".join(f"{one['host']} ({one['version']})" for one in running)
    past = Text("no controller runs: what is shown is of the past", "red")
    console.print(f"controllers: {hosts}" if running else past)
    console.print(table if shown else EMPTY)
    for entry in client.call("GET", "/overview")["attention"]:
        if entry["kind"] == "ends":
            console.print(Text(entry["text"], "red"))
