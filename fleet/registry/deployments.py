"""Deployments: a signed order for one device, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime

from sqlalchemy import and_, or_, select
from sqlalchemy.orm import Session, undefer

from agent.contract.messages import Desired
from fleet.core import deployments as core
from fleet.core.deployments import Stage
from fleet.errors import MissingError
from fleet.registry.database import Database
from fleet.registry.models import DeploymentRow, DeviceRow
from fleet.registry.rows import (
    MANY,
    Actor,
    add_audit,
    apply,
    in_chunks,
    orderable_rows,
    outstanding,
    put_in_outbox,
    to_core,
)

#: Orders to one device that a database restored from a backup may have lost; a device that reports more is lying.
MOST_LOST_ORDERS = 1_000_000

#: Makes the order for a device, from its id, the sequence number and the deployment's id.
Draft = Callable[[str, int, str], Desired]
Sign = Callable[[Desired], bytes]
Also = Callable[[Session, list[DeploymentRow]], None]


class Deployments:
    """Each call is one transaction. Every call raises ``RegistryError`` where the database cannot be used."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(
        self, devices: Sequence[str], draft: Draft, sign: Sign, actor: Actor, also: Also | None = None
    ) -> list[DeploymentRow]:
        """Record a signed order for each device, all or none; what was outstanding there is superseded.

        ``also`` is done in the same transaction, on the new rows.

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
            rows = orderable_rows(session, devices, lock=True)
            for earlier in outstanding(session, devices):
                apply(earlier, core.Superseded(), actor.at)
            for row in rows:
                row.sequence = _next_sequence(row)
                if row.sequence != numbers[row.id]:  # somebody else was quicker
                    orders[row.id] = _sign(draft, sign, row.id, row.sequence, actor)
            made = [_add(session, *orders[row.id], actor) for row in rows]
            session.flush()
            put_in_outbox(session, [row.id for row in rows], actor.at)
            if also is not None:
                also(session, made)
            return made

    def withdraw(self, devices: Sequence[str], reason: str, actor: Actor) -> None:
        """Cancel the outstanding deployments of devices, and let nothing of them be published any more."""
        if not devices:
            return
        with self._database.write() as session:
            orderable_rows(session, devices, lock=True)
            for row in outstanding(session, devices):
                apply(row, core.Withdrawn(reason), actor.at)
                add_audit(session, actor, "deployment.cancel", row.id, {"device": row.device})
            put_in_outbox(session, list(devices), actor.at)

    def tick(self, at: datetime) -> list[DeploymentRow]:
        """Give up on what is past its deadline; returns those.

        A device that is not connected cannot report, and its own clock may stand still: it has until its order expires.
        """
        due = and_(DeploymentRow.due_at <= at, or_(DeviceRow.online.is_(True), DeploymentRow.expires_at <= at))
        late = select(DeploymentRow).join(DeviceRow, DeviceRow.id == DeploymentRow.device).where(due)
        late = late.order_by(DeploymentRow.id).limit(MANY)
        with self._database.read() as session:
            if session.scalar(late.limit(1)) is None:
                return []
        with self._database.write() as session:
            rows = list(session.scalars(late.with_for_update(of=DeploymentRow, skip_locked=True)))
            for row in rows:
                apply(row, core.Tick(at), at)
            return rows

    def get(self, deployment: str) -> DeploymentRow:
        """Return one deployment by its id.

        Raises:
            UsageError: no such deployment.
        """
        with self._database.read() as session:
            row = session.get(DeploymentRow, deployment, options=[undefer(DeploymentRow.envelope)])
        if row is None:
            raise MissingError(f"no deployment has the id {deployment}")
        return row

    def newest(self, devices: Sequence[str] | None = None, *, with_envelopes: bool = False) -> dict[str, DeploymentRow]:
        """Return each device's newest deployment, by device id; of these devices, or of all."""
        with self._database.read() as session:
            query = select(DeploymentRow).join(DeviceRow, DeviceRow.id == DeploymentRow.device)
            newest = query.where(DeploymentRow.sequence == DeviceRow.sequence)
            if with_envelopes:
                newest = newest.options(undefer(DeploymentRow.envelope))
            if devices is None:
                return {row.device: row for row in session.scalars(newest)}
            found: dict[str, DeploymentRow] = {}
            for some in in_chunks(devices):
                found |= {row.device: row for row in session.scalars(newest.where(DeviceRow.id.in_(some)))}
            return found

    def history(self, device: str, limit: int = 20) -> list[DeploymentRow]:
        """Return a device's deployments, newest first."""
        with self._database.read() as session:
            query = select(DeploymentRow).where(DeploymentRow.device == device)
            return list(session.scalars(query.order_by(DeploymentRow.sequence.desc()).limit(limit)))


def _next_sequence(device: DeviceRow) -> int:
    """Return one more than was ever recorded or reported.

    A report that is beyond belief moves only its device's past.
    """
    reported = int((device.reported or {}).get("sequence", 0))
    believed = reported if reported - device.sequence <= MOST_LOST_ORDERS else 0
    return max(device.sequence, believed) + 1


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
        digests=[variant.digest for variant in order.artifacts],
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
