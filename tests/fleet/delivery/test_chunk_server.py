"""The chunk server over real brokers: what it answers, and what it does with nonsense."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import structlog

from agent.contract import topics
from agent.contract.chunk_index import INDEX_FILE
from agent.contract.messages import ChunkRange, Want, WantV1
from agent.link import Message, MqttLink
from tests.simulators.artifacts import make_artifact, make_indexed, noise
from tests.simulators.broker import Broker
from tests.simulators.transfer import fetch, linked, only, serving
from tests.waiting import until


def spans(*ranges: tuple[int, int]) -> tuple[ChunkRange, ...]:
    return tuple(ChunkRange(first=first, last=last) for first, last in ranges)


def want(digest: str, *ranges: tuple[int, int], credit: int = 4096, shared: bool = False) -> bytes:
    return Want(artifact=digest, ranges=spans(*ranges), credit=credit, shared=shared).to_json()


@dataclass
class Client:
    """Everything that is published of one artifact."""

    link: MqttLink
    digest: str
    got: list[Message]

    async def ask(self, *ranges: tuple[int, int], credit: int = 4096, shared: bool = False, device: str = "d1") -> None:
        await self.link.publish(topics.want(device), want(self.digest, *ranges, credit=credit, shared=shared))

    async def ask_v1(self, *ranges: tuple[int, int], device: str = "d1") -> None:
        """As an agent 0.1 does, or somebody who says he is one."""
        old = WantV1(device=device, ranges=spans(*ranges), credit=4096)
        await self.link.publish(topics.want_v1(self.digest), old.to_json())

    def numbers(self) -> list[int]:
        return [int(message.topic.rsplit("/", 1)[1]) for message in self.got]


async def client(link: MqttLink, digest: str, device: str = "d1") -> Client:
    one = Client(link, digest, [])
    await link.subscribe(topics.own_chunks(device, digest), one.got.append)
    await link.subscribe(topics.shared_chunks(digest), one.got.append)
    return one


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "source"


async def test_sends_what_was_asked_for_in_order_and_no_more_than_the_credit(broker: Broker, source: Path) -> None:
    manifest = make_artifact(source, {"a": noise(700_000, 11), "b": noise(300_000, 12)})
    data = (source / "a").read_bytes() + (source / "b").read_bytes()
    sizes = [size for file in manifest.files for size, _ in file.chunks]
    async with serving(broker.url, only(manifest, source)) as server, linked(broker.url) as link:
        one = await client(link, manifest.digest)
        await one.ask((4, 6), (0, 3), credit=5)
        await until(lambda: len(one.got) == 5)
        await asyncio.sleep(0.2)
        assert one.numbers() == [4, 5, 6, 0, 1]
        for message in one.got:
            assert message.topic.startswith(f"phifleet/v1/devices/d1/chunks/{manifest.digest}/")
            assert not message.retained
            start = sum(sizes[: int(message.topic.rsplit("/", 1)[1])])
            assert message.payload == data[start : start + len(message.payload)]
        assert server.stats().chunks == 5


async def test_an_index_is_served_as_its_artifact_is(broker: Broker, tmp_path: Path) -> None:
    source = tmp_path / "artifact" / "files"
    manifest, _ = make_indexed(source, {"a": noise(700_000, 13)})
    assert manifest.index is not None
    async with serving(broker.url, only(manifest, source)) as server, linked(broker.url) as link:
        index = await client(link, manifest.index.sha256)
        await index.ask((0, 100))
        await until(lambda: len(index.got) == 1)
        assert index.got[0].payload == (source.parent / INDEX_FILE).read_bytes()
        artifact = await client(link, manifest.digest)
        await artifact.ask((0, 10_000))
        await until(lambda: len(artifact.got) == manifest.chunk_count)
        assert b"".join(message.payload for message in artifact.got) == (source / "a").read_bytes()
        server.forget(manifest.digest)
        (source.parent / INDEX_FILE).unlink()  # what is open is still answered, what is not is told
        await artifact.ask((0, 0))
        await until(lambda: server.stats().wants_unknown == 1)


async def test_numbers_that_the_artifact_has_not_are_skipped(broker: Broker, source: Path) -> None:
    manifest = make_artifact(source, {"a": noise(200_000, 13)})
    count = len(manifest.files[0].chunks)
    async with serving(broker.url, only(manifest, source)) as server, linked(broker.url) as link:
        one = await client(link, manifest.digest)
        await one.ask((0, 2_000_000_000), (5_000_000, 6_000_000))
        await until(lambda: len(one.got) == count)
        await asyncio.sleep(0.1)
        assert one.numbers() == list(range(count))
        assert server.stats().unreadable == 0


async def test_equal_wants_are_published_once(broker: Broker, source: Path) -> None:
    manifest = make_artifact(source, {"a": noise(2_000_000, 14)})
    count = len(manifest.files[0].chunks)
    async with serving(broker.url, only(manifest, source)) as server, linked(broker.url) as link:
        one = await client(link, manifest.digest)
        await asyncio.gather(*(one.ask((0, count - 1), shared=True, device=f"d{n}") for n in range(10)))
        await until(lambda: server.stats().wants == 10 and server.stats().waiting == 0)
        await asyncio.sleep(0.2)
        assert one.numbers() == list(range(count))
        assert server.stats().coalesced == 9 * count


def but(**changes: object) -> bytes:
    good = {"artifact": "0" * 64, "ranges": [{"first": 0, "last": 1}], "credit": 1}
    return json.dumps(good | changes).encode()


NONSENSE = [
    b"",
    b"{",
    b"\xff\xfe",
    b"null",
    b"[]",
    b'{"artifact": "d1"}',
    but(artifact="../../etc/passwd"),
    but(ranges=[{"first": 3, "last": 1}]),
    but(ranges=[{"first": -1, "last": 1}]),
    but(credit=10**9),
    but(ranges=[{"first": 0, "last": 1}] * 300),
]


async def test_nonsense_is_ignored_counted_and_logged_once(broker: Broker, source: Path) -> None:
    manifest = make_artifact(source, {"a": noise(100_000, 15)})
    with structlog.testing.capture_logs() as logs:
        async with serving(broker.url, only(manifest, source)) as server, linked(broker.url) as link:
            one = await client(link, manifest.digest)
            for payload in NONSENSE:
                await link.publish(topics.want("d1"), payload)
            await link.publish(topics.want_v1(manifest.digest), b"nonsense")
            await link.publish(
                topics.want_v1("not-a-digest"), WantV1(device="d2", ranges=spans((0, 1)), credit=1).to_json()
            )
            await link.publish(topics.want("d1"), want("0" * 64, (0, 1)))
            await link.publish(topics.want("d1"), want("0" * 64, (0, 1)))
            await one.ask((0, 0))
            await until(lambda: one.got)
            stats = server.stats()
    assert stats.wants_malformed == len(NONSENSE) + 1
    assert stats.wants_unknown == 3
    assert one.numbers() == [0]
    events = [entry["event"] for entry in logs]
    assert events.count("want malformed") == 2  # two topics
    assert events.count("want unknown artifact") == 2  # two different ones


async def test_an_agent_of_the_last_release_is_served_until_it_asks_at_its_own_topic(
    broker: Broker, source: Path
) -> None:
    manifest = make_artifact(source, {"a": noise(300_000, 20)})
    async with serving(broker.url, only(manifest, source)) as server, linked(broker.url) as link:
        one = await client(link, manifest.digest)
        await one.ask_v1((0, 0))
        await until(lambda: one.numbers() == [0])
        await one.ask((1, 1))
        await until(lambda: one.numbers() == [0, 1])
        await one.ask_v1((0, 1))  # from here on it is somebody else who says so
        await until(lambda: server.stats().wants_refused == 1)
        assert one.numbers() == [0, 1]


async def test_devices_that_are_not_of_this_fleet_are_sent_nothing(broker: Broker, source: Path) -> None:
    manifest = make_artifact(source, {"a": noise(100_000, 21)})
    refused: dict[str, str] = {"stranger": "there is no such device in this fleet"}
    with structlog.testing.capture_logs() as logs:
        async with (
            serving(broker.url, only(manifest, source), refused.get) as server,
            linked(broker.url) as link,
        ):
            strangers = await client(link, manifest.digest, "stranger")
            known = await client(link, manifest.digest)
            for device in ("stranger", "d1"):
                await strangers.ask((0, 0), device=device)
            await strangers.ask_v1((0, 0), device="stranger")
            await until(lambda: known.got and server.stats().wants_refused == 2)
            assert strangers.got == []
    assert [entry["error"] for entry in logs if entry["event"] == "want refused"] == [
        "there is no such device in this fleet"
    ]


async def test_nobody_who_does_not_know_the_group_takes_a_turn(source: Path, mosquitto_broker: Broker) -> None:
    """What anybody can guess of a shared subscription must not let him join it: its turns would be lost with him."""
    manifest = make_artifact(source, {"a": noise(1_000_000, 22)})
    count = len(manifest.files[0].chunks)
    url = mosquitto_broker.url
    async with serving(url, only(manifest, source)), linked(url) as link, linked(url, "hostile") as hostile:
        for guess in ("phifleet-chunks", "phifleet-chunks-", "phifleet-metadata", "phifleet"):
            for wanted in (topics.ALL_WANTS, topics.ALL_WANTS_V1):
                await hostile.subscribe(f"$share/{guess}/{wanted}", lambda message: None)
        one = await client(link, manifest.digest)
        for number in range(count):
            await one.ask((number, number))
        await until(lambda: sorted(one.numbers()) == list(range(count)))


async def test_a_flood_of_wants_stops_nobody(broker: Broker, tmp_path: Path) -> None:
    """75 bytes ask for a whole artifact, over and over: what waits stays bounded, and the others get theirs.

    What share they get is tested without a network, in tests/agent/store/test_transfer_core.py.
    """
    manifest = make_artifact(tmp_path / "source", {"a": noise(4_000_000, 23)})
    count = len(manifest.files[0].chunks)
    async with (
        serving(broker.url, only(manifest, tmp_path / "source")) as server,
        linked(broker.url, "hostile") as hostile,
        linked(broker.url) as link,
    ):
        sent = asyncio.create_task(_flood(Client(hostile, manifest.digest, []), count))
        await until(lambda: server.stats().chunks > 4 * count)
        progress = await fetch(link, tmp_path / "device", manifest)
        assert server.stats().waiting <= count
        sent.cancel()
        await asyncio.gather(sent, return_exceptions=True)
    assert progress.bytes_done == manifest.size


async def _flood(hostile: Client, count: int) -> None:
    while True:
        await hostile.ask((0, count - 1), device="hostile")
        await asyncio.sleep(0.002)


async def test_source_that_is_gone_or_cut_short_is_counted_and_others_are_served(
    broker: Broker, tmp_path: Path
) -> None:
    good = make_artifact(tmp_path / "good", {"a": noise(100_000, 16)}, "good")
    short = make_artifact(tmp_path / "short", {"a": noise(300_000, 17)}, "short")
    gone = make_artifact(tmp_path / "gone", {"a": noise(100_000, 18)}, "gone")
    (tmp_path / "short" / "a").write_bytes(b"short")
    (tmp_path / "gone" / "a").unlink()
    known = only(good, tmp_path / "good") | only(short, tmp_path / "short") | only(gone, tmp_path / "gone")
    async with serving(broker.url, known) as server, linked(broker.url) as link:
        for manifest in (short, gone):
            await link.publish(topics.want("d1"), want(manifest.digest, (0, 0)))
        one = await client(link, good.digest)
        await one.ask((0, 0))
        await until(lambda: one.got)
        assert server.stats().unreadable == 2


async def test_many_artifacts_do_not_exhaust_the_descriptors(embedded_broker: Broker, tmp_path: Path) -> None:
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    made = [make_artifact(tmp_path / str(n), {"a": noise(1000, 100 + n)}, f"m{n}") for n in range(40)]
    known = {manifest.digest: (manifest, tmp_path / str(n)) for n, manifest in enumerate(made)}
    async with serving(embedded_broker.url, known) as server, linked(embedded_broker.url) as link:
        before = len(list(Path("/proc/self/fd").iterdir()))
        for manifest in made:
            await link.publish(topics.want("d1"), want(manifest.digest, (0, 0)))
        await until(lambda: server.stats().chunks == 40)
        assert len(list(Path("/proc/self/fd").iterdir())) <= before + 16


async def test_forgotten_artifact_is_asked_for_anew(embedded_broker: Broker, source: Path) -> None:
    manifest = make_artifact(source, {"a": noise(1000, 19)})
    known = only(manifest, source)
    async with serving(embedded_broker.url, known) as server, linked(embedded_broker.url) as link:
        one = await client(link, manifest.digest)
        await one.ask((0, 0))
        await until(lambda: one.got)
        known.clear()
        server.forget(manifest.digest)
        await one.ask((0, 0))
        await until(lambda: server.stats().wants_unknown == 1)
