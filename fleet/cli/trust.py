"""`phifleet init` and `phifleet trust`: the keys of the fleet, and what they sign."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from rich.console import Console
from rich.table import Column, Table
from securesystemslib.signer import SSlibKey

from agent.platform.files import PRIVATE, write_atomic
from fleet.cli.context import Context, actor
from fleet.errors import UsageError
from fleet.operations.artifacts import reinstate_artifact, withdraw_artifact
from fleet.operations.devices import revoke_device
from fleet.operations.fleet import Fleet
from fleet.trust.ca import Credentials, DeviceCA
from fleet.trust.release import Expiry
from fleet.trust.repository import ROLES, Repository, RoleStatus

_DEFAULT = Expiry()
_TUF_ROLES = ROLES[:-1]

_offline_option = click.option(
    "--offline-keys",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder that holds the root keys, where they were taken out of the home.",
)


@click.command()
@click.option("--root-keys", default=3, show_default=True, help="How many root keys to make.")
@click.option("--root-threshold", default=2, show_default=True, help="How many of them must sign.")
@click.option("--root-days", default=_DEFAULT.root, show_default=True, help="Days that a signed root holds.")
@click.option("--targets-days", default=_DEFAULT.targets, show_default=True, help="Days that the signed targets hold.")
@click.option("--snapshot-days", default=_DEFAULT.snapshot, show_default=True, help="The same, signed again by serve.")
@click.option(
    "--timestamp-days", default=_DEFAULT.timestamp, show_default=True, help="The same, signed again by serve."
)
@click.pass_obj
def init(context: Context, /, root_keys: int, root_threshold: int, **days: float) -> None:
    """Make the keys and the signed metadata of a new fleet, and the CA of its devices."""
    given = {name.removesuffix("_days"): value for name, value in days.items()}
    wrong = [f"--{role}-days" for role, value in given.items() if value <= 0]
    if wrong:
        raise UsageError(f"{', '.join(wrong)} must be more than 0 days")
    repository, ca = Repository(context.home), DeviceCA(context.home)
    if not repository.exists or ca.exists:
        repository.init(root_keys=root_keys, root_threshold=root_threshold, expiry=Expiry(**given))
    if not ca.exists:
        ca.init()
    click.echo(f"made a repository in {context.home.tuf}, and the CA of devices in {context.home.ca}")
    click.echo(f"{root_threshold} of {root_keys} root keys must sign a change of keys; all are in {context.home.keys}")
    click.echo("before the first real device: move the files root-*.pem onto media of their own, and back up the rest")


@click.group()
def trust() -> None:
    """Show, renew and rotate keys and metadata."""


@trust.command("status")
@click.option("--json", "as_json", is_flag=True, help="One JSON array instead of a table.")
@click.pass_obj
def status_command(context: Context, as_json: bool) -> None:
    """Show every role: its version, when its signatures end, and where its keys are."""
    rows, now = Repository(context.home).status(), datetime.now(UTC)
    if as_json:
        click.echo(json.dumps([_as_json(row) for row in rows]))
        return
    table = Table("role", "version", "signatures end", "threshold", Column("keys", overflow="fold"), box=None)
    for row in rows:
        keys = "\n".join(uri if keyid[:12] in uri else f"{keyid[:12]} {uri}" for keyid, uri in row.keys.items())
        table.add_row(row.role, str(row.version or "-"), _ends(row, now), f"{row.threshold} of {len(row.keys)}", keys)
    Console().print(table)


@trust.command("refresh")
@click.pass_obj
def refresh_command(context: Context) -> None:
    """Sign snapshot and timestamp again where half of their time is over; `phifleet serve` does so by itself."""
    signed = Repository(context.home).refresh_online()
    crl = DeviceCA(context.home).refresh_crl() if DeviceCA(context.home).exists else False
    click.echo("signed again" if signed or crl else "nothing is due")


@trust.command("renew")
@click.argument("role", type=click.Choice(_TUF_ROLES))
@_offline_option
@click.pass_obj
def renew_command(context: Context, role: str, offline_keys: Path | None) -> None:
    """Sign ROLE again, with the same keys and a new expiry."""
    version = Repository(context.home, offline_keys=offline_keys).renew(role)
    click.echo(f"{role} is now version {version}")


@trust.command("rotate")
@click.argument("role", type=click.Choice(ROLES))
@click.option("--key", "keyid", help="Replace this key alone: the beginning of its id.")
@click.option("--uri", help="The new key is in an HSM or KMS: its securesystemslib signer URI.")
@click.option("--public-key", type=click.Path(path_type=Path, exists=True), help="With --uri: the public key, PEM.")
@_offline_option
@click.pass_obj
def rotate_command(
    context: Context, role: str, keyid: str | None, uri: str | None, public_key: Path | None, offline_keys: Path | None
) -> None:
    """Replace the keys of ROLE; root signs the change. Devices learn of it with their next refresh."""
    if (uri is None) != (public_key is None):
        raise UsageError("--uri and --public-key go together")
    external = (uri, _read_key(public_key)) if uri and public_key else None
    made = Repository(context.home, offline_keys=offline_keys).rotate(role, keyid=keyid, external=external)
    click.echo(f"{role} is now held by {', '.join(key[:12] for key in made)}")
    if role == "director":
        click.echo("orders that devices have not finished are refused from now on: deploy them again")


@trust.command("withdraw")
@click.argument("digest")
@click.option("--reason", help="Why; `deploy` shows it to whoever orders the artifact again.")
@click.pass_obj
def withdraw_command(context: Context, digest: str, reason: str | None) -> None:
    """Take the artifact with DIGEST out of the signed targets: no device installs it, and `deploy` refuses it."""
    with Fleet(context.settings) as fleet:
        click.echo(f"withdrew {withdraw_artifact(fleet, digest, reason, actor())}")


@trust.command("reinstate")
@click.argument("digest")
@click.pass_obj
def reinstate_command(context: Context, digest: str) -> None:
    """Allow an artifact that was withdrawn: the next `deploy` that names it publishes it again."""
    with Fleet(context.settings) as fleet:
        click.echo(f"reinstated {reinstate_artifact(fleet, digest, actor())}")


@trust.command("revoke")
@click.argument("device")
@click.pass_obj
def revoke_command(context: Context, device: str) -> None:
    """Put the certificates of DEVICE on the revocation list, which the broker must then read again."""
    with Fleet(context.settings) as fleet:
        done = revoke_device(fleet, device, actor())
    for line in done.lines(context.home.ca / "crl.pem"):
        click.echo(line)


@trust.command("issue-broker")
@click.argument("hosts", metavar="HOST...", nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the PEM files.")
@click.pass_obj
def issue_broker_command(context: Context, hosts: tuple[str, ...], out: Path) -> None:
    """Make a certificate for a broker that devices reach under these names or addresses."""
    _write_credentials(out, "broker", DeviceCA(context.home).server_certificate(hosts))


@trust.command("issue-controller")
@click.option("--name", default="fleet.controller", show_default=True, help="For the broker's ACL; has a dot.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the PEM files.")
@click.pass_obj
def issue_controller_command(context: Context, name: str, out: Path) -> None:
    """Make the client certificate with which `phifleet serve` connects to a broker."""
    _write_credentials(out, "controller", DeviceCA(context.home).client_certificate(name))


def _write_credentials(folder: Path, name: str, credentials: Credentials) -> None:
    try:
        write_atomic(folder / f"{name}-key.pem", credentials.private_key.encode(), PRIVATE)
        write_atomic(folder / f"{name}.pem", credentials.certificate.encode())
        write_atomic(folder / "ca.pem", credentials.ca.encode())
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error.strerror or error}") from error
    click.echo(f"{folder / name}.pem, {name}-key.pem and ca.pem; good until {credentials.expires:%Y-%m-%d}")


def _as_json(row: RoleStatus) -> dict[str, Any]:
    return {
        "role": row.role,
        "version": row.version,
        "expires": row.expires.isoformat() if row.expires else None,
        "threshold": row.threshold,
        "keys": dict(row.keys),
    }


def _ends(row: RoleStatus, now: datetime) -> str:
    if row.expires is None:
        return "with the targets"
    left = (row.expires - now).total_seconds() / 86400
    return f"{row.expires:%Y-%m-%d} ({left:.0f} days)" if left > 0 else f"{row.expires:%Y-%m-%d} (ENDED)"


def _read_key(path: Path) -> SSlibKey:
    try:
        return SSlibKey.from_crypto(load_pem_public_key(path.read_bytes()))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UsageError(f"{path} is no public key in PEM: {error}") from error
