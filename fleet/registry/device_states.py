"""What a batch of messages changes of each device: read once, changed in memory, written as one statement for many."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import structlog
from sqlalchemy import bindparam, select, update
from sqlalchemy.orm import Session

from agent.contract.messages import Facts, HealthReport, Presence, Reported
from fleet.core import boots
from fleet.core.freshness import next_interval_s
from fleet.registry.models import DeviceRow, HealthRow
from fleet.registry.rows import in_chunks, insert_those_new

Report = Presence | Facts | Reported | HealthReport

#: A message that comes so long after the will is no late one: the device is back, or the will was of a connection
#: that it had replaced already.
BACK_AFTER = timedelta(seconds=5)

#: What an agent has said before its first health report.
_REPORTS = frozenset({"presence", "facts", "reported"})

_log = structlog.get_logger(component="recorder")
_READ = (
    DeviceRow.id, DeviceRow.revoked_at, DeviceRow.runs, DeviceRow.malformed, DeviceRow.last_seen, DeviceRow.online,
    DeviceRow.presence_received_at, DeviceRow.health_at, DeviceRow.health_interval_s, DeviceRow.agent_version,
    DeviceRow.reported["at"].as_string().label("reported_at"),
)  # fmt: skip


@dataclass(slots=True)
class DeviceState:
    """A device during one batch. ``changes`` are the columns to write, ``figures`` the health reports to keep."""

    device: str
    revoked: bool
    runs: boots.Runs
    malformed: int
    last_seen: datetime | None
    online: bool
    presence_received_at: datetime | None
    health_at: datetime | None
    health_interval_s: float | None
    agent_version: str
    reported_at: datetime | None
    changes: dict[str, Any] = field(default_factory=dict)
    figures: dict[int, dict[str, Any]] = field(default_factory=dict)

    def count_malformed(self) -> None:
        """A message that is none."""
        self.malformed += 1
        self.changes["malformed"] = self.malformed

    def take(self, leaf: str, report: Report, at: datetime, *, retained: bool) -> bool:
        """Return whether the report is newer than what is recorded; then it is what is to be recorded."""
        judged = boots.judge(self.runs, report.boot, leaf, live=not retained, at=at.timestamp())
        if judged.runs is not self.runs:
            self.runs, self.changes["runs"] = judged.runs, judged.runs.to_json()
        if judged.note is not None:
            self._note(judged.note, at)
        if not judged.newer or self._is_older(report):
            return False
        self._apply(report, at)
        if not retained and report.boot is not None and not isinstance(report, Presence):
            self._is_back(at)
        self._was_seen(report, at, retained=retained)
        return True

    @property
    def is_missing_reports(self) -> bool:
        """The run speaks, and of a topic that it has published long ago nothing has come: the broker dropped it."""
        return self.runs.id is not None and not self.runs.counters.keys() >= _REPORTS

    def _note(self, note: boots.Note, at: datetime) -> None:
        hint = "give one of them an identity of its own: `phifleet device add`, then its agent with the new bundle"
        if note is boots.Note.CLONED:
            self.changes["cloned_at"] = at
            _log.warning("two agents speak as one device", device=self.device, hint=hint)
        else:
            self.changes["cloned_at"] = None
            _log.warning("device numbers its starts anew", device=self.device, hint="its state folder was lost")

    def _is_older(self, report: Report) -> bool:
        """Of agents before 0.2, which name no run: a report from before the recorded one."""
        if report.boot is not None or not isinstance(report, Reported) or self.reported_at is None:
            return False
        return report.at < self.reported_at

    def _apply(self, report: Report, at: datetime) -> None:
        match report:
            case Presence():
                self.online, self.presence_received_at = report.online, at
                self.changes |= {"online": report.online, "presence_at": min(report.at or at, at)}
                self.changes |= {"presence_received_at": at}
                if report.agent_version:
                    self.changes["agent_version"] = report.agent_version
            case Facts():
                self.changes["facts"] = report.model_dump(mode="json", exclude={"boot"})
                self.changes["certificate_expires_at"] = report.certificate_expires_at
            case Reported():
                self.reported_at = report.at
                self.changes["reported"] = report.model_dump(mode="json", exclude={"boot"})
            case HealthReport():
                self._take_health(report, at)

    def _take_health(self, report: HealthReport, at: datetime) -> None:
        if self.health_at is not None and at > self.health_at:
            interval = next_interval_s(self.health_interval_s, (at - self.health_at).total_seconds())
            self.health_interval_s = self.changes["health_interval_s"] = interval
        self.health_at = self.changes["health_at"] = at
        self.changes["health"] = report.model_dump(mode="json", exclude={"boot"})
        moment = int(at.timestamp() * 1000)
        self.figures[moment] = {
            "device": self.device,
            "at": moment,
            "digest": report.digest,
            "requests": report.requests,
            "errors": report.errors,
            "ttft_ms_p50": report.ttft_ms_p50,
            "ttft_ms_p95": report.ttft_ms_p95,
            "tpot_ms_p50": report.tpot_ms_p50,
            "tpot_ms_p95": report.tpot_ms_p95,
            "tokens_per_s": report.tokens_per_s,
            "memory_bytes": report.worker_memory_bytes,
            "restarts": report.worker_restarts,
            "temperature_c": report.temperature_c,
        }

    def _is_back(self, at: datetime) -> None:
        if self.online or (self.presence_received_at is not None and at - self.presence_received_at < BACK_AFTER):
            return
        self.online, self.presence_received_at = True, at
        self.changes |= {"online": True, "presence_at": at, "presence_received_at": at}

    def _was_seen(self, report: Report, at: datetime, *, retained: bool) -> None:
        """When the device last spoke: its will is the broker's word, and a retained message is an old one."""
        if isinstance(report, Presence) and not report.online:
            return
        if retained:
            newest = max((one for one in (self.last_seen, report.at) if one is not None), default=None)
            seen = min(newest, at) if newest else None
        else:
            seen = at
        if seen != self.last_seen:
            self.last_seen = self.changes["last_seen"] = seen


def load_states(session: Session, devices: Collection[str]) -> dict[str, DeviceState]:
    """Return those of the devices that are in the fleet, locked in the order of their ids."""
    found: dict[str, DeviceState] = {}
    for some in in_chunks(sorted(devices)):
        query = select(*_READ).where(DeviceRow.id.in_(some), DeviceRow.removed_at.is_(None)).order_by(DeviceRow.id)
        for row in session.execute(query.with_for_update()):
            found[row.id] = DeviceState(
                device=row.id,
                revoked=row.revoked_at is not None,
                runs=boots.Runs.from_json(row.runs),
                malformed=row.malformed,
                last_seen=row.last_seen,
                online=row.online,
                presence_received_at=row.presence_received_at,
                health_at=row.health_at,
                health_interval_s=row.health_interval_s,
                agent_version=row.agent_version,
                reported_at=datetime.fromisoformat(row.reported_at) if row.reported_at else None,
            )
    return found


def store_states(session: Session, states: Iterable[DeviceState]) -> None:
    """Write what has changed."""
    by_columns: defaultdict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    figures: list[dict[str, Any]] = []
    for state in states:
        if state.changes:
            by_columns[tuple(sorted(state.changes))].append({"_device": state.device, **state.changes})
        figures += state.figures.values()
    connection, table = session.connection(), DeviceRow.__table__
    for columns, values in by_columns.items():
        statement = update(table).where(table.c.id == bindparam("_device"))  # type: ignore[arg-type]
        connection.execute(statement.values({name: bindparam(name) for name in columns}), values)
    if figures:
        # Two reports of one moment are one.
        insert_those_new(session, HealthRow, figures)
