"""One topic that the broker refuses starves nobody; and a revoked device is neither heard nor left connected."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from agent.contract import topics
from agent.contract.messages import Boot, State
from agent.link import LinkError, Message
from fleet.daemon.barring import MAX_UNKNOWN, UNKNOWN_S, BarredDevices, KnownDevices
from fleet.daemon.run import end_session
from fleet.settings import FleetSettings
from tests.fleet.daemon.test_controller import newest, running, say
from tests.fleet.world import World, make_world
from tests.simulators.broker import have_mosquitto, mosquitto
from tests.simulators.link import MemoryBroker
from tests.waiting import until, wait_until

MANY = tuple(f"pi-{number:03}" for number in range(100))
REFUSED = "pi-037"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = make_world(tmp_path / "home")
    yield made
    made.registry.close()


async def test_one_refused_topic_starves_no_other_device_after_a_restart(world: World):
    world.add(*MANY)
    world.deploy(*MANY)
    broker = MemoryBroker()

    def refuse(message: Message) -> Message | None:
        if message.topic == topics.desired(REFUSED):
            raise LinkError("the broker refuses: not authorized (135)")
        return message

    broker.intercept = refuse
    async with broker.link("fleet") as link, running(world, link):
        await until(lambda: sum(newest(world, one).stage == "published" for one in MANY) == 99, "99 of 100 have theirs")
        await until(lambda: newest(world, REFUSED).publish_error is not None, "the refusal is recorded")
        assert "not authorized" in str(newest(world, REFUSED).publish_error)
    sent = Counter(message.topic for message in broker.published if message.topic.endswith("/desired"))
    del sent[topics.desired(REFUSED)]
    assert set(sent.values()) == {1}, "nothing that was sent is sent again"
    broker.intercept = lambda message: message
    async with broker.link("fleet") as link, running(world, link):
        await until(lambda: newest(world, REFUSED).stage == "published", "the refused one has its order now")
    assert newest(world, REFUSED).publish_error is None


async def test_a_revoked_device_is_not_heard_and_its_order_is_cleared(world: World):
    world.add("pi-1", "pi-2")
    (order, _) = world.deploy("pi-1", "pi-2")
    broker = MemoryBroker()
    async with broker.link("fleet") as link, broker.link("device") as device, running(world, link) as controller:
        await until(lambda: topics.desired("pi-1") in broker.retained, "the order is at the broker")
        world.registry.devices.revoke("pi-1", world.actor)
        await until(lambda: topics.desired("pi-1") not in broker.retained, "its order is cleared")
        await until(lambda: "pi-1" in controller.barred, "the controller knows")
        await say(device, world.reported(order, State.COMMITTED, digest=world.manifest.digest), "pi-1")
        await say(device, world.presence("pi-2"), "pi-2")
        await until(lambda: world.registry.devices.get("pi-2").online, "what came after it is read")
        assert newest_stage(world, "pi-1") == "failed"
        assert topics.desired("pi-2") in broker.retained


def newest_stage(world: World, device: str) -> str:
    return world.registry.deployments.history(device)[0].stage


@pytest.mark.skipif(not have_mosquitto(), reason="mosquitto is not installed")
@pytest.mark.parametrize("client_id", ["pi-1", "pi-1.0123456789abcdef"])
async def test_a_live_session_is_ended_at_a_real_broker(tmp_path: Path, client_id: str):
    """By its client id: MQTT 5, section 3.1.4, lets one client id have one session."""
    with mosquitto(tmp_path) as broker:
        ended = threading.Event()
        device = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=client_id, protocol=mqtt.MQTTv5)
        device.on_disconnect = lambda *_: ended.set()
        device.connect(broker.host, broker.port)
        loop = threading.Thread(target=lambda: device.loop_forever(retry_first_connection=False), daemon=True)
        loop.start()
        await asyncio.to_thread(wait_until, device.is_connected, "the device is connected")
        device.reconnect_delay_set(300, 300)
        await end_session(FleetSettings(home=tmp_path / "home", broker=broker.url), client_id)
        assert await asyncio.to_thread(ended.wait, 10)
        device.disconnect()


async def test_the_session_of_the_known_run_is_ended_and_that_of_an_agent_of_the_last_release(world: World):
    """No neighbour can guess the client id of an agent and throw it off; the controllers know it."""
    world.add("pi-1", "pi-2")
    ended: list[str] = []

    async def evict(client_id: str) -> None:
        ended.append(client_id)

    broker = MemoryBroker()
    async with (
        broker.link("fleet") as link,
        broker.link("device") as device,
        running(world, link, evict=evict),
    ):
        boot = Boot(id="0123456789abcdef", number=1, counter=1)
        await say(device, world.presence("pi-1").model_copy(update={"boot": boot}), "pi-1")
        await until(lambda: world.registry.devices.get("pi-1").online, "its presence is read")
        for name in ("pi-1", "pi-2"):
            world.registry.devices.revoke(name, world.actor)
        await until(lambda: len(ended) == 3, "three sessions are ended")
    assert sorted(ended) == ["pi-1", "pi-1.0123456789abcdef", "pi-2"]


def test_who_is_answered(world: World):
    world.add("pi-1")
    now, barred = [0.0], BarredDevices()
    known = KnownDevices(world.registry, barred, lambda: now[0])
    assert known.refusal("pi-1") is None
    assert known.refusal("pi-2") == "there is no such device in this fleet"
    world.add("pi-2")
    assert known.refusal("pi-2") is not None, "the database is not asked again at once: a stranger may ask without end"
    now[0] = UNKNOWN_S
    assert known.refusal("pi-2") is None, "added while the controller runs"
    barred.replace(frozenset({"pi-1"}))
    assert known.refusal("pi-1") == "the device was revoked or removed"
    for number in range(MAX_UNKNOWN + 10):
        known.refusal(f"stranger-{number}")
    assert len(known._unknown) <= MAX_UNKNOWN


def test_who_is_answered_while_the_database_is_away(world: World):
    world.add("pi-1")
    known = KnownDevices(world.registry, BarredDevices())
    world.registry.close()
    (world.home.root / "fleet.db").unlink()
    (world.home.root / "fleet.db").mkdir()
    assert known.refusal("pi-1") is None
    assert known.refusal("pi-9") is None, "its certificate let it in; the database cannot say otherwise"
