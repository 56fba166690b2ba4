"""`phifleet cancel` and `phifleet rollback`: take orders back."""

from __future__ import annotations

import json
from typing import Any

import click

from fleet.cli import completion
from fleet.cli.context import Context

_devices = click.argument("devices", nargs=-1, required=True, shell_complete=completion.devices)
_json = click.option("--json", "as_json", is_flag=True, help="One JSON array.")


@click.command()
@_devices
@_json
@click.pass_obj
def cancel(context: Context, devices: tuple[str, ...], as_json: bool) -> None:
    """Cancel what DEVICES were ordered and have not ended: they keep what they serve.

    An order that is not out yet is withdrawn. Else the device may have begun: it is ordered what it serves now.
    """
    with context.client() as client:
        rows = client.call("POST", "/deployments/cancel", {"devices": list(devices)})["items"]
    _print(rows, as_json, "keeps")


@click.command()
@_devices
@_json
@click.pass_obj
def rollback(context: Context, devices: tuple[str, ...], as_json: bool) -> None:
    """Order DEVICES to run what they had committed to before what they serve now."""
    with context.client() as client:
        rows = client.call("POST", "/deployments/rollback", {"devices": list(devices)})["items"]
    _print(rows, as_json, "goes back to")


def _print(rows: list[dict[str, Any]], as_json: bool, does: str) -> None:
    if as_json:
        click.echo(json.dumps(rows))
        return
    for row in rows:
        if row["state"] == "failed":
            click.echo(f"{row['device']}: the order {row['deployment']} was withdrawn before it was published")
        else:
            click.echo(f"{row['device']}: {does} {row['artifact']}, ordered as {row['deployment']}")
