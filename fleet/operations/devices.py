"""Adding and removing devices, and writing the bundle that each starts from."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import TypeAdapter, ValidationError

from agent.contract.base import DeviceId, explain
from agent.contract.bundle import BUNDLE_VERSION, Bundle
from agent.contract.profile import DeviceProfile
from agent.platform.addresses import is_loopback
from agent.platform.files import PRIVATE, reason, write_atomic
from fleet.errors import ConflictError, MissingError, UsageError
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
    _check_id(device)
    _ = fleet.repository  # before anything is made: without a root of trust there is no bundle
    refuse_unless_new(bundle_path)
    if fleet.registry.devices.has(device):
        raise ConflictError(f"device {device} is there already; remove it first, or choose another id")
    bundle = make_bundle(fleet, device, profile.name, broker)
    _write_bundle(bundle_path, bundle)
    try:
        fleet.registry.devices.add(device, profile, profile.model_dump(mode="json") if custom else None, actor)
    except BaseException:
        if bundle_path is not None:
            bundle_path.unlink(missing_ok=True)
        raise
    return bundle


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a file of devices: its number, from 1 with the header, and what it names."""

    line: int
    device: str
    profile: str
    labels: Mapping[str, str]


def read_rows(text: str, origin: str) -> list[Row]:
    """Return the devices in CSV text with the columns ``device``, ``profile`` and any ``label.NAME``.

    Raises:
        UsageError: a column or a value is wrong; names every line that is.
    """
    reader = csv.DictReader(io.StringIO(text), strict=True)
    wrong: list[str] = []
    rows: list[Row] = []
    try:
        names = list(reader.fieldnames or ())
        unknown = [name for name in names if name not in ("device", "profile") and not name.startswith("label.")]
        if unknown or not {"device", "profile"} <= set(names) or len(set(names)) != len(names):
            raise UsageError(
                f"{origin}: its first line names the columns device, profile, and any label.NAME, each once"
            )
        seen: dict[str, int] = {}
        for values in reader:
            try:
                rows.append(_row(values, reader.line_num))
            except UsageError as error:
                wrong.append(f"line {reader.line_num}: {error}")
                continue
            first = seen.setdefault(rows[-1].device, reader.line_num)
            if first != reader.line_num:
                wrong.append(f"line {reader.line_num}: {rows[-1].device} is on line {first} too")
    except csv.Error as error:
        raise UsageError(f"{origin}, line {reader.line_num}: {error}") from None
    if wrong:
        more = f"\n  and {len(wrong) - MAX_WRONG} more" if len(wrong) > MAX_WRONG else ""
        listed = "\n  ".join(wrong[:MAX_WRONG])
        raise UsageError(f"{origin}: nothing was added:\n  {listed}{more}")
    return rows


def import_devices(
    fleet: Fleet, rows: Sequence[Row], profiles: Mapping[str, DeviceProfile], folder: Path, actor: Actor,
    *, broker: str | None = None, custom: Container[str] = (),
) -> list[str]:  # fmt: skip
    """Add devices and write the bundle of each as ``FOLDER/DEVICE.json``; returns the names of those added.

    A device that is in the fleet with that profile, and whose bundle is in the folder, is left as it is: a run that
    was interrupted is finished by the same command.

    Raises:
        UsageError: a device is in the fleet with another profile, or the folder cannot be written.
        RepositoryError: there is no root of trust yet.
    """
    added: list[str] = []
    for row in rows:
        path = folder / f"{row.device}.json"
        if fleet.registry.devices.has(row.device):
            there = fleet.registry.devices.get(row.device).profile
            if there != profiles[row.profile].name:
                raise UsageError(f"line {row.line}: {row.device} is in the fleet with the profile {there}")
            if not path.exists():
                renew_bundle(fleet, row.device, path, actor, broker=broker)
        else:
            path.unlink(missing_ok=True)  # of a run that was interrupted before it had added the device
            profile = profiles[row.profile]
            add_device(fleet, row.device, profile, path, actor, broker=broker, custom=row.profile in custom)
            added.append(row.device)
        if row.labels:
            fleet.registry.devices.label(row.device, dict(row.labels), actor)
    return added


def _check_id(device: str) -> None:
    try:
        TypeAdapter(DeviceId).validate_python(device)
    except ValidationError:
        raise UsageError(f"{device!r} is no device id: lower case letters, digits and dashes, at most 63") from None


def _row(values: Mapping[str | None, Any], line: int) -> Row:
    if None in values or any(value is None for value in values.values()):
        raise UsageError("has more or fewer values than the first line has columns")
    device = str(values["device"]).strip()
    _check_id(device)
    given = [
        f"{str(name).removeprefix('label.')}={value}"
        for name, value in values.items()
        if str(name).startswith("label.") and value
    ]
    labels = {name: value for name, value in parse_labels(given).items() if value is not None}
    return Row(line, device, str(values["profile"]).strip(), labels)


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
    """Return the bundle of one device: with a client certificate of the device CA where the broker speaks TLS.

    Raises:
        UsageError: the broker's URL or CA file cannot be used.
        RepositoryError: there is no root of trust, or no device CA.
    """
    values = bundle_values(fleet, device, profile, broker)
    if str(values["broker"]).startswith(("mqtts://", "wss://")):
        identity = fleet.ca.enrol(device)
        values |= {"certificate": identity.certificate, "private_key": identity.private_key}
    try:
        return Bundle(**values)
    except ValidationError as error:
        raise UsageError(explain(error, quote=False)) from None


def bundle_values(fleet: Fleet, device: str, profile: str, broker: str | None) -> dict[str, Any]:
    """Return a bundle's fields but for the device's certificate and its key.

    Raises:
        UsageError: the broker's CA file cannot be used.
        RepositoryError: there is no root of trust.
    """
    settings = fleet.settings
    values: dict[str, Any] = {
        "version": BUNDLE_VERSION,
        "device": device,
        "profile": profile,
        "broker": broker or settings.broker_url,
        "root": fleet.repository.root_bytes().decode(),
        "issued_at": datetime.now(UTC),
    }
    if settings.broker_ca is not None:
        values["broker_ca"] = _read_text(settings.broker_ca)
    return values


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

    def lines(self, crl: Path | str) -> Iterator[str]:
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
    since = fleet.registry.devices.revoke(name, actor) if fleet.registry.devices.has(name) else None
    count = fleet.ca.revoke(name) if fleet.ca.exists else 0
    if since is None and count == 0:
        raise MissingError(f"{name!r} is no device of this fleet, and no certificate of it is in force")
    return Revocation(name, count, since)


def only_here(broker: str) -> bool:
    """Return whether a broker's URL names this machine itself, which no other device can connect to."""
    host = urlsplit(broker).hostname or ""
    return is_loopback(host) or host.endswith(".localhost")


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


#: Lines of a file that an error names.
MAX_WRONG = 20
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
        labels[name] = value if equals else None
        check_labels({name: labels[name]})
    return labels


def check_labels(labels: Mapping[str, str | None]) -> None:
    """Let labels be set if selectors can name them.

    Raises:
        UsageError: one cannot be a label; says which, and why.
    """
    for name, value in labels.items():
        if not _LABEL.fullmatch(name):
            raise UsageError(f"label {name!r}: lower case letters, digits, dots, dashes and underscores, 63 at most")
        if value is not None and (len(value) > MAX_LABEL_VALUE or not value.isprintable()):
            raise UsageError(f"label {name}: its value has {MAX_LABEL_VALUE} printable characters at most")
