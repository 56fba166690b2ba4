"""The devices of the fleet."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select, update

from agent.contract.messages import Facts
from agent.contract.profile import DeviceProfile
from fleet.core import deployments as core
from fleet.errors import UsageError
from fleet.registry.database import Database
from fleet.registry.models import DeviceRow
from fleet.registry.rows import Actor, add_audit, apply, device_row, outstanding


class Devices:
    """Each call is one transaction. Every call raises ``RegistryError`` where the database cannot be used."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, device: str, profile: DeviceProfile, document: dict[str, Any] | None, actor: Actor) -> None:
        """Record a device; one that was removed may be added again, and its sequence goes on.

        ``document`` is the whole profile where it is not one that comes with phifleet.

        Raises:
            UsageError: it is there already.
        """
        with self._database.write() as session:
            row = session.get(DeviceRow, device)
            if row is not None and row.removed_at is None:
                raise UsageError(f"device {device} is there already; remove it first, or choose another id")
            if row is None:
                row = DeviceRow(id=device, added_at=actor.at)
                session.add(row)
            row.profile, row.profile_document = profile.name, document
            row.added_at, row.removed_at, row.cleared = actor.at, None, False
            row.facts = row.reported = row.health = row.last_seen = None
            add_audit(session, actor, "device.add", device, {"profile": profile.name})

    def remove(self, device: str, actor: Actor) -> None:
        """Forget a device: its outstanding deployment is cancelled, and the controller clears its topics.

        Raises:
            UsageError: no such device.
        """
        with self._database.write() as session:
            row = device_row(session, device)
            row.removed_at, row.online = actor.at, False
            for deployment in outstanding(session, [device]):
                apply(deployment, core.Withdrawn(), actor.at)
            add_audit(session, actor, "device.remove", device)

    def get(self, device: str) -> DeviceRow:
        """One device.

        Raises:
            UsageError: no such device; names those there are.
        """
        with self._database.read() as session:
            return device_row(session, device)

    def all(self, profile: str | None = None) -> list[DeviceRow]:
        """All that were not removed, by id; with ``profile``, those of that profile."""
        with self._database.read() as session:
            query = select(DeviceRow).where(DeviceRow.removed_at.is_(None)).order_by(DeviceRow.id)
            return list(session.scalars(query.where(DeviceRow.profile == profile) if profile else query))

    def to_clear(self) -> list[str]:
        """Devices that were removed and whose retained messages are still at the broker."""
        with self._database.read() as session:
            query = select(DeviceRow.id).where(DeviceRow.removed_at.is_not(None), DeviceRow.cleared.is_(False))
            return list(session.scalars(query))

    def mark_cleared(self, device: str) -> None:
        """The removed device's retained messages are gone."""
        with self._database.write() as session:
            session.execute(
                update(DeviceRow).where(DeviceRow.id == device, DeviceRow.removed_at.is_not(None)).values(cleared=True)
            )


def facts_of(row: DeviceRow) -> Facts | None:
    """What the device has reported about itself, or None when it has not."""
    return Facts.model_validate(row.facts) if row.facts else None
