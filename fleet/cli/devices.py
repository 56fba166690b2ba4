"""`phifleet device`: the devices of the fleet, and the bundle that each starts from."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from agent.contract.bundle import Bundle
from fleet.api.client import pages
from fleet.cli import completion
from fleet.cli.context import Context, actor
from fleet.errors import UsageError
from fleet.operations.devices import (
    Revocation,
    add_device,
    import_devices,
    only_here,
    parse_labels,
    read_rows,
    renew_bundle,
)
from fleet.operations.fleet import Fleet
from fleet.profiles_loader import load_profile, profile_paths
from fleet.registry.rows import revoked_text
from fleet.settings import default_files


@click.group()
def device() -> None:
    """Add, list, show and remove devices, and write their bundles again."""


@device.command("add")
@click.argument("device_id", metavar="ID")
@click.option(
    "--profile",
    "profile_name",
    required=True,
    shell_complete=completion.profiles,
    help="Name of a profile, or a TOML file.",
)
@click.option(
    "--bundle",
    "bundle_path",
    type=click.Path(path_type=Path, allow_dash=True),
    required=True,
    help="File to write, mode 0600; - is standard output.",
)
@click.option("--broker", help="What the device connects to, if not what the controller does.")
@click.pass_obj
def add_command(context: Context, device_id: str, profile_name: str, bundle_path: Path, broker: str | None) -> None:
    """Add a device and write the bundle it starts from: broker, identity, and the root of trust."""
    profile = load_profile(profile_name)
    custom = profile_name not in profile_paths()
    file = _file(bundle_path)
    with Fleet(context.settings) as fleet:
        bundle = add_device(fleet, device_id, profile, file, actor(), broker=broker, custom=custom)
    _tell(f"added {device_id} ({profile.name}); broker {bundle.broker}; bundle {file or 'on standard output'}", file)
    _hand_over(bundle, file)
    _tell("it is what the device believes: carry it there by a way that you trust, then start", file)
    _tell(f"  phifleet-agent run --bundle {file.name if file else 'FILE'}", file)


@device.command("import")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--bundles",
    "folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    required=True,
    help="Folder for the bundles, DEVICE.json each, mode 0600.",
)
@click.option("--broker", help="What the devices connect to, if not what the controller does.")
@click.pass_obj
def import_command(context: Context, file: Path, folder: Path, broker: str | None) -> None:
    """Add the devices of a CSV file: columns device, profile, and any label.NAME.

    The whole file is checked before the first device is added. Run it again after an interruption: what was added
    stays as it is.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{file}: is not UTF-8 at byte {error.start}") from None
    rows = read_rows(text, str(file))
    names = {row.profile for row in rows}
    profiles = {name: load_profile(name) for name in sorted(names)}
    custom = names - profile_paths().keys()
    with Fleet(context.settings) as fleet:
        added = import_devices(fleet, rows, profiles, folder, actor(), broker=broker, custom=custom)
    click.echo(f"{len(added)} devices added, {len(rows) - len(added)} were there; bundles are in {folder}")


@device.command("label")
@click.argument("device_id", metavar="ID", shell_complete=completion.devices)
@click.argument("labels", nargs=-1, required=True, metavar="NAME=VALUE|NAME-")
@click.pass_obj
def label_command(context: Context, device_id: str, labels: tuple[str, ...]) -> None:
    """Set labels, such as site=lyon, and remove those that are named with a dash after them, such as site-."""
    given = parse_labels(labels)
    with context.client() as client:
        now = client.call("PATCH", f"/devices/{device_id}/labels", {"labels": given})["labels"]
    click.echo(f"{device_id}: {', '.join(f'{name}={value}' for name, value in sorted(now.items())) or 'no labels'}")


@device.command("bundle")
@click.argument("device_id", metavar="ID", shell_complete=completion.devices)
@click.option(
    "--bundle",
    "bundle_path",
    type=click.Path(path_type=Path, allow_dash=True),
    required=True,
    help="File to write, mode 0600; - is standard output.",
)
@click.option("--broker", help="What the device connects to, if not what the controller does.")
@click.pass_obj
def bundle_command(context: Context, device_id: str, bundle_path: Path, broker: str | None) -> None:
    """Write the bundle of a device again: with today's root of trust, and a new certificate where there is TLS."""
    file = _file(bundle_path)
    with Fleet(context.settings) as fleet:
        bundle = renew_bundle(fleet, device_id, file, actor(), broker=broker)
    _tell(f"bundle of {device_id} ({bundle.profile}); broker {bundle.broker}: {file or 'on standard output'}", file)
    _hand_over(bundle, file)
    if bundle.certificate is not None:
        _tell("it holds a new certificate and key; the one before stays good until it expires", file)


def _file(named: Path) -> Path | None:
    """None for ``-``: standard output, which lets the operator's shell write where this program's user may not."""
    return None if str(named) == "-" else named


def _tell(line: str, file: Path | None) -> None:
    click.echo(line, err=file is None)


def _hand_over(bundle: Bundle, file: Path | None) -> None:
    if file is None:
        click.echo(bundle.model_dump_json(indent=2))
    if only_here(bundle.broker):
        click.echo(
            f"warning: no other machine can connect to {bundle.broker}. For another machine set `broker` in "
            f"{default_files()[0]}, or pass --broker, and write the bundle again with `phifleet device bundle`",
            err=True,
        )


@device.command("list")
@click.option("--selector", help="Which devices, such as 'profile=pi-5 and label.site=lyon' (docs/rollouts.md).")
@click.option("--json", "as_json", is_flag=True, help="One JSON array instead of a table.")
@click.pass_obj
def list_command(context: Context, selector: str | None, as_json: bool) -> None:
    """List the devices, or those that a selector means."""
    with context.client() as client:
        found = list(pages(client, "/devices", selector=selector))
    if as_json:
        click.echo(json.dumps(found))
        return
    table = Table("device", "profile", "presence", "agent", "added", "state", "artifact", box=None)
    for one in found:
        deployment = one["deployment"] or {"state": "-", "artifact": "-"}
        presence = "revoked" if one["revoked_at"] else one["presence"]
        added = f"{datetime.fromisoformat(one['added_at']):%Y-%m-%d}"
        columns = (one["agent_version"] or "-", added, deployment["state"], deployment["artifact"])
        table.add_row(one["device"], one["profile"], presence, *columns)
    none = "no device is meant" if selector else "no devices yet; add one with `phifleet device add`"
    Console().print(table if found else none)


@device.command("show")
@click.argument("device_id", metavar="ID", shell_complete=completion.devices)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.pass_obj
def show_command(context: Context, device_id: str, as_json: bool) -> None:
    """Show what is known of a device: facts, report, health, and its newest deployments."""
    with context.client() as client:
        document = client.call("GET", f"/devices/{device_id}")
        document["deployments"] = client.call("GET", f"/devices/{device_id}/deployments", limit=20)["items"]
    if as_json:
        click.echo(json.dumps(document))
        return
    Console().print_json(data=document)
    if document["revoked_at"]:
        click.echo(f"{device_id} is {revoked_text(datetime.fromisoformat(document['revoked_at']))}")


@device.command("revoke")
@click.argument("device_id", metavar="ID", shell_complete=completion.devices)
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def revoke_command(context: Context, device_id: str, yes: bool) -> None:
    """Revoke a device: its certificates are void, its order is cancelled, and nobody listens to it any more."""
    if not yes:
        click.confirm(f"revoke {device_id}? It must be removed and added again to come back", abort=True)
    with context.client() as client:
        done = client.call("POST", f"/devices/{device_id}/revoke")
    since = datetime.fromisoformat(done["since"]) if done["since"] else None
    for line in Revocation(done["device"], done["certificates"], since).lines(done["crl"]):
        click.echo(line)


@device.command("remove")
@click.argument("device_id", metavar="ID", shell_complete=completion.devices)
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def remove_command(context: Context, device_id: str, yes: bool) -> None:
    """Remove a device: its order is cancelled and its topics are cleared. What it serves, it goes on serving."""
    with context.client() as client:
        client.call("GET", f"/devices/{device_id}")
        if not yes:
            click.confirm(f"remove {device_id}?", abort=True)
        done = client.call("DELETE", f"/devices/{device_id}")
    click.echo(f"removed {device_id}")
    if done["certificates"]:
        click.echo(f"its certificate is on {done['crl']} now: let the broker read that again")
