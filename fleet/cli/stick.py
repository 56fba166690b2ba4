"""`phifleet stick`: devices without a network."""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import click

from agent.contract.exit_codes import ExitCode
from agent.contract.manifest import Manifest
from agent.platform import logs
from fleet.cli.context import Context, actor
from fleet.cli.devices import DURATION
from fleet.errors import UsageError
from fleet.operations.fleet import Fleet
from fleet.operations.names import select
from fleet.operations.stick import Read, read_stick, write_stick


@click.group()
def stick() -> None:
    """Carry orders to devices without a network, and their reports back."""


@stick.command("write")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--selector", help="The devices: see docs/selectors.md.")
@click.option("--device", "devices", multiple=True, help="A device by its id; as often as you like.")
@click.option(
    "--expires",
    "good_for",
    type=DURATION,
    default="30d",
    show_default=True,
    help="Such as 12h or 30d.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
@click.pass_obj
def write_command(
    obj: Context, folder: Path, selector: str | None, devices: tuple[str, ...], good_for: float, as_json: bool
) -> None:
    """Write the newest orders of devices into FOLDER, with the artifacts and signatures that they need.

    Order the devices first, with `phifleet deploy`; that needs no network. At the device, `phifleet-agent stick FOLDER`
    takes it from there. Whoever has the stick has the artifacts: they are not encrypted.
    """
    with Fleet(obj.settings) as fleet:
        names = list(devices)
        if selector is not None:
            names += [one.device for one in select(fleet, selector)]
        if not names:
            raise UsageError("no device is meant: name devices with --device or --selector")
        rows = fleet.registry.devices.some(sorted(set(names)))

        def tell(manifest: Manifest, there: bool) -> None:
            if not as_json:
                click.echo(f"{'there already' if there else 'wrote'}: {manifest.id}, {manifest.size / 1e6:.1f} MB")

        written = write_stick(fleet, rows, folder, timedelta(seconds=good_for), actor(), tell)
    if as_json:
        click.echo(json.dumps({
            "folder": str(folder), "devices": written.devices, "artifacts": written.artifacts,
            "expires_at": written.expires_at.isoformat(), "warnings": written.warnings,
        }))  # fmt: skip
        return
    for warning in written.warnings:
        click.echo(f"warning: {warning}", err=True)
    click.echo(f"orders for {len(written.devices)} devices, until {written.expires_at:%Y-%m-%d %H:%M} UTC")
    click.echo(f"at each of them:  phifleet-agent stick {folder}")


@stick.command("read")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--unsigned", is_flag=True, help="Take reports of devices that have no certificate, too.")
@click.option("--json", "as_json", is_flag=True, help="One JSON array instead of lines.")
@click.pass_obj
def read_command(obj: Context, folder: Path, unsigned: bool, as_json: bool) -> None:
    """Take in the reports that devices have written on a stick."""
    if obj.settings.log_level == "info":  # the recorder tells a log what is told here anyway
        logs.configure("warning", obj.settings.log_format)
    with Fleet(obj.settings) as fleet:
        found = read_stick(fleet, folder, actor(), unsigned=unsigned)
    if as_json:
        click.echo(json.dumps([_row(one) for one in found]))
    else:
        for one in found:
            click.echo(_line(one))
    if any(one.refused is not None for one in found):
        sys.exit(ExitCode.FAILED)


def _row(one: Read) -> dict[str, Any]:
    reported = one.reported
    return {
        "device": one.device,
        "refused": one.refused,
        "state": reported.state if reported else None,
        "deployment": reported.deployment if reported else None,
        "artifact": reported.artifact if reported else None,
        "failure": reported.failure.message if reported and reported.failure else None,
        "at": reported.at.isoformat() if reported else None,
    }


def _line(one: Read) -> str:
    row = _row(one)
    if row["refused"] is not None:
        return f"{one.device}: refused: {row['refused']}"
    serves = f", serves {row['artifact']}" if row["artifact"] else ""
    failure = f": {row['failure']}" if row["failure"] else ""
    return f"{one.device}: {row['state']}{failure}{serves}, reported {str(row['at'])[:16]}"
