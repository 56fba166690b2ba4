"""Devices by selector: what the database can narrow down it does, and the selector itself decides."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Row, Select, and_, case, false, func, literal, or_, select, true

from fleet.core.freshness import Presence
from fleet.core.selectors import And, Compare, Facts, In, Or, Selector, matches
from fleet.registry.database import Database
from fleet.registry.models import ArtifactRow, DeploymentRow, DeviceRow, LabelRow

GIB = 2**30
#: Of a health report, by the name that an overview has for it.
FIGURES = {"tpot_ms": "tpot_ms_p50", "ttft_ms": "ttft_ms_p50", "tokens_per_s": "tokens_per_s"}
#: Rows that are read at a time where a limit may be reached before the last.
_AT_A_TIME = 500
_THERE = (DeviceRow.removed_at.is_(None), DeviceRow.revoked_at.is_(None))
#: How a device is joined to its newest order.
_NEWEST = (
    DeploymentRow,
    and_(DeploymentRow.device == DeviceRow.id, DeploymentRow.sequence == DeviceRow.sequence),
)


@dataclass(frozen=True, slots=True)
class Found:
    """A device that is meant; ``served`` is the digest of what it says that it serves."""

    device: str
    profile: str
    facts: Facts
    served: str | None


class Figures(NamedTuple):
    """What an overview shows of one device; milliseconds, tokens a second. Empty or ``none`` where there is nothing."""

    device: str
    profile: str
    presence: str
    health_at: datetime | None
    health_interval_s: float | None
    serves: str
    tpot_ms: float | None
    ttft_ms: float | None
    tokens_per_s: float | None
    stage: str
    paused: bool
    cloned: bool
    unpublished: bool
    #: Whether it was ever heard of.
    known: bool


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
            .outerjoin(*_NEWEST)
            .where(*_THERE, _narrowed(selector))
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
        ).where(*_THERE)
        with self._database.read() as session:
            rows = session.execute(query)
            return [(row[0], (row[1] or {}).get("artifact"), row[2], row[3], row[4]) for row in rows]

    def figures(self, confirmed: datetime | None, names: Sequence[str] | None = None) -> list[Figures]:
        """Return one row a device, by name: what an overview shows of each, and no more, so that 10,000 are cheap.

        ``confirmed``: from when on a presence counts (``freshness.confirmed_from``); ``names``: these alone.
        """
        health, reported = DeviceRow.health, DeviceRow.reported
        query = (
            select(
                DeviceRow.id, DeviceRow.profile, presence_column(confirmed), DeviceRow.health_at,
                DeviceRow.health_interval_s, func.coalesce(reported["artifact"].as_string(), ""),
                *(health[field].as_float() for field in FIGURES.values()),
                func.coalesce(DeploymentRow.stage, "none"),
                func.coalesce(reported["paused"].as_boolean(), false()), DeviceRow.cloned_at.is_not(None),
                func.coalesce(DeploymentRow.publish_error, "") != "",
                or_(DeviceRow.last_seen.is_not(None), DeviceRow.presence_at.is_not(None)),
            )
            .outerjoin(*_NEWEST)
            .where(*_THERE)
            .order_by(DeviceRow.id)
        )  # fmt: skip
        return [Figures._make(row) for row in self._rows(query, names)]

    def details(self, names: Sequence[str]) -> dict[str, Row[Any]]:
        """Return what else there is to say of these devices and their newest orders, by device."""
        query = select(
            DeviceRow.id, DeviceRow.presence_at, DeviceRow.last_seen, DeviceRow.cloned_at, DeviceRow.health_at,
            DeploymentRow.stage, DeploymentRow.artifact, DeploymentRow.failure_message, DeploymentRow.publish_error,
            DeploymentRow.finished_at, DeploymentRow.reported_at,
        ).outerjoin(*_NEWEST)  # fmt: skip
        return {row.id: row for row in self._rows(query, names)}

    def _rows(self, query: Select[*tuple[Any, ...]], names: Sequence[str] | None) -> Iterator[Row[*tuple[Any, ...]]]:
        with self._database.read() as session:
            # Of the connection: what the session does for objects is half of the time where there are none.
            connection = session.connection()
            if names is None:
                yield from connection.execute(query).all()
                return
            for start in range(0, len(names), _AT_A_TIME):
                yield from connection.execute(query.where(DeviceRow.id.in_(names[start : start + _AT_A_TIME])))

    def summary(self, confirmed: datetime | None) -> tuple[dict[str, int], dict[str, int]]:
        """Return how many devices have which presence, and how many have which state of their newest order.

        The state is ``none`` where there is no order.
        """
        # Grouped by label: a database cannot tell that two expressions are one whose values are bound apart.
        known = select(presence_column(confirmed).label("found"), func.count()).where(*_THERE)
        state = func.coalesce(DeploymentRow.stage, "none").label("found")
        states = select(state, func.count()).select_from(DeviceRow).outerjoin(*_NEWEST).where(*_THERE)
        with self._database.read() as session:
            by_presence, by_state = (session.execute(one.group_by("found")).all() for one in (known, states))
            return {row[0]: row[1] for row in by_presence}, {row[0]: row[1] for row in by_state}


def presence_column(confirmed: datetime | None) -> ColumnElement[str]:
    """Return what ``freshness.presence`` says, for a database to work out."""
    if confirmed is None:
        return literal(Presence.UNKNOWN.value)
    return case(
        (DeviceRow.online.is_(False), Presence.OFFLINE.value),
        (DeviceRow.presence_received_at >= confirmed, Presence.ONLINE.value),
        else_=Presence.UNKNOWN.value,
    )


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
