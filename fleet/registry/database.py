"""Opens the database: SQLite for one controller, PostgreSQL by URL. Two processes at once are the normal case.

SQLite has one writer at a time. On PostgreSQL a transaction locks the rows that it decides about, in this order, so
that no two wait for each other: devices by id, then deployments by id, then the outbox, and the audit's head last.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.orm import Session

from fleet.errors import RegistryError
from fleet.registry import schema
from fleet.registry.audit_chain import append_audit

#: How long a process waits for another's transaction before it gives up.
BUSY_TIMEOUT_S = 10.0
#: Of the advisory lock of those who change PostgreSQL's tables; SQLite has BEGIN IMMEDIATE for it.
_LOCK = 0x7068_6966


class Database:
    """An engine whose schema was checked, and its two kinds of transaction."""

    def __init__(self, url: str, *, create: bool = True) -> None:
        self._open(url, create)
        with self._explained():
            schema.prepare(self._engine.execution_options(phifleet_migrate=True), self._where, create=create)

    @classmethod
    def unchecked(cls, url: str, *, create: bool = False) -> Self:
        """Return a database whatever its schema is, for those who look at that or change it."""
        database = cls.__new__(cls)
        database._open(url, create)
        return database

    def _open(self, url: str, create: bool) -> None:
        self.url = _parse(url)
        self.sqlite = self.url.get_backend_name() == "sqlite"
        if not create:
            _refuse_missing(self.url)
        self._engine = _engine(self.url)
        # SQLite: one writer at a time, from the first statement on. A transaction that read first and was overtaken
        # by another process would otherwise write over what that one decided.
        self._writer = self._engine.execution_options(phifleet_write=True)
        self._where = self.url.render_as_string(hide_password=True)

    def schema_state(self) -> schema.SchemaState:
        """Return what the database has.

        Raises:
            RegistryError: the database cannot be used.
        """
        with self._explained(), self._engine.connect() as connection:
            return schema.state(connection)

    def upgrade(self, revision: str = "head") -> schema.SchemaState:
        """Bring it to a revision; returns what it had.

        Raises:
            RegistryError: the database cannot be used, or one of the revisions is not known.
        """
        with self._explained():
            return schema.upgrade(self._engine.execution_options(phifleet_migrate=True), self._where, revision)

    def backup(self, path: Path) -> None:
        """Copy a SQLite database as it is now, also while others write.

        Raises:
            RegistryError: the copy cannot be made; nothing is left of it.
        """
        name = quote(self.url.database or "")
        if path.exists():
            raise RegistryError(f"database {self._where}: no backup can be made at {path}: something is there already")
        try:
            with (
                contextlib.closing(sqlite3.connect(f"file:{name}?mode=ro", uri=True)) as source,
                contextlib.closing(sqlite3.connect(path)) as target,
            ):
                source.backup(target)
        except (sqlite3.Error, OSError) as error:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            raise RegistryError(f"database {self._where}: no backup can be made at {path}: {error}") from None

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A snapshot; nothing is written.

        Raises:
            RegistryError: the database cannot be used.
        """
        with self._explained(), Session(self._engine, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """One transaction, committed at the end or not at all. What ``add_audit`` was told is appended last.

        Raises:
            RegistryError: the database cannot be used.
        """
        with self._explained(), Session(self._writer, expire_on_commit=False) as session, session.begin():
            yield session
            append_audit(session)

    def close(self) -> None:
        """Let go of all connections."""
        self._engine.dispose()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            raise RegistryError(f"database {self._where}: {_advice(error)}") from error
        except SQLAlchemyError as error:
            raise RegistryError(f"database {self._where}: {error}") from error


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise RegistryError(
            f"{url!r} is no database URL; write sqlite:////path/to/fleet.db or postgresql://user@host/name"
        ) from None
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise RegistryError(f"{parsed.drivername} is not supported; use sqlite or postgresql")
    return parsed


def _refuse_missing(url: URL) -> None:
    """SQLite makes a file that is not there when it is opened."""
    if url.get_backend_name() == "sqlite" and url.database and not Path(url.database).exists():
        raise RegistryError(f"there is no database {url.database}")


def _engine(url: URL) -> Engine:
    try:
        if url.get_backend_name() != "sqlite":
            engine = create_engine(url, pool_pre_ping=True, connect_args={"connect_timeout": int(BUSY_TIMEOUT_S)})
            event.listen(engine, "begin", _begin_postgresql)
            return engine
        if url.database and url.database != ":memory:":
            Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_S})
    except (ModuleNotFoundError, NoSuchModuleError) as error:
        reason = f"the driver of {url.drivername} is missing ({error}); install phifleet[postgres]"
        raise RegistryError(reason) from None
    except OSError as error:
        raise RegistryError(f"{url.database}: cannot be made: {error.strerror or error}") from None
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _configure_sqlite(connection: sqlite3.Connection, _record: Any) -> None:
    # The driver's own BEGIN comes too late for BEGIN IMMEDIATE; _begin_sqlite says it instead.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "foreign_keys=ON", "synchronous=NORMAL"):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_sqlite(connection: Connection) -> None:
    options = connection.get_execution_options()
    write = options.get("phifleet_write") or options.get("phifleet_migrate")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _begin_postgresql(connection: Connection) -> None:
    connection.execute(text(f"SET LOCAL lock_timeout = '{int(BUSY_TIMEOUT_S * 1000)}ms'"))
    if connection.get_execution_options().get("phifleet_migrate"):
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})


#: What an operator can do about what the database answers, by a regular expression for its words.
_ADVICE = {
    "database is locked": "another process kept it for more than {busy:.0f} s; see which one, with `fuser` say",
    "lock timeout": "another process kept it for more than {busy:.0f} s; see which one in pg_stat_activity",
    "unable to open database file": "is the folder there, and may this user write in it?",
    "file is not a database": "the file is something else, or damaged; move it aside or restore a backup",
    "disk image is malformed": "the file is damaged; stop the controller and restore a backup",
    "no such column": "its tables are of another version; move it aside, or use the phifleet that made it",
    "no such table": "its tables are of another version; move it aside, or use the phifleet that made it",
    "disk is full": "make room on its disk; nothing was changed",
    "No space left": "make room on the disk of the database server; nothing was changed",
    "disk I/O error": "its disk fails, is full or was taken away; see the system's log",
    "readonly database": "this user may not write it; run the command as the user that runs the controller",
    "read-only transaction": "this server is a standby; name the primary",
    "Connection refused": "is the database server running, and does the URL name its host and port?",
    "password authentication failed": "the user or the password in the URL is wrong",
    r'(database|role) "[^"]*" does not exist': "make it with createdb or createuser, or correct the URL",
    r'(relation|column) "?[^"]*"? does not exist': "its tables are of another version; use the phifleet that made it",
    "too many clients": "raise max_connections of the database server, or end other clients",
    "could not translate host name": "the URL names a host that is not known here",
    "could not receive data": "the connection to the database server was lost",
    "server closed the connection": "the database server was stopped or has crashed; see its log",
    "terminating connection": "the database server is being stopped",
    "duplicate key value|UNIQUE constraint failed": "another process wrote the same at this moment; do it again",
    "deadlock detected": "another process changed the same at this moment; do it again",
}


def _advice(error: DBAPIError) -> str:
    reason = str(error.orig).strip().splitlines()[0] if error.orig else str(error)
    whole = str(error.orig or error)
    hint = next((text for key, text in _ADVICE.items() if re.search(key, whole)), "").format(busy=BUSY_TIMEOUT_S)
    return f"{reason} ({hint})" if hint else reason
