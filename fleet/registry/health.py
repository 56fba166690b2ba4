"""Health reports: as they came for two days, then five minutes to a row for a year."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Float, cast, delete, func, select
from sqlalchemy.orm import Session

from fleet.registry.database import Database
from fleet.registry.models import HealthRollupRow, HealthRow
from fleet.registry.rows import insert_those_new

#: How long a report is kept as it came, and a roll-up after that.
KEPT = timedelta(hours=48)
ROLLUP_KEPT = timedelta(days=366)
ROLLUP_MS = 5 * 60 * 1000

#: Rows that ``of`` returns unless it is told otherwise: two hours at one each ten seconds.
NEWEST = 720


class Health:
    """Reads them; the recorder writes them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def of(self, device: str, limit: int = NEWEST) -> list[HealthRow]:
        """Return a device's newest reports, newest first.

        Raises:
            RegistryError: the database cannot be used.
        """
        with self._database.read() as session:
            query = select(HealthRow).where(HealthRow.device == device).order_by(HealthRow.at.desc())
            return list(session.scalars(query.limit(limit)))

    def rollups(self, device: str, limit: int = NEWEST) -> list[HealthRollupRow]:
        """Return a device's five minutes, newest first; they begin where ``KEPT`` ends.

        Raises:
            RegistryError: the database cannot be used.
        """
        with self._database.read() as session:
            query = select(HealthRollupRow).where(HealthRollupRow.device == device).order_by(HealthRollupRow.at.desc())
            return list(session.scalars(query.limit(limit)))


def roll_up(session: Session, device: str, now: datetime) -> None:
    """Turn a device's reports past ``KEPT`` into five minutes each, and delete its roll-ups past ``ROLLUP_KEPT``.

    A model's five minutes are whole when they are rolled up, so a roll-up is never added to. Where a model took over
    within five minutes, the row is of the one that answered more requests.
    """
    until = _bucket(now - KEPT)
    old = (HealthRow.device == device, HealthRow.at < until)
    start = (HealthRow.at - HealthRow.at % ROLLUP_MS).label("at")
    weight = cast(HealthRow.requests, Float)

    def mean(column: Any) -> Any:
        """Weighted with the requests that the figure is of."""
        return func.sum(column * weight) / func.nullif(func.sum(weight).filter(column.is_not(None)), 0.0)

    rows = session.execute(
        select(
            start,
            HealthRow.digest,
            func.sum(HealthRow.requests).label("requests"),
            func.sum(HealthRow.errors).label("errors"),
            mean(HealthRow.ttft_ms_p50).label("ttft_ms_p50"),
            func.max(HealthRow.ttft_ms_p95).label("ttft_ms_p95"),
            mean(HealthRow.tpot_ms_p50).label("tpot_ms_p50"),
            func.max(HealthRow.tpot_ms_p95).label("tpot_ms_p95"),
            func.avg(HealthRow.tokens_per_s).label("tokens_per_s"),
            func.max(HealthRow.memory_bytes).label("memory_bytes"),
            func.max(HealthRow.restarts).label("restarts"),
            func.max(HealthRow.temperature_c).label("temperature_c"),
        )
        .where(*old)
        .group_by(start, HealthRow.digest)
        .order_by(func.sum(HealthRow.requests))
    ).mappings()
    made = {row["at"]: {"device": device, **row} for row in rows}
    if made:
        insert_those_new(session, HealthRollupRow, list(made.values()))
        session.execute(delete(HealthRow).where(*old))
    expired = (HealthRollupRow.device == device, HealthRollupRow.at < _bucket(now - ROLLUP_KEPT))
    session.execute(delete(HealthRollupRow).where(*expired))


def _bucket(at: datetime) -> int:
    moment = int(at.timestamp() * 1000)
    return moment - moment % ROLLUP_MS
