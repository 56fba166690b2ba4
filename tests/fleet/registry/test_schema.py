"""A database as an earlier release left it, with devices and history, is brought up to date, and the fleet goes on."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import BigInteger, create_engine, inspect, text

from fleet.core.selectors import parse
from fleet.errors import RegistryError
from fleet.registry import Actor, open_registry, schema
from fleet.registry.database import Database
from fleet.registry.models import Base

RELEASED = Path(__file__).parent / "golden" / "registry.v2.sql"
NOW = datetime(2026, 11, 25, tzinfo=UTC)


def engine_of(url: str) -> Any:
    return create_engine(url.replace("postgresql:", "postgresql+psycopg:"))


def rows(url: str, statement: str) -> list[tuple[Any, ...]]:
    engine = engine_of(url)
    with engine.begin() as connection:
        found = [tuple(row) for row in connection.execute(text(statement))]
    engine.dispose()
    return found


def _load_sqlite(url: str) -> None:
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as database:
        database.executescript(RELEASED.read_text(encoding="utf-8"))


def _load_postgresql(url: str) -> None:
    """The same rows in the tables that release 0.1.0 made there."""
    with closing(Database.unchecked(url)) as database:
        database.upgrade("0001")
    with closing(sqlite3.connect(":memory:")) as source:
        source.executescript(RELEASED.read_text(encoding="utf-8"))
        engine = engine_of(url)
        with engine.begin() as connection:
            for table in ("artifacts", "devices", "deployments", "audit", "health"):
                cursor = source.execute(f"SELECT * FROM {table}")
                names = [column[0] for column in cursor.description]
                columns = inspect(connection).get_columns(table)
                kinds = {column["name"]: column["type"].python_type for column in columns}
                insert = f"INSERT INTO {table} ({', '.join(names)}) VALUES ({', '.join(f':{name}' for name in names)})"
                for row in cursor:
                    values = {
                        name: bool(value) if kinds[name] is bool and value is not None else value
                        for name, value in zip(names, row, strict=True)
                    }
                    connection.execute(text(insert), values)
            connection.execute(text("SELECT setval('audit_id_seq', 100)"))
            connection.execute(text("DROP TABLE alembic_version"))  # 0.1.0 had none
        engine.dispose()


@pytest.fixture
def released(url: str, tmp_path: Path) -> str:
    if url.startswith("sqlite"):
        (tmp_path / "home").mkdir()
        _load_sqlite(url)
    else:
        _load_postgresql(url)
    return url


def upgrade(url: str, revision: str = "head") -> None:
    with closing(Database.unchecked(url)) as database:
        database.upgrade(revision)


def test_devices_and_history_of_the_release_before_are_there(released: str):
    upgrade(released)
    with closing(open_registry(released)) as registry:
        first, second = registry.devices.all()
        assert (first.id, first.sequence, first.health["tokens_per_s"]) == ("pi-1", 1, 74.0)  # type: ignore[index]
        assert (second.id, second.revoked_at, second.health_at) == ("pi-2", None, None)
        (deployment,) = registry.deployments.history("pi-1")
        assert (deployment.stage, deployment.publish_error, deployment.digests) == ("committed", None, None)
        (health,) = registry.health.of("pi-1")
        assert (health.requests, health.ttft_ms_p50, health.tokens_per_s) == (3, 12.0, 74.0)
        assert registry.audit.broken() == [], "what was there before is part of the chain"
        # What the new tables are for works on what was there before.
        registry.devices.revoke("pi-2", Actor("tester", NOW))
        assert registry.devices.barred() == {"pi-2"}
        assert [claim.device for claim in registry.outbox.claim("me", NOW, 10)] == ["pi-2"]
        assert registry.artifacts.withdraw(deployment.digest, "a test", Actor("tester", NOW))
        assert [entry.action for entry in registry.audit.trail()][:2] == ["artifact.withdraw", "device.revoke"]
        assert registry.audit.broken() == []
    with closing(open_registry(released)) as again:
        assert again.devices.barred() == {"pi-2"}


def test_a_database_of_the_release_before_is_left_alone_until_it_is_upgraded(released: str):
    before = rows(released, "SELECT version FROM phifleet_schema")
    with pytest.raises(
        RegistryError, match=rf"has schema 0001, .* works with {schema.HEAD}: run `phifleet db upgrade`"
    ):
        open_registry(released)
    assert rows(released, "SELECT version FROM phifleet_schema") == before == [(2,)]


@pytest.mark.parametrize("revision", schema.revisions())
def test_each_revision_goes_down_and_up_again_with_its_data(released: str, revision: str):
    upgrade(released)
    before = {table: rows(released, f"SELECT * FROM {table} ORDER BY 1") for table in ("devices", "audit", "artifacts")}
    health = rows(released, "SELECT device, at, requests, tokens_per_s FROM health")
    upgrade(released, revision)
    upgrade(released)
    assert {table: rows(released, f"SELECT * FROM {table} ORDER BY 1") for table in before} == before
    assert rows(released, "SELECT device, at, requests, tokens_per_s FROM health") == health


def test_the_revisions_make_the_tables_of_the_models(url: str):
    upgrade_new(url)
    engine = engine_of(url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": _widths})
        assert compare_metadata(context, Base.metadata) == []
    engine.dispose()


def upgrade_new(url: str) -> None:
    open_registry(url).close()


def _widths(_context: Any, _inspected: Any, _column: Any, there: Any, wanted: Any) -> bool | None:
    """Whether a number is narrower in the database than in the model; SQLite has one width."""
    if isinstance(wanted, BigInteger):
        return _context.dialect.name != "sqlite" and not isinstance(there, BigInteger)
    return False


def test_alembic_and_the_program_agree_on_the_newest_revision():
    assert schema.revisions()[-1] == schema.HEAD


def test_a_database_of_a_later_version_is_left_alone(released: str):
    upgrade(released)
    rows_changed = "UPDATE alembic_version SET version_num = '9999'"
    engine = engine_of(released)
    with engine.begin() as connection:
        connection.execute(text(rows_changed))
    engine.dispose()
    for act in (open_registry, upgrade):
        act: Callable[[str], object]
        with pytest.raises(RegistryError, match=r"has schema 9999, .*: a later phifleet has upgraded it; upgrade this"):
            act(released)


def test_a_phifleet_before_revisions_is_told_to_leave_it_alone(released: str):
    upgrade(released)
    ((version,),) = rows(released, "SELECT version FROM phifleet_schema")
    assert version > 3, "release 0.1.0 and what came after it refuse a version above their own"


def test_a_revision_that_does_not_exist_is_refused_with_those_that_do(released: str):
    with pytest.raises(RegistryError, match=f"no revision is named 0042; there are: {', '.join(schema.revisions())}"):
        upgrade(released, "0042")
    assert rows(released, "SELECT version FROM phifleet_schema") == [(2,)]


def test_a_backup_is_the_database_as_it_was_also_while_others_write(released: str, tmp_path: Path):
    if not released.startswith("sqlite"):
        pytest.skip("PostgreSQL has tools of its own for backups")
    with closing(Database.unchecked(released)) as database:
        database.backup(tmp_path / "backup.db")
        database.upgrade()
    assert rows(f"sqlite:///{tmp_path / 'backup.db'}", "SELECT version FROM phifleet_schema") == [(2,)]


def test_labels_from_before_their_index_are_found_by_it(url: str) -> None:
    columns = "id, profile, added_at, cleared, sequence, online, agent_version, malformed, labels"
    values = "'pi-1', 'iot-x86', '2026-01-15 12:00:00', false, 0, false, '', 0, :labels"
    with closing(Database.unchecked(url, create=True)) as database:
        database.upgrade("0004")
        engine = engine_of(url)
        with engine.begin() as connection:
            labels = {"labels": '{"site": "lyon", "rack": "a"}'}
            connection.execute(text(f"INSERT INTO devices ({columns}) VALUES ({values})"), labels)
        engine.dispose()
        database.upgrade()
    with closing(open_registry(url)) as registry:
        found = registry.inventory.select(parse("label.site=lyon and label.rack in (a, b)"))
        assert [one.device for one in found] == ["pi-1"]
        assert registry.inventory.select(parse("label.site=paris")) == []
