from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agent.core.backoff import Backoff, BackoffPolicy

POLICY = BackoffPolicy(base_s=1.0, cap_s=120.0, stable_s=300.0)


def test_delay_doubles_up_to_the_cap() -> None:
    backoff, delays = Backoff(), []
    for _ in range(10):
        backoff = backoff.lost(0.0, POLICY)
        delays.append(backoff.delay_s(POLICY, 1.0))
    assert delays == [1, 2, 4, 8, 16, 32, 64, 120, 120, 120]


def test_only_a_connection_that_was_stable_resets_it() -> None:
    backoff = Backoff(failures=6)
    flapping = backoff.connected(0.0).lost(299.0, POLICY)
    assert flapping.failures == 7
    stable = backoff.connected(0.0).lost(300.0, POLICY)
    assert stable.failures == 1


def test_a_poor_link_that_works_is_tried_again_soon() -> None:
    backoff = Backoff(failures=6)
    for _ in range(20):  # it breaks every five seconds, and each time something has come
        backoff = backoff.connected(0.0).progressed().lost(5.0, POLICY)
        assert backoff.failures == 1
    assert backoff.lost(5.0, POLICY).failures == 2, (
        "what came before says nothing about an attempt that brought nothing"
    )


@given(st.integers(1, 10_000), st.floats(0, 1, exclude_max=True))
def test_delay_stays_within_the_cap_and_spreads_devices(failures: int, share: float) -> None:
    delay = Backoff(failures).delay_s(POLICY, share)
    assert 0 <= delay <= POLICY.cap_s
    assert delay <= share * POLICY.cap_s


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1000)), max_size=50))
def test_delay_never_shrinks_without_a_stable_connection(history: list[tuple[bool, float]]) -> None:
    backoff, now = Backoff(), 0.0
    for connects, seconds in history:
        before = backoff
        if connects:
            backoff = backoff.connected(now)
        now += seconds
        backoff = backoff.lost(now, POLICY)
        if not connects or seconds < POLICY.stable_s:
            assert backoff.failures == before.failures + 1
