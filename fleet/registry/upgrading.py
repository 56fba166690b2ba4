"""Bringing the database to the tables of this version, with a backup where that is a file."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from fleet.registry.database import Database
from fleet.registry.schema import SchemaState


@dataclass(frozen=True, slots=True)
class Upgrade:
    """What was done. ``before`` None: the database was new; ``backup`` None: there was nothing to keep, or no file."""

    before: str | None
    after: str
    backup: Path | None = None

    @property
    def changed(self) -> bool:
        """The tables are others now."""
        return self.before != self.after


def schema_of(url: str) -> SchemaState:
    """Which revision the database has.

    Raises:
        RegistryError: the database cannot be used, or is not there.
    """
    with contextlib.closing(Database.unchecked(url)) as database:
        return database.schema_state()


def upgrade(url: str, at: datetime, revision: str = "head") -> Upgrade:
    """Bring the database to a revision. A SQLite file is copied beside itself first.

    Raises:
        RegistryError: the database cannot be used, one of the revisions is not known, or no backup can be made; then
            nothing was changed.
    """
    with contextlib.closing(Database.unchecked(url)) as database:
        found = database.schema_state()
        target = found.head if revision == "head" else revision
        if found.revision == target:
            return Upgrade(found.revision, target)
        backup = None
        if database.sqlite and found.revision is not None and found.known and database.url.database:
            file = Path(database.url.database)
            backup = file.with_name(f"{file.name}.{found.revision}-{at:%Y%m%dT%H%M%S}")
            database.backup(backup)
        try:
            database.upgrade(revision)
        except BaseException:
            if backup is not None:
                backup.unlink(missing_ok=True)  # it was rolled back: the database is as it was
            raise
        return Upgrade(found.revision, target, backup)


def upgrade_own_file(url: str, at: datetime) -> Upgrade | None:
    """Return what a controller does at its start.

    Its own SQLite file is brought up to date, a server's database is not.

    Others may work with a server's database, so there an operator decides when. Returns None where nothing was done.

    Raises:
        RegistryError: as ``upgrade``.
    """
    with contextlib.closing(Database.unchecked(url, create=True)) as database:
        found = database.schema_state()
        if not database.sqlite or found.revision is None or found.current or not found.known:
            return None
    return upgrade(url, at)
