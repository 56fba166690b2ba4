from __future__ import annotations

import hashlib
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text, update

from agent.contract import topics
from agent.contract.messages import HealthReport, Presence, State
from fleet.errors import RegistryError, UsageError
from fleet.registry import Actor, Received, Recorder, open_registry
from fleet.registry.database import Database
from fleet.registry.health import HEALTH_KEPT
from fleet.registry.models import SCHEMA_VERSION, AuditRow, Base, SchemaRow
from tests.fleet.world import World, queued_orders, topic_of


def hear(world: World, *messages: Any) -> Recorder:
    recorder = Recorder(world.registry)
    recorder.record([Received(topic_of(m, m.device), m.to_json(), world.clock.now()) for m in messages])
    return recorder


def health(world: World, device: str, number: int = 0) -> HealthReport:
    return HealthReport(device=device, at=world.clock.now(), window_s=10, requests=number)


def test_what_is_written_is_there_after_opening_again(world: World, url: str) -> None:
    world.add("pi-1")
    (order,) = world.deploy("pi-1")
    world.registry.close()
    with closing(open_registry(url)) as again:
        assert again.devices.get("pi-1").added_at == world.clock.now()
        assert again.deployments.get(order.id).envelope == order.envelope
        assert again.artifacts.published() == {world.manifest.digest: world.manifest.id}


def test_the_order_as_published_is_the_one_that_was_signed(world: World) -> None:
    world.add("pi-1")
    (order,) = world.deploy("pi-1")
    (published,) = queued_orders(world)
    assert (published.envelope, published.id) == (order.envelope, order.id)
    world.registry.deployments.mark_published([order.id], world.clock.now())
    assert world.registry.deployments.to_publish(False, world.clock.now()) == {}
    assert world.registry.deployments.to_publish(True, world.clock.now()) == {order.id: "pi-1"}


def test_all_or_none_of_a_deployment_to_many(world: World) -> None:
    world.add("pi-1", "pi-2")
    with pytest.raises(UsageError, match="no device is named pi-3; there are: pi-1, pi-2"):
        world.deploy("pi-1", "pi-3", "pi-2")
    assert world.registry.deployments.newest() == {}
    assert world.registry.devices.get("pi-1").sequence == 0


def test_the_audit_cannot_be_changed_by_anyone(world: World, url: str) -> None:
    world.add("pi-1")
    database = Database(url)
    for statement in (update(AuditRow).values(who="nobody"), text("DELETE FROM audit")):
        with pytest.raises(RegistryError, match="append only"), database.write() as session:
            session.execute(statement)
    database.close()
    assert [row.who for row in world.registry.audit.trail()] == ["tester"]


def test_health_is_bounded_in_number_for_each_device(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleet.registry.health.HEALTH_KEPT", 10)
    monkeypatch.setattr("fleet.registry.recorder.PRUNE_EVERY", 4)
    world.add("pi-1", "pi-2")
    recorder = Recorder(world.registry)
    for number in range(41):
        for device in ("pi-1", "pi-2") if number < 3 else ("pi-1",):
            message = health(world, device, number)
            recorder.record([Received(topic_of(message, device), message.to_json(), world.clock.now())])
        assert len(world.registry.health.of("pi-1")) < 10 + 4
    kept = [row.report["requests"] for row in world.registry.health.of("pi-1")]
    assert kept == list(range(40, 30, -1))
    assert len(world.registry.health.of("pi-2")) == 3
    assert HEALTH_KEPT == 720


def test_a_message_that_the_database_will_not_take_costs_no_other(world: World, url: str) -> None:
    world.add("pi-1", "pi-2")
    poison = Presence(device="pi-1", online=True, agent_version="\0")  # PostgreSQL's text knows no NUL
    hear(world, poison, world.presence("pi-2"))
    assert world.registry.devices.get("pi-2").online
    assert world.registry.devices.get("pi-1").online == url.startswith("sqlite")


def test_a_retained_message_is_no_sign_of_life_now(world: World) -> None:
    world.add("pi-1")
    said = world.facts("pi-1")
    world.clock.advance(days=3)
    received = Received(topics.facts("pi-1"), said.to_json(), world.clock.now(), retained=True)
    Recorder(world.registry).record([received])
    assert world.registry.devices.get("pi-1").last_seen == said.at
    future = said.model_copy(update={"at": world.clock.now().replace(year=2100)})
    received = Received(topics.facts("pi-1"), future.to_json(), world.clock.now(), retained=True)
    Recorder(world.registry).record([received])
    assert world.registry.devices.get("pi-1").last_seen == world.clock.now(), "no clock of a device reaches the future"


def test_a_database_of_another_version_is_refused_with_advice(world: World, url: str) -> None:
    for version, advice in ((99, "upgrade phifleet"), (0, "move it aside")):
        engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
        with engine.begin() as connection:
            connection.execute(update(SchemaRow).values(version=version))
        engine.dispose()
        with pytest.raises(RegistryError, match=advice) as caught:
            open_registry(url)
        assert f"schema version {version}" in str(caught.value)


def test_a_database_from_before_a_column_was_added_is_refused_and_not_used(tmp_path: Path) -> None:
    path = tmp_path / "fleet.db"
    with closing(sqlite3.connect(path)) as database:  # as version 1 had it, which knew no due_at
        database.execute("CREATE TABLE phifleet_schema (version INTEGER PRIMARY KEY)")
        database.execute("INSERT INTO phifleet_schema VALUES (1)")
        database.execute("CREATE TABLE deployments (id VARCHAR(64) PRIMARY KEY)")
        database.commit()
    with pytest.raises(RegistryError, match="has schema version 1, and this phifleet works with 3: use the phifleet"):
        open_registry(f"sqlite:///{path}")


def test_tables_that_change_have_a_new_version() -> None:
    columns = sorted(
        f"{column.table.name}.{column.name}" for table in Base.metadata.sorted_tables for column in table.c
    )
    digest = hashlib.sha256(" ".join(columns).encode()).hexdigest()[:12]
    assert (SCHEMA_VERSION, digest) == (3, "bb8c4b9fa789"), "raise SCHEMA_VERSION, then put both here"


def _deploy_many(world: World, url: str, count: int) -> list[int]:
    """Over a connection of its own, as another process would."""
    with closing(open_registry(url)) as registry:
        other = replace(world, registry=registry)
        return [other.deploy("pi-1")[0].sequence for _ in range(count)]


def test_those_who_deploy_at_once_never_share_a_sequence_number(world: World, url: str) -> None:
    world.add("pi-1")
    with ThreadPoolExecutor(3) as pool:
        drawn = list(pool.map(lambda _: _deploy_many(world, url, 8), range(3)))
    assert sorted(number for numbers in drawn for number in numbers) == list(range(1, 25))
    assert all(numbers == sorted(numbers) for numbers in drawn)
    assert [row.stage for row in world.registry.deployments.history("pi-1", 30)] == ["queued"] + ["superseded"] * 23


def _open_new(url: str) -> int:
    with closing(open_registry(url)) as registry:
        return len(registry.devices.all())


def test_two_may_make_the_tables_at_once(url: str) -> None:
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(_open_new, [url] * 6)) == [0] * 6


def test_a_reader_is_never_in_the_way_of_a_writer(world: World, url: str) -> None:
    world.add("pi-1")
    database = Database(url)
    with database.read() as session:
        session.execute(text("SELECT * FROM devices")).all()
        hear(world, world.presence("pi-1"))
    database.close()
    assert world.registry.devices.get("pi-1").online


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "is no database URL; write sqlite"),
        ("mysql://x/y", "mysql is not supported; use sqlite or postgresql"),
        ("postgresql://nobody@127.0.0.1:1/x", "(?i)connection"),
        ("sqlite:////proc/nowhere/fleet.db", "cannot be made|unable to open"),
    ],
)
def test_a_database_that_cannot_be_used_says_why(url: str, message: str) -> None:
    with pytest.raises(RegistryError, match=message):
        open_registry(url)


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "fleet.db"
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(RegistryError, match="something else, or damaged") as caught:
        open_registry(f"sqlite:///{path}")
    assert str(path) in str(caught.value)


def test_a_password_is_never_in_a_message() -> None:
    with pytest.raises(RegistryError) as caught:
        open_registry("postgresql://fleet:hunter2@127.0.0.1:1/x")
    assert "hunter2" not in str(caught.value)


def test_a_writer_that_keeps_the_lock_too_long_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleet.registry.database.BUSY_TIMEOUT_S", 0.1)
    path = tmp_path / "fleet.db"
    with closing(open_registry(f"sqlite:///{path}")), closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(RegistryError, match="another process kept it"):
            open_registry(f"sqlite:///{path}")


def test_naive_times_are_refused(world: World) -> None:
    naive = datetime(2026, 1, 1)
    with pytest.raises(RegistryError, match="without an offset"):
        world.registry.audit.record(Actor("me", naive), "x", "y")


def test_the_state_of_a_deployment_survives_every_restart_of_the_controller(world: World, url: str) -> None:
    world.add("pi-1")
    (order,) = world.deploy("pi-1")
    for state in (State.RESOLVING, State.TRANSFERRING, State.PROBATION):
        hear(world, world.reported(order, state))
        with closing(open_registry(url)) as again:
            row = again.deployments.newest()["pi-1"]
            assert (row.stage, row.started_at) == (state.value, world.clock.now())
