"""Many devices at once: by selector, where the database narrows down and the selector decides, and in columns."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Numeric, Row, Text, and_, case, cast, false, func, literal, or_, select, true
from sqlalchemy.orm import InstrumentedAttribute

from fleet.core.deployments import WAITING, Stage
from fleet.core.freshness import DEFAULT_INTERVAL_S, STALE_INTERVALS, Presence
from fleet.core.selectors import And, Compare, Facts, In, Or, Selector, matches
from fleet.registry.database import Database
from fleet.registry.models import ArtifactRow, DeploymentRow, DeviceRow, LabelRow
from fleet.registry.rows import in_chunks

GIB = 2**30
#: Of a health report, by the name that an overview has for it.
FIGURES = {"tpot_ms": "tpot_ms_p50", "ttft_ms": "ttft_ms_p50", "tokens_per_s": "tokens_per_s"}
#: Rows that are read at a time where a limit may be reached before the last.
_AT_A_TIME = 500
#: Stages of a newest order that a person may have to know of.
_TOLD = (*WAITING, Stage.FAILED, Stage.ROLLED_BACK)
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


class Standing(NamedTuple):
    """Of a device about which there may be something to say: where it stands."""

    device: str
    presence: str
    #: Whether it ever reported its health, and whether that is old.
    reported: bool
    stale: bool
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

    def columns(self, at: datetime, confirmed: datetime | None, names: Sequence[str] | None = None) -> dict[str, str]:
        """Return what an overview shows of each device, or of those that are named: lists in JSON, by name.

        ``devices``, ``profile``, ``artifact`` (empty: it serves none), ``state``, ``presence``, those of ``FIGURES``
        in milliseconds and tokens a second, ``health_age_s`` in seconds, and ``stale``. The database writes them: it
        does so without Python's interpreter, in which others go on meanwhile. ``at`` is now; ``confirmed``: from when
        on a presence counts (``freshness.confirmed_from``).
        """
        age = self._seconds(DeviceRow.health_at, at)
        devices = (
            select(
                DeviceRow.id.label("devices"), DeviceRow.profile.label("profile"),
                func.coalesce(DeviceRow.reported["artifact"].as_string(), "").label("artifact"),
                func.coalesce(DeploymentRow.stage, "none").label("state"),
                presence_column(confirmed).label("presence"),
                # A hundredth of a millisecond is less than what a reading says.
                *(_rounded(DeviceRow.health[field].as_float(), 2).label(name) for name, field in FIGURES.items()),
                _rounded(age, 1).label("health_age_s"), _stale(age).label("stale"),
            )
            .outerjoin(*_NEWEST)
            .where(*_THERE)
            .order_by(DeviceRow.id)
        )  # fmt: skip
        listed = func.json_group_array if self._database.sqlite else func.json_agg
        parts: list[Row[*tuple[Any, ...]]] = []
        with self._database.read() as session:
            for these in _of(names):
                rows = devices.where(these).subquery()
                # Nothing is NULL on PostgreSQL.
                lists = (func.coalesce(cast(listed(column), Text), "[]").label(column.key) for column in rows.columns)
                parts.append(session.execute(select(*lists)).one())
        found = {one.key: _joined(getattr(part, one.key) for part in parts) for one in rows.columns}
        # SQLite has no booleans, and PostgreSQL writes nothing that holds a digit.
        return found | {"stale": found["stale"].replace("0", "false").replace("1", "true")}

    def noteworthy(
        self, at: datetime, confirmed: datetime | None, names: Sequence[str] | None = None
    ) -> list[Standing]:
        """Return the devices about which there may be something to say, by name; all others are as they should be."""
        stale, stage = _stale(self._seconds(DeviceRow.health_at, at)), func.coalesce(DeploymentRow.stage, "none")
        paused = func.coalesce(DeviceRow.reported["paused"].as_boolean(), false())
        cloned, unpublished = DeviceRow.cloned_at.is_not(None), func.coalesce(DeploymentRow.publish_error, "") != ""
        there, reported = presence_column(confirmed), DeviceRow.health_at.is_not(None)
        silent = and_(stale, reported, there == Presence.ONLINE.value)
        known = or_(DeviceRow.last_seen.is_not(None), DeviceRow.presence_at.is_not(None))
        query = (
            select(DeviceRow.id, there, reported, stale, stage, paused, cloned, unpublished, known)
            .outerjoin(*_NEWEST)
            .where(*_THERE)
            .where(or_(cloned, unpublished, paused, silent, stage.in_(_TOLD), DeviceRow.online.is_(False)))
            .order_by(DeviceRow.id)
        )
        with self._database.read() as session:
            return [Standing._make(row) for these in _of(names) for row in session.execute(query.where(these))]

    def details(self, names: Sequence[str]) -> dict[str, Row[*tuple[Any, ...]]]:
        """Return what else there is to say of these devices and their newest orders, by device."""
        query = select(
            DeviceRow.id, DeviceRow.presence_at, DeviceRow.last_seen, DeviceRow.cloned_at, DeviceRow.health_at,
            DeploymentRow.stage, DeploymentRow.artifact, DeploymentRow.failure_message, DeploymentRow.publish_error,
            DeploymentRow.finished_at, DeploymentRow.reported_at,
        ).outerjoin(*_NEWEST)  # fmt: skip
        with self._database.read() as session:
            return {row.id: row for these in _of(names) for row in session.execute(query.where(these))}

    def _seconds(self, since: InstrumentedAttribute[datetime | None], at: datetime) -> ColumnElement[float]:
        """Return what ``freshness.age_s`` says, for a database to work out."""
        if self._database.sqlite:
            moment = at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")
            return func.max(0.0, (func.julianday(moment) - func.julianday(since)) * 86400.0)
        # GREATEST leaves out what is NULL.
        seconds = func.extract("epoch", literal(at) - since)
        return case((since.is_not(None), func.greatest(0.0, seconds)))

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


def _of(names: Iterable[str] | None) -> list[ColumnElement[bool]]:
    """Return conditions that between them, one after the other, mean these devices by name, or all; at least one."""
    if names is None:
        return [true()]
    return [DeviceRow.id.in_(some) for some in in_chunks(sorted(names))] or [false()]


def _stale(age: ColumnElement[float]) -> ColumnElement[bool]:
    """Return what ``freshness.is_stale`` says of that age, for a database to work out."""
    interval = func.coalesce(func.nullif(DeviceRow.health_interval_s, 0.0), DEFAULT_INTERVAL_S)
    return or_(DeviceRow.health_at.is_(None), age > STALE_INTERVALS * interval)


def _rounded(value: ColumnElement[float], digits: int) -> ColumnElement[Any]:
    return func.round(cast(value, Numeric), digits)


def _joined(lists: Iterable[str]) -> str:
    """Return one list in JSON of several."""
    inner = (text.strip()[1:-1] for text in lists)
    return f"[{','.join(text for text in inner if text)}]"


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
