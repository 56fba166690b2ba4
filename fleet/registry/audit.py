"""Who did what, and when."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select

from fleet.registry.audit_chain import broken
from fleet.registry.database import Database
from fleet.registry.models import AuditHeadRow, AuditRow
from fleet.registry.rows import Actor, add_audit


class Audit:
    """Append only: the database itself refuses to change or delete an entry."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def record(self, actor: Actor, action: str, subject: str, details: dict[str, Any] | None = None) -> None:
        """Write down what was done; it can never be changed.

        Raises:
            RegistryError: the database cannot be used.
        """
        with self._database.write() as session:
            add_audit(session, actor, action, subject, details)

    def broken(self) -> list[str]:
        """Return what was changed or taken out since it was written, a sentence each.

        Raises:
            RegistryError: the database cannot be used.
        """
        with self._database.read() as session:
            return list(broken(session))

    def head(self) -> tuple[int, str]:
        """Return how many entries there are, and the newest one's hash.

        Raises:
            RegistryError: the database cannot be used.
        """
        with self._database.read() as session:
            row = session.execute(select(AuditHeadRow)).scalar_one()
            return row.entries, row.hash

    def hash_of(self, entry: int) -> str | None:
        """Return an entry's hash, or None where there is no such entry.

        Raises:
            RegistryError: the database cannot be used.
        """
        with self._database.read() as session:
            return session.scalar(select(AuditRow.hash).where(AuditRow.id == entry))

    def trail(self, limit: int = 100) -> list[AuditRow]:
        """Return the newest entries, newest first.

        Raises:
            RegistryError: the database cannot be used.
        """
        with self._database.read() as session:
            return list(session.scalars(select(AuditRow).order_by(AuditRow.id.desc()).limit(limit)))

    def after(self, entry: int, limit: int = 100) -> list[AuditRow]:
        """Return the entries that come after one, the oldest first.

        Raises:
            RegistryError: the database cannot be used.
        """
        with self._database.read() as session:
            return list(session.scalars(select(AuditRow).where(AuditRow.id > entry).order_by(AuditRow.id).limit(limit)))
