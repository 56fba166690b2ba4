"""Rollouts through their table: runs as stories, and any sequence of events whatever."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fleet.core.rollout_events import (
    AbortAsked,
    Approved,
    Assigned,
    CancelWaiting,
    Effect,
    Event,
    OpenWave,
    Order,
    PauseAsked,
    Progress,
    ResumeAsked,
    Started,
    Stopped,
    TakeBack,
    TakenBack,
    Ticked,
)
from fleet.core.rollout_spec import Counts, RolloutSpec, Wave
from fleet.core.rollouts import STATES, TABLE, Case, Rollout, State, TransitionError, decide, edges, plan

START = datetime(2026, 11, 25, tzinfo=UTC)
TWO = (Wave(devices=2), Wave(percent=100))


def spec(**changes: object) -> RolloutSpec:
    return RolloutSpec(**({"selector": "profile=pi-5", "artifacts": ("ab" * 32,), "waves": TWO} | changes))  # type: ignore[arg-type]


def counts(assigned: int, succeeded: int = 0, failed: int = 0, offline: int = 0, waiting: int = 0) -> Counts:
    left = assigned - succeeded - failed - offline - waiting
    return Counts(
        assigned=assigned, waiting=waiting, under_way=left, offline=offline, succeeded=succeeded, failed=failed
    )


class Run:
    """A rollout, and everything that it has asked for."""

    def __init__(self, **changes: object) -> None:
        self.at = START
        self.rollout = plan("r-1", spec(**changes), self.at)
        self.effects: list[Effect] = []

    def __call__(self, event: Event, after_s: float = 1.0) -> State:
        self.at += timedelta(seconds=after_s)
        self.rollout, effects = decide(self.rollout, event, self.at)
        self.effects += effects
        return self.rollout.state


def test_two_waves_that_go_well():
    run = Run()
    assert run(Started()) is State.OPENING
    assert run(Assigned(devices=2)) is State.RUNNING
    assert run(Progress(counts=counts(2, waiting=1))) is State.RUNNING
    assert run(Progress(counts=counts(2, succeeded=2))) is State.BAKING
    assert run(Ticked(), 299) is State.BAKING
    assert run(Ticked()) is State.OPENING
    assert run(Assigned(devices=8)) is State.RUNNING
    assert run(Progress(counts=counts(8, succeeded=8))) is State.BAKING
    assert run(Ticked(), 300) is State.COMPLETED
    assert run.effects == [OpenWave(wave=0), Order(wave=0), Order(wave=0), OpenWave(wave=1), Order(wave=1)]


@pytest.mark.parametrize("on_stop", ["revert", "keep"])
def test_the_gate_stops_it_and_devices_go_back_or_keep_what_they_have(on_stop: str):
    run = Run(on_stop=on_stop)
    run(Started())
    run(Assigned(devices=2))
    assert run(Stopped(reason="17 of 18 devices are over 5% slower")) is State.STOPPING
    assert run.effects[-1] == CancelWaiting()
    assert run(Progress(counts=counts(2, succeeded=1))) is State.STOPPING, "one is under way"
    ended = run(Progress(counts=counts(2, succeeded=1, failed=1)))
    assert run.rollout.reason == "17 of 18 devices are over 5% slower"
    if on_stop == "keep":
        assert ended is State.INCOMPLETE
        return
    assert ended is State.TAKING_BACK
    assert run.effects[-1] == TakeBack()
    assert run(TakenBack(remaining=1)) is State.TAKING_BACK
    assert run(TakenBack(remaining=0)) is State.TAKEN_BACK


def test_devices_that_are_offline_do_not_hold_a_wave_up_for_ever_and_are_counted():
    run = Run(wave_deadline_s=3600, bake_s=0)
    run(Started())
    run(Assigned(devices=2))
    assert run(Progress(counts=counts(2, succeeded=1, offline=1))) is State.RUNNING
    assert run(Ticked(), 3600) is State.BAKING
    assert run(Ticked()) is State.OPENING
    assert run.rollout.left_behind == 1
    run(Assigned(devices=3))
    run(Progress(counts=counts(3, succeeded=3)))
    assert run(Ticked()) is State.INCOMPLETE


def test_a_device_that_comes_back_while_others_bake_is_waited_for():
    run = Run()
    run(Started())
    run(Assigned(devices=2))
    run(Progress(counts=counts(2, succeeded=2)))
    assert run(Progress(counts=counts(2, succeeded=1))) is State.RUNNING, "it was rolled back and is ordered again"


def test_a_person_approves_pauses_resumes_and_aborts():
    run = Run(approval=True, bake_s=0)
    run(Started())
    run(Assigned(devices=2))
    assert run(PauseAsked()) is State.PAUSED
    run(Progress(counts=counts(2, succeeded=1)))
    assert run(ResumeAsked()) is State.RUNNING
    run(Progress(counts=counts(2, succeeded=2)))
    assert run(Ticked()) is State.APPROVING
    assert run(PauseAsked()) is State.PAUSED
    assert run(ResumeAsked()) is State.APPROVING
    assert run(Approved()) is State.OPENING
    run(Assigned(devices=8))
    assert run(AbortAsked(revert=True, reason="a wrong release")) is State.STOPPING
    assert run(Progress(counts=counts(8, succeeded=1, failed=7))) is State.TAKING_BACK
    assert run.rollout.reason == "a wrong release"


def test_an_abort_that_keeps_ends_as_aborted_and_one_before_the_start_at_once():
    run = Run()
    run(Started())
    run(Assigned(devices=2))
    run(AbortAsked(revert=False))
    assert run(Progress(counts=counts(2, succeeded=2))) is State.ABORTED
    fresh = Run()
    assert fresh(AbortAsked(revert=True)) is State.ABORTED


def test_devices_that_cannot_go_back_in_time_are_told_and_their_orders_wait():
    run = Run()
    for event in (Started(), Assigned(devices=2), Stopped(reason="x"), Progress(counts=counts(2, succeeded=2))):
        run(event)
    assert run.rollout.state is State.TAKING_BACK
    assert run(TakenBack(remaining=1)) is State.TAKING_BACK
    assert run(Ticked(), 8 * 86400) is State.INCOMPLETE


@pytest.mark.parametrize("event", [Approved(), ResumeAsked(), PauseAsked(), Started()])
def test_what_cannot_be_done_now_is_refused_and_changes_nothing(event: Event):
    run = Run()
    for one in (Started(), Assigned(devices=1), AbortAsked(revert=False), Progress(counts=counts(1, succeeded=1))):
        run(one)
    before = run.rollout
    with pytest.raises(TransitionError, match=r"rollout r-1 is aborted: it cannot be \w+ now"):
        run(event)
    assert run.rollout is before


@pytest.mark.parametrize(
    ("waves", "words"),
    [
        ([{"percent": 60}, {"percent": 60}], "the waves take 120% of the devices"),
        ([{"percent": 100}, {"devices": 1}], "the waves take 100% of the devices"),
        ([{}], "a wave has devices, percent, or selector"),
        ([{"devices": 1, "percent": 5}], "one of them alone"),
        ([{"devices": 0}], "greater than or equal to 1"),
        ([], "at least 1 item"),
    ],
)
def test_waves_that_do_not_add_up_are_refused(waves: list[dict[str, object]], words: str):
    with pytest.raises(ValidationError, match=words):
        spec(waves=waves)


def test_a_wave_takes_what_it_says():
    assert [wave.take(1000) for wave in (Wave(devices=5), Wave(percent=1), Wave(percent=0.01), Wave(selector="x"))] == [
        5,
        10,
        1,
        None,
    ]


def test_every_state_has_a_row_and_every_case_a_cell():
    assert set(STATES) == set(State)
    assert set(TABLE) == set(Case)
    reached = {following for _, _, following in edges()} | {State.PLANNED}
    assert reached == set(State)
    for state, row in STATES.items():
        leaves = [case for begin, case, following in edges() if begin is state and following is not state]
        assert bool(leaves) is not row.final


numbers = st.integers(0, 3)
some_counts = st.builds(
    Counts, assigned=st.integers(0, 6), waiting=numbers, under_way=numbers, offline=numbers, succeeded=numbers,
    failed=numbers,
)  # fmt: skip
events = st.one_of(
    st.just(Started()),
    st.builds(Assigned, devices=numbers),
    st.builds(Progress, counts=some_counts),
    st.just(Stopped(reason="slow")),
    st.just(Approved()),
    st.just(PauseAsked()),
    st.just(ResumeAsked()),
    st.builds(AbortAsked, revert=st.booleans()),
    st.builds(TakenBack, remaining=numbers),
    st.just(Ticked()),
)
specs = st.builds(
    spec,
    waves=st.sampled_from([TWO, (Wave(percent=100),), (Wave(devices=1), Wave(devices=1), Wave(percent=100))]),
    approval=st.booleans(),
    on_stop=st.sampled_from(["keep", "revert"]),
    bake_s=st.sampled_from([0.0, 60.0]),
)
ALLOWED = {(state, following) for state, _, following in edges()} | {(state, state) for state in State}


@settings(max_examples=300)
@given(specs, st.lists(st.tuples(events, st.sampled_from([0.0, 1.0, 3600.0, 10**7])), max_size=30))
def test_whatever_happens_the_table_holds_and_time_alone_ends_it(
    asked: RolloutSpec, happened: list[tuple[Event, float]]
):
    at, rollout = START, plan("r-1", asked, START)
    changed = cancelled = took_back = False
    for event, seconds in happened:
        at += timedelta(seconds=seconds)
        before = rollout
        try:
            rollout, effects = decide(rollout, event, at)
        except TransitionError:
            assert rollout is before
            continue
        assert (before.state, rollout.state) in ALLOWED
        assert STATES[rollout.state].final or rollout.state is State.PLANNED or rollout.due_at is not None
        assert Rollout.model_validate_json(rollout.model_dump_json()) == rollout
        assert len({effect.key for effect in effects}) == len(effects)
        changed |= any(isinstance(effect, Order) for effect in effects)
        cancelled |= any(isinstance(effect, CancelWaiting) for effect in effects)
        took_back |= any(isinstance(effect, TakeBack) for effect in effects)
    if rollout.state in (State.TAKEN_BACK, State.TAKING_BACK):
        assert cancelled and took_back
    if rollout.state is State.PLANNED:
        assert not changed
        return
    for _ in range(200):
        if STATES[rollout.state].final:
            return
        at += timedelta(days=400)
        rollout, effects = decide(rollout, Ticked(), at)
        if any(isinstance(effect, OpenWave) for effect in effects):
            rollout, _ = decide(rollout, Assigned(devices=1), at)
    pytest.fail(f"it is {rollout.state} for ever")
