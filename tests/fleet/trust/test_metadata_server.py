"""The metadata server: what it answers, what it ignores, and how much it takes at once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from agent.contract import topics
from agent.contract.manifest import MAX_CHUNK_BYTES
from agent.contract.messages import MetadataAnswer, MetadataStatus, MetadataWant, MetadataWantV1, metadata_segment
from agent.core.ports import Message
from fleet.delivery import metadata
from fleet.delivery.metadata import MetadataServer
from tests.simulators.link import MemoryBroker, MemoryLink
from tests.waiting import until

BIG = bytes(range(256)) * 1500


@dataclass
class Files:
    files: dict[str, bytes]
    read_names: list[str] = field(default_factory=list)

    def read(self, name: str) -> bytes | None:
        self.read_names.append(name)
        if name == "broken.json":
            raise OSError("the disk is gone")
        return self.files.get(name)


@dataclass
class Scene:
    broker: MemoryBroker
    device: MemoryLink
    server: MetadataServer
    files: Files
    answers: list[Message]

    async def send(self, payload: bytes, response_topic: str | None = topics.metadata("pi-1")) -> None:
        self.answers.clear()
        topic = topics.metadata_want("pi-1")
        await self.device.publish(topic, payload, response_topic=response_topic, correlation=b"c")

    async def send_v1(self, device: str = "pi-1") -> None:
        """As an agent 0.1 does, or somebody who says he is one."""
        old = MetadataWantV1(device=device, name="timestamp.json")
        await self.device.publish(
            topics.METADATA_WANT_V1, old.to_json(), response_topic=topics.metadata(device), correlation=b"1"
        )

    async def ask(self, payload: bytes) -> list[Message]:
        """All that is answered, at least one."""
        await self.send(payload)
        await until(lambda: self.answers, "there is an answer")
        return self.answers


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    broker = MemoryBroker()
    async with broker.link("fleet") as fleet, broker.link("device") as device:
        files = Files({"timestamp.json": b"{}", "3.targets.json": BIG, "empty.json": b""})
        server = MetadataServer(fleet, files, group="secret")
        await server.start()
        answers: list[Message] = []
        await device.subscribe(topics.metadata("pi-1"), answers.append)
        yield Scene(broker, device, server, files, answers)
        await server.stop()


def want(name: str, offset: int = 0) -> bytes:
    return MetadataWant(name=name, offset=offset).to_json()


async def test_an_answer(scene: Scene) -> None:
    (answer,) = await scene.ask(want("timestamp.json"))
    assert (answer.payload, answer.correlation) == (b"{}", b"c")
    properties = MetadataAnswer.from_properties(dict(answer.properties))
    assert properties == MetadataAnswer(status=MetadataStatus.OK, name="timestamp.json", total=2, wants=2)


async def test_a_definite_no(scene: Scene) -> None:
    (answer,) = await scene.ask(want("4.root.json"))
    assert MetadataAnswer.from_properties(dict(answer.properties)).status is MetadataStatus.NOT_FOUND


async def test_segments(scene: Scene) -> None:
    whole = b""
    while len(whole) < len(BIG):
        (answer,) = await scene.ask(want("3.targets.json", len(whole)))
        assert len(answer.payload) <= MAX_CHUNK_BYTES
        whole += answer.payload
    assert whole == BIG
    assert scene.files.read_names == ["3.targets.json"]


@pytest.mark.parametrize(
    ("payload", "response_topic"),
    [
        (b"", topics.metadata("pi-1")),
        (b"{", topics.metadata("pi-1")),
        (b'{"device": "pi-1"}', topics.metadata("pi-1")),
        (b'{"name": "timestamp.json", "offset": -1}', topics.metadata("pi-1")),
        (want("timestamp.json"), None),
        (want("timestamp.json"), topics.metadata("pi-2")),
        (want("timestamp.json"), topics.desired("pi-1")),
    ],
)
async def test_what_is_ignored(scene: Scene, payload: bytes, response_topic: str | None) -> None:
    before = len(scene.broker.published)
    await scene.send(payload, response_topic)
    await until(lambda: scene.server.ignored)
    assert scene.answers == []
    assert len(scene.broker.published) == before + 1
    assert (scene.server.answered, scene.server.ignored) == (0, 1)
    assert len(await scene.ask(want("timestamp.json"))) == 1


async def test_a_fault_costs_one_answer(scene: Scene) -> None:
    with capture_logs() as logs:
        await scene.send(want("broken.json"))
        await until(lambda: logs)
    assert logs[0]["event"] == "metadata answer failed"
    assert scene.answers == []
    assert len(await scene.ask(want("timestamp.json"))) == 1


async def test_a_herd_is_answered_as_far_as_there_is_room(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "MAX_WAITING", 50)
    for number in range(200):
        device = f"pi-{number}"
        await scene.device.publish(
            topics.metadata_want(device), want("timestamp.json"), response_topic=topics.metadata(device)
        )
    await until(lambda: scene.server.answered + scene.server.ignored == 200)
    assert scene.server.answered >= 50


async def test_one_device_that_asks_without_end_leaves_room_for_the_others(scene: Scene) -> None:
    for _ in range(3 * metadata.MAX_WAITING_OF_ONE):
        await scene.device.publish(
            topics.metadata_want("hostile"), want("3.targets.json"), response_topic=topics.metadata("hostile")
        )
    assert len(await scene.ask(want("timestamp.json"))) == 1
    await until(lambda: scene.server.answered + scene.server.ignored == 3 * metadata.MAX_WAITING_OF_ONE + 1)


async def test_an_agent_of_the_last_release_is_answered_until_it_asks_at_its_own_topic(scene: Scene) -> None:
    await scene.send_v1()
    await until(lambda: len(scene.answers) == 1)
    assert len(await scene.ask(want("timestamp.json"))) == 1
    await scene.send_v1()  # from here on it is somebody else who says so
    await until(lambda: scene.server.ignored == 1)
    await scene.send_v1("pi-2")
    await until(lambda: scene.server.answered == 3)


async def test_devices_that_are_not_of_this_fleet_are_not_answered() -> None:
    broker = MemoryBroker()
    async with broker.link("fleet") as fleet, broker.link("device") as device:
        server = MetadataServer(
            fleet,
            Files({"timestamp.json": b"{}"}),
            group="secret",
            admission=lambda name: None if name == "pi-1" else "there is no such device",
        )
        await server.start()
        for name in ("stranger", "pi-1"):
            await device.publish(
                topics.metadata_want(name), want("timestamp.json"), response_topic=topics.metadata(name)
            )
        await until(lambda: (server.answered, server.ignored) == (1, 1))
        await server.stop()


async def test_two_controllers_share_the_load(scene: Scene) -> None:
    async with scene.broker.link("second") as link:
        second = MetadataServer(link, scene.files, group="secret")
        await second.start()
        for _ in range(6):
            assert len(await scene.ask(want("timestamp.json"))) == 1
        await until(lambda: scene.server.answered + second.answered == 6)
        assert (scene.server.answered, second.answered) == (3, 3)
        await second.stop()


@given(data=st.binary(max_size=300_000), offset=st.integers(0, 400_000))
def test_a_segment_is_as_long_as_it_can_be(data: bytes, offset: int) -> None:
    answer, segment = metadata_segment(MetadataWant(name="x", offset=offset), data)
    assert (answer.total, answer.offset) == (len(data), offset)
    assert segment == data[offset : offset + MAX_CHUNK_BYTES]
