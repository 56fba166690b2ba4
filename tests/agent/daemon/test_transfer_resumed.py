"""The daemon over the real store, fetcher, link and chunk server: what has arrived is never fetched twice."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from agent.contract.failures import FailureCode
from agent.contract.manifest import Manifest, Probe
from agent.contract.messages import State
from agent.core import deployment as core
from agent.core.ports import Handler, Message
from agent.link import MqttLink
from agent.store.artifacts import ArtifactStore
from agent.store.fetch import Fetcher
from tests.agent.daemon.world import Device, order
from tests.disk import MIB
from tests.simulators.artifacts import make_artifact, noise
from tests.simulators.broker import Broker, embedded_broker, free_port, mosquitto
from tests.simulators.device import SimHost, SimTrust
from tests.simulators.transfer import linked, serving
from tests.waiting import until

__all__ = ["embedded_broker"]


class ThinLink:
    """A link over which a given number of chunk bytes comes, and then no more."""

    def __init__(self, link: MqttLink) -> None:
        self._link = link
        self.left = 1 << 40

    @property
    def connected(self) -> bool:
        return self._link.connected

    async def publish(self, *arguments: Any, **more: Any) -> None:
        await self._link.publish(*arguments, **more)

    async def subscribe(self, topic: str, handler: Handler, **more: Any) -> None:
        def pass_on(message: Message) -> None:
            if self.left >= len(message.payload):
                self.left -= len(message.payload)
                handler(message)

        await self._link.subscribe(topic, pass_on, **more)

    async def unsubscribe(self, topic: str) -> None:
        await self._link.unsubscribe(topic)

    def progressed(self) -> None:
        self._link.progressed()


class RealTransfer:
    """A device with a real disk and a real link."""

    def __init__(self, folder: Path, link: MqttLink, manifests: list[Manifest]) -> None:
        self.home = folder / "device"
        self.manifests = manifests
        self.link = ThinLink(link)
        self.device = self._new()

    def _new(self, **kept: Any) -> Device:
        known = {manifest.digest: manifest for manifest in self.manifests}
        store = ArtifactStore(self.home, reserve_bytes=0)
        device = Device(trust=SimTrust("pi-1", known), store=store, host=SimHost(), **kept)  # type: ignore[arg-type]
        device.transfer = Fetcher(self.link, store, f"d-{uuid.uuid4().hex[:8]}")  # type: ignore[assignment]
        return device

    def restart(self) -> None:
        self.device = self._new(journal=self.device.journal)

    async def order(self, sequence: int, manifest: Manifest, **more: Any) -> core.Deployment:
        limits = {"transfer": {"window_bytes": MIB, "stall_s": 1.0}}
        self.device.progress.clear()
        return await self.device.deploys(sequence, manifest, **(limits | more))

    @property
    def received(self) -> int:
        return self.device.progress[-1].bytes_received


@pytest.fixture
def manifests(tmp_path: Path) -> list[Manifest]:
    seed = uuid.uuid4().int
    probes = (Probe(prompt="What is the capital of France?", expect=("Paris",)),)
    made = [make_artifact(tmp_path / name, {"w": noise(4 * MIB, seed + n)}, name) for n, name in enumerate("abc")]
    return [manifest.model_copy(update={"probes": probes}) for manifest in made]


@asynccontextmanager
async def world(broker: Broker, folder: Path, manifests: list[Manifest]) -> AsyncIterator[RealTransfer]:
    known = {each.digest: (each, folder / name) for each, name in zip(manifests, "abc", strict=True)}
    async with serving(broker.url, known), linked(broker.url) as link:
        yield RealTransfer(folder, link, manifests)


Interruption = Callable[[RealTransfer], Any]


async def by_a_stall(real: RealTransfer, manifest: Manifest) -> None:
    real.device.deployer.orders.take(order(1, manifest, transfer={"window_bytes": MIB, "stall_s": 1.0}))
    waiting = await real.device.until(lambda now: now.state is State.WAITING_LINK)
    assert waiting.waits_for and waiting.waits_for.code is FailureCode.TRANSFER_STALLED
    assert "which are kept; does a controller serve it" in waiting.waits_for.message


async def by_the_deadline(real: RealTransfer, manifest: Manifest) -> None:
    ended = await real.order(1, manifest, deadline_s=1.0, transfer={"window_bytes": MIB, "stall_s": 60.0})
    assert ended.failure and ended.failure.code is FailureCode.DEADLINE


async def by_the_person_at_the_device(real: RealTransfer, manifest: Manifest) -> None:
    limits = {"window_bytes": MIB, "stall_s": 60.0}
    real.device.deployer.orders.take(order(1, manifest, transfer=limits))
    await until(lambda: real.link.left < MIB / 4)
    real.device.deployer.roll_back("the person at the device asked for it")
    ended = await real.device.settled(1)
    assert ended.failure and ended.failure.code is FailureCode.CANCELLED


INTERRUPTIONS = [by_a_stall, by_the_deadline, by_the_person_at_the_device]


@pytest.mark.parametrize("interrupted", INTERRUPTIONS, ids=lambda function: function.__name__)
@pytest.mark.parametrize("restarted", [False, True], ids=["", "and a restart"])
async def test_a_transfer_that_was_interrupted_at_90_percent_needs_the_rest_only(
    embedded_broker: Broker,
    tmp_path: Path,
    manifests: list[Manifest],
    interrupted: Callable[[RealTransfer, Manifest], Any],
    restarted: bool,
) -> None:
    manifest = manifests[0]
    async with world(embedded_broker, tmp_path, manifests) as real:
        real.link.left = int(0.9 * manifest.size)
        async with real.device.boot():
            await interrupted(real, manifest)
            real.link.left = 1 << 40
            if not restarted:
                assert (await real.order(2, manifest)).state is State.COMMITTED
                assert real.received < 0.2 * manifest.size
        if restarted:
            real.restart()
            async with real.device.boot():
                assert (await real.order(2, manifest)).state is State.COMMITTED
                assert real.received < 0.2 * manifest.size


async def test_an_order_in_between_costs_the_interrupted_one_nothing(
    embedded_broker: Broker, tmp_path: Path, manifests: list[Manifest]
) -> None:
    first, second, _ = manifests
    async with world(embedded_broker, tmp_path, manifests) as real, real.device.boot():
        real.link.left = int(0.9 * first.size)
        await by_a_stall(real, first)
        # The first one still lacks bytes when it is superseded; whole, it would be collected.
        real.device.deployer.orders.take(order(2, second))
        await real.device.until(lambda now: now.newest_sequence == 2 and now.state is State.TRANSFERRING)
        real.link.left = 1 << 40
        assert (await real.device.settled(2)).state is State.COMMITTED
        assert (await real.order(3, first)).state is State.COMMITTED
        assert real.received < 0.2 * first.size


async def test_a_superseded_transfer_goes_on_where_it_was(
    embedded_broker: Broker, tmp_path: Path, manifests: list[Manifest]
) -> None:
    first, second, _ = manifests
    async with world(embedded_broker, tmp_path, manifests) as real, real.device.boot():
        real.link.left = int(0.9 * first.size)
        real.device.deployer.orders.take(order(1, first, transfer={"window_bytes": MIB, "stall_s": 60.0}))
        await until(lambda: real.link.left < MIB / 4)
        # The first one still lacks bytes when it is superseded; whole, it would be collected.
        real.device.deployer.orders.take(order(2, second))
        await real.device.until(lambda now: now.newest_sequence == 2 and now.state is State.TRANSFERRING)
        real.link.left = 1 << 40
        assert (await real.device.settled(2)).state is State.COMMITTED
        assert (await real.order(3, first)).state is State.COMMITTED
        assert real.received < 0.2 * first.size


async def test_whole_bytes_of_a_deployment_that_was_cancelled_are_not_fetched_again(
    embedded_broker: Broker, tmp_path: Path, manifests: list[Manifest]
) -> None:
    manifest = manifests[0]
    async with world(embedded_broker, tmp_path, manifests) as real, real.device.boot():
        real.device.host.hang_in_prove = True
        real.device.deployer.orders.take(order(1, manifest))
        await real.device.until(lambda now: now.state is State.PROVING)
        real.device.deployer.roll_back("the person at the device asked for it")
        await real.device.settled(1)
        real.device.host.hang_in_prove = False
        assert (await real.order(2, manifest)).state is State.COMMITTED
        assert real.received == 0
        await asyncio.sleep(0)


async def test_a_broker_that_goes_away_in_the_middle_is_waited_for_and_the_rest_is_fetched(
    tmp_path: Path, manifests: list[Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.store.fetch.LINK_PATIENCE_S", 0.3)
    manifest, port = manifests[0], free_port()
    with mosquitto(tmp_path / "one", port=port) as broker:
        async with world(broker, tmp_path, manifests) as real, real.device.boot():
            real.link.left = int(0.9 * manifest.size)
            real.device.deployer.orders.take(order(1, manifest, transfer={"window_bytes": MIB, "stall_s": 60.0}))
            await until(lambda: real.link.left < MIB / 4)
            real.device.is_linked = False
            assert broker.process is not None
            broker.process.kill()
            broker.process.wait()
            waiting = await real.device.until(lambda now: now.state is State.WAITING_LINK)
            assert waiting.waits_for and waiting.waits_for.message.startswith("the broker is not connected")
            with mosquitto(tmp_path / "two", port=port):
                await until(lambda: real.link.connected)
                real.device.progress.clear()
                real.link.left, real.device.is_linked = 1 << 40, True
                assert (await real.device.settled(1)).state is State.COMMITTED
                assert real.received < 0.2 * manifest.size


async def test_a_disk_that_is_full_is_waited_for_until_so_much_is_free_as_the_artifact_needs(
    embedded_broker: Broker, tmp_path: Path, manifests: list[Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = manifests[0]
    free = MIB
    monkeypatch.setattr("agent.store.artifacts.free_bytes", lambda _: free)
    async with world(embedded_broker, tmp_path, manifests) as real, real.device.boot():
        real.device.deployer.orders.take(order(1, manifest))
        waiting = await real.device.until(lambda now: now.state is State.WAITING_SPACE)
        assert waiting.waiting and waiting.waiting.needs_bytes == manifest.size
        free = manifest.size - 1
        await asyncio.sleep(1.5)
        assert real.device.deployer.deployment.state is State.WAITING_SPACE
        free = manifest.size
        assert (await real.device.settled(1)).state is State.COMMITTED
