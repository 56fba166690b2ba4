"""Devices by selector: what the database can narrow down it does, and the selector itself decides."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Row, and_, func, or_, select, true

from fleet.core.selectors import And, Compare, Facts, In, Or, Selector, matches
from fleet.registry.database import Database
from fleet.registry.models import ArtifactRow, DeploymentRow, DeviceRow, LabelRow

GIB = 2**30
#: Of a health report, by the name that an overview has for it.
FIGURES = {"tpot_ms": "tpot_ms_p50", "ttft_ms": "ttft_ms_p50", "tokens_per_s": "tokens_per_s"}
#: Rows that are read at a time where a limit may be reached before the last.
_AT_A_TIME = 500


@dataclass(frozen=True, slots=True)
class Found:
    """A device that is meant; ``served`` is the digest of what it says that it serves."""

    device: str
    profile: str
    facts: Facts
    served: str | None


class Inventory:
    """Each call is one transaction. Every call raises ``RegistryError`` where the database cannot be used."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def select(self, selector: Selector, *, after: str | None = None, limit: int | None = None) -> list[Found]:
        """Return the devices that are meant, by id; neither those that were removed nor those that were revoked.

        ``after``: those whose ids come after this one; ``limit``: so many at most.
        """
        query = (
            select(
                DeviceRow.id, DeviceRow.profile, DeviceRow.labels, DeviceRow.online, DeviceRow.agent_version,
                DeviceRow.facts, DeviceRow.reported, DeploymentRow.stage, DeploymentRow.runtime,
            )
            .outerjoin(
                DeploymentRow,
                and_(DeploymentRow.device == DeviceRow.id, DeploymentRow.sequence == DeviceRow.sequence),
            )
            .where(DeviceRow.removed_at.is_(None), DeviceRow.revoked_at.is_(None), _narrowed(selector))
            .where(DeviceRow.id > after if after is not None else true())
            .order_by(DeviceRow.id)
        )  # fmt: skip
        with self._database.read() as session:
            models = {row.digest: row.model for row in session.execute(select(ArtifactRow.digest, ArtifactRow.model))}
            rows = session.execute(query, execution_options={"yield_per": _AT_A_TIME if limit is not None else None})
            meant = (found for found in _read(rows, models) if matches(selector, found.facts))
            return list(itertools.islice(meant, limit))

    def health(self) -> list[tuple[str, str | None, dict[str, Any] | None, datetime | None, float | None]]:
        """Return each device's profile, its artifact, its newest report, when that came, and its interval."""
        query = select(
            DeviceRow.profile, DeviceRow.reported, DeviceRow.health, DeviceRow.health_at, DeviceRow.health_interval_s
        ).where(DeviceRow.removed_at.is_(None), DeviceRow.revoked_at.is_(None))
        with self._database.read() as session:
            rows = session.execute(query)
            return [(row[0], (row[1] or {}).get("artifact"), row[2], row[3], row[4]) for row in rows]

    def figures(self, names: Sequence[str] | None = None) -> list[Row[Any]]:
        """Return one row a device, by name: what an overview shows of it, and no more, so that 10,000 are cheap.

        ``names``: these alone.
        """
        health, reported = DeviceRow.health, DeviceRow.reported
        query = (
            select(
                DeviceRow.id, DeviceRow.profile, DeviceRow.online, DeviceRow.presence_received_at,
                DeviceRow.presence_at, DeviceRow.last_seen, DeviceRow.cloned_at, DeviceRow.health_at,
                DeviceRow.health_interval_s, reported["artifact"].as_string().label("serves"),
                reported["paused"].as_boolean().label("paused"),
                *(health[field].as_float().label(name) for name, field in FIGURES.items()),
                DeploymentRow.stage, DeploymentRow.artifact, DeploymentRow.failure_message,
                DeploymentRow.publish_error, DeploymentRow.finished_at, DeploymentRow.reported_at,
            )
            .outerjoin(
                DeploymentRow,
                and_(DeploymentRow.device == DeviceRow.id, DeploymentRow.sequence == DeviceRow.sequence),
            )
            .where(DeviceRow.removed_at.is_(None), DeviceRow.revoked_at.is_(None))
            .order_by(DeviceRow.id)
        )  # fmt: skip
        with self._database.read() as session:
            if names is None:
                return list(session.execute(query))
            some = (names[start : start + _AT_A_TIME] for start in range(0, len(names), _AT_A_TIME))
            return [row for part in some for row in session.execute(query.where(DeviceRow.id.in_(part)))]

    def summary(self) -> tuple[list[tuple[str, bool, datetime | None]], dict[str, int]]:
        """Return each device's profile, whether it is online and since when that is known; and the count of each state.

        The state is that of the newest order: ``none`` where there is none.
        """
        there = (DeviceRow.removed_at.is_(None), DeviceRow.revoked_at.is_(None))
        states = (
            select(func.coalesce(DeploymentRow.stage, "none"), func.count())
            .select_from(DeviceRow)
            .outerjoin(
                DeploymentRow,
                and_(DeploymentRow.device == DeviceRow.id, DeploymentRow.sequence == DeviceRow.sequence),
            )
            .where(*there)
            .group_by(func.coalesce(DeploymentRow.stage, "none"))
        )
        with self._database.read() as session:
            devices = session.execute(
                select(DeviceRow.profile, DeviceRow.online, DeviceRow.presence_received_at).where(*there)
            )
            counts = {row[0]: row[1] for row in session.execute(states)}
            return [(row[0], row[1], row[2]) for row in devices], counts


def _read(rows: Any, models: dict[str, str]) -> Iterator[Found]:
    for row in rows:
        facts, reported = row.facts or {}, row.reported or {}
        served = reported.get("digest")
        known: dict[str, str | float | None] = {
            "name": row.id,
            "profile": row.profile,
            "agent": row.agent_version or None,
            "served": models.get(served) or reported.get("artifact") if served else None,
            "artifact": reported.get("artifact") if served else None,
            "state": row.stage,
            "presence": "online" if row.online else "offline",
            "machine": facts.get("machine"),
            "runtime": row.runtime,
            "memory_gib": facts["memory_total_bytes"] / GIB if "memory_total_bytes" in facts else None,
            "cpus": facts.get("cpu_count"),
        }
        known |= {f"label.{name}": str(value) for name, value in (row.labels or {}).items()}
        yield Found(row.id, row.profile, known, served)


def _narrowed(selector: Selector) -> ColumnElement[bool]:
    """Return a condition that holds for every device that is meant, and for as few others as is easily said."""
    match selector:
        case Compare(attribute, "=", value):
            return _one_of(attribute, [value])
        case In(attribute, values):
            return _one_of(attribute, values)
        case And(terms):
            return and_(*(_narrowed(term) for term in terms))
        case Or(terms):
            return or_(*(_narrowed(term) for term in terms))
        case _:
            return true()


def _one_of(attribute: str, values: Sequence[str]) -> ColumnElement[bool]:
    if any("*" in value for value in values):
        return true()
    if attribute.startswith("label."):
        name = attribute.removeprefix("label.")
        return DeviceRow.id.in_(select(LabelRow.device).where(LabelRow.name == name, LabelRow.value.in_(values)))
    columns = {"name": DeviceRow.id, "profile": DeviceRow.profile}
    return columns[attribute].in_(values) if attribute in columns else true()
