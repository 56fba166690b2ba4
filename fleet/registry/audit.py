"""Who did what, and when."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select

from fleet.registry.database import Database
from fleet.registry.models import AuditRow
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

    def trail(self, limit: int = 100) -> list[AuditRow]:
        """The newest entries, newest first.

        Raises:
            RegistryError: the database cannot be used.
        """
        with self._database.read() as session:
            return list(session.scalars(select(AuditRow).order_by(AuditRow.id.desc()).limit(limit)))
