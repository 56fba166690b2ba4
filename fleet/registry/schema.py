"""Makes the tables of a new database, and brings one of an earlier version up to this one, in one transaction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from sqlalchemy import Connection, Engine, Float, Table, Text, insert, inspect, select, text, update
from sqlalchemy.types import TypeEngine

from fleet.errors import RegistryError
from fleet.registry.models import SCHEMA_VERSION, Base, ControllerRow, SchemaRow, UtcDateTime, WithdrawalRow


def prepare(engine: Engine, where: str, *, create: bool = True) -> None:
    """See that the database has the tables of this version; ``where`` names it in errors.

    Without ``create`` nothing is made in a database that has none of them.

    ``engine`` lets one writer in at a time, so two processes that start together make or change the tables once.

    Raises:
        RegistryError: it has a version that this phifleet does not know how to change, or no tables and none may be
            made.
    """
    with engine.connect() as connection:
        if _version(connection) == SCHEMA_VERSION:
            return
    with engine.begin() as connection:
        found = _version(connection)
        if found is None and not create:
            raise RegistryError(f"database {where} holds no fleet")
        if found is None:
            Base.metadata.create_all(connection)
            connection.execute(insert(SchemaRow).values(version=SCHEMA_VERSION))
        elif found != SCHEMA_VERSION:
            _upgrade(connection, found, where)


def _version(connection: Connection) -> int | None:
    if not inspect(connection).has_table(SchemaRow.__tablename__):
        return None
    return connection.execute(select(SchemaRow.version)).scalar_one_or_none() or 0


def _upgrade(connection: Connection, found: int, where: str) -> None:
    if any(version not in UPGRADES for version in range(found, SCHEMA_VERSION)) or found > SCHEMA_VERSION:
        advice = (
            "upgrade phifleet"
            if found > SCHEMA_VERSION
            else "use the phifleet that made it, or move it aside and add the devices again with `phifleet device add`"
        )
        raise RegistryError(
            f"database {where} has schema version {found}, and this phifleet works with {SCHEMA_VERSION}: {advice}"
        )
    for version in range(found, SCHEMA_VERSION):
        UPGRADES[version](connection)
    connection.execute(update(SchemaRow).values(version=SCHEMA_VERSION))


def _from_2(connection: Connection) -> None:
    """Revocation, the age of figures, why an order was not published; controllers and withdrawals.

    Every column may be null, so a controller of the version before goes on working until it is restarted.
    """
    for name in ("revoked_at", "presence_received_at", "health_at"):
        _add_column(connection, "devices", name, UtcDateTime())
    _add_column(connection, "devices", "health_interval_s", Float())
    _add_column(connection, "deployments", "publish_error", Text())
    for row in (ControllerRow, WithdrawalRow):
        table: Table = Base.metadata.tables[row.__tablename__]
        table.create(connection)


def _add_column(connection: Connection, table: str, name: str, kind: TypeEngine[Any]) -> None:
    connection.execute(text(f"ALTER TABLE {table} ADD COLUMN {name} {kind.compile(dialect=connection.dialect)}"))


#: From a version to the next.
UPGRADES: Mapping[int, Callable[[Connection], None]] = MappingProxyType({2: _from_2})
