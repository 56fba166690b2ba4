"""What devices say, parsed off their topics and written down in batches: one transaction for many messages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

import structlog
from sqlalchemy import update
from sqlalchemy.exc import DataError, IntegrityError
from sqlalchemy.orm import Session

from agent.contract import topics
from agent.contract.base import MalformedMessageError
from agent.contract.messages import Facts, HealthReport, Presence, Reported
from fleet.core import deployments as core
from fleet.errors import RegistryError
from fleet.registry.models import DeploymentRow, DeviceRow, HealthRow
from fleet.registry.registry import Registry, keep_newest_health, store, view

_log = structlog.get_logger("recorder")

Said = Presence | Facts | Reported | HealthReport
#: Devices whose faulty messages are counted one by one; what comes past that is counted as "*".
MAX_NAMES = 10_000

_TYPES: dict[str, type[Said]] = {
    "presence": Presence,
    "facts": Facts,
    "reported": Reported,
    "health": HealthReport,
}


@dataclass(frozen=True, slots=True)
class Heard:
    """One publication of a device, and when it came. ``retained``: said before the controller was listening."""

    topic: str
    payload: bytes
    at: datetime
    retained: bool = False


Entry = Callable[[Session], None]


class Recorder:
    """Turns publications into rows. Malformed ones are counted, and logged once per device."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self.malformed: Counter[str] = Counter()
        self.unknown: Counter[str] = Counter()

    def record(self, batch: Sequence[Heard]) -> None:
        """Write a batch down.

        Raises:
            RegistryError: the database cannot be used; nothing of the batch was written.
        """
        entries = [entry for heard in batch if (entry := self._entry(heard)) is not None]
        if not entries:
            return
        try:
            self._registry.record(entries)
        except RegistryError as error:
            if not isinstance(error.__cause__, (DataError, IntegrityError)):
                raise
            self._record_singly(entries)

    def _record_singly(self, entries: Sequence[Entry]) -> None:
        """One message that the database will not take must not cost the others of its batch."""
        for entry in entries:
            try:
                self._registry.record([entry])
            except RegistryError as error:
                if not isinstance(error.__cause__, (DataError, IntegrityError)):
                    raise
                _log.warning("message dropped", reason=str(error))

    def _entry(self, heard: Heard) -> Entry | None:
        found = topics.parse_device(heard.topic)
        if found is None or not heard.payload:  # an empty payload clears a retained message
            return None
        device, leaf = found
        try:
            message = _TYPES[leaf].from_json(heard.payload)
        except (MalformedMessageError, KeyError) as error:
            return self._reject(device, leaf, str(error))
        if message.device != device:
            return self._reject(device, leaf, f"device is {message.device!r} on {heard.topic}")
        return lambda session: self._apply(session, device, message, heard)

    def _reject(self, device: str, leaf: str, reason: str) -> Entry:
        if _count(self.malformed, device):
            _log.warning("malformed message ignored", device=device, leaf=leaf, reason=reason[:500])
        counted = update(DeviceRow).where(DeviceRow.id == device).values(malformed=DeviceRow.malformed + 1)

        def count(session: Session) -> None:
            session.execute(counted)

        return count

    def _apply(self, session: Session, device: str, message: Said, heard: Heard) -> None:
        row = session.get(DeviceRow, device)
        if row is None or row.removed_at is not None:
            if _count(self.unknown, device):
                _log.warning("message of a device that was not added", device=device, topic=heard.topic)
            return
        match message:
            case Presence():
                row.online, row.presence_at = message.online, message.at or heard.at
                row.agent_version = message.agent_version or row.agent_version
                _log.info("presence", device=device, online=message.online)
            case Facts():
                row.facts = message.model_dump(mode="json")
            case Reported():
                row.reported = message.model_dump(mode="json")
                _apply_report(session, message, heard)
            case HealthReport():
                row.health = message.model_dump(mode="json")
                session.add(HealthRow(device=device, at=heard.at, report=row.health))
                session.flush()
                keep_newest_health(session, device)
        row.last_seen = _seen(row.last_seen, message, heard)


def _count(counter: Counter[str], device: str) -> bool:
    """Count, and say whether it is this device's first: names that somebody makes up must not fill memory or log."""
    key = device if device in counter or len(counter) < MAX_NAMES else "*"
    counter[key] += 1
    return counter[key] == 1


def _seen(before: datetime | None, message: Said, heard: Heard) -> datetime | None:
    """When the device last spoke: its will is the broker's word, and a retained message is an old one."""
    if isinstance(message, Presence) and not message.online:
        return before
    if not heard.retained:
        return heard.at
    newest = max((at for at in (before, message.at) if at is not None), default=None)
    return min(newest, heard.at) if newest else None


def _apply_report(session: Session, message: Reported, heard: Heard) -> None:
    row = session.get(DeploymentRow, message.deployment) if message.deployment else None
    if row is None or row.device != message.device or row.sequence != message.sequence:
        return
    stage = row.stage
    try:
        decided = core.decide(view(row), core.Report(message.state, message.failure, heard.at))
    except core.TransitionError as error:
        _log.debug("report not taken", deployment=row.id, device=row.device, reason=str(error))
        return
    store(row, decided, heard.at)
    row.reported_at = heard.at
    row.progress = message.progress.model_dump(mode="json") if message.progress else row.progress
    row.proof = message.proof.model_dump(mode="json") if message.proof else row.proof
    row.runtime, row.endpoint, row.served_digest = message.runtime, message.endpoint, message.digest
    if row.stage != stage:
        failure = {"failure": row.failure_code, "reason": row.failure_message} if row.failure_code else {}
        _log.info("deployment", deployment=row.id, device=row.device, state=row.stage, artifact=row.artifact, **failure)
