"""Controllers on one database and one broker: a real mosquitto, the real link, SQLite and PostgreSQL."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import structlog

from agent.contract import topics
from agent.contract.messages import Boot, Facts, HealthReport, Presence, Reported, State
from agent.core.backoff import BackoffPolicy
from agent.link import LinkSettings, Message, MqttLink
from fleet.daemon.controller import Controller
from fleet.registry import open_registry
from tests.fleet.registry.conftest import fresh_postgresql, postgresql, url
from tests.fleet.world import World, make_world
from tests.simulators.broker import Broker, have_mosquitto, mosquitto
from tests.simulators.proxy import proxy
from tests.waiting import until

__all__ = ["fresh_postgresql", "postgresql", "url"]  # fixtures

pytestmark = pytest.mark.skipif(not have_mosquitto(), reason="mosquitto is not installed")
FAST = BackoffPolicy(base_s=0.1, cap_s=0.3)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    with mosquitto(tmp_path) as running:
        yield running


@pytest.fixture
def world(url: str, tmp_path: Path) -> Iterator[World]:
    made = make_world(tmp_path / "home", url)
    yield made
    made.registry.close()


@asynccontextmanager
async def link_to(where: str, name: str) -> AsyncIterator[MqttLink]:
    async with MqttLink(LinkSettings(where, name, backoff=FAST, keepalive_s=5, receive_maximum=500)) as link:
        await link.wait_connected(10)
        yield link


@asynccontextmanager
async def controller(world: World, where: str, name: str, url: str) -> AsyncIterator[Controller]:
    """One that is ready, over a database connection of its own."""
    ready, stop = asyncio.Event(), asyncio.Event()
    with contextlib.closing(open_registry(url)) as registry:
        async with link_to(where, name) as link:
            one = Controller(
                link,
                registry,
                world.repository,
                clock=lambda: datetime.now(UTC),
                notify=lambda _: ready.set() or True,
                poll_s=0.05,
            )
            task = asyncio.create_task(one.run(stop))
            await asyncio.wait([asyncio.create_task(ready.wait()), task], return_when=asyncio.FIRST_COMPLETED)
            try:
                yield one
            finally:
                stop.set()
                await task


@asynccontextmanager
async def watched(broker: Broker) -> AsyncIterator[list[Message]]:
    """Every order that ever comes to the broker, as an application that listens sees it."""
    seen: list[Message] = []
    async with link_to(broker.url, "watcher") as link:
        await link.subscribe(f"{topics.PREFIX}/devices/+/desired", seen.append)
        yield seen


async def test_a_controller_that_was_cut_off_brings_no_older_order_back(world: World, broker: Broker, url: str):
    world.clock.set(datetime.now(UTC))
    world.add("pi-1")
    with proxy(broker.host, broker.port) as line:
        async with watched(broker) as seen, controller(world, line.url, "a", url) as cut_off:
            (first,) = world.deploy("pi-1")
            await until(lambda: len(seen) == 1)
            line.refusing = True
            line.cut()
            async with controller(world, broker.url, "b", url):
                (second,) = world.deploy("pi-1")
                await until(lambda: len(seen) == 2, timeout_s=60)
                line.refusing = False
                await until(lambda: cut_off.link.connected)
                await asyncio.sleep(2)  # for what it would send again
    assert [message.payload for message in seen] == [first.envelope, second.envelope]


async def test_two_controllers_write_each_message_once_and_publish_each_order_once(
    world: World, broker: Broker, url: str
):
    if url.startswith("sqlite"):
        pytest.skip("SQLite is for one controller")
    world.clock.set(datetime.now(UTC))
    devices = [f"pi-{number:03}" for number in range(200)]
    world.add(*devices)
    written: Counter[str] = Counter()
    async with (
        watched(broker) as seen,
        swept(world, broker.url, url, "a") as one,
        swept(world, broker.url, url, "b") as other,
    ):
        for name, each in (("a", one), ("b", other)):
            record = each.ingest.recorder.record

            def counted(batch, record=record, name=name):  # type: ignore[no-untyped-def]
                written[name] += len(batch)
                record(batch)

            each.ingest.recorder.record = counted  # type: ignore[method-assign]
        orders = world.deploy(*devices)
        await until(lambda: len(seen) >= 200, timeout_s=60)
        async with link_to(broker.url, "devices") as link:
            for order in orders:
                report = Reported(
                    device=order.device, sequence=1, deployment=order.id, state=State.COMMITTED,
                    digest=order.digest, at=datetime.now(UTC), boot=Boot(id="a" * 16, number=1, counter=1),
                )  # fmt: skip
                await link.publish(topics.reported(order.device), report.to_json(), retain=True)
            newest = world.registry.deployments.newest
            await until(lambda: {row.stage for row in newest().values()} == {"committed"}, timeout_s=60)
    assert Counter(message.topic for message in seen) == {topics.desired(device): 1 for device in devices}
    assert written.total() == 200, "each message was written by one of them"
    assert min(written.values()) > 20, "a second controller takes its share"


async def test_what_was_said_while_no_controller_listened_is_known_after_its_start(
    world: World, broker: Broker, url: str
):
    devices = [f"pi-{number:03}" for number in range(120)]
    world.clock.set(datetime.now(UTC))
    world.add(*devices)
    async with link_to(broker.url, "devices") as link:
        await asyncio.gather(*(say_all(link, device) for device in devices))
    with structlog.testing.capture_logs() as logs:
        async with controller(world, broker.url, "a", url):
            await until(lambda: all(row.online and row.facts and row.reported for row in world.registry.devices.all()))
            await until(lambda: any(entry["event"] == "retained messages read" for entry in logs))
    (read,) = [entry for entry in logs if entry["event"] == "retained messages read"]
    assert (read["devices"], read["messages"]) == (120, 360)


@asynccontextmanager
async def swept(world: World, where: str, url: str, name: str = "a") -> AsyncIterator[Controller]:
    """A controller that has read what was retained at its start."""
    with structlog.testing.capture_logs() as logs:
        async with controller(world, where, name, url) as one:
            await until(lambda: any(entry["event"] == "retained messages read" for entry in logs))
            yield one


async def say_all(link: MqttLink, device: str) -> None:
    at = datetime.now(UTC)
    boot = Boot(id="b" * 16, number=5)
    said = [
        Presence(device=device, online=True, at=at, boot=boot.model_copy(update={"counter": 1})),
        Facts(
            device=device, profile="iot-x86", agent_version="0.2", system="Linux", machine="x86", cpu="x", cpu_count=1,
            memory_total_bytes=1, memory_available_bytes=1, disk_free_bytes=1, at=at,
            boot=boot.model_copy(update={"counter": 2}),
        ),
        Reported(device=device, state=State.IDLE, at=at, boot=boot.model_copy(update={"counter": 3})),
    ]  # fmt: skip
    for message, topic in zip(said, (topics.presence, topics.facts, topics.reported), strict=True):
        await link.publish(topic(device), message.to_json(), retain=True)


async def test_an_order_that_the_broker_lost_or_that_somebody_put_in_its_place_is_published_again(
    world: World, broker: Broker, url: str
):
    world.clock.set(datetime.now(UTC))
    world.add("pi-1", "pi-2", "pi-3")
    async with controller(world, broker.url, "a", url):
        first, second, third = world.deploy("pi-1", "pi-2", "pi-3")
        newest = world.registry.deployments.newest
        await until(lambda: {row.stage for row in newest().values()} == {"published"})
    async with link_to(broker.url, "stranger") as link:
        await link.publish(topics.desired("pi-1"), b"", retain=True)
        await link.publish(topics.desired("pi-2"), first.envelope, retain=True)
    async with watched(broker) as seen:
        await until(lambda: len(seen) == 2)  # those that are retained now
        seen.clear()
        async with controller(world, broker.url, "b", url):
            await until(lambda: len(seen) == 2, timeout_s=60)
            await asyncio.sleep(0.5)
    assert {message.topic: message.payload for message in seen} == {
        topics.desired("pi-1"): first.envelope,
        topics.desired("pi-2"): second.envelope,
    }, "and the third, which is right, is left alone"
    assert third.envelope


async def test_what_the_broker_dropped_at_a_devices_start_is_read_when_it_speaks(
    world: World, broker: Broker, url: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("fleet.daemon.sweep.MISSING_S", 0.1)
    world.clock.set(datetime.now(UTC))
    world.add("pi-1")
    async with link_to(broker.url, "device") as link, swept(world, broker.url, url) as one:
        receive, dropped = one.ingest.receive, []

        def forgetful(message: Message) -> None:
            if not message.retained and not message.topic.endswith("health") and len(dropped) < 3:
                dropped.append(message.topic)
                assert message.acknowledge is not None
                message.acknowledge()
            else:
                receive(message)

        # As a broker does whose queue for this client is full.
        one.ingest.receive = forgetful  # type: ignore[method-assign]
        await one.ingest.start()
        await say_all(link, "pi-1")
        await until(lambda: len(dropped) == 3)
        assert not world.registry.devices.get("pi-1").online
        health = HealthReport(
            device="pi-1", at=datetime.now(UTC), window_s=1, boot=Boot(id="b" * 16, number=5, counter=4)
        )
        await link.publish(topics.health("pi-1"), health.to_json(), qos=0)

        def known() -> bool:
            # All three: the sweep may write what it reads in more than one batch.
            row = world.registry.devices.get("pi-1")
            return bool(row.online and row.facts and row.reported)

        await until(known)


async def test_the_lease_of_a_controller_that_vanished_ends_by_itself(world: World, url: str):
    world.clock.set(datetime.now(UTC))
    world.add("pi-1")
    (order,) = world.deploy("pi-1")
    outbox, now = world.registry.outbox, world.clock.now()
    (held,) = outbox.claim("gone", now, 10)
    assert held.order == order.envelope
    assert outbox.claim("other", now + timedelta(seconds=39), 10) == []
    (taken,) = outbox.claim("other", now + timedelta(seconds=41), 10)
    assert taken.order == order.envelope
    assert outbox.complete("gone", [held], now) == [], "its word comes too late"
    assert outbox.complete("other", [taken], now) == [taken]


async def test_an_order_that_comes_while_an_earlier_one_is_published_is_published_next(world: World, url: str):
    world.clock.set(datetime.now(UTC))
    world.add("pi-1")
    world.deploy("pi-1")
    outbox, now = world.registry.outbox, world.clock.now()
    (earlier,) = outbox.claim("one", now, 10)
    (second,) = world.deploy("pi-1")
    assert outbox.claim("two", now, 10) == [], "one alone publishes to a device"
    assert outbox.complete("one", [earlier], now) == []
    (later,) = outbox.claim("two", now, 10)
    assert later.order == second.envelope
