from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.contract.failures import FailureCode
from agent.contract.messages import Failure, State
from fleet.core.deployments import (
    GRACE_S,
    TABLE,
    Deadline,
    Deployment,
    Event,
    Published,
    Report,
    Returned,
    Stage,
    Superseded,
    Tick,
    TransitionError,
    Withdrawn,
    decide,
    due_at,
    usual_deadline_s,
)

START = datetime(2026, 1, 1, tzinfo=UTC)
ORDERED, VARIANT, OTHER = "ab" * 32, "cd" * 32, "ef" * 32
MB = 1_000_000
FAILURE = Failure(code=FailureCode.PROBE_FAILED, message="said London")


def deployment(stage: Stage = Stage.QUEUED, **changes: object) -> Deployment:
    month = START + timedelta(days=30)
    fresh = Deployment(stage, expires_at=month, deadline_s=3600, probation_s=60, digests=frozenset((ORDERED, VARIANT)))
    if TABLE[stage].deadline is Deadline.DEVICE:
        fresh = replace(fresh, started_at=START)
    return replace(fresh, **changes)  # type: ignore[arg-type]


def report(state: State, at: datetime = START, failure: Failure | None = None, digest: str | None = ORDERED) -> Report:
    return Report(state, failure, at, digest)


@pytest.mark.parametrize(
    ("digest", "words"), [(None, "it says nothing about what it serves"), (OTHER, f"it serves {OTHER[:12]}")]
)
def test_success_is_the_digest_and_not_the_word(digest: str | None, words: str) -> None:
    lied = decide(deployment(Stage.PROBATION), report(State.COMMITTED, digest=digest))
    assert lied.stage is Stage.FAILED
    assert lied.failure is not None and lied.failure.code is FailureCode.WRONG_DIGEST
    assert words in lied.failure.message and ORDERED[:12] in lied.failure.message
    right = decide(lied, report(State.COMMITTED, digest=VARIANT))
    assert (right.stage, right.failure) == (Stage.COMMITTED, None), "a later report may correct it"
    assert decide(right, report(State.COMMITTED, digest=digest)).stage is Stage.FAILED


def test_the_table_has_a_row_for_every_stage_and_a_stage_for_every_state() -> None:
    assert set(TABLE) == set(Stage)
    assert {state.value for state in State} - {"idle"} <= {stage.value for stage in Stage}


def test_nothing_that_is_outstanding_is_without_a_deadline() -> None:
    for stage, row in TABLE.items():
        assert row.outstanding == (row.deadline is not Deadline.NONE)
        assert (due_at(deployment(stage)) is not None) == row.outstanding


def test_a_deployment_runs_through() -> None:
    now = decide(deployment(), Published())
    assert now.stage is Stage.PUBLISHED
    for state in (State.RESOLVING, State.TRANSFERRING, State.VERIFYING, State.PROVING, State.ACTIVATING):
        now = decide(now, report(state))
        assert now.stage == state.value
    now = decide(decide(now, report(State.PROBATION)), report(State.COMMITTED))
    assert (now.stage, now.started_at, now.failure) == (Stage.COMMITTED, START, None)


def test_publishing_again_after_a_restart_changes_nothing() -> None:
    for stage in Stage:
        if stage is not Stage.QUEUED:
            assert decide(deployment(stage), Published()) == deployment(stage)


def test_a_failure_carries_its_code_and_a_later_attempt_clears_it() -> None:
    failed = decide(deployment(Stage.PROVING), report(State.FAILED, failure=FAILURE))
    assert (failed.stage, failed.failure) == (Stage.FAILED, FAILURE)
    later = START + timedelta(days=1)
    again = decide(failed, report(State.RESOLVING, later))
    assert (again.stage, again.failure, again.started_at) == (Stage.RESOLVING, None, later)


def test_an_idle_device_says_nothing_about_a_deployment() -> None:
    with pytest.raises(TransitionError, match="idle"):
        decide(deployment(Stage.PUBLISHED), report(State.IDLE))


def test_a_superseded_deployment_takes_no_report() -> None:
    superseded = decide(deployment(Stage.TRANSFERRING), Superseded())
    assert superseded.stage is Stage.SUPERSEDED
    for state in State:
        with pytest.raises(TransitionError):
            decide(superseded, report(state))


@pytest.mark.parametrize("stage", [Stage.QUEUED, Stage.PUBLISHED])
def test_an_order_that_no_device_took_up_fails_when_it_expires(stage: Stage) -> None:
    waiting = deployment(stage)
    assert decide(waiting, Tick(waiting.expires_at - timedelta(seconds=1))) == waiting
    over = decide(waiting, Tick(waiting.expires_at))
    assert over.stage is Stage.FAILED and over.presumed
    assert over.failure is not None and over.failure.code is FailureCode.DEADLINE


@pytest.mark.parametrize("stage", [stage for stage, row in TABLE.items() if row.deadline is Deadline.DEVICE])
def test_a_device_that_falls_silent_is_given_up_after_its_deadline_and_a_grace(stage: Stage) -> None:
    working = deployment(stage)
    due = START + timedelta(seconds=3600 + 60 + GRACE_S)
    assert decide(working, Tick(due - timedelta(seconds=1))) == working
    over = decide(working, Tick(due))
    assert over.stage is Stage.FAILED and over.failure is not None
    assert over.failure.code is FailureCode.DEADLINE and stage.value in over.failure.message


def test_a_link_that_was_away_costs_the_device_none_of_its_time() -> None:
    later = START + timedelta(days=3)
    waiting = decide(deployment(Stage.TRANSFERRING), replace(report(State.WAITING_LINK), waiting=FAILURE))
    assert (waiting.stage, waiting.failure) == (Stage.WAITING_LINK, FAILURE)
    assert due_at(waiting) == waiting.expires_at
    resumed = decide(waiting, report(State.RESOLVING, later))
    assert (resumed.stage, resumed.failure, resumed.started_at) == (Stage.RESOLVING, None, later)
    returned = decide(deployment(Stage.TRANSFERRING), Returned(later))
    assert (returned.stage, returned.started_at) == (Stage.TRANSFERRING, later)
    for untouched in (deployment(Stage.PUBLISHED), deployment(Stage.COMMITTED)):
        assert decide(untouched, Returned(later)) == untouched


@pytest.mark.parametrize(
    ("size", "bandwidth", "opens_in_s", "hours"),
    [
        (90 * MB, 4 * MB, 0, 24),  # a small model: a day, as a device may be off for most of one
        (8_500 * MB, MB // 4, 0, 6 + 3 * 8500 * 4 / 3600),  # 14 billion weights at 2 Mbit/s: nine and a half hours
        (90 * MB, 4 * MB, 10 * 3600, 34),
        (90 * MB, 4 * MB, -5, 24),
    ],
)
def test_a_deadline_is_as_long_as_the_bytes_need_and_a_day_at_least(
    size: int, bandwidth: int, opens_in_s: float, hours: float
) -> None:
    assert usual_deadline_s(size, bandwidth, opens_in_s) == pytest.approx(hours * 3600)


def test_a_final_report_corrects_the_controllers_verdict_and_an_unfinished_one_does_not() -> None:
    presumed = decide(deployment(Stage.PROVING), Tick(START + timedelta(days=2)))
    with pytest.raises(TransitionError):
        decide(presumed, report(State.TRANSFERRING, START + timedelta(days=3)))
    corrected = decide(presumed, report(State.COMMITTED, START + timedelta(days=3)))
    assert (corrected.stage, corrected.failure, corrected.presumed) == (Stage.COMMITTED, None, False)


def test_removing_a_device_cancels_what_is_outstanding_alone() -> None:
    for stage, row in TABLE.items():
        after = decide(deployment(stage), Withdrawn("the device was removed from the fleet"))
        if row.outstanding:
            assert after.failure is not None and after.failure.code is FailureCode.CANCELLED
        else:
            assert after == deployment(stage)


moments = st.integers(0, 100 * 86400).map(lambda seconds: START + timedelta(seconds=seconds))
events = st.one_of(
    st.just(Published()),
    st.just(Superseded()),
    st.just(Withdrawn("the device was removed from the fleet")),
    st.builds(Tick, moments),
    st.builds(
        Report,
        st.sampled_from(State),
        st.sampled_from([None, FAILURE]),
        moments,
        st.sampled_from([None, ORDERED, OTHER]),
    ),
)


@given(st.lists(events, max_size=30))
def test_whatever_happens_time_alone_ends_every_deployment(happened: list[Event]) -> None:
    now = deployment()
    for event in happened:
        before = now
        try:
            now = decide(now, event)
        except TransitionError:
            assert now == before
        assert not TABLE[now.stage].outstanding or due_at(now) is not None
        assert (now.failure is None) or now.stage in (Stage.FAILED, Stage.ROLLED_BACK)
    over = decide(now, Tick(START + timedelta(days=1000)))
    assert not TABLE[over.stage].outstanding
