"""Which revision of the tables a database has, and bringing it to another (Alembic; ``migrations/versions``)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, Engine, inspect, text

from fleet.errors import RegistryError

if TYPE_CHECKING:
    from alembic.config import Config

#: The revision that this phifleet works with. Alembic is loaded when the tables are to be changed, and not before.
HEAD = "0007"
#: Of a database that was made before there were revisions, by the version that it wrote down itself.
_BEFORE_REVISIONS = {2: "0001", 3: "0002"}
_MIGRATIONS = Path(__file__).parent / "migrations"


@dataclass(frozen=True, slots=True)
class SchemaState:
    """``revision`` None: the database holds no fleet. ``known``: this phifleet has that revision."""

    revision: str | None
    head: str = HEAD
    known: bool = True

    @property
    def current(self) -> bool:
        """It can be worked with as it is."""
        return self.revision == self.head


def state(connection: Connection) -> SchemaState:
    """Return what the database has.

    Raises:
        RegistryError: it was made by a phifleet before 0.1.0.
    """
    tables, revision = inspect(connection), None
    if tables.has_table("alembic_version"):
        revision = connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one_or_none()
    if revision == HEAD:
        return SchemaState(revision)
    if revision is None and tables.has_table("phifleet_schema"):
        version = connection.execute(text("SELECT version FROM phifleet_schema")).scalar_one_or_none() or 0
        revision = _BEFORE_REVISIONS.get(version, f"version {version}")
    return SchemaState(revision, known=revision is None or revision in revisions())


def prepare(engine: Engine, where: str, *, create: bool = True) -> None:
    """See that the database has the tables of this revision; ``where`` names it in errors.

    A new database gets them where ``create`` says so. One of an earlier revision is left as it is: ``upgrade`` is an
    operator's decision, or the controller's for its own SQLite file.

    Raises:
        RegistryError: it has another revision, or no tables and none may be made.
    """
    with engine.connect() as connection:
        found = state(connection)
    if found.current:
        return
    if found.revision is None and create:
        upgrade(engine, where)
        return
    raise RegistryError(_refusal(found, where))


def upgrade(engine: Engine, where: str, revision: str = "head") -> SchemaState:
    """Bring the database to a revision, up or down, in one transaction; returns what it had.

    ``engine`` lets one writer in at a time, so two processes that start together change the tables once.

    Raises:
        RegistryError: it has a revision that this phifleet does not know, or the one asked for is unknown.
    """
    from alembic import command

    if revision != "head" and revision not in revisions():
        raise RegistryError(f"no revision is named {revision}; there are: {', '.join(revisions())}")
    with engine.begin() as connection:
        found = state(connection)
        if not found.known:
            raise RegistryError(_refusal(found, where))
        config = _config(connection)
        if found.revision is not None and not inspect(connection).has_table("alembic_version"):
            command.stamp(config, found.revision)
        target = found.head if revision == "head" else revision
        down = found.revision is not None and target < found.revision
        (command.downgrade if down else command.upgrade)(config, target)
    return found


def _refusal(found: SchemaState, where: str) -> str:
    if found.revision is None:
        return f"database {where} holds no fleet"
    has = f"database {where} has schema {found.revision}, and this phifleet works with {found.head}"
    if found.known:
        return f"{has}: run `phifleet db upgrade`, which keeps a backup of a SQLite file, or start `phifleet serve`"
    if found.revision.startswith("version") and found.revision < "version 2":
        return f"{has}: move it aside and add the devices again with `phifleet device add`"
    return f"{has}: a later phifleet has upgraded it; upgrade this phifleet too"


def revisions() -> list[str]:
    """Return all that this phifleet knows, the oldest first."""
    from alembic.script import ScriptDirectory

    script = ScriptDirectory.from_config(_config(None))
    return [found.revision for found in script.walk_revisions()][::-1]


def _config(connection: Connection | None) -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config
