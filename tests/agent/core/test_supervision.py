"""When what died is started again, and when it is given up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.contract.failures import FailureCode
from agent.core.health import after_unhealthy
from agent.core.orders import AfterRefusal, after_refusal, keys_may_be_new
from agent.core.supervision import (
    ATTEMPTS_BEFORE_FALLBACK,
    HANG_FACTOR,
    LEAST_HANG_S,
    MOST_ATTEMPTS,
    GiveUp,
    HostNews,
    Pace,
    Restart,
    RestartPolicy,
    after_death,
    after_failed_serve,
    meaning_of_host_event,
)

POLICY = RestartPolicy(window_s=300.0, limit=3, first_s=0.5, max_s=4.0)
CRASHED = FailureCode.RUNTIME_CRASHED


def test_the_first_death_costs_no_pause_and_the_next_ones_twice_as_much_each():
    deaths: tuple[float, ...] = ()
    pauses = []
    for now in (1.0, 2.0, 3.0):
        decision = after_death(deaths, CRASHED, now, POLICY)
        assert isinstance(decision, Restart)
        deaths = decision.deaths
        pauses.append(decision.pause_s)
    assert pauses == [0.0, 0.5, 1.0]
    assert after_death(deaths, CRASHED, 4.0, POLICY) == GiveUp((1.0, 2.0, 3.0, 4.0))


def test_deaths_out_of_the_window_are_forgotten():
    assert after_death((0.0, 1.0, 2.0), CRASHED, 302.0, POLICY) == Restart((2.0, 302.0), 0.5)


def test_a_worker_that_was_told_to_leave_has_not_died():
    assert after_death((), FailureCode.CANCELLED, 5.0, POLICY) == Restart((), 0.0)


def test_a_silence_is_measured_by_the_steps_before_it():
    pace = Pace()
    assert pace.patience_s(None, 60.0) == pace.patience_s(10, 60.0) == 60.0, "nothing was measured"
    pace.stepped(0.4, reads=True)
    pace.has_read(100)
    pace.stepped(0.03, reads=False)
    assert pace.patience_s(None, 60.0) == LEAST_HANG_S
    assert pace.patience_s(100, 60.0) == HANG_FACTOR * 0.4
    assert pace.patience_s(101, 60.0) == 60.0, "no prompt of this length was read so far"
    assert pace.patience_s(100, 3.0) == 3.0


@given(st.lists(st.tuples(st.floats(0, 1e4), st.booleans(), st.integers(0, 10**6))), st.integers(0, 10**6))
def test_no_silence_as_long_as_one_that_ended_well_is_a_hang(steps: list[tuple[float, bool, int]], characters: int):
    pace, most = Pace(), 1e5
    for seconds, reads, size in steps:
        pace.stepped(seconds, reads=reads)
        pace.has_read(size)
    for reading, is_reading in ((None, False), (characters, True)):
        patience = pace.patience_s(reading, most)
        assert LEAST_HANG_S <= patience <= most
        assert patience >= max((seconds for seconds, reads, _ in steps if reads is is_reading), default=0.0)


@given(
    st.lists(st.floats(0, 1e6), max_size=2000).map(sorted),
    st.sampled_from(list(FailureCode)),
    st.floats(0, 1e6),
    st.integers(0, 5000),
)
def test_whatever_the_history_there_is_a_decision_with_a_bounded_pause(
    times: list[float], code: FailureCode, later: float, limit: int
):
    now = (times[-1] if times else 0.0) + later
    policy = RestartPolicy(300.0, limit, 0.5, 30.0)
    decision = after_death(tuple(times), code, now, policy)
    assert all(now - policy.window_s <= at <= now for at in decision.deaths)
    if isinstance(decision, Restart):
        assert 0.0 <= decision.pause_s <= 30.0
        assert len(decision.deaths) <= limit
    else:
        assert len(decision.deaths) > limit


@pytest.mark.parametrize("has_previous", [True, False])
def test_damaged_bytes_are_lost_at_the_first_attempt(has_previous: bool):
    decision = after_failed_serve(0, FailureCode.STORE_CORRUPT, has_previous=has_previous)
    assert (decision.report, decision.lost, decision.retry) == (True, True, False)


def test_with_an_artifact_to_fall_back_to_the_newest_has_a_few_attempts():
    decisions = [after_failed_serve(n, CRASHED, has_previous=True) for n in range(ATTEMPTS_BEFORE_FALLBACK)]
    assert [(one.report, one.lost, one.retry) for one in decisions] == [
        *[(False, False, True)] * (ATTEMPTS_BEFORE_FALLBACK - 1),
        (True, True, False),
    ]


def test_without_one_it_is_reported_once_and_tried_for_long():
    decisions = [after_failed_serve(n, CRASHED, has_previous=False) for n in range(MOST_ATTEMPTS)]
    assert [one.report for one in decisions] == [True] + [False] * (MOST_ATTEMPTS - 1)
    assert [one.retry for one in decisions] == [True] * (MOST_ATTEMPTS - 1) + [False]
    assert not any(one.lost for one in decisions)


@pytest.mark.parametrize(
    ("kind", "digest", "means"),
    [
        ("crashed", "watched", HostNews.DEATH),
        ("crashed", "candidate", HostNews.NOTHING),
        ("gave_up", "watched", HostNews.LOST),
        ("gave_up", "another", HostNews.LOST),
        ("restarted", "watched", HostNews.NOTHING),
        ("activated", "watched", HostNews.NOTHING),
    ],
)
def test_what_an_event_of_the_host_means(kind: str, digest: str, means: HostNews):
    assert meaning_of_host_event(kind, digest, "watched") is means


@pytest.mark.parametrize("code", FailureCode)
def test_an_order_that_could_not_be_checked_is_tried_again_or_rejected(code: FailureCode):
    passing = {FailureCode.TRUST_UNREACHABLE, FailureCode.STORE_DISK_FULL, FailureCode.STORE_IO}
    assert (after_refusal(code) is AfterRefusal.RETRY) is (code in passing)
    if keys_may_be_new(code):
        assert code.value.startswith("trust.")


@pytest.mark.parametrize("code", FailureCode)
@pytest.mark.parametrize("serves_committed", [False, True])
@pytest.mark.parametrize("has_previous", [False, True])
@pytest.mark.parametrize("is_new", [False, True])
def test_only_what_is_broken_gives_way_and_only_to_something(
    code: FailureCode, serves_committed: bool, has_previous: bool, is_new: bool
):
    decision = after_unhealthy(code, serves_committed=serves_committed, has_previous=has_previous, is_new=is_new)
    broken = code in (FailureCode.HEALTH_ERRORS, FailureCode.HEALTH_RESTARTS, FailureCode.HEALTH_MEMORY)
    assert decision.give_way is (broken and serves_committed and has_previous)
    assert decision.report is (decision.give_way or is_new)
