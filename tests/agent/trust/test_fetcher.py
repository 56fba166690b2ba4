"""A file that comes too slowly, changes while it comes, or is given up: each is told, whatever the machine's speed."""

from __future__ import annotations

import asyncio

import pytest
from tuf.api.exceptions import DownloadError, SlowRetrievalError

from agent.trust.fetcher import METADATA_URL, LinkFetcher
from agent.trust.requests import MetadataRequests, RetryPolicy, Segment
from tests.simulators.link import MemoryBroker, MemoryLink


class Scripted(MetadataRequests):
    """Answers with these segments, one after the other."""

    def __init__(self, segments: list[Segment], policy: RetryPolicy) -> None:
        super().__init__(MemoryLink(MemoryBroker(), "d"), "d", policy)
        self.segments = segments

    async def segment(self, name: str, offset: int) -> Segment:
        return self.segments.pop(0)


async def fetched(segments: list[Segment], policy: RetryPolicy, *, stopped: bool = False) -> bytes:
    fetcher = LinkFetcher(Scripted(segments, policy), asyncio.get_running_loop())
    if stopped:
        fetcher.stop()
    return b"".join(await asyncio.to_thread(lambda: list(fetcher._fetch(f"{METADATA_URL}root.json"))))


async def test_all_of_its_segments_are_the_file():
    assert await fetched([Segment(b"ab", 3), Segment(b"c", 3)], RetryPolicy()) == b"abc"


async def test_a_file_that_changes_while_it_comes_is_refused():
    with pytest.raises(DownloadError, match=r"changed from 3 to 4 bytes while it came"):
        await fetched([Segment(b"ab", 3), Segment(b"cd", 4)], RetryPolicy())


async def test_a_file_that_comes_too_slowly_is_given_up():
    with pytest.raises(SlowRetrievalError, match=r"root.json: 0 of 1 bytes in 0 s"):
        await fetched([], RetryPolicy(grace_s=-1.0, min_bytes_per_s=1e12))


async def test_after_stop_nothing_is_asked_for():
    with pytest.raises(DownloadError, match=r"given up"):
        await fetched([Segment(b"abc", 3)], RetryPolicy(), stopped=True)
