"""The controllers of the fleet: each says every few seconds that it is alive, and whether the broker answers."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import delete, select, update

from fleet.registry.database import Database
from fleet.registry.models import ControllerRow

#: How long a controller that is gone is remembered.
KEPT = timedelta(days=30)


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a controller says of itself. ``connected_since`` None: the broker does not answer, for ``broker_error``."""

    id: str
    host: str
    pid: int
    version: str
    started_at: datetime
    interval_s: float
    broker: str
    connected_since: datetime | None
    broker_error: str | None


class Controllers:
    """Each call is one transaction. Every call raises ``RegistryError`` where the database cannot be used."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def beat(self, heartbeat: Heartbeat, at: datetime) -> None:
        """The controller is alive at ``at``."""
        with self._database.write() as session:
            row = session.get(ControllerRow, heartbeat.id)
            if row is None:
                session.execute(delete(ControllerRow).where(ControllerRow.seen_at < at - KEPT))
                row = ControllerRow(id=heartbeat.id, host=heartbeat.host, pid=heartbeat.pid)
                session.add(row)
            row.version, row.started_at, row.interval_s = heartbeat.version, heartbeat.started_at, heartbeat.interval_s
            row.broker, row.broker_error = heartbeat.broker, heartbeat.broker_error
            row.connected_since, row.seen_at, row.stopped_at = heartbeat.connected_since, at, None

    def stopped(self, controller: str, at: datetime) -> None:
        """The controller has ended in good order."""
        with self._database.write() as session:
            values = {"stopped_at": at, "seen_at": at, "connected_since": None}
            session.execute(update(ControllerRow).where(ControllerRow.id == controller).values(**values))

    def all(self) -> list[ControllerRow]:
        """Return those of the last days, the one that was heard of last first."""
        with self._database.read() as session:
            return list(session.scalars(select(ControllerRow).order_by(ControllerRow.seen_at.desc())))
