"""Adding and removing devices, and writing the bundle that each starts from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import TypeAdapter, ValidationError

from agent.contract.base import DeviceId, explain
from agent.contract.bundle import Bundle
from agent.contract.profile import DeviceProfile
from agent.platform.files import PRIVATE, reason, write_atomic
from fleet.errors import UsageError
from fleet.operations.fleet import Fleet
from fleet.registry import Actor


def add_device(
    fleet: Fleet,
    device: str,
    profile: DeviceProfile,
    bundle_path: Path | None,
    actor: Actor,
    *,
    broker: str | None = None,
    custom: bool = False,
) -> Bundle:
    """Record a device and write its bundle, which is there whole or not at all.

    Without a ``bundle_path`` the caller takes the bundle on, such as to standard output. ``broker`` is what the device
    connects to, if not what the controller does. ``custom``: the profile does not come with phifleet, so the registry
    keeps all of it.

    Raises:
        UsageError: the id is not a device id, the device is there already, or the file is, its folder is not, or it
            cannot be written.
        RepositoryError: there is no root of trust yet.
    """
    try:
        TypeAdapter(DeviceId).validate_python(device)
    except ValidationError:
        raise UsageError(f"{device!r} is no device id: lower case letters, digits and dashes, at most 63") from None
    _ = fleet.repository  # before anything is made: without a root of trust there is no bundle
    refuse_unless_new(bundle_path)
    if any(row.id == device for row in fleet.registry.devices.all()):
        raise UsageError(f"device {device} is there already; remove it first, or choose another id")
    bundle = make_bundle(fleet, device, profile.name, broker)
    _write_bundle(bundle_path, bundle)
    try:
        fleet.registry.devices.add(device, profile, profile.model_dump(mode="json") if custom else None, actor)
    except BaseException:
        if bundle_path is not None:
            bundle_path.unlink(missing_ok=True)
        raise
    return bundle


def renew_bundle(
    fleet: Fleet, device: str, bundle_path: Path | None, actor: Actor, *, broker: str | None = None
) -> Bundle:
    """Write the bundle of a device again: today's root of trust, and a new certificate where there is TLS.

    Raises:
        UsageError: no such device, or the file is there already or cannot be written.
        RepositoryError: there is no root of trust yet.
    """
    _ = fleet.repository
    refuse_unless_new(bundle_path)
    bundle = make_bundle(fleet, device, fleet.registry.devices.get(device).profile, broker)
    _write_bundle(bundle_path, bundle)
    fleet.registry.audit.record(actor, "device.bundle", device)
    return bundle


def make_bundle(fleet: Fleet, device: str, profile: str, broker: str | None) -> Bundle:
    """The bundle of one device: with a client certificate of the device CA where the broker speaks TLS.

    Raises:
        UsageError: the broker's URL or CA file cannot be used.
        RepositoryError: there is no root of trust, or no device CA.
    """
    settings = fleet.settings
    url = broker or settings.broker_url
    values: dict[str, Any] = {
        "device": device,
        "profile": profile,
        "broker": url,
        "root": fleet.repository.root_bytes().decode(),
        "issued_at": datetime.now(UTC),
    }
    if settings.broker_ca is not None:
        values["broker_ca"] = _read_text(settings.broker_ca)
    if url.startswith("mqtts://"):
        identity = fleet.ca.enrol(device)
        values |= {"certificate": identity.certificate, "private_key": identity.private_key}
    try:
        return Bundle(**values)
    except ValidationError as error:
        raise UsageError(explain(error, quote=False)) from None


def remove_device(fleet: Fleet, device: str, actor: Actor) -> int:
    """Remove a device and revoke its certificates; returns how many those were.

    Raises:
        UsageError: no such device.
    """
    fleet.registry.devices.remove(device, actor)
    return fleet.ca.revoke(device) if fleet.ca.exists else 0


@dataclass(frozen=True, slots=True)
class Revocation:
    """What was revoked. ``since`` is None for a name that only has certificates, such as a controller's."""

    name: str
    certificates: int
    since: datetime | None

    def lines(self, crl: Path) -> Iterator[str]:
        """For the operator: what was done, and what is left to do."""
        yield f"revoked {self.name}: {self.certificates} certificate(s) are on the list {crl}"
        if self.certificates:
            yield "let the broker read that list again: until then the device can still connect"
        if self.since is not None:
            yield "a running `phifleet serve` ends its session, ignores its messages and clears its order"


def revoke_device(fleet: Fleet, name: str, actor: Actor) -> Revocation:
    """Void the certificates of a name; where it is a device of the fleet, also cancel its order and bar it.

    Raises:
        UsageError: it is no device of the fleet, and no certificate of it is in force.
    """
    known = any(row.id == name for row in fleet.registry.devices.all())
    since = fleet.registry.devices.revoke(name, actor) if known else None
    count = fleet.ca.revoke(name) if fleet.ca.exists else 0
    if since is None and count == 0:
        raise UsageError(f"{name!r} is no device of this fleet, and no certificate of it is in force")
    return Revocation(name, count, since)


def only_here(broker: str) -> bool:
    """Whether a broker's URL names this machine itself, which no other device can connect to."""
    host = urlsplit(broker).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def refuse_unless_new(path: Path | None) -> None:
    """Before a certificate is made for it.

    Raises:
        UsageError: the file is there already, or its folder is not.
    """
    if path is None:
        return
    if path.exists():
        raise UsageError(f"{path} is there already; a bundle holds a private key and is never overwritten")
    if not path.parent.is_dir():
        raise UsageError(f"bundle {path}: the folder {path.parent} does not exist; make it, or name another")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"broker_ca {path}: cannot be read: {error}") from None


def _write_bundle(path: Path | None, bundle: Bundle) -> None:
    if path is None:
        return
    try:
        write_atomic(path, bundle.model_dump_json(indent=2).encode(), PRIVATE)
    except OSError as error:
        hint = "; with --bundle - it goes to standard output" if isinstance(error, PermissionError) else ""
        raise UsageError(f"bundle {path}: cannot be written: {reason(error, path.parent)}{hint}") from None


#: Of a label, as selectors read it.
_LABEL = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")
MAX_LABEL_VALUE = 128


def parse_labels(given: Iterable[str]) -> dict[str, str | None]:
    """Labels from ``name=value``; None for those to be removed, ``name-``.

    Raises:
        UsageError: one cannot be a label; says which, and why.
    """
    labels: dict[str, str | None] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals and name.endswith("-"):
            name = name[:-1]
        elif not equals:
            raise UsageError(f"label {text!r}: write NAME=VALUE to set it, or NAME- to remove it")
        if not _LABEL.fullmatch(name):
            raise UsageError(f"label {name!r}: lower case letters, digits, dots, dashes and underscores, 63 at most")
        if equals and (len(value) > MAX_LABEL_VALUE or not value.isprintable()):
            raise UsageError(f"label {name}: its value has {MAX_LABEL_VALUE} printable characters at most")
        labels[name] = value if equals else None
    return labels
