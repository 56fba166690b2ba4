"""`phifleet device`: the devices of the fleet, and the bundle that each starts from."""

from __future__ import annotations

import contextlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

from agent.contract.base import DeviceId, explain
from agent.contract.bundle import Bundle
from agent.contract.profile import DeviceProfile
from agent.platform.files import PRIVATE, write_atomic
from fleet.cli.context import Context, actor
from fleet.cli.describe import describe, describe_deployment
from fleet.errors import RepositoryError, UsageError
from fleet.profiles_loader import load_profile, profile_paths
from fleet.trust.ca import DeviceCA
from fleet.trust.repository import Repository


@click.group()
def device() -> None:
    """Add, list, show and remove devices, and write their bundles again."""


@device.command("add")
@click.argument("device_id", metavar="ID")
@click.option("--profile", "profile_name", required=True, help="Name of a profile, or a TOML file.")
@click.option("--bundle", "bundle_path", type=click.Path(path_type=Path), required=True, help="File to write; 0600.")
@click.option("--broker", help="What the device connects to, if not what the controller does.")
@click.pass_obj
def add_command(context: Context, device_id: str, profile_name: str, bundle_path: Path, broker: str | None) -> None:
    """Add a device and write the bundle it starts from: broker, identity, and the root of trust."""
    profile = load_profile(profile_name)
    add_device(context, device_id, profile, bundle_path, broker=broker, custom=profile_name not in profile_paths())
    click.echo(f"added {device_id} ({profile.name}); bundle {bundle_path}")
    click.echo("it is what the device believes: carry it there by a way that you trust, then start")
    click.echo(f"  phifleet-agent run --bundle {bundle_path.name}")


@device.command("bundle")
@click.argument("device_id", metavar="ID")
@click.option("--bundle", "bundle_path", type=click.Path(path_type=Path), required=True, help="File to write; 0600.")
@click.option("--broker", help="What the device connects to, if not what the controller does.")
@click.pass_obj
def bundle_command(context: Context, device_id: str, bundle_path: Path, broker: str | None) -> None:
    """Write the bundle of a device again: with today's root of trust, and a new certificate where there is TLS."""
    repository = _repository(context)
    _refuse_unless_new(bundle_path)
    with contextlib.closing(context.open_registry()) as registry:
        bundle = make_bundle(context, repository, device_id, registry.device(device_id).profile, broker)
        _write_bundle(bundle_path, bundle)
        registry.audit(actor(), "device.bundle", device_id)
    click.echo(f"bundle of {device_id} ({bundle.profile}): {bundle_path}")
    if bundle.certificate is not None:
        click.echo("it holds a new certificate and key; the one before stays good until it expires")


def add_device(
    context: Context,
    device_id: str,
    profile: DeviceProfile,
    bundle_path: Path,
    *,
    broker: str | None = None,
    custom: bool = False,
) -> Bundle:
    """Record the device and write its bundle, which is there whole or not at all.

    Raises:
        UsageError: the id is no device id, the device is there already, or the file is, its folder is not, or it
            cannot be written.
        RepositoryError: there is no root of trust yet.
    """
    try:
        TypeAdapter(DeviceId).validate_python(device_id)
    except ValidationError:
        raise UsageError(f"{device_id!r} is no device id: lower case letters, digits and dashes, at most 63") from None
    repository = _repository(context)
    _refuse_unless_new(bundle_path)
    with contextlib.closing(context.open_registry()) as registry:
        if any(row.id == device_id for row in registry.devices()):
            raise UsageError(f"device {device_id} is there already; remove it first, or choose another id")
        bundle = make_bundle(context, repository, device_id, profile.name, broker)
        _write_bundle(bundle_path, bundle)
        try:
            registry.add_device(device_id, profile, profile.model_dump(mode="json") if custom else None, actor())
        except BaseException:
            bundle_path.unlink(missing_ok=True)
            raise
    return bundle


def make_bundle(context: Context, repository: Repository, device_id: str, profile: str, broker: str | None) -> Bundle:
    """The bundle of one device: with a client certificate of the device CA where the broker speaks TLS.

    Raises:
        UsageError: the broker's URL or CA file cannot be used.
        RepositoryError: there is no device CA.
    """
    settings = context.settings
    url = broker or settings.broker_url
    values: dict[str, Any] = {
        "device": device_id,
        "profile": profile,
        "broker": url,
        "root": repository.root_bytes().decode(),
        "issued_at": datetime.now(UTC),
    }
    if settings.broker_ca is not None:
        values["broker_ca"] = _read_text(settings.broker_ca)
    if url.startswith("mqtts://"):
        identity = DeviceCA(context.home).enrol(device_id)
        values |= {"certificate": identity.certificate, "private_key": identity.private_key}
    try:
        return Bundle(**values)
    except ValidationError as error:
        raise UsageError(explain(error, quote=False)) from None


def _repository(context: Context) -> Repository:
    repository = Repository(context.home)
    if not repository.exists:
        raise RepositoryError(f"{context.home.root} has no root of trust; make one with `phifleet init`")
    return repository


def _refuse_unless_new(path: Path) -> None:
    """Before a certificate is made for it."""
    if path.exists():
        raise UsageError(f"{path} is there already; a bundle holds a private key and is never overwritten")
    if not path.parent.is_dir():
        raise UsageError(f"bundle {path}: the folder {path.parent} does not exist; make it, or name another")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"broker_ca {path}: cannot be read: {error}") from None


def _write_bundle(path: Path, bundle: Bundle) -> None:
    try:
        write_atomic(path, bundle.model_dump_json(indent=2).encode(), PRIVATE)
    except OSError as error:
        raise UsageError(f"bundle {path}: cannot be written: {error.strerror or error}") from None


@device.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON array instead of a table.")
@click.pass_obj
def list_command(context: Context, as_json: bool) -> None:
    """List the devices."""
    with contextlib.closing(context.open_registry()) as registry:
        rows, newest = registry.devices(), registry.newest()
    if as_json:
        click.echo(json.dumps([describe(row, newest.get(row.id)) for row in rows]))
        return
    table = Table("device", "profile", "online", "agent", "added", "state", "artifact", box=None)
    for row in rows:
        order = newest.get(row.id)
        table.add_row(
            row.id,
            row.profile,
            "yes" if row.online else "no",
            row.agent_version or "-",
            f"{row.added_at:%Y-%m-%d}",
            order.stage if order else "-",
            order.artifact if order else "-",
        )
    Console().print(table if rows else "no devices yet; add one with `phifleet device add`")


@device.command("show")
@click.argument("device_id", metavar="ID")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.pass_obj
def show_command(context: Context, device_id: str, as_json: bool) -> None:
    """Show what is known of a device: facts, report, health, and its newest deployments."""
    with contextlib.closing(context.open_registry()) as registry:
        row, history = registry.device(device_id), registry.history(device_id)
    document = describe(row, history[0] if history else None)
    document |= {"facts": row.facts, "reported": row.reported, "health": row.health}
    document["deployments"] = [describe_deployment(entry) for entry in history]
    if as_json:
        click.echo(json.dumps(document))
    else:
        Console().print_json(data=document)


@device.command("remove")
@click.argument("device_id", metavar="ID")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def remove_command(context: Context, device_id: str, yes: bool) -> None:
    """Remove a device: its order is cancelled and its topics are cleared. What it serves, it goes on serving."""
    with contextlib.closing(context.open_registry()) as registry:
        registry.device(device_id)
        if not yes:
            click.confirm(f"remove {device_id}?", abort=True)
        registry.remove_device(device_id, actor())
    ca = DeviceCA(context.home)
    revoked = ca.revoke(device_id) if ca.exists else 0
    click.echo(f"removed {device_id}")
    if revoked:
        click.echo(f"its certificate is on {context.home.ca / 'crl.pem'} now: let the broker read that again")
