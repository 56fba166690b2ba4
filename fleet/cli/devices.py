"""`phifleet device`: the devices of the fleet, and the bundle that each starts from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

import click
from rich.console import Console
from rich.table import Table

from agent.contract.bundle import Bundle
from fleet.api.client import pages
from fleet.cli import completion
from fleet.cli.access import page_url
from fleet.cli.artifacts import wide_console
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


class Duration(click.ParamType):  # type: ignore[type-arg] # older click has no type arguments
    """A number and its unit, such as 30m, 24h or 7d; in seconds."""

    name = "duration"
    _units: ClassVar[Mapping[str, float]] = {"m": 60.0, "h": 3600.0, "d": 86400.0}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return seconds; a number alone is refused, as nobody can know its unit."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([mhd])", str(value))
        if found is None or float(found[1]) == 0:
            self.fail(f"{value!r}: a number and m, h or d, such as 30m, 24h or 7d", param, ctx)
        return float(found[1]) * self._units[found[2]]


DURATION = Duration()


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


@device.command("token")
@click.option(
    "--profile",
    "profile_name",
    required=True,
    shell_complete=completion.profiles,
    help="Name of a profile, or a TOML file.",
)
@click.option("--uses", type=click.IntRange(1), default=1, show_default=True, help="How many devices may use it.")
@click.option("--expires", "good_for", type=DURATION, default="24h", show_default=True, help="Such as 30m, 24h or 7d.")
@click.option("--approve", is_flag=True, help="An operator accepts each machine: `phifleet device accept`.")
@click.option("--label", "labels", multiple=True, metavar="NAME=VALUE", help="Of each device; more than once.")
@click.pass_obj
def token_command(
    context: Context, profile_name: str, uses: int, good_for: float, approve: bool, labels: tuple[str, ...]
) -> None:
    """Make a token with which machines become devices by themselves. It is printed this once on standard output."""
    profile = load_profile(profile_name)
    body = {
        "profile": profile.name,
        "profile_document": None if profile_name in profile_paths() else profile.model_dump(mode="json"),
        "uses": uses,
        "hours": good_for / 3600,
        "approval": approve,
        "labels": {name: value for name, value in parse_labels(labels).items() if value is not None},
    }
    with context.client() as client:
        made = client.call("POST", "/enrolment-tokens", body)
    for_whom = "one device" if uses == 1 else f"{uses} devices"
    click.echo(
        f"enrolment token {made['id']} for {for_whom} ({profile.name}), until {made['expires_at'][:16]} UTC", err=True
    )
    click.echo("on the device, where phifleet-agent is installed:", err=True)
    click.echo(f"  phifleet-agent enrol --url {page_url(context.settings)} --token TOKEN", err=True)
    if context.settings.server is None and context.settings.api is None:
        click.echo("while `phifleet serve --api HOST:PORT` runs; without --api nobody can ask", err=True)
    click.echo(made["token"])


@device.command("tokens")
@click.option("--json", "as_json", is_flag=True, help="One JSON array.")
@click.pass_obj
def tokens_command(context: Context, as_json: bool) -> None:
    """List the enrolment tokens, newest first."""
    with context.client() as client:
        rows = client.call("GET", "/enrolment-tokens")["items"]
    if as_json:
        click.echo(json.dumps(rows))
        return
    table = Table("id", "profile", "used", "accepted by", "labels", "made (UTC)", "by", "good until", box=None)
    for row in rows:
        labels = ", ".join(f"{name}={value}" for name, value in sorted(row["labels"].items()))
        by = "an operator" if row["approval"] else "the token"
        until = "revoked" if row["revoked_at"] else row["expires_at"][:16]
        made = (row["created_at"][:16], row["created_by"])
        table.add_row(row["id"], row["profile"], f"{row['used']} of {row['uses']}", by, labels or "-", *made, until)
    wide_console().print(table if rows else "no enrolment tokens; make one with `phifleet device token`")


@device.command("token-revoke")
@click.argument("token_id", metavar="ID")
@click.pass_obj
def token_revoke_command(context: Context, token_id: str) -> None:
    """Let the enrolment token ID be good no more; devices that used it stay."""
    with context.client() as client:
        client.call("DELETE", f"/enrolment-tokens/{token_id}")
    click.echo(f"enrolment token {token_id} is revoked")


@device.command("waiting")
@click.option("--json", "as_json", is_flag=True, help="One JSON array.")
@click.pass_obj
def waiting_command(context: Context, as_json: bool) -> None:
    """List the machines that wait to become devices."""
    with context.client() as client:
        rows = client.call("GET", "/enrolments")["items"]
    if as_json:
        click.echo(json.dumps(rows))
        return
    table = Table("device", "profile", "from", "asked (UTC)", "SHA-256 of its key", box=None)
    for row in rows:
        table.add_row(row["device"], row["profile"], row["address"], row["asked_at"][:16], row["key"])
    wide_console().print(table if rows else "no machine waits")


@device.command("accept")
@click.argument("device_id", metavar="ID")
@click.pass_obj
def accept_command(context: Context, device_id: str) -> None:
    """Let the machine that waits as ID become a device."""
    with context.client() as client:
        client.call("POST", f"/enrolments/{device_id}/accept")
    click.echo(f"accepted {device_id}")


@device.command("reject")
@click.argument("device_id", metavar="ID")
@click.pass_obj
def reject_command(context: Context, device_id: str) -> None:
    """Refuse the machine that waits as ID."""
    with context.client() as client:
        client.call("POST", f"/enrolments/{device_id}/reject")
    click.echo(f"rejected {device_id}")


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
