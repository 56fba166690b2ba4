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
