"""What the broker is to be told, device by device: claimed by one controller at a time, gone once it was told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from sqlalchemy import delete, func, or_, select, update
from sqlalchemy.orm import Session

from agent.contract.failures import FailureCode
from fleet.core import deployments as core
from fleet.registry.database import Database
from fleet.registry.models import DeploymentRow, DeviceRow, OutboxRow
from fleet.registry.rows import apply, in_chunks, put_in_outbox

#: How long one controller alone may publish to a device. It gives a publication up after ``PUBLISH_TIMEOUT_S`` and the
#: broker a silent controller after one and a half of its keep-alive (MQTT 5, section 3.1.2.10), which are 10 s and 15 s
#: (``fleet.daemon``): what one controller has sent cannot arrive after another one has claimed the device.
LEASE = timedelta(seconds=40)


@dataclass(frozen=True, slots=True)
class Claim:
    """A device whose topics one controller may publish now, and what is to be there.

    ``order`` None: nothing, for the device is barred or its order is over. ``barred``: what the device itself has
    published goes too.
    """

    device: str
    version: int
    attempts: int
    deployment: str | None
    order: bytes | None = field(repr=False)
    barred: bool


class OutboxTable:
    """Each call is one transaction. Every call raises ``RegistryError`` where the database cannot be used."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def claim(self, owner: str, at: datetime, most: int) -> list[Claim]:
        """Devices that are due and that no other controller holds, with what the tables say of them now."""
        free = or_(OutboxRow.lease_until.is_(None), OutboxRow.lease_until <= at, OutboxRow.lease_owner == owner)
        query = select(OutboxRow).where(OutboxRow.due_at <= at, free).order_by(OutboxRow.due_at, OutboxRow.device)
        with self._database.read() as session:  # a writer that waits for nothing would keep others waiting
            if session.execute(query.limit(1)).first() is None:
                return []
        with self._database.write() as session:
            rows = list(session.scalars(query.limit(most).with_for_update(skip_locked=True)))
            for row in rows:
                row.lease_owner, row.lease_until = owner, at + LEASE
            session.flush()
            return _claims(session, rows, at)

    def complete(self, owner: str, claims: Sequence[Claim], at: datetime) -> list[Claim]:
        """The broker has acknowledged these; returns those that are done, the others have changed meanwhile."""
        done: list[Claim] = []
        with self._database.write() as session:
            for some in in_chunks(sorted(claims, key=lambda claim: claim.device)):
                _cleared(session, [claim.device for claim in some if claim.barred])
                _published(session, [claim.deployment for claim in some if claim.deployment], at)
                for claim in some:
                    ours = (OutboxRow.device == claim.device, OutboxRow.lease_owner == owner)
                    same = delete(OutboxRow).where(*ours, OutboxRow.version == claim.version)
                    if session.execute(same).rowcount:  # type: ignore[attr-defined]
                        done.append(claim)
                    else:
                        session.execute(update(OutboxRow).where(*ours).values(lease_owner=None, lease_until=None))
        return done

    def refused(self, owner: str, errors: Mapping[str, tuple[Claim, str, datetime]]) -> None:
        """Why the broker has not taken these, by device, and when to try again; the lease goes on until it ends.

        Another controller may be able to, but not before nothing of ours can arrive any more.
        """
        with self._database.write() as session:
            for device in sorted(errors):
                claim, error, again = errors[device]
                if claim.deployment:
                    held = update(DeploymentRow).where(DeploymentRow.id == claim.deployment)
                    session.execute(held.values(publish_error=error))
                ours = update(OutboxRow).where(OutboxRow.device == device, OutboxRow.lease_owner == owner)
                changed = {"attempts": OutboxRow.attempts + 1}
                session.execute(ours.where(OutboxRow.version == claim.version).values(due_at=again, **changed))

    def release(self, owner: str) -> None:
        """This controller has ended in good order: nothing of it is on its way to the broker."""
        with self._database.write() as session:
            ours = update(OutboxRow).where(OutboxRow.lease_owner == owner)
            session.execute(ours.values(lease_owner=None, lease_until=None))

    def take_over(self, at: datetime) -> None:
        """On SQLite there is one controller: what the one before held when it was killed, or tries later, is due."""
        if not self._database.sqlite:
            return
        with self._database.write() as session:
            session.execute(update(OutboxRow).values(lease_owner=None, lease_until=None, due_at=at))

    def put(self, devices: Sequence[str], at: datetime) -> None:
        """Tell the broker about these (again)."""
        with self._database.write() as session:
            put_in_outbox(session, devices, at)

    def waiting(self) -> int:
        """Return how many devices wait to be told."""
        with self._database.read() as session:
            return session.scalar(select(func.count()).select_from(OutboxRow)) or 0

    def expected(self, devices: Sequence[str], at: datetime) -> dict[str, bytes | None]:
        """By device, the order that the broker should have retained; None where it should have none.

        Without those that are in the outbox: what the broker has of them is not settled.
        """
        with self._database.read() as session:
            unsettled = set(session.scalars(select(OutboxRow.device).where(OutboxRow.device.in_(devices))))
            orders = _orders(session, devices, at)
            return {device: orders.get(device, (None, None))[1] for device in devices if device not in unsettled}


def _claims(session: Session, rows: Sequence[OutboxRow], at: datetime) -> list[Claim]:
    names = [row.device for row in rows]
    query = select(DeviceRow.id).where(DeviceRow.id.in_(names))
    barred = set(
        session.scalars(query.where(or_(DeviceRow.removed_at.is_not(None), DeviceRow.revoked_at.is_not(None))))
    )
    orders = _orders(session, names, at)
    claims = []
    for row in rows:
        deployment, order = orders.get(row.device, (None, None))
        claims.append(Claim(row.device, row.version, row.attempts, deployment, order, row.device in barred))
    return claims


def _orders(session: Session, devices: Sequence[str], at: datetime) -> dict[str, tuple[str, bytes]]:
    """By device, the newest deployment of those that are not barred, if it is not over for the controller."""
    query = (
        select(DeploymentRow.device, DeploymentRow.id, DeploymentRow.envelope)
        .join(DeviceRow, DeviceRow.id == DeploymentRow.device)
        .where(DeploymentRow.sequence == DeviceRow.sequence)
        .where(DeviceRow.id.in_(devices), DeviceRow.removed_at.is_(None), DeviceRow.revoked_at.is_(None))
        .where(DeploymentRow.expires_at > at, DeploymentRow.presumed.is_(False))
        # A cancelled order must not come back when its device is added again.
        .where(~DeploymentRow.failure_code.is_not_distinct_from(FailureCode.CANCELLED.value))
    )
    return {device: (deployment, envelope) for device, deployment, envelope in session.execute(query)}


def _published(session: Session, deployments: Sequence[str], at: datetime) -> None:
    query = select(DeploymentRow).where(DeploymentRow.id.in_(deployments)).order_by(DeploymentRow.id)
    for row in session.scalars(query.with_for_update()):
        row.published_at, row.publish_error = row.published_at or at, None
        apply(row, core.Published(), at)
    session.flush()


def _cleared(session: Session, devices: Sequence[str]) -> None:
    barred = or_(DeviceRow.removed_at.is_not(None), DeviceRow.revoked_at.is_not(None))
    session.execute(update(DeviceRow).where(DeviceRow.id.in_(devices), barred).values(cleared=True))
