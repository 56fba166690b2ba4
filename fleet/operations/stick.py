"""A stick for devices without a network: what a controller would send them, as files; and what they report, read back.

Nothing on a stick needs protection of its own: metadata, orders and manifests are signed, chunks are compared with
manifests, and a report is signed by its device's key.
"""

from __future__ import annotations

import base64
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from agent.contract.base import MalformedMessageError
from agent.contract.manifest import Manifest
from agent.contract.messages import Desired, Reported
from agent.contract.stick import (
    ARTIFACTS,
    INDEX,
    INDEXES,
    MAX_REPORT_BYTES,
    METADATA,
    ORDERS,
    REPORT_PREFIX,
    REPORTS,
    SignedReport,
    StickFile,
    StickIndex,
    StickReport,
)
from agent.contract.topics import parse_device
from agent.platform.files import reason, write_atomic
from fleet.core.deployments import Stage
from fleet.errors import FleetError, StoreError, UsageError
from fleet.export.mirror import mirror
from fleet.operations.deploy import ordered
from fleet.operations.fleet import Fleet
from fleet.registry import Actor
from fleet.registry.models import DeviceRow
from fleet.registry.recorder import Received, Recorder
from fleet.store import FolderStore, find

#: What a device says without a network, and what of it changes the registry.
_READ = frozenset({"facts", "reported", "health"})
_DAY = timedelta(days=1)
#: Orders that are no longer meant.
_VOID = frozenset({Stage.SUPERSEDED, Stage.FAILED, Stage.ROLLED_BACK})


@dataclass(frozen=True, slots=True)
class Written:
    """A stick: the artifacts and devices on it, when it ends, and what the operator should know besides."""

    devices: tuple[str, ...]
    artifacts: tuple[str, ...]
    expires_at: datetime
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Read:
    """What became of one report; ``refused`` says why nothing of it was taken, None where it was."""

    device: str
    refused: str | None = None
    reported: Reported | None = None


def write_stick(
    fleet: Fleet, devices: Sequence[DeviceRow], folder: Path, lasting: timedelta, actor: Actor,
    on_done: Callable[[Manifest, bool], None],
) -> Written:  # fmt: skip
    """Write the devices' newest orders into ``folder``, with all that they need to carry them out.

    Artifacts that are whole there are left alone. ``on_done`` is told of each, and whether it was there already.

    Raises:
        UsageError: a device was revoked or has no order that holds; says which.
        StoreError: an artifact is not in this home, or the folder cannot be written.
        RepositoryError: metadata cannot be signed.
    """
    orders = _orders(fleet, devices, actor.at)
    digests = sorted({ref.digest for _, order in orders.values() for ref in order.artifacts})
    store = FolderStore(fleet.home.artifacts)
    manifests = [find(store, digest) for digest in digests]
    metadata, ends = fleet.repository.lasting(lasting, digests)
    until = {device: order.expires_at for device, (_, order) in orders.items()}
    early = [device for device in sorted(until, key=until.__getitem__) if until[device] < ends - _DAY]
    warnings = []
    if early:
        warnings.append(
            f"{len(early)} order(s) end before the rest of the stick does, the first, of {early[0]}, on "
            f"{until[early[0]]:%Y-%m-%d}; deploy again for longer"
        )
    if ends < actor.at + lasting - timedelta(minutes=1):
        warnings.append(f"a signature of the fleet ends on {ends:%Y-%m-%d}: see `phifleet trust status`")
    files = {f"{METADATA}/{name}": data for name, data in metadata.items()}
    files |= {f"{ORDERS}/{device}.json": envelope for device, (envelope, _) in orders.items()}
    for manifest in manifests:
        if manifest.index is not None and (packed := store.index(manifest)) is not None:
            files[f"{INDEXES}/{manifest.index.sha256}"] = packed
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / INDEX).unlink(missing_ok=True)  # until it is whole again
        for part in (METADATA, ORDERS, INDEXES):
            shutil.rmtree(folder / part, ignore_errors=True)
        mirror(store, manifests, folder / ARTIFACTS, on_done)
        for name, data in files.items():
            write_atomic(folder / name, data)
        sizes = {name: len(data) for name, data in files.items()}
        for manifest in manifests:
            sizes |= {f"{ARTIFACTS}/{manifest.digest}/{file.path}": file.size for file in manifest.files}
        index = StickIndex(
            written_at=actor.at,
            expires_at=ends,
            devices={device: order.deployment for device, (_, order) in orders.items()},
            files=tuple(StickFile(path=path, size=size) for path, size in sorted(sizes.items())),
        )
        write_atomic(folder / INDEX, index.to_json())
        if hasattr(os, "sync"):
            os.sync()  # who pulls a stick out has read that it is done
    except OSError as error:
        raise StoreError(f"{folder} cannot be written: {reason(error, folder)}") from error
    details = {"devices": sorted(orders), "artifacts": [one.id for one in manifests], "expires_at": ends.isoformat()}
    fleet.registry.audit.record(actor, "stick.write", str(folder), details)
    return Written(
        tuple(sorted(orders)), tuple(one.id for one in manifests), min([ends, *until.values()]), tuple(warnings)
    )


def read_stick(fleet: Fleet, folder: Path, actor: Actor, *, unsigned: bool = False) -> list[Read]:
    """Take in the reports that devices have written on a stick. What was read before changes nothing.

    ``unsigned``: also those of devices that have no certificate.

    Raises:
        UsageError: there are none.
        RegistryError: the database cannot be used.
    """
    try:
        paths = sorted((folder / REPORTS).glob("*.json"))
    except OSError as error:
        raise UsageError(f"{folder} cannot be read: {reason(error, folder)}") from error
    if not paths:
        raise UsageError(f"{folder} holds no reports: no device has written one under {REPORTS}/")
    recorder = Recorder(fleet.registry)
    found = []
    for path in paths:
        try:
            report = _verified(fleet, path, unsigned=unsigned)
        except (FleetError, MalformedMessageError) as error:
            found.append(Read(path.stem, refused=str(error)))
            continue
        own = [(parse_device(message.topic), message) for message in report.messages]
        messages = [one for topic, one in own if topic is not None and topic[0] == report.device and topic[1] in _READ]
        # As what a broker has kept: it tells how things stood, and not that the device is there now.
        at = min(report.at, actor.at)
        recorder.record([Received(one.topic, one.payload.encode(), at, retained=True) for one in messages])
        reported = next((one for one in messages if one.topic.endswith("/reported")), None)
        found.append(Read(report.device, reported=Reported.from_json(reported.payload) if reported else None))
    taken = [one.device for one in found if one.refused is None]
    fleet.registry.audit.record(actor, "stick.read", str(folder), {"devices": taken})
    return found


def _orders(fleet: Fleet, devices: Sequence[DeviceRow], now: datetime) -> dict[str, tuple[bytes, Desired]]:
    if revoked := [row.id for row in devices if row.revoked_at is not None]:
        raise UsageError(f"revoked, and will believe nothing: {', '.join(revoked[:20])}")
    newest = fleet.registry.deployments.newest([row.id for row in devices], with_envelopes=True)
    orders, without = {}, []
    for row in devices:
        deployment = newest.get(row.id)
        if deployment is None or Stage(deployment.stage) in _VOID:
            without.append(row.id)
            continue
        order = ordered(deployment.envelope)
        if order.expires_at <= now:
            without.append(f"{row.id} (its order ended on {order.expires_at:%Y-%m-%d})")
            continue
        orders[row.id] = (deployment.envelope, order)
    if without:
        raise UsageError(
            f"no order that holds: {', '.join(without[:20])}; give one with `phifleet deploy`, which needs no network"
        )
    return orders


def _verified(fleet: Fleet, path: Path, *, unsigned: bool) -> StickReport:
    try:
        if path.stat().st_size > 4 * MAX_REPORT_BYTES:
            raise UsageError("it is larger than any report")
        signed = SignedReport.from_json(path.read_bytes())
        data = base64.b64decode(signed.report, validate=True)
        signature = base64.b64decode(signed.signature, validate=True)
    except MalformedMessageError:
        raise
    except OSError as error:
        raise UsageError(f"it cannot be read: {reason(error, path.parent)}") from error
    except ValueError as error:  # base64 that is none, in several ways
        raise UsageError(f"it is damaged: {error}") from error
    report = StickReport.from_json(data)
    row = fleet.registry.devices.get(report.device)
    if row.revoked_at is not None:
        raise UsageError(f"{report.device} was revoked")
    if not signed.certificate:
        if not unsigned:
            raise UsageError(
                f"{report.device} has no certificate, so that anybody may have written it; --unsigned takes it"
            )
        return report
    name = fleet.ca.verify(signed.certificate, signature, REPORT_PREFIX + data)
    if name != report.device:
        raise UsageError(f"it is of {report.device}, and signed by {name}")
    return report
