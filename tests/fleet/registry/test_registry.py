from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, text, update

from agent.contract import topics
from agent.contract.messages import HealthReport, Presence, Reported, State
from fleet.errors import RegistryError, UsageError
from fleet.registry import Actor, Received, Recorder, open_registry
from fleet.registry.database import Database
from fleet.registry.models import AuditRow, DeviceRow
from fleet.registry.rows import orderable_rows, outstanding, put_in_outbox
from tests.fleet.world import World, put_artifact, topic_of


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
    outbox, now = world.registry.outbox, world.clock.now()
    (claim,) = outbox.claim("me", now, 10)
    assert (claim.order, claim.deployment, claim.barred) == (order.envelope, order.id, False)
    assert outbox.complete("me", [claim], now) == [claim]
    assert outbox.claim("me", now, 10) == []
    assert outbox.expected(["pi-1"], now) == {"pi-1": order.envelope}


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


def test_health_is_kept_as_it_came_for_two_days_and_then_five_minutes_to_a_row(world: World) -> None:
    world.add("pi-1", "pi-2")
    recorder = Recorder(world.registry)
    digest = "ab" * 32
    for number in range(4 * 24 * 12):  # four days, a report each five minutes and one a minute after it
        for minutes, requests, tpot in ((1, 1, 10.0), (4, 3, 20.0)):
            world.clock.advance(minutes=minutes)
            report = HealthReport(
                device="pi-1", at=world.clock.now(), window_s=60, requests=requests, errors=number % 2, digest=digest,
                tpot_ms_p50=tpot, ttft_ms_p95=float(number),
            )  # fmt: skip
            recorder.record([Received(topics.health("pi-1"), report.to_json(), world.clock.now())])
    kept, rolled = world.registry.health.of("pi-1", 10_000), world.registry.health.rollups("pi-1", 10_000)
    assert 2 * 48 * 12 <= len(kept) <= 2 * 48 * 12 + 64
    assert len(kept) // 2 + len(rolled) == pytest.approx(4 * 24 * 12, abs=2)
    whole = [row for row in rolled if row.requests == 4]
    assert len(whole) >= len(rolled) - 1, "each has both of its reports"
    assert {row.tpot_ms_p50 for row in whole} == {17.5}, "weighted by requests"
    assert world.registry.health.of("pi-2") == []


def test_a_number_of_any_size_is_written_and_read_as_it_was(world: World) -> None:
    most = 2**53 - 1
    manifest = put_artifact(world.home, b"a large one").model_copy(update={"size": 3 * 2**31})
    world.registry.artifacts.record(manifest, world.actor)
    world.add("pi-1")
    report = HealthReport(device="pi-1", at=world.clock.now(), window_s=1, requests=2**40, worker_memory_bytes=most)
    hear(world, report, Reported(device="pi-1", sequence=2**40, state=State.IDLE, at=world.clock.now()))
    (row,) = world.registry.health.of("pi-1")
    assert (row.requests, row.memory_bytes) == (2**40, most)


def test_what_a_device_says_of_its_sequence_moves_no_order_of_others_and_not_past_belief(world: World) -> None:
    world.add("pi-1", "pi-2", "pi-3")
    hear(world, Reported(device="pi-1", sequence=2**53 - 1, state=State.IDLE, at=world.clock.now()))
    hear(world, Reported(device="pi-2", sequence=41, state=State.IDLE, at=world.clock.now()))
    payload = b'{"device":"pi-3","sequence":9223372036854775808,"state":"idle","at":"2026-11-25T00:00:00Z"}'
    recorder = Recorder(world.registry)
    recorder.record([Received(topics.reported("pi-3"), payload, world.clock.now())])
    assert recorder.malformed == {"pi-3": 1}
    sequences = {order.device: order.sequence for order in world.deploy("pi-1", "pi-2", "pi-3")}
    assert sequences == {"pi-1": 1, "pi-2": 42, "pi-3": 1}, "a backup may have lost 41 orders, but no quadrillion"


@pytest.mark.thorough
def test_seventy_thousand_devices_are_ordered_at_once(world: World) -> None:
    """More values than one statement of any database may name."""
    names = [f"d-{number:05}" for number in range(70_000)]
    database = Database(str(world.registry._database.url.render_as_string(hide_password=False)))
    with database.write() as session:
        row = {"profile": "iot-x86", "added_at": world.clock.now(), "cleared": False, "sequence": 0, "online": False}
        session.execute(insert(DeviceRow), [{"id": name, "agent_version": "", "malformed": 0, **row} for name in names])
    with database.write() as session:
        assert len(orderable_rows(session, names, lock=True)) == 70_000
        assert outstanding(session, names) == []
        put_in_outbox(session, names, world.clock.now())
        put_in_outbox(session, names, world.clock.now())
    with database.read() as session:
        assert session.execute(text("SELECT count(*), min(version), max(version) FROM outbox")).one() == (70_000, 2, 2)
    database.close()
    assert len(world.registry.devices.ids()) == 70_000


def test_what_a_terminal_would_obey_and_what_a_database_will_not_take_is_cleaned(world: World) -> None:
    world.add("pi-1")
    hear(world, Presence(device="pi-1", online=True, agent_version="\x1b[2J\0\u202e0.2\ud800" + "x" * 9999))
    version = world.registry.devices.get("pi-1").agent_version
    assert version.startswith("\ufffd[2J\ufffd\ufffd0.2\ufffd") and len(version) == 128


def test_a_message_that_the_database_will_not_take_costs_no_other(world: World) -> None:
    world.add("pi-1", "pi-2")

    class Poisoned(Recorder):
        """As a message would be that no check of ours has foreseen."""

        def _write(self, session: Any, read: Any) -> None:
            if any(one.device == "pi-1" for one in read):
                session.execute(text("INSERT INTO fleet (name, value) VALUES ('group', 'again')"))
            super()._write(session, read)

    recorder = Poisoned(world.registry)
    said = [world.presence("pi-1"), world.presence("pi-2")]
    recorder.record([Received(topic_of(m, m.device), m.to_json(), world.clock.now()) for m in said])
    assert (world.registry.devices.get("pi-1").online, world.registry.devices.get("pi-2").online) == (False, True)


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


def test_a_database_from_before_a_column_was_added_is_refused_and_not_used(tmp_path: Path) -> None:
    path = tmp_path / "fleet.db"
    with closing(sqlite3.connect(path)) as database:  # as version 1 had it, which knew no due_at
        database.execute("CREATE TABLE phifleet_schema (version INTEGER PRIMARY KEY)")
        database.execute("INSERT INTO phifleet_schema VALUES (1)")
        database.execute("CREATE TABLE deployments (id VARCHAR(64) PRIMARY KEY)")
        database.commit()
    with pytest.raises(RegistryError, match=r"has schema version 1, and this phifleet works with \d+: move it aside"):
        open_registry(f"sqlite:///{path}")


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
