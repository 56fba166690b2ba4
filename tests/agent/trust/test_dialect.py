"""An agent of this release and a controller of the last one: it is asked where it listens, and no other is."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agent.contract import topics
from agent.contract.messages import MetadataAnswer, MetadataStatus, MetadataWantV1, State, WantV1
from agent.core.dialect import Dialect
from agent.core.ports import Message
from agent.store.artifacts import ArtifactStore
from agent.store.fetch import Fetcher
from agent.trust.requests import MetadataRequests, RetryPolicy, UnreachableError
from fleet.delivery.metadata import MetadataServer
from tests.simulators.artifacts import make_artifact, noise
from tests.simulators.link import MemoryBroker, MemoryLink

QUICK = RetryPolicy(timeout_s=0.05, attempts=3, factor=1.0)


class Files:
    def read(self, name: str) -> bytes | None:
        return b"{}" if name == "timestamp.json" else None


class OldController:
    """What a controller 0.1 answers: its topics, its messages, and no word about newer ones."""

    def __init__(self, link: MemoryLink) -> None:
        self._link = link
        self.chunks_asked: list[WantV1] = []

    async def start(self) -> None:
        await self._link.subscribe("$share/phifleet-metadata/phifleet/v1/metadata/want", self._metadata)
        await self._link.subscribe("$share/phifleet-chunks/phifleet/v1/artifacts/+/want", self._chunks)

    def _metadata(self, message: Message) -> None:
        want = MetadataWantV1.from_json(message.payload)
        answer = MetadataAnswer(status=MetadataStatus.OK, name=want.name, offset=want.offset, total=2)
        properties = {name: value for name, value in answer.to_properties().items() if name != "wants"}
        topic = topics.metadata(want.device)
        self._link.broker.accept(Message(topic, b"{}", correlation=message.correlation, properties=properties))

    def _chunks(self, message: Message) -> None:
        self.chunks_asked.append(WantV1.from_json(message.payload))


@asynccontextmanager
async def old_controller(broker: MemoryBroker) -> AsyncIterator[OldController]:
    async with broker.link("old") as link:
        controller = OldController(link)
        await controller.start()
        yield controller


def asked_at(broker: MemoryBroker) -> list[str]:
    return [message.topic for message in broker.published if message.topic.endswith("want")]


async def test_a_controller_of_this_release_is_asked_at_the_devices_own_topic_alone() -> None:
    broker = MemoryBroker()
    async with broker.link("fleet") as fleet, broker.link("device") as device:
        await MetadataServer(fleet, Files(), group="secret").start()
        requests = MetadataRequests(device, "pi-1", QUICK)
        for _ in range(2):
            assert (await requests.segment("timestamp.json", 0)).data == b"{}"
        assert asked_at(broker) == [topics.metadata_want("pi-1")] * 2


async def test_a_controller_of_the_last_release_is_found_and_then_asked_for_chunks_where_it_listens(
    tmp_path: Path,
) -> None:
    broker, dialect = MemoryBroker(), Dialect()
    manifest = make_artifact(tmp_path / "source", {"a": noise(100_000, 1)})
    async with old_controller(broker) as old, broker.link("device") as device:
        requests = MetadataRequests(device, "pi-1", QUICK, dialect)
        assert (await requests.segment("timestamp.json", 0)).data == b"{}"
        assert dialect.shared_topics
        fetcher = Fetcher(device, ArtifactStore(tmp_path, reserve_bytes=0), "pi-1", dialect=dialect)
        with pytest.raises(Exception, match="no chunk came"):
            await fetcher.fetch(manifest, window_bytes=1 << 20, stall_s=0.2, on_progress=lambda progress: None)
        assert {want.device for want in old.chunks_asked} == {"pi-1"}
        assert topics.want("pi-1") not in asked_at(broker)


async def test_a_controller_that_was_upgraded_meanwhile_is_noticed() -> None:
    broker, dialect = MemoryBroker(), Dialect(shared_topics=True)
    async with broker.link("fleet") as fleet, broker.link("device") as device:
        await MetadataServer(fleet, Files(), group="secret").start()
        await MetadataRequests(device, "pi-1", QUICK, dialect).segment("timestamp.json", 0)
        assert not dialect.shared_topics


async def test_a_broker_that_lets_no_device_ask_at_its_own_topic_costs_no_time() -> None:
    """Its ACL is of the last release, and so is its controller."""
    broker = MemoryBroker()
    async with old_controller(broker), broker.link("device") as device:
        broker.forbidden = {topics.metadata_want("pi-1")}
        requests = MetadataRequests(device, "pi-1", RetryPolicy(timeout_s=60, attempts=1))
        assert (await requests.segment("timestamp.json", 0)).data == b"{}"


async def test_a_broker_that_refuses_both_is_told_with_its_reason() -> None:
    broker = MemoryBroker()
    async with broker.link("device") as device:
        broker.forbidden = {topics.metadata_want("pi-1"), topics.METADATA_WANT_V1}
        with pytest.raises(UnreachableError, match=r"cannot ask for timestamp\.json: .*refused"):
            await MetadataRequests(device, "pi-1", QUICK).segment("timestamp.json", 0)


def test_a_controller_of_the_last_release_is_told_the_states_that_it_knows() -> None:
    old, new = Dialect(shared_topics=True), Dialect()
    known = {"idle", "resolving", "transferring", "verifying", "proving", "activating", "probation", "committed"}
    assert {old.state(state).value for state in State} == known | {"rolled_back", "failed"}
    assert all(new.state(state) is state for state in State)
