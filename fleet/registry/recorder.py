"""What devices report, parsed off their topics and written down in batches: one transaction for many messages."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
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
from fleet.errors import RegistryError
from fleet.registry.device_states import Report, load_states, store_states
from fleet.registry.health import roll_up
from fleet.registry.models import DeploymentRow
from fleet.registry.rows import OUTSTANDING, apply, in_chunks

_log = structlog.get_logger(component="recorder")

#: Devices whose faulty messages are counted one by one; what comes past that is counted as "*".
MAX_NAMES = 10_000
#: A device's old health reports are rolled up at every so many batches with its reports: two hours at one each 30 s.
ROLL_UP_EVERY = 240

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
    leaf: str
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
        self._turns: dict[str, int] = {}
        self._missing: set[str] = set()

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
        if leaf not in _TYPES:
            return None
        try:
            report = _TYPES[leaf].from_json(received.payload)
        except MalformedMessageError as error:
            return self._malformed(device, leaf, received, str(error))
        if report.device != device:
            return self._malformed(device, leaf, received, f"device is {report.device!r}")
        return _Read(device, leaf, report, received)

    def _malformed(self, device: str, leaf: str, received: Received, error: str) -> _Read:
        if _count(self.malformed, device):
            _log.warning("malformed message ignored", device=device, topic=received.topic, error=error[:500])
        return _Read(device, leaf, None, received)

    def _write(self, session: Session, read: Sequence[_Read]) -> None:
        states = load_states(session, {one.device for one in read})
        away = {name for name, state in states.items() if not state.online}
        deployments = _deployments(session, read, away)
        for one in read:
            state = states.get(one.device)
            if state is None or state.revoked:
                self._ignore(one, revoked=state is not None)
            elif one.report is None:
                state.count_malformed()
            elif state.take(one.leaf, one.report, one.received.at, retained=one.received.retained):
                _log_presence(one)
                if one.device in away and state.online:
                    away.discard(one.device)
                    _start_again(deployments.values(), one.device, one.received.at)
                if isinstance(one.report, Reported):
                    _apply_report(deployments.get(one.report.deployment), one.report, one.received)
        session.flush()
        store_states(session, states.values())
        now = max(one.received.at for one in read)
        reporting = [name for name, state in states.items() if state.figures]
        self._missing |= {name for name in reporting if states[name].is_missing_reports}
        self._roll_up(session, reporting, now)

    def take_missing(self) -> list[str]:
        """Devices of which something did not come, since it was last asked; it may still be retained."""
        missing, self._missing = self._missing, set()
        return sorted(missing)

    def _ignore(self, one: _Read, *, revoked: bool) -> None:
        if _count(self.unknown, one.device):
            event = "message of a revoked device ignored" if revoked else "message of a device that was not added"
            _log.warning(event, device=one.device, topic=one.received.topic)

    def _roll_up(self, session: Session, devices: Iterable[str], now: datetime) -> None:
        for device in devices:
            # Each device at a report of its own: after a restart all of them report at once.
            turn = self._turns.setdefault(device, zlib.crc32(device.encode()) % ROLL_UP_EVERY)
            if turn == 0:
                roll_up(session, device, now)
            self._turns[device] = (turn + 1) % ROLL_UP_EVERY


def _deployments(session: Session, read: Sequence[_Read], away: Collection[str]) -> dict[str, DeploymentRow]:
    """Return those that the batch reports on, and those under way of devices that are ``away``.

    All are locked, in the order of their ids.
    """
    ids = {one.report.deployment for one in read if isinstance(one.report, Reported)}
    for some in in_chunks(sorted(away)):
        under_way = select(DeploymentRow.id).where(
            DeploymentRow.device.in_(some), DeploymentRow.stage.in_(OUTSTANDING), DeploymentRow.started_at.is_not(None)
        )
        ids.update(session.scalars(under_way))
    found: dict[str, DeploymentRow] = {}
    for some in in_chunks(sorted(ids)):
        query = select(DeploymentRow).where(DeploymentRow.id.in_(some)).order_by(DeploymentRow.id)
        found |= {row.id: row for row in session.scalars(query.with_for_update())}
    return found


def _start_again(deployments: Iterable[DeploymentRow], device: str, at: datetime) -> None:
    """The device is back: how long it may still take is counted anew, as its own clock may have stood still."""
    for row in deployments:
        if row.device == device:
            apply(row, core.Returned(at), at)


def _log_presence(one: _Read) -> None:
    if isinstance(one.report, Presence):
        _log.info("presence", device=one.device, online=one.report.online)


def _count(counter: Counter[str], device: str) -> bool:
    """Count, and say whether it is this device's first: names that somebody makes up must not fill memory or log."""
    key = device if device in counter or len(counter) < MAX_NAMES else "*"
    counter[key] += 1
    return counter[key] == 1


def _apply_report(row: DeploymentRow | None, report: Reported, received: Received) -> None:
    if row is None or (row.device, row.sequence) != (report.device, report.sequence):
        return
    stage = row.stage
    try:
        apply(row, core.Report(report.state, report.failure, received.at, report.digest, report.waiting), received.at)
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
