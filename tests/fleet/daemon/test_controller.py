from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from agent.contract import topics
from agent.contract.base import WireModel
from agent.contract.failures import FailureCode
from agent.contract.messages import Failure, HealthReport, Progress, SignedDesired, State
from fleet.daemon.barring import Evict
from fleet.daemon.controller import Controller
from fleet.operations.overview import overview
from fleet.operations.views import describe_deployment
from fleet.registry import Received, Recorder
from fleet.registry.models import DeploymentRow
from tests.fleet.world import World, make_world, topic_of
from tests.simulators.clock import START
from tests.simulators.link import Faults, MemoryBroker, MemoryLink
from tests.waiting import until

DEVICE = "pi-1"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = make_world(tmp_path / "home")
    made.add(DEVICE)
    yield made
    made.registry.close()


@asynccontextmanager
async def running(
    world: World, link: MemoryLink, notices: list[str] | None = None, *, evict: Evict | None = None
) -> AsyncIterator[Controller]:
    """A controller that is ready, stopped in good order at the end."""
    ready, stop = asyncio.Event(), asyncio.Event()

    def notify(message: str) -> bool:
        if notices is not None:
            notices.append(message)
        ready.set()
        return True

    controller = Controller(
        link, world.registry, world.repository, clock=world.clock.now, notify=notify, poll_s=0.02, evict=evict
    )
    task = asyncio.create_task(controller.run(stop))
    waits = [asyncio.create_task(ready.wait()), task]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
    try:
        yield controller
    finally:
        stop.set()
        await task


async def say(link: MemoryLink, message: WireModel, device: str = DEVICE) -> None:
    await link.publish(topic_of(message, device), message.to_json(), retain=not isinstance(message, HealthReport))


def newest(world: World, device: str = DEVICE) -> DeploymentRow:
    return world.registry.deployments.newest()[device]


async def test_an_order_that_is_recorded_is_published_signed_and_retained(world: World) -> None:
    broker = MemoryBroker()
    async with broker.link("fleet") as link, running(world, link):
        (order,) = world.deploy(DEVICE)
        await until(lambda: newest(world).stage == "published", "it is published")
    message = broker.retained[topics.desired(DEVICE)]
    assert message.payload == order.envelope
    assert SignedDesired.from_json(message.payload).payloadType.startswith("application/vnd.phifleet")


async def test_what_a_device_says_is_recorded(world: World) -> None:
    broker = MemoryBroker()
    async with broker.link("fleet") as link, broker.link("device") as device, running(world, link):
        (order,) = world.deploy(DEVICE)
        await say(device, world.presence(DEVICE))
        await say(device, world.facts(DEVICE))
        progress = Progress(bytes_total=10, bytes_done=4, seconds=2)
        await say(device, world.reported(order, State.TRANSFERRING, progress=progress))
        await until(lambda: newest(world).stage == "transferring", "the transfer is recorded")
        assert newest(world).progress == progress.model_dump(mode="json")
        digest = world.manifest.digest
        await say(
            device, world.reported(order, State.COMMITTED, digest=digest, runtime="onnx_genai", endpoint="http://x")
        )
        await say(device, HealthReport(device=DEVICE, at=world.clock.now(), window_s=10, tokens_per_s=61.5))
        await until(lambda: bool(world.registry.health.of(DEVICE)), "health is recorded")
    row, deployed = world.registry.devices.get(DEVICE), newest(world)
    assert (row.online, row.agent_version, row.last_seen) == (True, "0.1.0", world.clock.now())
    assert row.facts is not None and row.facts["machine"] == "x86_64"
    assert row.health is not None and row.health["tokens_per_s"] == 61.5
    assert (deployed.stage, deployed.served_digest, deployed.runtime) == ("committed", digest, "onnx_genai")
    assert deployed.finished_at == world.clock.now()


async def test_a_device_that_vanishes_is_offline_by_its_will(world: World) -> None:
    broker = MemoryBroker()
    async with broker.link("fleet") as link, running(world, link), broker.link("device") as device:
        await say(device, world.presence(DEVICE))
        await until(lambda: world.registry.devices.get(DEVICE).online, "it is online")
        seen = world.clock.now()
        world.clock.advance(hours=1)
        await say(device, world.presence(DEVICE, online=False))
        await until(lambda: not world.registry.devices.get(DEVICE).online, "it is offline")
        assert world.registry.devices.get(DEVICE).last_seen == seen


async def test_after_a_restart_what_is_outstanding_is_published_again_and_reports_are_read_again(world: World) -> None:
    (order,) = world.deploy(DEVICE)
    async with MemoryBroker().link("fleet") as link, running(world, link):
        await until(lambda: newest(world).stage == "published", "it is published")
    broker = MemoryBroker()  # an embedded broker forgets everything when it restarts
    async with broker.link("device") as device, broker.link("fleet") as link:
        await say(device, world.reported(order, State.VERIFYING))
        async with running(world, link):
            await until(lambda: topics.desired(DEVICE) in broker.retained, "it is published again")
            await until(lambda: newest(world).stage == "verifying", "the retained report is read")
    assert broker.retained[topics.desired(DEVICE)].payload == order.envelope


async def test_the_newest_order_alone_is_published_and_the_one_before_is_superseded(world: World) -> None:
    (first,), (second,) = world.deploy(DEVICE), world.deploy(DEVICE)
    broker = MemoryBroker()
    async with broker.link("fleet") as link, running(world, link):
        await until(lambda: newest(world).stage == "published", "it is published")
    sent = [message.payload for message in broker.published if message.topic == topics.desired(DEVICE)]
    assert sent == [second.envelope]
    assert world.registry.deployments.get(first.id).stage == "superseded"
    assert (first.sequence, second.sequence) == (1, 2)


async def test_without_a_broker_orders_wait(world: World) -> None:
    broker = MemoryBroker()
    async with broker.link("fleet") as link:
        with structlog.testing.capture_logs() as logs:
            async with running(world, link):
                link.cut()
                world.deploy(DEVICE)
                await asyncio.sleep(0.2)
                assert newest(world).stage == "queued"
                link.restore()
                await until(lambda: newest(world).stage == "published", "it is published")
    assert len([entry for entry in logs if entry["event"].startswith("not published")]) == 1


MALFORMED = [
    b"",
    b"{",
    b"\xff\xfe",
    b"[]",
    b"null",
    b'{"device":"pi-1"}',
    b"9" * 5000,
    b'{"device":"pi-1","online":"\\ud800"}',
]


async def test_malformed_messages_are_ignored_counted_and_logged_once_per_device(world: World) -> None:
    broker = MemoryBroker()
    with structlog.testing.capture_logs() as logs:
        async with broker.link("fleet") as link, broker.link("device") as device, running(world, link) as controller:
            for topic in (topics.presence, topics.facts, topics.reported, topics.health):
                for payload in MALFORMED:
                    await device.publish(topic(DEVICE), payload)
            await say(device, world.presence(DEVICE))
            await until(lambda: world.registry.devices.get(DEVICE).online, "the good one is taken")
    counted = 4 * (len(MALFORMED) - 1)  # an empty payload clears a retained message
    assert controller.ingest.recorder.malformed[DEVICE] == counted
    assert world.registry.devices.get(DEVICE).malformed == counted
    assert len([entry for entry in logs if entry["event"].startswith("malformed")]) == 1


async def test_a_device_cannot_speak_for_another(world: World) -> None:
    world.add("pi-2")
    broker = MemoryBroker()
    async with broker.link("fleet") as link, broker.link("device") as device, running(world, link) as controller:
        await device.publish(topics.presence("pi-2"), world.presence(DEVICE).to_json())
        await until(lambda: controller.ingest.recorder.malformed["pi-2"] == 1, "it is refused")
    assert not world.registry.devices.get("pi-2").online


async def test_a_device_that_was_not_added_is_logged_once_and_leaves_no_row(world: World) -> None:
    broker = MemoryBroker()
    with structlog.testing.capture_logs() as logs:
        async with broker.link("fleet") as link, broker.link("device") as device, running(world, link) as controller:
            for _ in range(3):
                await say(device, world.presence("stranger"), "stranger")
            await until(lambda: controller.ingest.recorder.unknown["stranger"] == 3, "all are seen")
    assert [row.id for row in world.registry.devices.all()] == [DEVICE]
    assert len([entry for entry in logs if "not added" in entry["event"]]) == 1


async def test_a_report_on_another_deployment_or_sequence_changes_nothing(world: World) -> None:
    (order,) = world.deploy(DEVICE)
    broker = MemoryBroker()
    async with broker.link("fleet") as link, broker.link("device") as device, running(world, link):
        await say(device, world.reported(order, State.COMMITTED, deployment="another"))
        await say(device, world.reported(order, State.COMMITTED, sequence=7))
        await say(device, world.presence(DEVICE))
        await until(lambda: world.registry.devices.get(DEVICE).online, "all are read")
        await until(lambda: newest(world).stage == "published", "the order is with the broker")
    assert newest(world).stage == "published"
    world.deploy(DEVICE)
    assert newest(world).sequence == 8, "larger than every sequence the device has ever reported"


async def test_nothing_is_in_progress_for_ever(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleet.daemon.publisher.TICK_S", 0.02)
    (order,) = world.deploy(DEVICE, deadline_s=3600, probation_s=0)
    broker = MemoryBroker()
    async with broker.link("fleet") as link, broker.link("device") as device, running(world, link):
        await say(device, world.presence(DEVICE))
        await say(device, world.reported(order, State.TRANSFERRING))
        await until(lambda: newest(world).stage == "transferring", "it is under way")
        world.clock.advance(hours=2)
        await until(lambda: newest(world).stage == "failed", "it is given up")
        assert newest(world).failure_code == FailureCode.DEADLINE
        await say(device, world.reported(order, State.COMMITTED, digest=world.manifest.digest))
        await until(lambda: newest(world).stage == "committed", "the device's word corrects it")
    assert newest(world).failure_code is None


async def test_a_device_that_was_away_has_its_time_when_it_is_back(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own clock stands still without a link, and who knows nothing of a device must not call that a failure."""
    monkeypatch.setattr("fleet.daemon.publisher.TICK_S", 0.02)
    (order,) = world.deploy(DEVICE, deadline_s=3600, probation_s=0)
    broker = MemoryBroker()
    async with broker.link("fleet") as link, broker.link("device") as device, running(world, link):
        await say(device, world.presence(DEVICE))
        await say(device, world.reported(order, State.TRANSFERRING))
        await until(lambda: newest(world).stage == "transferring", "it is under way")
        await say(device, world.presence(DEVICE, online=False))
        await until(lambda: not world.registry.devices.get(DEVICE).online, "it is away")
        world.clock.advance(hours=20)
        await asyncio.sleep(0.2)
        assert newest(world).stage == "transferring"
        await say(device, world.presence(DEVICE))
        await until(lambda: newest(world).started_at == world.clock.now(), "its time begins again")
        await asyncio.sleep(0.2)
        assert newest(world).stage == "transferring"
        world.clock.advance(hours=2)
        await until(lambda: newest(world).stage == "failed", "and is over at last")


async def test_an_order_that_expired_while_its_device_was_away_is_given_up(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fleet.daemon.publisher.TICK_S", 0.02)
    (order,) = world.deploy(DEVICE, deadline_s=3600, probation_s=0)
    broker = MemoryBroker()
    async with broker.link("fleet") as link, broker.link("device") as device, running(world, link):
        await say(device, world.reported(order, State.TRANSFERRING))
        await until(lambda: newest(world).stage == "transferring", "it is under way")
        world.clock.advance(days=400)
        await until(lambda: newest(world).stage == "failed", "it is given up")


async def test_what_a_device_waits_for_is_shown_and_is_no_failure(world: World) -> None:
    (order,) = world.deploy(DEVICE)
    broker = MemoryBroker()
    why = Failure(code=FailureCode.STORE_DISK_FULL, message="needs 86 MiB, has 3 MiB")
    async with broker.link("fleet") as link, broker.link("device") as device, running(world, link):
        await say(device, world.presence(DEVICE))
        await say(device, world.reported(order, State.WAITING_SPACE, waiting=why))
        await until(lambda: newest(world).stage == "waiting_space", "it waits")
        shown = describe_deployment(newest(world))
        assert (shown["failure"], shown["waiting"]) == (None, {"code": "store.disk_full", "message": why.message})
        assert any(
            entry["kind"] == "waiting" and "waits for room on its disk: needs 86 MiB" in entry["text"]
            for entry in json.loads(overview(world.registry, world.clock.now()))["attention"]
        )
        await say(device, world.reported(order, State.TRANSFERRING))
        await until(lambda: newest(world).stage == "transferring", "it goes on")
        assert newest(world).failure_code is None


async def test_a_failure_is_kept_with_its_code_and_reason(world: World) -> None:
    (order,) = world.deploy(DEVICE)
    broker = MemoryBroker()
    failure = Failure(code=FailureCode.STORE_DISK_FULL, message="needs 86 MiB, has 3 MiB")
    async with broker.link("fleet") as link, broker.link("device") as device, running(world, link):
        await say(device, world.reported(order, State.FAILED, failure=failure))
        await until(lambda: newest(world).stage == "failed", "it is recorded")
    assert (newest(world).failure_code, newest(world).failure_message) == ("store.disk_full", failure.message)


async def test_a_removed_device_leaves_nothing_at_the_broker(world: World) -> None:
    world.deploy(DEVICE)
    broker = MemoryBroker()
    async with broker.link("fleet") as link, broker.link("device") as device, running(world, link):
        await say(device, world.presence(DEVICE))
        await say(device, world.facts(DEVICE))
        await until(lambda: len(broker.retained) == 3, "order, presence and facts are retained")
        world.registry.devices.remove(DEVICE, world.actor)
        await until(lambda: not broker.retained, "they are cleared")
        await until(lambda: not world.registry.devices.to_clear(), "that is recorded")
    world.add(DEVICE)
    expected = world.registry.outbox.expected([DEVICE], world.clock.now())
    assert expected == {DEVICE: None}, "a cancelled order does not come back"
    assert world.deploy(DEVICE)[0].sequence == 2


async def test_metadata_is_signed_again_before_it_expires(world: World) -> None:
    before = world.repository.read("timestamp.json")
    world.clock.advance(days=5)
    async with MemoryBroker().link("fleet") as link, running(world, link):
        after = world.repository.read("timestamp.json")
    assert before != after


async def test_metadata_that_only_the_operator_can_renew_is_warned_of(world: World) -> None:
    world.clock.advance(days=340)
    with structlog.testing.capture_logs() as logs:
        async with MemoryBroker().link("fleet") as link, running(world, link):
            await until(lambda: len([e for e in logs if e["event"] == "metadata expires soon"]) == 2, "it is warned of")


async def test_systemd_is_told(world: World) -> None:
    notices: list[str] = []
    async with MemoryBroker().link("fleet") as link, running(world, link, notices):
        await until(lambda: notices.count("WATCHDOG=1") > 2, "the watchdog is fed")
    assert notices[0] == "READY=1" and notices[-1] == "STOPPING=1"


async def test_a_database_that_is_away_for_a_while_loses_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleet.daemon.retry.DATABASE_RETRY_S", 0.05)
    broker = MemoryBroker()
    with structlog.testing.capture_logs() as logs:
        async with broker.link("fleet") as link, broker.link("device") as device, running(world, link):
            with contextlib.closing(sqlite3.connect(world.home.database, isolation_level=None)) as other:
                other.execute("PRAGMA busy_timeout=10000")
                other.execute("ALTER TABLE devices RENAME TO away")
                await say(device, world.presence(DEVICE))
                await until(lambda: any("unusable" in entry["event"] for entry in logs), "it is noticed")
                other.execute("ALTER TABLE away RENAME TO devices")
            await until(lambda: world.registry.devices.get(DEVICE).online, "it is recorded at last")


async def test_over_a_bad_line_every_deployment_still_ends_where_the_device_is(world: World) -> None:
    broker = MemoryBroker(Faults(duplication=0.3, seed=3))
    (order,) = world.deploy(DEVICE)
    states = [State.RESOLVING, State.TRANSFERRING, State.VERIFYING, State.PROVING, State.ACTIVATING, State.PROBATION]
    async with broker.link("fleet") as link, broker.link("device") as device, running(world, link):
        for state in (*states, State.COMMITTED):
            await say(device, world.reported(order, state))
        await until(lambda: newest(world).stage == "committed", "it is committed")


async def test_two_thousand_messages_from_fifty_devices_are_written(world: World) -> None:
    broker = MemoryBroker()
    devices = [f"d-{number}" for number in range(50)]
    world.add(*devices)
    async with broker.link("fleet") as link, broker.link("device") as device, running(world, link):
        for number in range(2000):
            name = devices[number % 50]
            report = HealthReport(device=name, at=world.clock.now(), window_s=10, requests=number)
            await device.publish(topics.health(name), report.to_json())
        await until(
            lambda: (world.registry.devices.get("d-49").health or {}).get("requests") == 1999, "all are written"
        )


async def test_three_hundred_orders_are_published_together(world: World) -> None:
    devices = [f"d-{number}" for number in range(300)]
    world.add(*devices)
    broker = MemoryBroker()
    notices: list[str] = []
    async with broker.link("fleet") as link, running(world, link, notices):
        world.deploy(*devices)
        await until(lambda: len(broker.retained) == 300, "all are published")
        await until(
            lambda: {row.stage for row in world.registry.deployments.newest().values()} == {"published"}, "and recorded"
        )


@given(st.sampled_from([topics.presence, topics.facts, topics.reported, topics.health]), st.binary(max_size=200))
def test_no_bytes_of_any_device_disturb_the_recorder(topic: Callable[[str], str], payload: bytes) -> None:
    written: list[object] = []
    recorder = Recorder(_Sink(written))  # type: ignore[arg-type]
    recorder.record([Received(topic(DEVICE), payload, START)])
    assert len(written) == (1 if payload else 0)
    assert recorder.malformed[DEVICE] == len(written), "no random bytes are a message"


class _Sink:
    """A registry that only counts."""

    def __init__(self, written: list[object]) -> None:
        self._written = written

    def record(self, write: object) -> None:
        self._written.append(write)


async def test_an_order_expires_with_the_clock(world: World) -> None:
    world.deploy(DEVICE)
    world.clock.advance(days=2)
    late = world.registry.deployments.tick(world.clock.now() + timedelta(seconds=1))
    assert [row.failure_code for row in late] == [FailureCode.DEADLINE]
    (claim,) = world.registry.outbox.claim("me", world.clock.now(), 10)
    assert claim.order is None, "nothing is published that every device would refuse"
