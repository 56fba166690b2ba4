"""The chunk server over real brokers: what it answers, and what it does with nonsense."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import structlog

from agent.contract import topics
from agent.contract.messages import ChunkRange, Want
from agent.link import Message, MqttLink
from tests.simulators.artifacts import make_artifact, noise
from tests.simulators.broker import Broker
from tests.simulators.transfer import linked, only, serving
from tests.waiting import until


def want(*ranges: tuple[int, int], credit: int = 4096, shared: bool = False, device: str = "d1") -> bytes:
    spans = tuple(ChunkRange(first=first, last=last) for first, last in ranges)
    return Want(device=device, ranges=spans, credit=credit, shared=shared).to_json()


@dataclass
class Client:
    """Everything that is published of one artifact."""

    link: MqttLink
    digest: str
    got: list[Message]

    async def ask(self, payload: bytes) -> None:
        await self.link.publish(topics.want(self.digest), payload)

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
        await one.ask(want((4, 6), (0, 3), credit=5))
        await until(lambda: len(one.got) == 5)
        await asyncio.sleep(0.2)
        assert one.numbers() == [4, 5, 6, 0, 1]
        for message in one.got:
            assert message.topic.startswith(f"phifleet/v1/devices/d1/chunks/{manifest.digest}/")
            assert not message.retained
            start = sum(sizes[: int(message.topic.rsplit("/", 1)[1])])
            assert message.payload == data[start : start + len(message.payload)]
        assert server.stats().chunks == 5


async def test_numbers_that_the_artifact_has_not_are_skipped(broker: Broker, source: Path) -> None:
    manifest = make_artifact(source, {"a": noise(200_000, 13)})
    count = len(manifest.files[0].chunks)
    async with serving(broker.url, only(manifest, source)) as server, linked(broker.url) as link:
        one = await client(link, manifest.digest)
        await one.ask(want((0, 2_000_000_000), (5_000_000, 6_000_000)))
        await until(lambda: len(one.got) == count)
        await asyncio.sleep(0.1)
        assert one.numbers() == list(range(count))
        assert server.stats().unreadable == 0


async def test_equal_wants_are_published_once(broker: Broker, source: Path) -> None:
    manifest = make_artifact(source, {"a": noise(2_000_000, 14)})
    count = len(manifest.files[0].chunks)
    async with serving(broker.url, only(manifest, source)) as server, linked(broker.url) as link:
        one = await client(link, manifest.digest)
        await asyncio.gather(*(one.ask(want((0, count - 1), shared=True, device=f"d{n}")) for n in range(10)))
        await until(lambda: server.stats().wants == 10 and server.stats().waiting == 0)
        await asyncio.sleep(0.2)
        assert one.numbers() == list(range(count))
        assert server.stats().coalesced == 9 * count


NONSENSE = [
    b"",
    b"{",
    b"\xff\xfe",
    b"null",
    b"[]",
    b'{"device": "d1"}',
    json.dumps({"device": "D 1", "ranges": [{"first": 0, "last": 1}], "credit": 1}).encode(),
    json.dumps({"device": "d1", "ranges": [{"first": 3, "last": 1}], "credit": 1}).encode(),
    json.dumps({"device": "d1", "ranges": [{"first": -1, "last": 1}], "credit": 1}).encode(),
    json.dumps({"device": "d1", "ranges": [{"first": 0, "last": 1}], "credit": 10**9}).encode(),
    json.dumps({"device": "d1", "ranges": [{"first": 0, "last": 1}] * 300, "credit": 1}).encode(),
]


async def test_nonsense_is_ignored_counted_and_logged_once(broker: Broker, source: Path) -> None:
    manifest = make_artifact(source, {"a": noise(100_000, 15)})
    with structlog.testing.capture_logs() as logs:
        async with serving(broker.url, only(manifest, source)) as server, linked(broker.url) as link:
            one = await client(link, manifest.digest)
            for payload in NONSENSE:
                await one.ask(payload)
            await link.publish(topics.want("not-a-digest"), want((0, 1)))
            await link.publish(topics.want("0" * 64), want((0, 1)))
            await link.publish(topics.want("0" * 64), want((0, 1)))
            await one.ask(want((0, 0)))
            await until(lambda: one.got)
            stats = server.stats()
    assert stats.wants_malformed == len(NONSENSE)
    assert stats.wants_unknown == 3
    assert one.numbers() == [0]
    events = [entry["event"] for entry in logs]
    assert events.count("want malformed") == 1
    assert events.count("want unknown artifact") == 2  # two different ones


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
            await link.publish(topics.want(manifest.digest), want((0, 0)))
        one = await client(link, good.digest)
        await one.ask(want((0, 0)))
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
            await link.publish(topics.want(manifest.digest), want((0, 0)))
        await until(lambda: server.stats().chunks == 40)
        assert len(list(Path("/proc/self/fd").iterdir())) <= before + 16


async def test_forgotten_artifact_is_asked_for_anew(embedded_broker: Broker, source: Path) -> None:
    manifest = make_artifact(source, {"a": noise(1000, 19)})
    known = only(manifest, source)
    async with serving(embedded_broker.url, known) as server, linked(embedded_broker.url) as link:
        one = await client(link, manifest.digest)
        await one.ask(want((0, 0)))
        await until(lambda: one.got)
        known.clear()
        server.forget(manifest.digest)
        await one.ask(want((0, 0)))
        await until(lambda: server.stats().wants_unknown == 1)
