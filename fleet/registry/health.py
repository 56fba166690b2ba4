"""Health reports: the newest of each device."""

from __future__ import annotations

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from fleet.registry.database import Database
from fleet.registry.models import HealthRow

#: Health reports kept of each device: two hours at one each ten seconds.
HEALTH_KEPT = 720


class Health:
    """Reads them; the recorder writes them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def of(self, device: str, limit: int = HEALTH_KEPT) -> list[HealthRow]:
        """A device's newest reports, newest first.

        Raises:
            RegistryError: the database cannot be used.
        """
        with self._database.read() as session:
            query = select(HealthRow).where(HealthRow.device == device).order_by(HealthRow.id.desc())
            return list(session.scalars(query.limit(limit)))


def keep_newest_health(session: Session, device: str) -> None:
    """Delete a device's reports past the newest ``HEALTH_KEPT``."""
    oldest_kept = (
        select(HealthRow.id)
        .where(HealthRow.device == device)
        .order_by(HealthRow.id.desc())
        .offset(HEALTH_KEPT - 1)
        .limit(1)
        .scalar_subquery()
    )
    session.execute(delete(HealthRow).where(HealthRow.device == device, HealthRow.id < oldest_kept))
