"""What may flow in a second: the bucket alone, and a transfer that has a limit."""

from __future__ import annotations

from collections import deque
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.contract.bandwidth import BURST_S, Bandwidth
from agent.contract.manifest import MAX_CHUNK_BYTES, ArtifactFile
from agent.core.chunks import ChunkTable
from agent.core.transfer import Outcome, TransferCore
from tests.simulators.artifacts import manifest_of

KIB = 1024


def most_in_10_s(taken: list[tuple[float, int]]) -> int:
    return max(sum(size for at, size in taken if start <= at < start + 10) for start, _ in taken)


@given(
    st.floats(1024, 1e9),
    st.lists(st.tuples(st.floats(0, 3), st.integers(1, MAX_CHUNK_BYTES)), min_size=1, max_size=200),
)
def test_no_more_flows_in_any_10_seconds_than_the_rate_and_a_twentieth_and_one_piece(
    rate: float, pieces: list[tuple[float, int]]
) -> None:
    now, bandwidth, taken = 0.0, Bandwidth(rate, 0.0), []
    for pause, size in pieces:
        now += pause
        while (wait_s := bandwidth.wait_s(now)) > 0:
            now += wait_s
        bandwidth.take(size)
        taken.append((now, size))
    assert most_in_10_s(taken) <= rate * (10 + BURST_S) * 1.001 + MAX_CHUNK_BYTES


def test_without_a_limit_nothing_waits() -> None:
    bandwidth = Bandwidth(None, 0.0)
    for _ in range(1000):
        bandwidth.take(1 << 30)
    assert bandwidth.wait_s(0.0) == 0.0


def table_of(chunks: int, size: int) -> ChunkTable:
    names = tuple((size, sha256(b"%d" % n).hexdigest()) for n in range(chunks))
    return ChunkTable(manifest_of((ArtifactFile(path="a", size=chunks * size, sha256="0" * 64, chunks=names),)))


@pytest.mark.parametrize("delay_s", [0.001, 0.1, 0.6])
@pytest.mark.parametrize("rate", [256 * KIB, 1024 * KIB, 16 * 1024 * KIB])
def test_a_transfer_with_a_limit_takes_what_it_may_and_no_more(rate: int, delay_s: float) -> None:
    size = 64 * KIB
    table = table_of(40 * rate // size, size)
    core = TransferCore(table, (), window_bytes=64 << 20, stall_s=900.0, now=0.0, jitter=lambda: 0.5, bytes_per_s=rate)
    assert not core.following
    under_way: deque[tuple[float, int]] = deque()
    came: list[tuple[float, int]] = []
    now = 0.0
    while not core.complete:
        while under_way and under_way[0][0] <= now:
            at, index = under_way.popleft()
            core.arrived(index, Outcome.GOOD, size, shared=False, now=now)
            came.append((at, size))
        for request in core.tick(now):
            assert not request.shared
            under_way.extend(
                (now + delay_s, index) for first, last in request.ranges for index in range(first, last + 1)
            )
        now += 0.05
        assert now < 100, "it stands still"
    seconds = [(at, sum(size for when, size in came if at <= when < at + 10)) for at in range(int(now))]
    assert max(size for _, size in seconds) <= rate * 10.5 + size
    settled = [piece for at, piece in came if 5 <= at < 35]
    assert sum(settled) >= 0.95 * 30 * rate, "it takes what it may"
