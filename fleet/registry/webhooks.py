"""Webhooks: where the audit's entries are sent, and how far that has come."""

from __future__ import annotations

import fnmatch
import secrets
from base64 import b64encode
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import func, select

from fleet.errors import MissingError
from fleet.registry.database import Database
from fleet.registry.models import AuditRow, WebhookRow
from fleet.registry.rows import Actor, add_audit

#: Entries that are read at a time for one webhook.
MANY = 200
#: How long a controller has a webhook to itself.
LEASE = timedelta(seconds=30)
SECRET_PREFIX = "whsec_"  # noqa: S105 - the scheme's prefix of a secret, and no secret


@dataclass(frozen=True, slots=True)
class Due:
    """A webhook to be called now. ``entry`` None: nothing of what came since concerns it."""

    id: str
    url: str
    secret: str
    failures: int
    entry: AuditRow | None
    #: The newest entry that was looked at.
    seen: int


class Webhooks:
    """Each call is one transaction. Every call raises ``RegistryError`` where the database cannot be used."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, url: str, events: Sequence[str], actor: Actor) -> WebhookRow:
        """Return a new one, which is sent what is written into the audit from now on."""
        with self._database.write() as session:
            row = WebhookRow(
                id=secrets.token_hex(4),
                url=url,
                secret=SECRET_PREFIX + b64encode(secrets.token_bytes(32)).decode(),
                events=list(events),
                created_at=actor.at,
                created_by=actor.who,
                cursor=session.scalar(select(func.max(AuditRow.id))) or 0,
                failures=0,
                due_at=actor.at,
            )
            session.add(row)
            add_audit(session, actor, "webhook.create", row.id, {"url": url, "events": list(events)})
        return row

    def delete(self, identity: str, actor: Actor) -> None:
        """Send it nothing more.

        Raises:
            UsageError: there is none with this id.
        """
        with self._database.write() as session:
            row = session.get(WebhookRow, identity, with_for_update=True)
            if row is None:
                raise MissingError(f"no webhook has the id {identity}")
            session.delete(row)
            add_audit(session, actor, "webhook.delete", identity, {"url": row.url})

    def all(self) -> list[WebhookRow]:
        """Return every one, the oldest first."""
        with self._database.read() as session:
            return list(session.scalars(select(WebhookRow).order_by(WebhookRow.created_at, WebhookRow.id)))

    def claim(self, at: datetime, under_way: Collection[str] = ()) -> list[Due]:
        """Return those that are due and have something to be sent; no other controller gets them for a while.

        ``under_way``: those that this controller is calling, and does not want yet.
        """
        with self._database.read() as session:
            newest = session.scalar(select(func.max(AuditRow.id))) or 0
            waiting = (WebhookRow.due_at <= at, WebhookRow.cursor < newest, WebhookRow.id.not_in(list(under_way)))
            if session.scalar(select(WebhookRow.id).where(*waiting).limit(1)) is None:
                return []
        found: list[Due] = []
        with self._database.write() as session:
            for row in session.scalars(select(WebhookRow).where(*waiting).with_for_update(skip_locked=True)):
                entries = session.scalars(
                    select(AuditRow).where(AuditRow.id > row.cursor).order_by(AuditRow.id).limit(MANY)
                ).all()
                entry = next((one for one in entries if _concerns(row.events, one.action)), None)
                seen = entry.id if entry is not None else entries[-1].id
                if entry is None:
                    row.cursor = seen
                    continue
                row.due_at = at + LEASE
                found.append(Due(row.id, row.url, row.secret, row.failures, entry, seen))
        return found

    def delivered(self, due: Due, at: datetime) -> None:
        """Note that the receiver has taken it; what comes after it is due at once."""
        with self._database.write() as session:
            row = session.get(WebhookRow, due.id, with_for_update=True)
            if row is not None:
                row.cursor, row.failures, row.due_at = max(row.cursor, due.seen), 0, at
                row.delivered_at, row.error = at, None

    def failed(self, due: Due, error: str, next_at: datetime | None) -> None:
        """Note that the receiver has not taken it; ``next_at`` None: it said that it is gone."""
        with self._database.write() as session:
            row = session.get(WebhookRow, due.id, with_for_update=True)
            if row is not None:
                row.failures, row.error, row.due_at = row.failures + 1, error, next_at


def _concerns(patterns: Sequence[str], action: str) -> bool:
    return any(fnmatch.fnmatchcase(action, pattern) for pattern in patterns)
