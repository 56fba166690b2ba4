"""The simulator does what the Link's Protocol says."""

from __future__ import annotations

import asyncio
import threading

import pytest

from agent.core.ports import Link, Message
from agent.errors import LinkError
from tests.simulators.link import Faults, MemoryBroker, matches


@pytest.mark.parametrize(
    ("pattern", "topic", "expected"),
    [
        ("a/+/c", "a/b/c", True),
        ("a/+", "a/b/c", False),
        ("a/#", "a/b/c", True),
        ("a/b", "a/b", True),
        ("a/b/c", "a/b", False),
    ],
)
def test_topic_filters(pattern: str, topic: str, expected: bool) -> None:
    assert matches(pattern, topic) is expected


async def test_publishes_to_subscribers_and_keeps_what_is_retained() -> None:
    broker = MemoryBroker()
    seen: list[Message] = []
    async with broker.link("a") as a, broker.link("b") as b:
        link: Link = a
        await link.subscribe("x/+", seen.append)
        await b.publish("x/1", b"one", retain=True, properties={"k": "v"}, correlation=b"c", response_topic="r")
        await asyncio.sleep(0.01)
        await b.subscribe("x/1", seen.append)
        await asyncio.sleep(0.01)
    assert [message.retained for message in seen] == [False, True]
    assert (seen[0].payload, seen[0].properties, seen[0].correlation) == (b"one", {"k": "v"}, b"c")


async def test_shared_subscriptions_take_turns() -> None:
    broker = MemoryBroker()
    first: list[Message] = []
    second: list[Message] = []
    async with broker.link() as a, broker.link() as b, broker.link() as c:
        await a.subscribe("$share/g/t", first.append)
        await b.subscribe("$share/g/t", second.append)
        for _ in range(10):
            await c.publish("t", b"x")
        await asyncio.sleep(0.01)
    assert (len(first), len(second)) == (5, 5)


async def test_bulk_handlers_run_on_another_thread_in_order() -> None:
    broker = MemoryBroker()
    seen: list[tuple[int, bytes]] = []
    async with broker.link() as a:
        await a.subscribe("t", lambda m: seen.append((threading.get_ident(), m.payload)), bulk=True)
        for n in range(5):
            await a.publish("t", b"%d" % n)
        await asyncio.sleep(0.05)
    assert [payload for _, payload in seen] == [b"0", b"1", b"2", b"3", b"4"]
    assert threading.get_ident() not in {ident for ident, _ in seen}


async def test_faults_lose_duplicate_and_reorder() -> None:
    broker = MemoryBroker(Faults(loss=0.2, duplication=0.2, reordering=0.3, seed=3))
    seen: list[bytes] = []
    async with broker.link() as a:
        await a.subscribe("t", lambda m: seen.append(m.payload))
        for n in range(100):
            await a.publish("t", b"%03d" % n)
        await asyncio.sleep(0.1)
    assert 50 < len(set(seen)) < 100
    assert len(seen) > len(set(seen))
    assert seen != sorted(seen)


async def test_a_cut_link_refuses_and_its_will_is_published() -> None:
    broker = MemoryBroker()
    seen: list[bytes] = []
    async with broker.link("a") as a, broker.link("b") as b:
        a.will = Message("p", b"gone", True)
        await b.subscribe("p", lambda m: seen.append(m.payload))
        a.cut()
        with pytest.raises(LinkError, match="not connected"):
            await a.publish("t", b"")
        await asyncio.sleep(0.01)
        a.restore()
        await a.publish("p", b"back")
        await asyncio.sleep(0.01)
    assert seen == [b"gone", b"back"]
