"""The devices of the fleet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import delete, insert, or_, select, update
from sqlalchemy.orm import Session

from agent.contract import topics
from agent.contract.messages import Facts
from agent.contract.profile import DeviceProfile
from fleet.core import deployments as core
from fleet.errors import ConflictError
from fleet.registry.database import Database
from fleet.registry.models import DeviceRow, LabelRow
from fleet.registry.rows import (
    Actor,
    add_audit,
    apply,
    device_row,
    device_rows,
    in_chunks,
    insert_if_new,
    outstanding,
    put_in_outbox,
)

_BARRED = or_(DeviceRow.removed_at.is_not(None), DeviceRow.revoked_at.is_not(None))


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
            add_row(session, device, profile.name, document, actor.at)
            add_audit(session, actor, "device.add", device, {"profile": profile.name})

    def label(self, device: str, labels: Mapping[str, str | None], actor: Actor) -> dict[str, str]:
        """Set labels, and remove those whose value is None; returns what the device has now.

        Raises:
            UsageError: no such device.
        """
        with self._database.write() as session:
            row = device_row(session, device, lock=True)
            now = set_labels(session, row, labels)
            add_audit(session, actor, "device.label", device, dict(labels))
            return now

    def label_many(self, devices: Sequence[str], labels: Mapping[str, str | None], actor: Actor) -> None:
        """Set the same labels of many devices, and remove those whose value is None: of all of them, or of none.

        Raises:
            UsageError: one is not there; names those there are.
        """
        names = sorted(set(devices))
        with self._database.write() as session:
            device_rows(session, names)
            for some in in_chunks(names):
                found = select(DeviceRow).where(DeviceRow.id.in_(some)).order_by(DeviceRow.id).with_for_update()
                rows = list(session.scalars(found))
                session.execute(delete(LabelRow).where(LabelRow.device.in_(some), LabelRow.name.in_(labels)))
                for row in rows:
                    row.labels = _merged(row, labels)
                session.flush()
                given = [(name, value) for name, value in labels.items() if value is not None]
                new = [{"device": device, "name": name, "value": value} for device in some for name, value in given]
                if new:
                    session.execute(insert(LabelRow), new)
            details = {"labels": dict(labels), "devices": names}
            add_audit(session, actor, "device.label", names[0] if len(names) == 1 else f"{len(names)} devices", details)

    def remove(self, device: str, actor: Actor) -> None:
        """Forget a device: its outstanding deployment is cancelled, and the controller clears its topics.

        Raises:
            UsageError: no such device.
        """
        with self._database.write() as session:
            row = device_row(session, device, lock=True)
            row.removed_at, row.online, row.cleared = actor.at, False, False
            for deployment in outstanding(session, [device]):
                apply(deployment, core.Withdrawn("the device was removed from the fleet"), actor.at)
            put_in_outbox(session, [device], actor.at)
            add_audit(session, actor, "device.remove", device)

    def revoke(self, device: str, actor: Actor) -> datetime:
        """Listen to the device no more and order it nothing; returns since when, also where that was done before.

        Its outstanding deployment is cancelled, and the controller clears its topics. To remove and add the device
        again is the only way back, as its certificates are void.

        Raises:
            UsageError: no such device.
        """
        with self._database.write() as session:
            row = device_row(session, device, lock=True)
            if row.revoked_at is not None:
                return row.revoked_at
            row.revoked_at, row.online, row.cleared = actor.at, False, False
            for deployment in outstanding(session, [device]):
                apply(deployment, core.Withdrawn("the device was revoked"), actor.at)
            put_in_outbox(session, [device], actor.at)
            add_audit(session, actor, "device.revoke", device)
            return actor.at

    def get(self, device: str) -> DeviceRow:
        """Return one device.

        Raises:
            UsageError: no such device; names those there are.
        """
        with self._database.read() as session:
            return device_row(session, device)

    def some(self, devices: Sequence[str]) -> list[DeviceRow]:
        """Return those that are named, in that order, each once.

        Raises:
            UsageError: one is not there; names those there are.
        """
        with self._database.read() as session:
            return device_rows(session, devices)

    def page(self, after: str | None, limit: int) -> list[str]:
        """Return ids of the fleet's devices that come after one, revoked ones too; so many at most."""
        query = select(DeviceRow.id).where(DeviceRow.removed_at.is_(None)).order_by(DeviceRow.id).limit(limit)
        with self._database.read() as session:
            return list(session.scalars(query if after is None else query.where(DeviceRow.id > after)))

    def has(self, device: str) -> bool:
        """Return whether a device is in the fleet."""
        with self._database.read() as session:
            row = session.get(DeviceRow, device)
            return row is not None and row.removed_at is None

    def all(self, profile: str | None = None) -> list[DeviceRow]:
        """Return all that were not removed, by id; with ``profile``, those of that profile."""
        with self._database.read() as session:
            query = select(DeviceRow).where(DeviceRow.removed_at.is_(None)).order_by(DeviceRow.id)
            return list(session.scalars(query.where(DeviceRow.profile == profile) if profile else query))

    def barred(self) -> frozenset[str]:
        """Devices that were removed or revoked: nobody listens to them, and they are sent nothing."""
        with self._database.read() as session:
            return frozenset(session.scalars(select(DeviceRow.id).where(_BARRED)))

    def client_ids(self, device: str) -> list[str]:
        """Under which MQTT client ids the device may be connected: its known run's, and its own id before 0.2."""
        with self._database.read() as session:
            runs = session.scalar(select(DeviceRow.runs).where(DeviceRow.id == device))
        run = (runs or {}).get("id")
        return [*([topics.client_id(device, run)] if run else []), device]

    def certificates_ending(self, before: datetime, limit: int) -> list[tuple[str, datetime]]:
        """Return devices whose certificate ends before a time, and when, the soonest first; so many at most."""
        ends = DeviceRow.certificate_expires_at
        with self._database.read() as session:
            found = session.execute(
                select(DeviceRow.id, ends).where(ends < before, ~_BARRED).order_by(ends).limit(limit)
            )
            return [(device, at) for device, at in found if at is not None]

    def to_clear(self) -> list[str]:
        """Return those of them whose retained messages may still be at the broker."""
        with self._database.read() as session:
            return list(session.scalars(select(DeviceRow.id).where(_BARRED, DeviceRow.cleared.is_(False))))

    def clear_again(self, devices: Sequence[str], at: datetime) -> None:
        """Retained messages of barred devices are at the broker again."""
        with self._database.write() as session:
            barred: list[str] = []
            for some in in_chunks(sorted(devices)):
                found = select(DeviceRow.id).where(DeviceRow.id.in_(some), _BARRED).order_by(DeviceRow.id)
                barred += session.scalars(found.with_for_update())
                session.execute(update(DeviceRow).where(DeviceRow.id.in_(some), _BARRED).values(cleared=False))
            put_in_outbox(session, barred, at)

    def ids(self) -> list[str]:
        """Of all that may speak: neither removed nor revoked, the one that was heard of last first."""
        with self._database.read() as session:
            query = select(DeviceRow.id).where(~_BARRED)
            return list(session.scalars(query.order_by(DeviceRow.last_seen.desc().nulls_last(), DeviceRow.id)))


def add_row(session: Session, device: str, profile: str, document: dict[str, Any] | None, at: datetime) -> DeviceRow:
    """Record a device; one that was removed may be added again, and its sequence goes on.

    Raises:
        ConflictError: it is there already.
    """
    new = insert_if_new(session, DeviceRow, {"id": device, "profile": profile, "added_at": at})
    row = session.get_one(DeviceRow, device, with_for_update=True)
    if not new and row.removed_at is None:
        raise ConflictError(f"device {device} is there already; remove it first, or choose another id")
    row.profile, row.profile_document = profile, document
    row.added_at, row.removed_at, row.revoked_at, row.cleared = at, None, None, False
    row.facts = row.reported = row.health = row.last_seen = None
    row.health_at = row.health_interval_s = row.presence_received_at = row.runs = row.cloned_at = None
    row.certificate_expires_at = None
    return row


def set_labels(session: Session, row: DeviceRow, labels: Mapping[str, str | None]) -> dict[str, str]:
    """Set labels, and remove those whose value is None; returns what the device has now."""
    row.labels = _merged(row, labels)
    session.execute(delete(LabelRow).where(LabelRow.device == row.id))
    session.add_all(LabelRow(device=row.id, name=name, value=value) for name, value in row.labels.items())
    return dict(row.labels)


def _merged(row: DeviceRow, labels: Mapping[str, str | None]) -> dict[str, str]:
    both = {**(row.labels or {}), **labels}
    return {name: value for name, value in both.items() if value is not None}


def facts_of(row: DeviceRow) -> Facts | None:
    """Return what the device has reported about itself, or None when it has not."""
    return Facts.model_validate(row.facts) if row.facts else None
