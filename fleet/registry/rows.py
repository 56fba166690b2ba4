"""What the parts of the registry share: finding rows, and moving a deployment between its row and the pure core."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from agent.contract.failures import FailureCode
from agent.contract.messages import Failure
from fleet.core import deployments as core
from fleet.core.deployments import TABLE, Stage
from fleet.errors import UsageError
from fleet.registry.models import AuditRow, DeploymentRow, DeviceRow

OUTSTANDING = tuple(stage.value for stage, row in TABLE.items() if row.outstanding)
#: Ids that an error message lists.
MAX_LISTED = 20


@dataclass(frozen=True, slots=True)
class Actor:
    """Who does something, and when; it goes into the audit."""

    who: str
    at: datetime


def device_row(session: Session, device: str) -> DeviceRow:
    """A device that was not removed.

    Raises:
        UsageError: there is none; names those there are.
    """
    row = session.get(DeviceRow, device)
    if row is None or row.removed_at is not None:
        raise UsageError(_no_such_device(session, device))
    return row


def device_rows(session: Session, devices: Sequence[str]) -> list[DeviceRow]:
    """The same for many, in the order named, each once.

    Raises:
        UsageError: one is not there; names those there are.
    """
    query = select(DeviceRow).where(DeviceRow.id.in_(devices), DeviceRow.removed_at.is_(None))
    found = {row.id: row for row in session.scalars(query)}
    return [found.get(device) or device_row(session, device) for device in dict.fromkeys(devices)]


def orderable_rows(session: Session, devices: Sequence[str]) -> list[DeviceRow]:
    """The same, if none of them was revoked.

    Raises:
        UsageError: one is not there, or was revoked.
    """
    rows = device_rows(session, devices)
    for row in rows:
        if row.revoked_at is not None:
            raise UsageError(f"device {row.id}: {revoked_text(row.revoked_at)}")
    return rows


def revoked_text(revoked_at: datetime) -> str:
    """What an operator reads of a revoked device."""
    return (
        f"revoked since {revoked_at:%Y-%m-%d %H:%M} UTC; to have it back, `phifleet device remove` it and "
        "`phifleet device add` it with a new bundle"
    )


def outstanding(session: Session, devices: Sequence[str]) -> Sequence[DeploymentRow]:
    """The deployments of these devices that are not over."""
    query = select(DeploymentRow).where(DeploymentRow.device.in_(devices), DeploymentRow.stage.in_(OUTSTANDING))
    return session.scalars(query).all()


def to_core(row: DeploymentRow) -> core.Deployment:
    """The row as the pure core sees it."""
    failure = None
    if row.failure_code:
        failure = Failure(code=FailureCode(row.failure_code), message=row.failure_message or "")
    return core.Deployment(
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
    session.add(AuditRow(at=actor.at, who=actor.who, action=action, subject=subject, details=details))


def _no_such_device(session: Session, device: str) -> str:
    query = select(DeviceRow.id).where(DeviceRow.removed_at.is_(None)).order_by(DeviceRow.id)
    known = list(session.scalars(query.limit(MAX_LISTED)))
    total = session.scalar(select(func.count()).select_from(query.subquery())) or 0
    more = f" and {total - len(known)} more" if total > len(known) else ""
    return f"no device is named {device}; there are: {', '.join(known) or 'none'}{more}"
