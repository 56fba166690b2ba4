"""Enrolment by token: which tokens are good, which machines have asked, and what became of them."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from fleet.errors import ConflictError, MissingError
from fleet.registry.database import Database
from fleet.registry.devices import add_row, set_labels
from fleet.registry.models import DeviceRow, EnrolmentRow, EnrolmentTokenRow
from fleet.registry.rows import Actor, add_audit, insert_if_new

PREFIX = "enrol_"


class EnrolmentState(StrEnum):
    """Of a machine that has asked."""

    WAITING = "waiting"
    ENROLLED = "enrolled"
    REJECTED = "rejected"


class EnrolmentRefusal(StrEnum):
    """Why an enrolment token is not good."""

    UNKNOWN = "no such enrolment token; `phifleet device token` makes one"
    EXPIRED = "the enrolment token has expired; make another with `phifleet device token`"
    REVOKED = "the enrolment token was revoked; make another with `phifleet device token`"
    USED_UP = "the enrolment token was used as often as it may be; make another with `phifleet device token`"


@dataclass(frozen=True, slots=True)
class Machine:
    """That asks: the id it wants, SHA-256 of its public key in hex, and where it asks from."""

    device: str
    key: str
    address: str


class Enrolments:
    """Each call is one transaction. Every call raises ``RegistryError`` where the database cannot be used."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(
        self,
        profile: str,
        actor: Actor,
        *,
        expires_at: datetime,
        uses: int = 1,
        approval: bool = False,
        labels: Mapping[str, str] | None = None,
        document: dict[str, Any] | None = None,
    ) -> tuple[EnrolmentTokenRow, str]:
        """Return a new token's row, and the token, which nobody can read again."""
        secret = PREFIX + secrets.token_urlsafe(32)
        row = EnrolmentTokenRow(
            id=secrets.token_hex(4),
            hash=_hash(secret),
            profile=profile,
            profile_document=document,
            labels=dict(labels or {}),
            uses=uses,
            used=0,
            approval=approval,
            created_at=actor.at,
            created_by=actor.who,
            expires_at=expires_at,
        )
        details = {"profile": profile, "uses": uses, "approval": approval, "expires_at": expires_at.isoformat()}
        with self._database.write() as session:
            session.add(row)
            add_audit(session, actor, "enrolment.token", row.id, details)
        return row, secret

    def ask(self, token: str, machine: Machine, at: datetime) -> EnrolmentRow | EnrolmentRefusal:
        """Let a machine become a device, or wait for an operator; asking again with the same key changes nothing.

        Raises:
            ConflictError: the id is another machine's.
        """
        with self._database.write() as session:
            row = session.scalar(
                select(EnrolmentTokenRow).where(EnrolmentTokenRow.hash == _hash(token)).with_for_update()
            )
            if row is None:
                return EnrolmentRefusal.UNKNOWN
            before = session.get(EnrolmentRow, machine.device, with_for_update=True)
            if before is not None and before.token == row.id and before.key == machine.key and _stands(session, before):
                return before
            refusal = _refusal(row, at)
            if refusal is not None:
                return refusal
            if before is not None:
                self._give_way(session, before, machine.device)
            asked = {
                "device": machine.device,
                "token": row.id,
                "key": machine.key,
                "state": EnrolmentState.WAITING.value,
                "address": machine.address,
                "asked_at": at,
            }
            if _is_there(session, machine.device) or not insert_if_new(session, EnrolmentRow, asked):
                raise ConflictError(
                    f"device {machine.device} is there already: choose another id with --id, or remove it first"
                )
            row.used += 1
            made = session.get_one(EnrolmentRow, machine.device)
            actor = Actor(f"enrolment:{row.id}", at)
            if row.approval:
                add_audit(session, actor, "enrolment.ask", machine.device, {"address": machine.address})
            else:
                _enrol(session, made, row, actor)
            return made

    def owns(self, device: str, key: str) -> bool:
        """Return whether the device was enrolled by token with this key, and is neither revoked nor removed."""
        with self._database.read() as session:
            row, there = session.get(EnrolmentRow, device), session.get(DeviceRow, device)
            if row is None or there is None or there.removed_at is not None or there.revoked_at is not None:
                return False
            return row.state == EnrolmentState.ENROLLED and row.key == key

    def decide(self, device: str, accept: bool, actor: Actor) -> EnrolmentRow:
        """Accept or reject a machine that waits; deciding the same again changes nothing.

        Raises:
            MissingError: nobody waits under this id.
            ConflictError: it was decided the other way, or the id became another device's meanwhile.
        """
        wanted = EnrolmentState.ENROLLED if accept else EnrolmentState.REJECTED
        with self._database.write() as session:
            row = session.get(EnrolmentRow, device, with_for_update=True)
            if row is None:
                raise MissingError(f"no machine waits to become {device!r}; see `phifleet device waiting`")
            if row.state == wanted:
                return row
            if row.state != EnrolmentState.WAITING:
                raise ConflictError(f"{device} is {row.state} already, by {row.decided_by}")
            if accept:
                if _is_there(session, device):
                    raise ConflictError(f"device {device} is there already; reject this machine, or remove that one")
                _enrol(session, row, session.get_one(EnrolmentTokenRow, row.token), actor)
            else:
                row.state, row.decided_at, row.decided_by = wanted.value, actor.at, actor.who
                add_audit(session, actor, "enrolment.reject", device)
            return row

    def revoke(self, identity: str, actor: Actor) -> None:
        """Let a token be good no more. Devices that were enrolled with it stay, and who waits goes on waiting.

        Raises:
            MissingError: there is none with this id.
        """
        with self._database.write() as session:
            row = session.get(EnrolmentTokenRow, identity, with_for_update=True)
            if row is None:
                raise MissingError(f"no enrolment token has the id {identity}; see `phifleet device tokens`")
            if row.revoked_at is None:
                row.revoked_at = actor.at
                add_audit(session, actor, "enrolment.revoke", identity)

    def tokens(self) -> list[EnrolmentTokenRow]:
        """Return every token, the newest first."""
        with self._database.read() as session:
            query = select(EnrolmentTokenRow)
            return list(session.scalars(query.order_by(EnrolmentTokenRow.created_at.desc(), EnrolmentTokenRow.id)))

    def waiting(self) -> list[EnrolmentRow]:
        """Return the machines that wait for an operator, in the order in which they asked."""
        with self._database.read() as session:
            query = select(EnrolmentRow).where(EnrolmentRow.state == EnrolmentState.WAITING.value)
            return list(session.scalars(query.order_by(EnrolmentRow.asked_at, EnrolmentRow.device)))

    def _give_way(self, session: Session, before: EnrolmentRow, device: str) -> None:
        """Forget what became of an id, if it is free again."""
        if before.state == EnrolmentState.WAITING:
            raise ConflictError(f"another machine waits to become {device}: choose another id with --id, or reject it")
        if before.state == EnrolmentState.REJECTED or not _is_there(session, device):
            session.delete(before)
            session.flush()


def _enrol(session: Session, row: EnrolmentRow, token: EnrolmentTokenRow, actor: Actor) -> None:
    row.state, row.decided_at, row.decided_by = EnrolmentState.ENROLLED.value, actor.at, actor.who
    device = add_row(session, row.device, token.profile, token.profile_document, actor.at)
    if token.labels:
        set_labels(session, device, token.labels)
    details = {"profile": token.profile, "token": token.id, "address": row.address}
    add_audit(session, actor, "device.enrol", row.device, details)


def _stands(session: Session, row: EnrolmentRow) -> bool:
    """Whether what was answered before is still so: a device that was removed must ask anew."""
    if row.state != EnrolmentState.ENROLLED:
        return True
    device = session.get(DeviceRow, row.device)
    if device is not None and device.removed_at is None and device.revoked_at is not None:
        raise ConflictError(f"device {row.device} was revoked: it must be removed before it can be enrolled again")
    return device is not None and device.removed_at is None


def _is_there(session: Session, device: str) -> bool:
    row = session.get(DeviceRow, device)
    return row is not None and row.removed_at is None


def _refusal(row: EnrolmentTokenRow, at: datetime) -> EnrolmentRefusal | None:
    if row.revoked_at is not None:
        return EnrolmentRefusal.REVOKED
    if row.expires_at <= at:
        return EnrolmentRefusal.EXPIRED
    return EnrolmentRefusal.USED_UP if row.used >= row.uses else None


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
