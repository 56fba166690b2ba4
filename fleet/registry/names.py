"""Selectors and releases under a name."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from fleet.errors import ConflictError, MissingError
from fleet.registry.database import Database
from fleet.registry.models import ReleaseRow, SelectorRow
from fleet.registry.rows import Actor, add_audit, insert_if_new


class Selectors:
    """Each call is one transaction. Every call raises ``RegistryError`` where the database cannot be used."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def save(self, name: str, selector: str, actor: Actor) -> None:
        """Give a selector a name, or the name another selector."""
        with self._database.write() as session:
            row = {"name": name, "selector": selector, "created_at": actor.at, "created_by": actor.who}
            if not insert_if_new(session, SelectorRow, row):
                there = session.get_one(SelectorRow, name, with_for_update=True)
                there.selector, there.created_at, there.created_by = selector, actor.at, actor.who
            add_audit(session, actor, "selector.save", name, {"selector": selector})

    def delete(self, name: str, actor: Actor) -> None:
        """Forget a name.

        Raises:
            UsageError: there is none; names those there are.
        """
        with self._database.write() as session:
            _delete(session, SelectorRow, "selector", name, actor)

    def all(self) -> list[SelectorRow]:
        """Return every one, by name."""
        with self._database.read() as session:
            return list(session.scalars(select(SelectorRow).order_by(SelectorRow.name)))


class Releases:
    """Each call is one transaction. Every call raises ``RegistryError`` where the database cannot be used."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, name: str, digests: Sequence[str], actor: Actor) -> None:
        """Make a release; it is never changed, so that its name means one thing.

        Raises:
            UsageError: the name is taken.
        """
        with self._database.write() as session:
            row = {"name": name, "digests": list(digests), "created_at": actor.at, "created_by": actor.who}
            if not insert_if_new(session, ReleaseRow, row):
                raise ConflictError(f"release {name} is there already and never changes; choose another name")
            add_audit(session, actor, "release.create", name, {"digests": list(digests)})

    def find(self, name: str) -> ReleaseRow | None:
        """Return the release, or None."""
        with self._database.read() as session:
            return session.get(ReleaseRow, name)

    def delete(self, name: str, actor: Actor) -> None:
        """Forget a release; its artifacts stay.

        Raises:
            UsageError: there is none; names those there are.
        """
        with self._database.write() as session:
            _delete(session, ReleaseRow, "release", name, actor)

    def all(self) -> list[ReleaseRow]:
        """Return every one, the newest first."""
        with self._database.read() as session:
            return list(session.scalars(select(ReleaseRow).order_by(ReleaseRow.created_at.desc(), ReleaseRow.name)))


def _delete(session: Session, model: type[SelectorRow | ReleaseRow], kind: str, name: str, actor: Actor) -> None:
    row = session.get(model, name, with_for_update=True)
    if row is None:
        known = ", ".join(sorted(session.scalars(select(model.name)))[:20])
        raise MissingError(f"no {kind} is named {name}; there are: {known or 'none'}")
    session.delete(row)
    add_audit(session, actor, f"{kind}.delete", name)
