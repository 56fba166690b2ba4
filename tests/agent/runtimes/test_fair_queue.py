from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from agent.runtimes.host.fair_queue import FairQueue

_entries = st.lists(st.tuples(st.integers(0, 2), st.sampled_from("abc")), max_size=40)


@given(_entries)
def test_everything_comes_out_once_by_priority_and_in_order_for_each_client(entries: list[tuple[int, str]]) -> None:
    queue: FairQueue[tuple[int, str, int]] = FairQueue(100)
    for number, (priority, client) in enumerate(entries):
        assert queue.push((priority, client, number), priority=priority, client=client)
    out = queue.drain()
    assert sorted(out) == sorted((priority, client, number) for number, (priority, client) in enumerate(entries))
    assert [item[0] for item in out] == sorted(item[0] for item in out)
    for client in "abc":
        for priority in range(3):
            numbers = [item[2] for item in out if item[:2] == (priority, client)]
            assert numbers == sorted(numbers)
    assert len(queue) == 0


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=40))
def test_nobody_is_served_twice_before_another_who_waits(clients: list[str]) -> None:
    queue: FairQueue[str] = FairQueue(100)
    for client in clients:
        queue.push(client, client=client)
    left = Counter(clients)
    while left:
        this_round = {queue.pop() for _ in range(len(left))}
        assert this_round == set(left)
        left = Counter({client: count - 1 for client, count in left.items() if count > 1})


def test_it_is_bounded() -> None:
    queue: FairQueue[int] = FairQueue(2)
    assert queue.push(1)
    assert queue.push(2)
    assert not queue.push(3)
    assert queue.remove(1)
    assert not queue.remove(1)
    assert queue.push(3)
    assert queue.drain() == [2, 3]


def test_short_ones_go_first_until_a_long_one_has_waited_its_time() -> None:
    queue: FairQueue[str] = FairQueue(100, age_s=10.0)
    queue.push("long", client="a", now=0.0)
    queue.push("longer", client="a", now=5.0)
    for number in range(4):
        queue.push(f"short {number}", client="b", short=True, now=6.0)
    assert queue.pop(7.0) == "short 0"
    assert queue.pop(9.9) == "short 1"
    assert queue.pop(10.0) == "long"
    assert queue.pop(10.1) == "short 2"
    assert queue.pop(15.0, short_only=True) == "short 3"
    assert queue.pop(15.0, short_only=True) is None
    assert queue.pop(15.0) == "longer"


_ITEMS = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from("abc"), st.booleans(), st.floats(0, 30)), max_size=40
).map(lambda items: sorted(items, key=lambda item: item[3]))


@given(_ITEMS, st.lists(st.tuples(st.floats(0, 20), st.booleans()), max_size=80))
def test_no_long_one_that_is_due_is_passed_by_a_short_one(
    items: list[tuple[int, str, bool, float]], pops: list[tuple[float, bool]]
) -> None:
    queue: FairQueue[tuple[int, tuple[int, str, bool, float]]] = FairQueue(100, age_s=10.0)
    waiting = list(enumerate(items))
    for entry in waiting:
        priority, client, short, since = entry[1]
        assert queue.push(entry, priority=priority, client=client, short=short, now=since)
    now = items[-1][3] if items else 0.0
    for step, short_only in pops:
        now += step
        taken = queue.pop(now, short_only=short_only)
        left = [item for _, item in waiting if item[2] or not short_only]
        assert (taken is None) == (not left)
        if taken is None:
            continue
        waiting.remove(taken)
        priority, _, short, _ = taken[1]
        assert priority == min(item[0] for item in left)
        if short_only:
            assert short
        elif not short:
            others = [item for _, item in waiting if item[0] == priority and item[2]]
            assert not others or now - taken[1][3] >= 10.0
    assert len(queue) == len(waiting)
    assert len(queue.drain()) == len(waiting)
