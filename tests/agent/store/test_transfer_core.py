"""The transfer's decisions, joined in memory with the server's over a network that loses, repeats and reorders."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.contract.manifest import MAX_CHUNK_BYTES, ArtifactFile
from agent.core.chunks import ChunkTable
from agent.core.transfer import MAX_CREDIT, MAX_RANGES, SILENCE_S, Outcome, Request, TransferCore, Variation
from fleet.delivery.send_queue import ANYBODY, COALESCE_S, DEVICE_BYTES, WASTE_HALVED_S, Chunk, SendQueue
from tests.simulators.artifacts import manifest_of

KIB = 1024


def table_of(sizes: list[int], repeats: int = 0) -> ChunkTable:
    """Chunks of these sizes; the last ``repeats`` have the bytes of the first ones."""
    chunks = [(size, sha256(b"%d" % n).hexdigest()) for n, size in enumerate(sizes)]
    chunks += chunks[:repeats]
    half = len(chunks) // 2 or 1
    files = [
        ArtifactFile(path=name, size=sum(size for size, _ in part), sha256="0" * 64, chunks=tuple(part))
        for name, part in (("a", chunks[:half]), ("b", chunks[half:]))
    ]
    return ChunkTable(manifest_of(tuple(files)))


def core_of(table: ChunkTable, present: tuple[int, ...] = (), window: int = 1 << 20, **more: float) -> TransferCore:
    return TransferCore(
        table, present, window_bytes=window, stall_s=more.get("stall_s", 900.0), now=more.get("now", 0.0),
        jitter=lambda: 0.5, variation=Variation(gather_s=more.get("gather_s", 0.0)),
    )  # fmt: skip


@dataclass
class Network:
    """Messages under way, each with the time it arrives; QoS 0 in the worst case."""

    seed: int
    loss: float
    duplication: float
    reordering: float
    delay_s: float
    under_way: list[tuple[float, int, object]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.count = 0

    def send(self, what: object, now: float) -> None:
        for _ in range(2 if self.random.random() < self.duplication else 1):
            if self.random.random() < self.loss:
                continue
            late = self.random.random() * 3 if self.random.random() < self.reordering else 0.0
            self.count += 1
            self.under_way.append((now + self.delay_s + late, self.count, what))

    def due(self, now: float) -> list[object]:
        ready = sorted(item for item in self.under_way if item[0] <= now)
        self.under_way = [item for item in self.under_way if item[0] > now]
        return [what for _, _, what in ready]


@dataclass
class Device:
    name: str
    core: TransferCore
    joined_at: float
    served: int = 0


def indices(request: Request) -> list[int]:
    return [index for first, last in request.ranges for index in range(first, last + 1)]


def run(
    table: ChunkTable,
    devices: list[Device],
    network: Network,
    *,
    corrupt: float = 0.0,
    per_step: int = 8,
    window: int,
    limit_s: float = 4000.0,
) -> tuple[float, int]:
    """Until all are complete; returns seconds and the chunks that the server published."""
    queue, now, published = SendQueue(), 0.0, 0
    while not all(device.core.complete for device in devices):
        assert now < limit_s, [device.core.progress(now) for device in devices]
        now += 0.1
        for device in devices:
            if now < device.joined_at:
                continue
            for request in device.core.tick(now):
                check(request, table, device.core, window)
                network.send((device.name, request), now)
        for what in network.due(now):
            if isinstance(what[1], Request):  # type: ignore[index]
                name, request = what  # type: ignore[misc]
                wish(queue, name, indices(request), now, table=table, shared=request.shared)
            else:
                destination, index = what  # type: ignore[misc]
                for device in devices:
                    if now >= device.joined_at:
                        deliver(device, destination, index, table, network, corrupt, now)
        for _ in range(per_step):
            item = queue.next(now)
            if item is None:
                break
            published += 1
            network.send((item.device, item.index), now)
    return now, published


def wish(
    queue: SendQueue,
    device: str,
    wanted: Iterable[int],
    now: float,
    *,
    table: ChunkTable | None = None,
    shared: bool = False,
    digest: str = "a",
    of_bytes: int | None = None,
) -> None:
    """Of ``table``'s chunks, or of chunks of 64 KiB."""
    sized = (
        (Chunk(digest, index, None if shared else device), table.sizes[index] if table else 64 * KIB)
        for index in wanted
    )
    queue.want(device, sized, now, of_bytes=of_bytes or (sum(table.sizes) if table else 1 << 40))


def check(request: Request, table: ChunkTable, core: TransferCore, window: int) -> None:
    wanted = indices(request)
    assert len(wanted) == len(set(wanted)) == request.credit <= MAX_CREDIT
    assert len(request.ranges) <= MAX_RANGES
    assert core.in_flight_bytes <= max(window, MAX_CHUNK_BYTES)
    for index in wanted:
        assert table.first[index] == index, "a repeat was asked for"
        assert core._state[index] != 1, "what is here was asked for"


def deliver(
    device: Device, to: str | None, index: int, table: ChunkTable, network: Network, corrupt: float, now: float
) -> None:
    if to not in (None, device.name) or (to is None and not device.core.following):
        return
    have = device.core._state[index] == 1
    bad = not have and network.random.random() < corrupt
    outcome = Outcome.DUPLICATE if have else Outcome.BAD if bad else Outcome.GOOD
    device.core.arrived(index, outcome, table.sizes[index], shared=to is None, now=now)


SIZES = st.lists(st.integers(1, MAX_CHUNK_BYTES), min_size=1, max_size=120)
SHARE = st.sampled_from([0.0, 0.05, 0.3])


@settings(max_examples=150)
@given(
    sizes=SIZES,
    repeats=st.integers(0, 5),
    window=st.sampled_from([1, 64 * KIB, 300 * KIB, 4096 * KIB]),
    seed=st.integers(0, 1 << 32),
    loss=SHARE,
    duplication=SHARE,
    reordering=SHARE,
    corrupt=SHARE,
    delay_s=st.sampled_from([0.0, 0.05, 1.5]),
    joins=st.lists(st.floats(0, 20), min_size=1, max_size=4),
    gather_s=st.sampled_from([0.0, 1.0]),
    data=st.data(),
)
def test_every_device_completes_whatever_the_network_does(
    sizes: list[int],
    repeats: int,
    window: int,
    seed: int,
    loss: float,
    duplication: float,
    reordering: float,
    corrupt: float,
    delay_s: float,
    joins: list[float],
    gather_s: float,
    data: st.DataObject,
) -> None:
    table = table_of(sizes, min(repeats, len(sizes)))
    network = Network(seed, loss, duplication, reordering, delay_s)
    unique = list(table.unique())
    present = tuple(data.draw(st.lists(st.sampled_from(unique), unique=True)))
    devices = [Device(f"d{n}", core_of(table, present, window, gather_s=gather_s), at) for n, at in enumerate(joins)]
    seconds, _ = run(table, devices, network, corrupt=corrupt, window=window)
    for device in devices:
        progress = device.core.progress(seconds)
        assert progress.chunks_done == progress.chunks_total == len(table)
        assert progress.bytes_done == progress.bytes_total == sum(table.sizes)
        assert device.core.in_flight_bytes == 0 or device.core.complete


def test_without_faults_nothing_is_sent_twice() -> None:
    table = table_of([64 * KIB] * 500)
    device = Device("d", core_of(table, window=4 << 20), 0.0)
    _, published = run(table, [device], Network(0, 0, 0, 0, 0.05), per_step=100, window=4 << 20)
    assert published == 500
    assert device.core.progress(1.0).bytes_received == sum(table.sizes)


def test_devices_that_start_late_fall_into_step() -> None:
    table = table_of([64 * KIB] * 2000)
    devices = [Device(f"d{n}", core_of(table, window=1 << 20), at) for n, at in enumerate((0.0, 2.0, 4.0, 6.0))]
    _, published = run(table, devices, Network(0, 0, 0, 0, 0.05), per_step=20, window=1 << 20)
    assert published < 1.8 * 2000, "four devices cost the server less than two"


def test_equal_devices_cost_the_server_one_artifact() -> None:
    table = table_of([64 * KIB] * 1000)
    devices = [Device(f"d{n}", core_of(table, window=1 << 20), 0.0) for n in range(20)]
    _, published = run(table, devices, Network(0, 0, 0, 0, 0.05), per_step=20, window=1 << 20)
    assert published <= 1.02 * 1000


@pytest.mark.parametrize(("spread_s", "publications"), [(0.9, 1), (10.0, 12)])
def test_an_index_is_published_for_all_that_came_and_not_for_each(spread_s: float, publications: int) -> None:
    """A thousand devices that an order reached at once, or one after the other."""
    table = table_of([64 * KIB] * 30)
    joins = [spread_s * n / 1000 for n in range(1000)]
    devices = [Device(f"d{n}", core_of(table, now=at, gather_s=1.0), at) for n, at in enumerate(joins)]
    seconds, published = run(table, devices, Network(0, 0, 0, 0, 0.05), per_step=30, window=1 << 20)
    assert published <= 30 * publications
    assert seconds < spread_s + 5


def test_who_is_alone_waits_no_longer_than_it_listens() -> None:
    core = core_of(table_of([64 * KIB] * 3), gather_s=1.0)
    assert core.tick(0.9) == []
    assert core.tick(1.0) == [Request(((0, 2),), 3, shared=True)]
    shared = []
    for now in (5.0, 20.0, 60.0, 200.0):
        shared += [request.shared for request in core.tick(now)]
    assert shared == [True, True, True, False], "what stays away is asked for alone"


def test_complete_from_the_start_wants_nothing() -> None:
    table = table_of([10, 20, 30], repeats=2)
    core = core_of(table, (0, 1, 2))
    assert core.complete
    assert core.tick(0.0) == []
    progress = core.progress(1.0)
    assert (progress.chunks_done, progress.bytes_done, progress.bytes_reused) == (5, 90, 90)


def test_window_starts_small_grows_as_chunks_come_and_shrinks_in_silence() -> None:
    table = table_of([64 * KIB] * 1000)
    core = core_of(table, window=4 << 20)
    assert core.tick(0.0)[0].credit == 16
    for index in range(16):
        core.arrived(index, Outcome.GOOD, 64 * KIB, shared=True, now=0.05)
    assert core.tick(0.1)[0].credit == 32
    probe = core.tick(1.0)
    assert probe == [Request(((16, 16),), 1, shared=False)]
    core.arrived(16, Outcome.GOOD, 64 * KIB, shared=False, now=1.1)
    assert core.tick(1.3) == []
    again = core.tick(1.8)
    assert again[0].shared is False
    assert again[0].ranges == ((17, 32),)
    assert core.in_flight_bytes <= 1 << 20


@pytest.mark.parametrize(
    ("rate", "round_trip", "at_least", "at_most"),
    [
        # Bytes a second, seconds; what may be under way once the link is known.
        (250_000, 0.3, 256 * KIB, 800 * KIB),
        (30_000, 0.6, 256 * KIB, 600 * KIB),
        (20 << 20, 0.1, 4 << 20, 4 << 20),
        (300 << 20, 0.002, 4 << 20, 4 << 20),
    ],
)
def test_as_much_is_under_way_as_the_link_needs(rate: float, round_trip: float, at_least: int, at_most: int) -> None:
    """A link with a queue before it, as they have: what is asked for beyond its rate waits there."""
    size = 128 * KIB
    core, now, free = core_of(table_of([size] * 400), window=4 << 20), 0.0, 0.0
    under_way: list[tuple[float, int]] = []
    seen: list[int] = []
    while not core.complete:
        for request in core.tick(now):
            for index in indices(request):
                free = max(free, now + round_trip) + size / rate
                under_way.append((free, index))
        seen.append(core.in_flight_bytes)
        now = min(at for at, _ in under_way)
        for at, index in [one for one in under_way if one[0] <= now]:
            under_way.remove((at, index))
            core.arrived(index, Outcome.GOOD, size, shared=False, now=at)
    later = seen[len(seen) // 4 : -40]
    assert at_least <= max(later) <= at_most + size
    assert now <= 1.25 * 400 * size / rate + 20 * round_trip, "and the link never ran dry"


def test_in_silence_one_chunk_is_asked_for_ever_more_seldom() -> None:
    core = core_of(table_of([64 * KIB] * 100))
    times, now = [], 0.0
    assert core.tick(now)[0].credit == 16
    while now < 600:
        now += 0.25
        for request in core.tick(now):
            assert request.credit == 1
            times.append(now)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert times[0] <= 3 * SILENCE_S
    assert all(later >= earlier - 0.25 for earlier, later in itertools.pairwise(gaps))
    assert len(times) < 20


def test_slow_link_is_not_asked_twice_for_what_is_on_its_way() -> None:
    table = table_of([64 * KIB] * 200)
    device = Device("d", core_of(table, window=4 << 20), 0.0)
    network = Network(0, 0, 0, 0, 0.3)
    queue, now, published, credit = SendQueue(), 0.0, 0, 0.0
    while not device.core.complete:
        now += 0.1
        for request in device.core.tick(now):
            wish(queue, "d", indices(request), now, table=table, shared=request.shared)
        credit += 0.05  # half a chunk a second: 32 KiB/s, so a full window takes two minutes
        if credit >= 1 and (item := queue.next(now)) is not None:
            credit -= 1
            published += 1
            network.send(item.index, now)
        for index in network.due(now):
            deliver(device, None, index, table, network, 0.0, now)  # type: ignore[arg-type]
    assert published <= 200 + 8


def test_wrong_bytes_are_counted_and_asked_for_on_the_own_topic_ever_more_slowly() -> None:
    core = core_of(table_of([100]))
    now, asked = 0.0, []
    while now < 200:
        for request in core.tick(now):
            asked.append((now, request.shared))
            core.arrived(0, Outcome.BAD, 100, shared=request.shared, now=now)
        now += 0.25
    assert asked[0][1] is True
    assert not any(shared for _, shared in asked[1:])
    assert 5 < len(asked) < 20
    assert core.progress(now).chunks_rejected == len(asked)


def test_wrong_bytes_that_nobody_asked_for_do_no_harm() -> None:
    core = core_of(table_of([64 * KIB] * 100))
    core.tick(0.0)
    for _ in range(50):
        core.arrived(99, Outcome.BAD, 10, shared=True, now=0.0)
    assert core._state[99] == 0


def test_stalls_only_without_good_chunks() -> None:
    core = core_of(table_of([100, 100]), stall_s=10)
    core.tick(0.0)
    core.arrived(0, Outcome.BAD, 100, shared=True, now=9.0)
    assert not core.stalled(9.9)
    assert core.stalled(10.0)
    core.arrived(1, Outcome.GOOD, 100, shared=True, now=10.0)
    assert not core.stalled(19.9)


def test_lost_connection_frees_the_window_and_asks_again_from_there() -> None:
    core = core_of(table_of([64 * KIB] * 100))
    core.tick(0.0)
    core.arrived(0, Outcome.GOOD, 64 * KIB, shared=True, now=0.1)
    core.link_lost()
    assert core.in_flight_bytes == 0
    assert core.tick(60.0)[0].ranges[0][0] == 1


def test_refused_request_waits_before_the_next() -> None:
    core = core_of(table_of([64 * KIB] * 100))
    core.tick(0.0)
    for _ in range(5):
        core.unsent(0.0)
    assert core.tick(5.0) == []
    assert core.tick(60.0) != []


def test_device_that_only_sees_what_it_has_leaves_the_shared_topic() -> None:
    table = table_of([64 * KIB] * 400)
    core = core_of(table, tuple(range(399)), window=1 << 20)
    for index in range(200):
        core.arrived(index, Outcome.DUPLICATE, 64 * KIB, shared=True, now=0.0)
    assert not core.following


def test_device_that_the_shared_topic_overruns_leaves_it() -> None:
    table = table_of([64 * KIB] * 4000)
    core, now, last = core_of(table, window=4 << 20), 0.0, 0
    while core.following and now < 600:
        for request in core.tick(now):
            for index in indices(request):
                if index % 3 == 0 or not request.shared:  # the broker dropped the others
                    core.arrived(index, Outcome.GOOD, 64 * KIB, shared=request.shared, now=now)
        now += 0.5
        last += 1
    assert not core.following
    assert now < 600


def test_bytes_until_useful_never_waits_for_more_than_is_on_its_way() -> None:
    table = table_of([64 * KIB] * 1000)
    core = core_of(table, window=4 << 20)
    now = 0.0
    while not core.complete:
        requests = core.tick(now)
        need = core.bytes_until_useful()
        assert 1 <= need <= max(core.in_flight_bytes, 1)
        due = list(core._asked)
        for index in due[: max(1, len(due) // 2)]:
            core.arrived(index, Outcome.GOOD, 64 * KIB, shared=True, now=now)
        now += 0.01
        assert requests or due


class TestSendQueue:
    def test_equal_wants_become_one_publication(self) -> None:
        queue = SendQueue()
        for device in "vwxyz":
            wish(queue, device, range(10), 0.0, shared=True)
        assert len(queue) == 10
        assert [queue.next(0.0) for _ in range(11)] == [*(Chunk("a", n, None) for n in range(10)), None]
        assert queue.counts.coalesced == 40

    def test_just_published_is_not_repeated_on_the_shared_topic(self) -> None:
        queue = SendQueue()
        wish(queue, "d", [1], 0.0, shared=True)
        queue.next(0.0)
        wish(queue, "d", [1], COALESCE_S * 0.9, shared=True)
        assert queue.next(0.5) is None
        wish(queue, "d", [1], COALESCE_S, shared=True)
        assert queue.next(COALESCE_S) == Chunk("a", 1, None)

    def test_own_topic_is_never_refused(self) -> None:
        queue = SendQueue()
        for _ in range(2):
            wish(queue, "d", [1], 0.0)
            assert queue.next(0.0) == Chunk("a", 1, "d")

    def test_devices_take_turns_by_bytes(self) -> None:
        queue = SendQueue()
        queue.want("large", [(Chunk("a", n, "large"), 128 * KIB) for n in range(100)], 0.0, of_bytes=1 << 30)
        queue.want("small", [(Chunk("b", n, "small"), 16 * KIB) for n in range(800)], 0.0, of_bytes=1 << 30)
        first = [queue.next(0.0) for _ in range(90)]
        sent = {
            name: size * sum(chunk is not None and chunk.device == name for chunk in first)
            for name, size in (("large", 128), ("small", 16))
        }
        assert abs(sent["large"] - sent["small"]) <= 128

    def test_who_asks_last_is_served_soon_and_many_wants_are_no_larger_share(self) -> None:
        queue = SendQueue()
        for begin in range(0, 1000, 10):
            wish(queue, "greedy", range(begin, begin + 10), 0.0)
        wish(queue, "late", [7], 0.0)
        assert Chunk("a", 7, "late") in [queue.next(0.0) for _ in range(4)]

    def test_what_one_device_has_waiting_is_bounded_and_its_newest_wish_is_kept(self) -> None:
        queue, most = SendQueue(), DEVICE_BYTES // (64 * KIB)
        for begin in range(0, 10 * most, 128):
            wish(queue, "greedy", range(begin, begin + 128), 0.0)
        assert len(queue) == most
        assert queue.counts.dropped == 9 * most
        assert queue.next(0.0) == Chunk("a", 9 * most, "greedy")

    def test_agents_that_cannot_be_told_apart_share_one_turn(self) -> None:
        queue = SendQueue()
        for number in range(50):
            device = f"old-{number}"
            queue.want(ANYBODY, [(Chunk("a", n, device), 64 * KIB) for n in range(10)], 0.0, of_bytes=1 << 30)
        wish(queue, "new", range(10), 0.0)
        first = [queue.next(0.0) for _ in range(22)]
        assert sum(chunk is not None and chunk.device == "new" for chunk in first) == 10

    def test_a_device_that_has_the_same_sent_again_gets_less_until_it_is_forgotten(self) -> None:
        queue = SendQueue()

        def turns(now: float) -> int:
            """Chunks of the wasteful device while the other is sent a hundred."""
            wish(queue, "wasteful", range(100), now, of_bytes=6_400 * KIB)
            wish(queue, "other", range(100), now, digest="b")
            sent, wasted = 0, 0
            while sent < 100:
                chunk = queue.next(now)
                assert chunk is not None
                sent += chunk.device == "other"
                wasted += chunk.device == "wasteful"
            queue.forget()
            return wasted

        assert turns(0.0) >= 98
        for _ in range(10):
            wish(queue, "wasteful", range(100), 1.0, of_bytes=6_400 * KIB)
            while queue.next(1.0) is not None:
                pass
        assert turns(2.0) <= 10
        assert turns(20 * WASTE_HALVED_S) >= 98

    def test_a_wasteful_device_does_not_hold_back_what_others_share_with_it(self) -> None:
        queue = SendQueue()
        for _ in range(50):
            wish(queue, "wasteful", range(100), 0.0, of_bytes=6_400 * KIB)
            while queue.next(0.0) is not None:
                pass
        wish(queue, "wasteful", range(200), 5.0, shared=True, of_bytes=6_400 * KIB)
        wish(queue, "other", range(200), 5.0, shared=True, of_bytes=6_400 * KIB)
        wish(queue, "third", range(200), 5.0, digest="b")
        first = [queue.next(5.0) for _ in range(402)]
        assert [chunk.index for chunk in first if chunk is not None and chunk.digest == "a"] == list(range(200))
        assert sum(chunk is not None for chunk in first[:300]) == 300
        assert sum(chunk is not None and chunk.digest == "a" for chunk in first[:100]) >= 45

    def test_an_artifact_that_is_forgotten_leaves_nothing_behind(self) -> None:
        queue = SendQueue()
        for device in "xy":
            wish(queue, device, range(5), 0.0, shared=True)
            wish(queue, device, range(5), 0.0)
            wish(queue, device, range(5), 0.0, digest="b")
        queue.forget(unless=lambda digest: digest != "a")
        assert len(queue) == 10
        assert {queue.next(0.0) for _ in range(10)} == {Chunk("b", n, device) for n in range(5) for device in "xy"}
        assert queue.next(0.0) is None

    @given(
        st.lists(
            st.one_of(
                st.tuples(st.sampled_from("ab"), st.sampled_from("xyz"), st.booleans(), st.lists(st.integers(0, 20))),
                st.none(),
            ),
            max_size=60,
        )
    )
    def test_all_that_is_wanted_is_sent_and_nothing_else(
        self, steps: list[tuple[str, str, bool, list[int]] | None]
    ) -> None:
        queue, now = SendQueue(), 0.0
        wanted: set[Chunk] = set()
        for step in steps:
            now += 2 * COALESCE_S
            if step is None:
                item = queue.next(now)
                assert item is None or item in wanted
                wanted.discard(item)  # type: ignore[arg-type]
            else:
                digest, device, shared, numbers = step
                wish(queue, device, numbers, now, digest=digest, shared=shared)
                wanted |= {Chunk(digest, number, None if shared else device) for number in numbers}
            assert len(queue) == len(wanted)
        while (item := queue.next(now)) is not None:
            wanted.remove(item)
        assert not wanted
