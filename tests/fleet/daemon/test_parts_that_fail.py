"""What each part of the controller does while the broker, the database, the CA or the disk refuses."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest
import structlog
from structlog.typing import EventDict

from agent.contract import topics
from agent.contract.messages import HealthReport
from agent.link import LinkError, Message
from fleet.core.retry import RetryPolicy
from fleet.daemon import ingest as ingest_module
from fleet.daemon.barring import BarredDevices, Barring
from fleet.daemon.controller import Controller
from fleet.daemon.heartbeat import Heart
from fleet.daemon.ingest import Ingest
from fleet.daemon.publisher import Publisher
from fleet.daemon.refresh import Refresh
from fleet.daemon.retry import DATABASE_TRIES, DatabaseRetry
from fleet.daemon.sweep import Sweep, _Reading
from fleet.errors import RegistryError, RepositoryError
from fleet.trust.ca import DeviceCA
from tests.fleet.daemon.test_controller import say
from tests.fleet.world import World, make_world
from tests.simulators.link import MemoryBroker, MemoryLink
from tests.waiting import until

DEVICE = "pi-1"
GONE = RegistryError("database sqlite:///fleet.db: disk I/O error")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = make_world(tmp_path / "home")
    made.add(DEVICE, "pi-2")
    yield made
    made.registry.close()


class Runs(Protocol):
    def run(self) -> Awaitable[None]: ...


@asynccontextmanager
async def going(part: Runs) -> AsyncIterator[list[EventDict]]:
    """A part that runs; yields what it logs. One that has ended by itself raises what ended it."""
    with structlog.testing.capture_logs() as logs:
        task = asyncio.ensure_future(part.run())
        try:
            yield logs
        finally:
            if task.done():
                task.result()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def refusing(times: int, error: Exception, then: Callable[..., Any]) -> Callable[..., Any]:
    """A call that raises so many times, and then does its work."""
    left = iter(range(times))

    def call(*arguments: Any, **more: Any) -> Any:
        if next(left, None) is not None:
            raise error
        return then(*arguments, **more)

    return call


def events(logs: list[EventDict], event: str) -> list[EventDict]:
    return [entry for entry in logs if entry["event"] == event]


def health(world: World, device: str, requests: int = 0) -> HealthReport:
    return HealthReport(device=device, at=world.clock.now(), window_s=10, requests=requests)


# --- the heartbeat


async def test_a_heartbeat_that_is_not_written_is_logged_once_and_written_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    controllers = world.registry.controllers
    monkeypatch.setattr(controllers, "beat", refusing(3, GONE, controllers.beat))
    async with MemoryBroker().link() as link, going(Heart(link, world.registry, world.clock.now, 0.01)) as logs:
        await until(lambda: controllers.all() != [], "it is written at last")
    assert [entry["error"] for entry in events(logs, "heartbeat not written")] == [str(GONE)]


async def test_a_heartbeat_says_since_when_the_broker_is_there_and_why_it_is_not(world: World) -> None:
    async with MemoryBroker().link() as link:
        heart = Heart(link, world.registry, world.clock.now)
        link.cut()
        await heart.beat()
        (row,) = world.registry.controllers.all()
        assert (row.connected_since, row.broker_error) == (None, "the connection was cut")
        world.clock.advance(minutes=5)
        link.restore()
        await heart.beat()
        (row,) = world.registry.controllers.all()
        assert (row.connected_since, row.broker_error) == (world.clock.now(), None)


async def test_a_controller_that_began_without_a_broker_counts_from_when_it_came(world: World) -> None:
    async with MemoryBroker().link() as link:
        link.cut()
        heart = Heart(link, world.registry, world.clock.now)
        world.clock.advance(minutes=5)
        link._up = True  # connected before anybody was told
        await heart.beat()
        assert world.registry.controllers.all()[0].connected_since == world.clock.now()


# --- the database


async def test_a_database_that_is_away_for_too_long_ends_the_controller(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fleet.daemon.retry.DATABASE_RETRY_S", 0.001)
    monkeypatch.setattr(world.registry.outbox, "claim", refusing(10**6, GONE, world.registry.outbox.claim))
    async with MemoryBroker().link("fleet") as link:
        controller = Controller(link, world.registry, world.repository, clock=world.clock.now, notify=lambda _: True)
        with structlog.testing.capture_logs() as logs, pytest.raises(RegistryError, match="disk I/O error"):
            await controller.run(asyncio.Event())
    assert len(events(logs, "database unusable, trying again")) == 1


def test_the_database_is_tried_so_often_and_its_return_is_told() -> None:
    retry = DatabaseRetry()
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            with retry.attempt() as attempt:
                raise GONE
            assert not attempt.succeeded and retry.failing
        with retry.attempt():
            pass
        assert not retry.failing
        for _ in range(DATABASE_TRIES - 1):
            with retry.attempt():
                raise GONE
        with pytest.raises(RegistryError, match="disk I/O error"), retry.attempt():
            raise GONE
    assert events(logs, "database usable again")[0]["failures"] == 3


async def test_reports_wait_for_the_database_and_are_acknowledged_when_they_are_written(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fleet.daemon.retry.DATABASE_RETRY_S", 0.001)
    async with MemoryBroker().link("fleet") as link:
        ingest = Ingest(link, world.registry, world.clock.now, lambda device, message: None, BarredDevices())
        monkeypatch.setattr(ingest.recorder, "record", refusing(2, GONE, ingest.recorder.record))
        await ingest.start()
        async with going(ingest) as logs:
            await say(link, world.presence(DEVICE))
            await until(lambda: link.acknowledged, "it is acknowledged")
            assert world.registry.devices.get(DEVICE).online
    assert len(events(logs, "database unusable, trying again")) == 1


async def test_what_still_waits_at_the_end_is_written_if_the_database_lets_one(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with MemoryBroker().link("fleet") as link:
        ingest = Ingest(link, world.registry, world.clock.now, lambda device, message: None, BarredDevices())
        await ingest.start()
        await say(link, world.presence(DEVICE))
        await until(lambda: ingest._waiting, "it has come")
        await ingest.finish()
        assert world.registry.devices.get(DEVICE).online and len(link.acknowledged) == 1
        await say(link, world.presence("pi-2"))
        await until(lambda: ingest._waiting, "it has come")
        monkeypatch.setattr(ingest.recorder, "record", refusing(9, GONE, ingest.recorder.record))
        await ingest.finish()
        assert len(link.acknowledged) == 1, "the broker keeps what was not written"


async def test_health_that_comes_faster_than_it_is_written_is_counted_and_told(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest_module, "MAX_HEALTH", 1)
    monkeypatch.setattr(ingest_module, "COUNTS_S", 0.02)
    async with MemoryBroker().link("fleet") as link:
        ingest = Ingest(link, world.registry, world.clock.now, lambda device, message: None, BarredDevices())
        for number, device in enumerate((DEVICE, DEVICE, "pi-2")):
            ingest.receive(Message(topics.health(device), health(world, device, number).to_json()))
        async with going(ingest) as logs:
            await until(lambda: events(logs, "health reports not written"), "it is told")
            await until(lambda: world.registry.health.of(DEVICE), "the newest is written")
            await asyncio.sleep(0.1)
    (told,) = events(logs, "health reports not written")
    assert (told["dropped"], told["replaced_by_newer"]) == (1, 1)
    assert [row.requests for row in world.registry.health.of(DEVICE)] == [1]
    assert world.registry.health.of("pi-2") == []


async def test_a_message_after_the_end_disturbs_nobody(world: World) -> None:
    barred = BarredDevices()
    async with MemoryBroker().link("fleet") as link:
        ingest = Ingest(link, world.registry, world.clock.now, lambda device, message: None, barred)
        barred.replace(frozenset({DEVICE}))
        done: list[int] = []
        for device in (DEVICE, "pi-2"):  # before the start there is no loop to wake
            message = Message(topics.presence(device), b"{}", acknowledge=lambda: done.append(1))
            ingest.receive(message)
        assert done == [1], "of a barred device nothing is kept, and the broker is not asked for it again"
        ingest.receive(Message(topics.presence(DEVICE), b"{}"))
        ingest._woken, ingest._loop = False, asyncio.new_event_loop()
        ingest._loop.close()
        ingest.receive(Message(topics.presence("pi-2"), b"{}"))


# --- those who are barred


class Evictions:
    """Ends sessions, or refuses to."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.asked = list(errors), 0

    async def __call__(self, device: str) -> None:
        self.asked += 1
        if self.errors:
            raise self.errors.pop(0)


def barring(world: World, evict: Evictions | None, barred: BarredDevices | None = None) -> Barring:
    policy = RetryPolicy(first_s=0.01, most_s=0.02)
    barred = barred or BarredDevices()
    return Barring(world.registry, barred, evict, clock=world.clock.now, poll_s=0.005, policy=policy)


async def test_a_session_that_the_broker_does_not_let_one_end_is_tried_again(world: World) -> None:
    evict = Evictions(LinkError("not connected"), LinkError("not connected"))
    async with going(barring(world, evict)) as logs:
        world.registry.devices.revoke(DEVICE, world.actor)
        await until(lambda: events(logs, "session of a barred device ended again"), "it is ended")
    assert evict.asked == 3
    assert [entry["error"] for entry in events(logs, "session of a barred device not ended")] == ["not connected"] * 2


async def test_one_that_comes_back_is_thrown_off_again_and_what_to_do_is_told(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world.registry.devices, "barred", refusing(1, GONE, world.registry.devices.barred))
    evict = Evictions()
    part = barring(world, evict)
    async with going(part) as logs:
        world.registry.devices.revoke(DEVICE, world.actor)
        await until(lambda: events(logs, "session of a barred device ended"), "it is ended")
        for expected in (2, 3):
            part.received(DEVICE, Message(topics.presence(DEVICE), world.presence(DEVICE).to_json()))
            part.received(DEVICE, Message(topics.presence(DEVICE), world.presence(DEVICE).to_json()))
            await until(lambda expected=expected: evict.asked >= expected, "it is ended again")
        await asyncio.sleep(0.1)  # over twice the longest wait: it begins anew
        part.received(DEVICE, Message(topics.health(DEVICE), b"{}"))
        await until(lambda: evict.asked == 4, "it is ended once more")
        await until(lambda: world.registry.devices.to_clear() == [DEVICE], "its topics are cleared again")
    assert events(logs, "session of a barred device ended again")[0]["hint"].startswith("it can still connect")
    assert events(logs, "barred devices not read")[0]["error"] == str(GONE)


@pytest.mark.parametrize(
    ("topic", "payload", "retained", "ends"),
    [
        ("presence", b"", False, False),  # that was us, clearing it
        ("presence", b'{"online": fals', False, True),  # no message of ours, so the device's
        ("facts", b"{}", False, True),
        ("facts", b"{}", True, False),
    ],
)
async def test_only_what_a_barred_device_says_itself_ends_its_session(
    world: World, topic: str, payload: bytes, retained: bool, ends: bool
) -> None:
    world.registry.devices.revoke(DEVICE, world.actor)
    evict, part = Evictions(), barring(world, None)
    await part.start()
    part._sessions.clear()  # the one that its revocation ends anyway
    part._evict = evict
    part.received(DEVICE, Message(f"{topics.PREFIX}/devices/{DEVICE}/{topic}", payload, retained))
    async with going(part):
        await asyncio.sleep(0.05)
    assert evict.asked == (1 if ends else 0)


async def test_the_will_of_a_barred_device_is_the_brokers_word(world: World) -> None:
    world.registry.devices.revoke(DEVICE, world.actor)
    part = barring(world, None)
    await part.start()
    part._sessions.clear()
    will = world.presence(DEVICE, online=False)
    part.received(DEVICE, Message(topics.presence(DEVICE), will.to_json()))
    assert part._sessions == {}
    async with going(part):
        await until(lambda: part._uncleared == set(), "its topics are to be cleared")


# --- publishing, sweeping, signing


async def test_a_broker_that_does_not_acknowledge_in_time_is_said_to(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fleet.daemon.publisher.PUBLISH_TIMEOUT_S", 0.02)
    world.deploy(DEVICE)
    async with MemoryBroker().link("fleet") as link:
        silent = asyncio.Event()

        async def publish(*_: Any, **__: Any) -> None:
            await silent.wait()

        monkeypatch.setattr(link, "publish", publish)
        publisher = Publisher(link, world.registry, world.clock.now, lambda _: True, 0.01, owner="me")
        async with going(publisher) as logs:
            await until(lambda: events(logs, "publications refused, trying again"), "it is told")
    assert events(logs, "publications refused, trying again")[0]["error"] == "no acknowledgement within 0.02 s"


async def test_a_broker_that_is_away_is_told_when_something_waits_for_it(world: World) -> None:
    async with MemoryBroker().link("fleet") as link:
        link.cut()
        publisher = Publisher(link, world.registry, world.clock.now, lambda _: True, 0.005, owner="me")
        async with going(publisher) as logs:
            await asyncio.sleep(0.05)
            assert logs == []
            world.deploy(DEVICE)
            await until(lambda: events(logs, "not published, waiting for the broker"), "it is told")
            link.restore()
            await until(lambda: events(logs, "order published"), "it is published")


async def test_a_sweep_that_the_broker_or_the_database_breaks_off_begins_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fleet.daemon.sweep.RETRY_S", 0.01)
    monkeypatch.setattr(world.registry.devices, "ids", refusing(1, GONE, world.registry.devices.ids))
    async with MemoryBroker().link("fleet") as link:
        await say(link, world.presence(DEVICE))
        monkeypatch.setattr(link, "subscribe_exact", refusing(1, LinkError("quota exceeded"), link.subscribe_exact))
        received: list[Message] = []
        sweep = Sweep(link, world.registry, received.append, world.clock.now, list, quiet_s=0.05)
        async with going(sweep) as logs:
            await until(lambda: received, "it is read")
            await until(lambda: events(logs, "retained messages read"), "the sweep ends")
    errors = [entry["error"] for entry in events(logs, "retained messages not read, trying again")]
    assert errors == [str(GONE), "quota exceeded"]


async def test_a_refusal_that_is_over_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.deploy(DEVICE)
    async with MemoryBroker().link("fleet") as link:
        monkeypatch.setattr(link, "publish", refusing(1, LinkError("not authorized (135)"), link.publish))
        policy = RetryPolicy(first_s=0.0, most_s=0.0)
        publisher = Publisher(link, world.registry, world.clock.now, lambda _: True, 0.005, owner="me", policy=policy)
        async with going(publisher) as logs:
            await until(lambda: events(logs, "no publication refused any more"), "it is published")
    assert events(logs, "publications refused, trying again")[0]["error"] == "not authorized (135)"


async def test_an_order_that_nobody_waits_to_have_acknowledged_is_looked_at_all_the_same(world: World) -> None:
    seen: list[Message] = []
    reading = _Reading([topics.desired(DEVICE)], seen.append, asyncio.get_running_loop())
    reading.received(Message(topics.desired(DEVICE), b"order", retained=True))
    await reading.wait(1.0)
    assert (reading.orders, seen) == ({DEVICE: b"order"}, [])


async def test_what_did_not_come_is_read_again_while_the_broker_is_there(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fleet.daemon.sweep.MISSING_S", 0.01)
    missing: list[list[str]] = []
    async with MemoryBroker().link("fleet") as link:
        sweep = Sweep(link, world.registry, lambda message: None, world.clock.now, missing.pop, quiet_s=0.02)
        link.cut()
        sweep._due.clear()
        async with going(sweep) as logs:
            await asyncio.sleep(0.05)
            missing += [[DEVICE], []] + [[]] * 1000
            missing.append([DEVICE])
            link._up = True
            await until(lambda: events(logs, "read again what did not come"), "it is read")
    assert events(logs, "read again what did not come")[0]["devices"] == 1


async def test_metadata_that_cannot_be_signed_is_told_and_signed_later(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fleet.daemon.refresh.REFRESH_RETRY_S", 0.01)
    monkeypatch.setattr("fleet.daemon.refresh.REFRESH_S", 0.01)
    error = RepositoryError("repository: the disk is full")
    monkeypatch.setattr(world.repository, "refresh_online", refusing(1, error, lambda: True))
    ca = DeviceCA(world.home)
    ca.init()
    monkeypatch.setattr(ca, "refresh_crl", lambda: True)
    async with going(Refresh(world.repository, ca, world.clock.now)) as logs:
        await until(lambda: events(logs, "revocation list signed again; the broker must read it again"), "it is signed")
    assert events(logs, "not signed again, trying again")[0]["error"] == str(error)
    assert events(logs, "metadata signed again")


# --- the controller as a whole


class _Server:
    """Stops badly, as a broker that is gone lets one."""

    async def start(self) -> None:
        return

    async def stop(self) -> None:
        raise LinkError("not connected")


async def test_a_controller_stops_in_good_order_though_all_around_it_is_gone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = asyncio.Event()
    link: MemoryLink
    async with MemoryBroker().link("fleet") as link:
        controller = Controller(
            link, world.registry, world.repository, (_Server(),), clock=world.clock.now, notify=lambda _: True
        )
        with structlog.testing.capture_logs() as logs:
            task = asyncio.ensure_future(controller.run(stop))
            await until(lambda: events(logs, "controller ready"), "it is ready")
            monkeypatch.setattr(world.registry.outbox, "release", refusing(9, GONE, list))
            monkeypatch.setattr(world.registry.controllers, "stopped", refusing(9, GONE, list))
            stop.set()
            await task
    assert events(logs, "controller stopped")


async def test_a_part_of_somebody_else_that_fails_ends_the_controller_and_says_why(world: World) -> None:
    class Part:
        async def run(self) -> None:
            raise RegistryError("no such table")

    async with MemoryBroker().link("fleet") as link:
        controller = Controller(link, world.registry, world.repository, clock=world.clock.now, parts=(Part(),))
        with contextlib.suppress(TimeoutError), pytest.raises(RegistryError, match="no such table"):
            async with asyncio.timeout(20):
                await controller.run(asyncio.Event())
