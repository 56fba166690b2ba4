"""What the parts of the registry share: finding rows, and moving a deployment between its row and the pure core."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from sqlalchemy import func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import DeclarativeBase, Session

from agent.contract.failures import FailureCode
from agent.contract.messages import Failure
from fleet.core import deployments as core
from fleet.core.deployments import TABLE, Stage
from fleet.errors import ConflictError, MissingError
from fleet.registry.audit_chain import Entry, wait_for_the_end
from fleet.registry.models import DeploymentRow, DeviceRow, OutboxRow

T = TypeVar("T")

OUTSTANDING = tuple(stage.value for stage, row in TABLE.items() if row.outstanding)
#: Values that one statement names: databases bound it (PostgreSQL 65,535, SQLite 32,766).
MANY = 1000
#: Ids that an error message lists.
MAX_LISTED = 20


@dataclass(frozen=True, slots=True)
class Actor:
    """Who does something, and when; it goes into the audit."""

    who: str
    at: datetime


def in_chunks(values: Iterable[T], size: int = MANY) -> Iterator[list[T]]:
    """Yield the values, at most ``size`` at a time."""
    rest = iter(values)
    while chunk := list(itertools.islice(rest, size)):
        yield chunk


def device_row(session: Session, device: str, *, lock: bool = False) -> DeviceRow:
    """A device that was not removed; with ``lock``, nobody else changes it until the transaction ends.

    Raises:
        UsageError: there is none; names those there are.
    """
    row = session.get(DeviceRow, device, with_for_update=lock or None)
    if row is None or row.removed_at is not None:
        raise MissingError(_no_such_device(session, device))
    return row


def device_rows(session: Session, devices: Sequence[str], *, lock: bool = False) -> list[DeviceRow]:
    """Return the same for many, in the order named, each once. They are locked in the order of their ids.

    Raises:
        UsageError: one is not there; names those there are.
    """
    found: dict[str, DeviceRow] = {}
    for some in in_chunks(sorted(set(devices))):
        query = select(DeviceRow).where(DeviceRow.id.in_(some), DeviceRow.removed_at.is_(None)).order_by(DeviceRow.id)
        found |= {row.id: row for row in session.scalars(query.with_for_update() if lock else query)}
    return [found.get(device) or device_row(session, device) for device in dict.fromkeys(devices)]


def orderable_rows(session: Session, devices: Sequence[str], *, lock: bool = False) -> list[DeviceRow]:
    """Return the same, if none of them was revoked.

    Raises:
        UsageError: one is not there, or was revoked.
    """
    rows = device_rows(session, devices, lock=lock)
    for row in rows:
        if row.revoked_at is not None:
            raise ConflictError(f"device {row.id}: {revoked_text(row.revoked_at)}")
    return rows


def revoked_text(revoked_at: datetime) -> str:
    """Return what an operator reads of a revoked device."""
    return (
        f"revoked since {revoked_at:%Y-%m-%d %H:%M} UTC; to have it back, `phifleet device remove` it and "
        "`phifleet device add` it with a new bundle"
    )


def outstanding(session: Session, devices: Sequence[str]) -> list[DeploymentRow]:
    """Return the deployments of these devices that are not over, locked in the order of their ids."""
    found: list[DeploymentRow] = []
    for some in in_chunks(sorted(set(devices))):
        query = select(DeploymentRow).where(DeploymentRow.device.in_(some), DeploymentRow.stage.in_(OUTSTANDING))
        found += session.scalars(query.order_by(DeploymentRow.id).with_for_update())
    return found


def insert_if_new(session: Session, model: type[DeclarativeBase], row: Mapping[str, Any]) -> bool:
    """Insert the row unless its key is there; returns whether it was inserted.

    Who looks first and then inserts is overtaken by another process between the two. This waits for the other one's
    transaction, and then leaves what it has written alone.
    """
    # RETURNING, as not every driver counts the rows of an INSERT.
    statement = _upsert(session, model).on_conflict_do_nothing().returning(*model.__table__.primary_key)
    return session.connection().execute(statement, dict(row)).first() is not None


def insert_those_new(session: Session, model: type[DeclarativeBase], rows: Sequence[Mapping[str, Any]]) -> None:
    """The same for many, in the order of their keys, as locks are taken."""
    session.connection().execute(_upsert(session, model).on_conflict_do_nothing(), list(rows))


def put_in_outbox(session: Session, devices: Sequence[str], at: datetime) -> None:
    """The broker is to be told what the tables say of these devices now; who publishes an earlier state is not done."""
    for some in in_chunks(sorted(set(devices))):
        rows = [{"device": device, "version": 1, "due_at": at, "attempts": 0} for device in some]
        changed = {"version": OutboxRow.version + 1, "due_at": at, "attempts": 0}
        put = _upsert(session, OutboxRow).on_conflict_do_update(index_elements=[OutboxRow.device], set_=changed)
        session.connection().execute(put, rows)


def _upsert(session: Session, model: type[DeclarativeBase]) -> Any:
    """SQL has no word for it that both databases know; SQLAlchemy keeps each one's own."""
    kind = postgresql if session.connection().dialect.name == "postgresql" else sqlite
    return kind.insert(model.__table__)


def to_core(row: DeploymentRow) -> core.Deployment:
    """Return the row as the pure core sees it."""
    failure = None
    if row.failure_code:
        failure = Failure(code=FailureCode(row.failure_code), message=row.failure_message or "")
    return core.Deployment(
        digests=frozenset(row.digests or [row.digest]),
        stage=Stage(row.stage),
        expires_at=row.expires_at,
        deadline_s=row.deadline_s,
        probation_s=row.probation_s,
        started_at=row.started_at,
        failure=failure,
        presumed=row.presumed,
    )


def apply(row: DeploymentRow, event: core.Event, at: datetime) -> None:
    """Let the core decide about an event, and put what it decided into the row.

    Raises:
        TransitionError: the core does not allow the event; the row is unchanged.
    """
    decided = core.decide(to_core(row), event)
    row.stage, row.presumed, row.started_at = decided.stage.value, decided.presumed, decided.started_at
    row.failure_code = decided.failure.code.value if decided.failure else None
    row.failure_message = decided.failure.message if decided.failure else None
    row.due_at = core.due_at(decided)
    row.finished_at = None if TABLE[decided.stage].outstanding else row.finished_at or at


def add_audit(session: Session, actor: Actor, action: str, subject: str, details: dict[str, Any] | None = None) -> None:
    """Write down what was done, in the transaction that does it."""
    wait_for_the_end(session, Entry(actor.at, actor.who, action, subject, details))


def _no_such_device(session: Session, device: str) -> str:
    query = select(DeviceRow.id).where(DeviceRow.removed_at.is_(None)).order_by(DeviceRow.id)
    known = list(session.scalars(query.limit(MAX_LISTED)))
    total = session.scalar(select(func.count()).select_from(query.subquery())) or 0
    more = f" and {total - len(known)} more" if total > len(known) else ""
    return f"no device is named {device}; there are: {', '.join(known) or 'none'}{more}"
