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
from agent.contract.messages import MetadataAnswer, MetadataStatus, MetadataWant
from agent.core.ports import Message
from fleet.delivery import metadata
from fleet.delivery.metadata import MetadataServer, segment_of
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
        await self.device.publish(topics.METADATA_WANT, payload, response_topic=response_topic, correlation=b"c")

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
        server = MetadataServer(fleet, files)
        await server.start()
        answers: list[Message] = []
        await device.subscribe(topics.metadata("pi-1"), answers.append)
        yield Scene(broker, device, server, files, answers)
        await server.stop()


def want(name: str, offset: int = 0) -> bytes:
    return MetadataWant(device="pi-1", name=name, offset=offset).to_json()


async def test_an_answer(scene: Scene) -> None:
    (answer,) = await scene.ask(want("timestamp.json"))
    assert (answer.payload, answer.correlation) == (b"{}", b"c")
    properties = MetadataAnswer.from_properties(dict(answer.properties))
    assert properties == MetadataAnswer(status=MetadataStatus.OK, name="timestamp.json", total=2)


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
        (b'{"device": "../x", "name": "timestamp.json"}', topics.metadata("pi-1")),
        (b'{"device": "pi-1", "name": "timestamp.json", "offset": -1}', topics.metadata("pi-1")),
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
    for _ in range(200):
        await scene.device.publish(
            topics.METADATA_WANT, want("timestamp.json"), response_topic=topics.metadata("pi-1"), correlation=b"c"
        )
    await until(lambda: scene.server.answered + scene.server.ignored == 200)
    await until(lambda: len(scene.answers) == scene.server.answered)
    assert scene.server.answered >= 50


async def test_two_controllers_share_the_load(scene: Scene) -> None:
    async with scene.broker.link("second") as link:
        second = MetadataServer(link, scene.files)
        await second.start()
        for _ in range(6):
            assert len(await scene.ask(want("timestamp.json"))) == 1
        await until(lambda: scene.server.answered + second.answered == 6)
        assert (scene.server.answered, second.answered) == (3, 3)
        await second.stop()


@given(data=st.binary(max_size=300_000), offset=st.integers(0, 400_000))
def test_a_segment_is_as_long_as_it_can_be(data: bytes, offset: int) -> None:
    answer, segment = segment_of(MetadataWant(device="pi-1", name="x", offset=offset), data)
    assert (answer.total, answer.offset) == (len(data), offset)
    assert segment == data[offset : offset + MAX_CHUNK_BYTES]
