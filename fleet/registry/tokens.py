"""Tokens of the API, and the answers that a repeated request gets."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from fleet.core.roles import Role
from fleet.errors import MissingError
from fleet.registry.database import Database
from fleet.registry.models import IdempotencyRow, TokenRow
from fleet.registry.rows import Actor, add_audit, insert_if_new

PREFIX = "phifleet_"
#: How long an answer is kept for a repeated request.
ANSWER_KEPT = timedelta(hours=24)
#: ``used_at`` is written at most so often: a token that polls must not write with each request.
USED_EVERY = timedelta(minutes=1)


class Refusal(StrEnum):
    """Why a token is not good."""

    UNKNOWN = "unknown"
    EXPIRED = "expired"
    REVOKED = "revoked"


@dataclass(frozen=True, slots=True)
class Kept:
    """An answer that was given before. ``status`` None: it is being made; ``same``: to the very same request."""

    same: bool
    status: int | None
    answer: dict[str, Any] | None
    headers: Mapping[str, str]


class Tokens:
    """Each call is one transaction. Every call raises ``RegistryError`` where the database cannot be used."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(
        self,
        name: str,
        role: Role,
        actor: Actor,
        *,
        scope: str | None = None,
        expires_at: datetime | None = None,
        sign_in: bool = False,
    ) -> tuple[TokenRow, str]:
        """Return a new token's row, and the token, which nobody can read again.

        ``sign_in``: it is the code of a link, good for nothing but to be exchanged.
        """
        with self._database.write() as session:
            return _add(session, actor, name, role.value, scope, expires_at, sign_in=sign_in)

    def exchange(self, code: str, at: datetime, expires_at: datetime) -> tuple[TokenRow, str] | Refusal:
        """Return a token for the code of a link, which is good no more; or why it is not good."""
        with self._database.write() as session:
            link = session.scalar(
                select(TokenRow).where(TokenRow.hash == _hash(code), TokenRow.sign_in).with_for_update()
            )
            if link is None:
                return Refusal.UNKNOWN
            if link.revoked_at is not None:
                return Refusal.REVOKED
            if link.expires_at is not None and link.expires_at <= at:
                return Refusal.EXPIRED
            link.revoked_at = link.used_at = at
            return _add(session, Actor(f"link:{link.id}", at), link.name, link.role, link.scope, expires_at)

    def check(self, token: str, at: datetime) -> TokenRow | Refusal:
        """Return the token's row, or why it is not good."""
        with self._database.read() as session:
            row = session.scalar(select(TokenRow).where(TokenRow.hash == _hash(token)))
        if row is None or row.sign_in:
            return Refusal.UNKNOWN
        if row.revoked_at is not None:
            return Refusal.REVOKED
        if row.expires_at is not None and row.expires_at <= at:
            return Refusal.EXPIRED
        if row.used_at is None or at - row.used_at >= USED_EVERY:
            with self._database.write() as session:
                session.execute(update(TokenRow).where(TokenRow.id == row.id).values(used_at=at))
        return row

    def revoke(self, identity: str, actor: Actor) -> None:
        """Let a token be good no more; one that was revoked before stays so.

        Raises:
            UsageError: there is none with this id.
        """
        with self._database.write() as session:
            row = session.get(TokenRow, identity, with_for_update=True)
            if row is None:
                raise MissingError(f"no token has the id {identity}; see `phifleet token list`")
            if row.revoked_at is None:
                row.revoked_at = actor.at
                add_audit(session, actor, "token.revoke", identity, {"name": row.name})

    def all(self) -> list[TokenRow]:
        """Return every token, the newest first."""
        with self._database.read() as session:
            return list(
                session.scalars(
                    select(TokenRow).where(~TokenRow.sign_in).order_by(TokenRow.created_at.desc(), TokenRow.id)
                )
            )

    def begin(self, token: str, key: str, request: str, at: datetime) -> Kept | None:
        """Return what was answered under this key; None where nothing was, and this request is the one to answer."""
        row = {"token": token, "key": key, "request": request, "at": at}
        with self._database.write() as session:
            session.execute(delete(IdempotencyRow).where(IdempotencyRow.at < at - ANSWER_KEPT))
            if insert_if_new(session, IdempotencyRow, row):
                return None
            kept = session.get_one(IdempotencyRow, (token, key))
            return Kept(kept.request == request, kept.status, kept.answer, kept.headers or {})

    def answer(
        self, token: str, key: str, status: int, answer: dict[str, Any] | None, headers: Mapping[str, str]
    ) -> None:
        """Keep what was answered."""
        with self._database.write() as session:
            row = session.get_one(IdempotencyRow, (token, key))
            row.status, row.answer, row.headers = status, answer, dict(headers)

    def forget(self, token: str, key: str) -> None:
        """Nothing was done for this request, so that it may come again."""
        with self._database.write() as session:
            session.execute(delete(IdempotencyRow).where(IdempotencyRow.token == token, IdempotencyRow.key == key))


def _add(
    session: Session,
    actor: Actor,
    name: str,
    role: str,
    scope: str | None,
    expires_at: datetime | None,
    *,
    sign_in: bool = False,
) -> tuple[TokenRow, str]:
    token = PREFIX + secrets.token_urlsafe(32)
    row = TokenRow(
        id=secrets.token_hex(4),
        name=name,
        hash=_hash(token),
        role=role,
        scope=scope,
        created_at=actor.at,
        created_by=actor.who,
        expires_at=expires_at,
        sign_in=sign_in,
    )
    session.add(row)
    details = {"name": name, "role": role, "scope": scope}
    add_audit(session, actor, "token.link" if sign_in else "token.create", row.id, details)
    return row, token


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
