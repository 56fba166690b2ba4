"""What devices report, parsed off their topics and written down in batches: one transaction for many messages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import structlog
from sqlalchemy import select
from sqlalchemy.exc import DataError, IntegrityError
from sqlalchemy.orm import Session

from agent.contract import topics
from agent.contract.base import MalformedMessageError
from agent.contract.messages import Facts, HealthReport, Presence, Reported
from fleet.core import deployments as core
from fleet.core.freshness import next_interval_s
from fleet.errors import RegistryError
from fleet.registry.health import keep_newest_health
from fleet.registry.models import DeploymentRow, DeviceRow, HealthRow
from fleet.registry.rows import apply

_log = structlog.get_logger("recorder")

Report = Presence | Facts | Reported | HealthReport
#: Devices whose faulty messages are counted one by one; what comes past that is counted as "*".
MAX_NAMES = 10_000
#: A device's old health reports are deleted at its first batch and then at every so many.
PRUNE_EVERY = 32

_TYPES: dict[str, type[Report]] = {
    "presence": Presence,
    "facts": Facts,
    "reported": Reported,
    "health": HealthReport,
}


@dataclass(frozen=True, slots=True)
class Received:
    """One publication of a device, and when it came. ``retained``: it was published before the controller listened."""

    topic: str
    payload: bytes
    at: datetime
    retained: bool = False


@dataclass(frozen=True, slots=True)
class _Read:
    """A publication that was parsed; ``report`` is None when it was malformed."""

    device: str
    report: Report | None
    received: Received


class Sink(Protocol):
    """What the recorder needs of the registry."""

    def record(self, write: Callable[[Session], None]) -> None:
        """One transaction."""
        ...


class Recorder:
    """Turns publications into rows. Malformed ones are counted, and logged once per device."""

    def __init__(self, registry: Sink) -> None:
        self._registry = registry
        self.malformed: Counter[str] = Counter()
        self.unknown: Counter[str] = Counter()
        self._unpruned: Counter[str] = Counter()

    def record(self, batch: Sequence[Received]) -> None:
        """Write a batch down.

        Raises:
            RegistryError: the database cannot be used; nothing of the batch was written.
        """
        read = [found for received in batch if (found := self._read(received)) is not None]
        if read and not self._written(read):
            # One message that the database will not take must not cost the others of its batch.
            for one in read:
                self._written([one])

    def _written(self, read: Sequence[_Read]) -> bool:
        try:
            self._registry.record(lambda session: self._write(session, read))
        except RegistryError as error:
            if not isinstance(error.__cause__, (DataError, IntegrityError)):
                raise
            if len(read) == 1:
                _log.warning("message dropped", device=read[0].device, error=str(error))
            return False
        return True

    def _read(self, received: Received) -> _Read | None:
        found = topics.parse_device(received.topic)
        if found is None or not received.payload:  # an empty payload clears a retained message
            return None
        device, leaf = found
        try:
            report = _TYPES[leaf].from_json(received.payload)
        except (MalformedMessageError, KeyError) as error:
            return self._malformed(device, received, str(error))
        if report.device != device:
            return self._malformed(device, received, f"device is {report.device!r}")
        return _Read(device, report, received)

    def _malformed(self, device: str, received: Received, error: str) -> _Read:
        if _count(self.malformed, device):
            _log.warning("malformed message ignored", device=device, topic=received.topic, error=error[:500])
        return _Read(device, None, received)

    def _write(self, session: Session, read: Sequence[_Read]) -> None:
        names = {one.device for one in read}
        query = select(DeviceRow).where(DeviceRow.id.in_(names), DeviceRow.removed_at.is_(None))
        devices = {row.id: row for row in session.scalars(query)}
        named = {one.report.deployment for one in read if isinstance(one.report, Reported)}
        deployments = {row.id: row for row in session.scalars(select(DeploymentRow).where(DeploymentRow.id.in_(named)))}
        for one in read:
            row = devices.get(one.device)
            if row is None or row.revoked_at is not None:
                self._ignore(one, revoked=row is not None)
            elif one.report is None:
                row.malformed += 1
            else:
                _apply(session, row, one.report, one.received, deployments)
        self._prune(session, {one.device for one in read if isinstance(one.report, HealthReport)} & devices.keys())

    def _ignore(self, one: _Read, *, revoked: bool) -> None:
        if _count(self.unknown, one.device):
            event = "message of a revoked device ignored" if revoked else "message of a device that was not added"
            _log.warning(event, device=one.device, topic=one.received.topic)

    def _prune(self, session: Session, devices: Collection[str]) -> None:
        for device in devices:
            if self._unpruned[device] == 0:
                session.flush()
                keep_newest_health(session, device)
            self._unpruned[device] = (self._unpruned[device] + 1) % PRUNE_EVERY


def _apply(
    session: Session, row: DeviceRow, report: Report, received: Received, deployments: Mapping[str, DeploymentRow]
) -> None:
    match report:
        case Presence():
            row.online, row.presence_at = report.online, report.at or received.at
            row.presence_received_at = received.at
            row.agent_version = report.agent_version or row.agent_version
            _log.info("presence", device=row.id, online=report.online)
        case Facts():
            row.facts = report.model_dump(mode="json")
        case Reported():
            row.reported = report.model_dump(mode="json")
            deployment = deployments.get(report.deployment)
            if deployment is not None and (deployment.device, deployment.sequence) == (report.device, report.sequence):
                _apply_report(deployment, report, received)
        case HealthReport():
            _time_health(row, received.at)
            row.health = report.model_dump(mode="json")
            session.add(HealthRow(device=row.id, at=received.at, report=row.health))
    row.last_seen = _seen(row.last_seen, report, received)


def _time_health(row: DeviceRow, at: datetime) -> None:
    if row.health_at is not None and at > row.health_at:
        row.health_interval_s = next_interval_s(row.health_interval_s, (at - row.health_at).total_seconds())
    row.health_at = at


def _count(counter: Counter[str], device: str) -> bool:
    """Count, and say whether it is this device's first: names that somebody makes up must not fill memory or log."""
    key = device if device in counter or len(counter) < MAX_NAMES else "*"
    counter[key] += 1
    return counter[key] == 1


def _seen(before: datetime | None, report: Report, received: Received) -> datetime | None:
    """When the device last spoke: its will is the broker's word, and a retained message is an old one."""
    if isinstance(report, Presence) and not report.online:
        return before
    if not received.retained:
        return received.at
    newest = max((at for at in (before, report.at) if at is not None), default=None)
    return min(newest, received.at) if newest else None


def _apply_report(row: DeploymentRow, report: Reported, received: Received) -> None:
    stage = row.stage
    try:
        apply(row, core.Report(report.state, report.failure, received.at), received.at)
    except core.TransitionError as error:
        _log.debug("report not taken", deployment=row.id, device=row.device, error=str(error))
        return
    row.reported_at = received.at
    row.progress = report.progress.model_dump(mode="json") if report.progress else row.progress
    row.proof = report.proof.model_dump(mode="json") if report.proof else row.proof
    row.runtime, row.endpoint, row.served_digest = report.runtime, report.endpoint, report.digest
    if row.stage != stage:
        failure = {"code": row.failure_code, "error": row.failure_message} if row.failure_code else {}
        _log.info("deployment", deployment=row.id, device=row.device, state=row.stage, artifact=row.artifact, **failure)
