"""Deployments: a signed order for one device, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Select, or_, select
from sqlalchemy.orm import Session, undefer

from agent.contract.failures import FailureCode
from agent.contract.messages import Desired
from fleet.core import deployments as core
from fleet.core.deployments import Stage
from fleet.errors import UsageError
from fleet.registry.database import Database
from fleet.registry.models import DeploymentRow, DeviceRow
from fleet.registry.rows import Actor, add_audit, apply, orderable_rows, outstanding, to_core

#: Makes the order for a device, from its id, the sequence number and the deployment's id.
Draft = Callable[[str, int, str], Desired]
Sign = Callable[[Desired], bytes]


class Deployments:
    """Each call is one transaction. Every call raises ``RegistryError`` where the database cannot be used."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, devices: Sequence[str], draft: Draft, sign: Sign, actor: Actor) -> list[DeploymentRow]:
        """Record a signed order for each device, all or none; what was outstanding there is superseded.

        A sequence number is larger than every one recorded *and* every one the device has reported, so that a
        database that was restored from a backup cannot bring forth an order that devices take for a replay.

        Raises:
            UsageError: a device is not there, or was revoked.
        """
        with self._database.read() as session:
            numbers = {row.id: _next_sequence(row) for row in orderable_rows(session, devices)}
        # Signing takes milliseconds each: not while every other writer waits.
        orders = {name: _sign(draft, sign, name, number, actor) for name, number in numbers.items()}
        with self._database.write() as session:
            rows = orderable_rows(session, devices)
            for earlier in outstanding(session, devices):
                apply(earlier, core.Superseded(), actor.at)
            for row in rows:
                row.sequence = _next_sequence(row)
                if row.sequence != numbers[row.id]:  # somebody else was quicker
                    orders[row.id] = _sign(draft, sign, row.id, row.sequence, actor)
            return [_add(session, *orders[row.id], actor) for row in rows]

    def to_publish(self, after_restart: bool, at: datetime) -> dict[str, str]:
        """Whose orders the broker should have, oldest first, as deployment to device.

        Those queued; after a restart, each device's newest that is not over. ``orders`` loads them.
        """
        query = _newest(DeploymentRow.id, DeploymentRow.device).order_by(DeploymentRow.created_at, DeploymentRow.id)
        query = _alive(query, at) if after_restart else query.where(DeploymentRow.stage == Stage.QUEUED.value)
        with self._database.read() as session:
            return {row[0]: row[1] for row in session.execute(query)}

    def orders(self, deployments: Sequence[str], at: datetime) -> list[DeploymentRow]:
        """These deployments with their envelopes; without those that were overtaken or ended meanwhile."""
        query = _newest(DeploymentRow).where(DeploymentRow.id.in_(deployments))
        with self._database.read() as session:
            return list(session.scalars(_alive(query, at).options(undefer(DeploymentRow.envelope))))

    def mark_published(self, deployments: Sequence[str], at: datetime) -> None:
        """The broker has the orders of these deployments."""
        with self._database.write() as session:
            for row in session.scalars(select(DeploymentRow).where(DeploymentRow.id.in_(deployments))):
                row.published_at, row.publish_error = row.published_at or at, None
                apply(row, core.Published(), at)

    def mark_refused(self, errors: Mapping[str, str]) -> None:
        """Why the broker has not taken the orders of these deployments; for those who look at the fleet."""
        with self._database.write() as session:
            for row in session.scalars(select(DeploymentRow).where(DeploymentRow.id.in_(errors))):
                row.publish_error = errors[row.id]

    def tick(self, at: datetime) -> list[DeploymentRow]:
        """Give up on what is past its deadline; returns those."""
        late = select(DeploymentRow).where(DeploymentRow.due_at <= at)
        with self._database.read() as session:
            if session.scalar(late.limit(1)) is None:
                return []
        with self._database.write() as session:
            rows = list(session.scalars(late))
            for row in rows:
                apply(row, core.Tick(at), at)
            return rows

    def get(self, deployment: str) -> DeploymentRow:
        """One deployment by its id.

        Raises:
            UsageError: no such deployment.
        """
        with self._database.read() as session:
            row = session.get(DeploymentRow, deployment, options=[undefer(DeploymentRow.envelope)])
        if row is None:
            raise UsageError(f"no deployment has the id {deployment}")
        return row

    def newest(self) -> dict[str, DeploymentRow]:
        """Each device's newest deployment, by device id."""
        with self._database.read() as session:
            return {row.device: row for row in session.scalars(_newest_of_all(DeploymentRow))}

    def history(self, device: str, limit: int = 20) -> list[DeploymentRow]:
        """A device's deployments, newest first."""
        with self._database.read() as session:
            query = select(DeploymentRow).where(DeploymentRow.device == device)
            return list(session.scalars(query.order_by(DeploymentRow.sequence.desc()).limit(limit)))


def _newest(*columns: Any) -> Select[Any]:
    """Of each device's newest deployment, of the devices that may be ordered."""
    barred = or_(DeviceRow.removed_at.is_not(None), DeviceRow.revoked_at.is_not(None))
    return _newest_of_all(*columns).where(~barred)


def _newest_of_all(*columns: Any) -> Select[Any]:
    query = select(*columns).join(DeviceRow, DeviceRow.id == DeploymentRow.device)
    return query.where(DeploymentRow.sequence == DeviceRow.sequence)


def _alive(query: Select[Any], at: datetime) -> Select[Any]:
    """Without those that were given up; and a cancelled order must not come back when its device is added again."""
    cancelled = DeploymentRow.failure_code.is_not_distinct_from(FailureCode.CANCELLED.value)
    return query.where(DeploymentRow.expires_at > at, DeploymentRow.presumed.is_(False), ~cancelled)


def _next_sequence(device: DeviceRow) -> int:
    reported = int((device.reported or {}).get("sequence", 0))
    return max(device.sequence, reported) + 1


def _sign(draft: Draft, sign: Sign, device: str, sequence: int, actor: Actor) -> tuple[Desired, bytes]:
    order = draft(device, sequence, f"{device[:40]}-{sequence}-{actor.at:%Y%m%dT%H%M%S}")
    return order, sign(order)


def _add(session: Session, order: Desired, envelope: bytes, actor: Actor) -> DeploymentRow:
    artifact = order.artifacts[0]
    row = DeploymentRow(
        id=order.deployment,
        device=order.device,
        artifact=artifact.id,
        digest=artifact.digest,
        sequence=order.sequence,
        envelope=envelope,
        stage=Stage.QUEUED.value,
        presumed=False,
        created_at=actor.at,
        expires_at=order.expires_at,
        deadline_s=order.deadline_s,
        probation_s=order.probation_s,
    )
    row.due_at = core.due_at(to_core(row))
    session.add(row)
    details = {"device": order.device, "artifact": artifact.id, "sequence": order.sequence}
    add_audit(session, actor, "deployment.create", order.deployment, details)
    return row
