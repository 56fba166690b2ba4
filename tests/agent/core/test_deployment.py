"""The deployment's table: the way through it, each way out of it, and that nothing else is possible."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.contract.failures import FailureCode
from agent.contract.messages import ArtifactRef, Desired, Failure, Proof, State, Window
from agent.core import deployment as core

NOW = datetime(2026, 11, 23, tzinfo=UTC)
OLD = ArtifactRef(id="phi-old", digest="0" * 64)
NEW = ArtifactRef(id="phi-new", digest="1" * 64)
OTHER = ArtifactRef(id="phi-other", digest="2" * 64)
PROOF = Proof(runtime="onnx_genai", load_s=1, ttft_ms=20, tpot_ms=15)
BROKEN = Failure(code=FailureCode.PROBE_FAILED, message="it said no")


def order(sequence: int = 1, *artifacts: ArtifactRef, **more: object) -> Desired:
    fields: dict[str, object] = {
        "device": "pi-1",
        "sequence": sequence,
        "deployment": f"d{sequence}",
        "issued_at": NOW,
        "expires_at": NOW + timedelta(days=1),
        "artifacts": artifacts or (NEW,),
    }
    return Desired.model_validate(fields | more)


CORRUPT = Failure(code=FailureCode.STORE_CORRUPT, message="other bytes")
NO_LINK = Failure(code=FailureCode.TRANSFER_STALLED, message="the broker is not connected")
NO_ROOM = Failure(code=FailureCode.STORE_DISK_FULL, message="9 bytes are free")

#: The way into each state that is not on the happy way: from which state, and by which event.
WAYS_ASIDE: dict[State, tuple[State, core.Event]] = {
    State.WAITING_LINK: (State.TRANSFERRING, core.Failed(NO_LINK)),
    State.WAITING_SPACE: (State.TRANSFERRING, core.Failed(NO_ROOM, needs_bytes=1 << 30)),
}

HAPPY: list[tuple[core.Event, State, core.Step | None]] = [
    (core.Ordered(order()), State.RESOLVING, core.Step.RESOLVE),
    (core.Resolved((NEW,)), State.TRANSFERRING, core.Step.TRANSFER),
    (core.Transferred((NEW,)), State.VERIFYING, core.Step.VERIFY),
    (core.Verified(), State.PROVING, core.Step.PROVE),
    (core.Proved(NEW, PROOF), State.ACTIVATING, core.Step.ACTIVATE),
    (core.Activated(NEW.digest), State.PROBATION, core.Step.WATCH),
    (core.Healthy(NEW.digest), State.COMMITTED, None),
]


def at(state: State, committed: ArtifactRef | None = OLD) -> core.Deployment:
    """A deployment that went the happy way up to ``state``, and aside where that is the way."""
    if state in WAYS_ASIDE:
        before, event = WAYS_ASIDE[state]
        return core.decide(at(before, committed), event, NOW)[0]
    deployment = core.Deployment(committed=committed)
    for event, reached, _ in HAPPY:
        if deployment.state is state:
            break
        deployment, _ = core.decide(deployment, event, NOW)
        assert deployment.state is reached
    assert deployment.state is state
    return deployment


def steps(effects: tuple[core.Effect, ...]) -> list[core.Step]:
    return [effect.step for effect in effects if isinstance(effect, core.Begin)]


UNDERWAY = [state for state, row in core.STATES.items() if row.step]


def test_the_happy_way_begins_each_states_step_and_commits():
    deployment = core.Deployment()
    for event, state, step in HAPPY:
        deployment, effects = core.decide(deployment, event, NOW)
        assert deployment.state is state
        assert steps(effects) == ([step] if step else [])
        assert core.Report() in effects
    assert deployment.committed == NEW
    assert deployment.previous is None


def test_committing_keeps_the_one_before_for_rollback():
    deployment = at(State.COMMITTED)
    assert (deployment.committed, deployment.previous) == (NEW, OLD)
    assert deployment.keep() == (NEW.digest, OLD.digest)


@pytest.mark.parametrize("state", UNDERWAY)
def test_every_state_with_a_step_has_a_deadline_and_a_way_out(state: State):
    onwards = {following for origin, _, following in core.edges() if origin is state}
    assert onwards & {State.ROLLED_BACK, State.FAILED}
    assert len(onwards) > 2
    deadline_s = core.deadline_s(at(state), NOW)
    assert deadline_s is None if state is State.WAITING_LINK else 0 < (deadline_s or 0) <= 6 * 3600


@pytest.mark.parametrize("state", UNDERWAY)
def test_a_failure_restores_exactly_when_the_endpoint_may_serve_the_new_model(state: State):
    before = at(state)
    failed, effects = core.decide(before, core.Failed(BROKEN), NOW)
    live = state in (State.ACTIVATING, State.PROBATION)
    assert failed.state is (State.ROLLED_BACK if live else State.FAILED)
    assert (core.Serve() in effects) is live
    assert failed.committed == OLD
    assert failed.failure == BROKEN
    assert core.Collect() in effects
    assert NEW.digest not in failed.keep()


@pytest.mark.parametrize("state", UNDERWAY)
def test_a_passed_deadline_is_a_failure_that_says_so(state: State):
    failed, _ = core.decide(at(state), core.DeadlinePassed(900), NOW)
    assert failed.failure and failed.failure.code is FailureCode.DEADLINE
    assert state.value in failed.failure.message


@pytest.mark.parametrize("state", UNDERWAY)
def test_a_restart_serves_the_committed_artifact_first_and_resumes_where_the_table_says(state: State):
    resumed, effects = core.decide(at(state), core.Restarted(), NOW)
    assert effects[0] == core.Serve()
    assert resumed.state is core.TABLE[core.Case.RESTARTED][state]
    assert steps(effects) == [core.STATES[resumed.state].step]
    assert resumed.restarts == int(core.STATES[state].counts_restarts)


@pytest.mark.parametrize("state", [state for state in UNDERWAY if core.STATES[state].counts_restarts])
def test_a_boot_loop_gives_the_artifact_up_by_itself(state: State):
    deployment = at(state)
    for _ in range(core.MAX_RESTARTS + 1):
        assert deployment.underway
        deployment, effects = core.decide(deployment, core.Restarted(), NOW)
    assert deployment.state is State.FAILED
    assert deployment.failure and deployment.failure.code is FailureCode.BOOT_LOOP
    assert effects[0] == core.Serve()


def test_losing_power_during_a_long_transfer_is_no_boot_loop():
    deployment = at(State.TRANSFERRING)
    for _ in range(50):
        deployment, _ = core.decide(deployment, core.Restarted(), NOW)
    assert deployment.state is State.TRANSFERRING
    for hour in range(1, 7):
        deployment, effects = core.decide(deployment, core.Restarted(), NOW + timedelta(hours=hour))
    assert [effect.deadline_s for effect in effects if isinstance(effect, core.Begin)] == [0.0]


@pytest.mark.parametrize("state", [State.ACTIVATING, State.PROBATION])
def test_a_digest_that_was_not_ordered_is_never_accepted(state: State):
    event = core.Activated(OTHER.digest) if state is State.ACTIVATING else core.Healthy(OTHER.digest)
    failed, effects = core.decide(at(state), event, NOW)
    assert failed.state is State.ROLLED_BACK
    assert failed.failure and failed.failure.code is FailureCode.STORE_CORRUPT
    assert core.Serve() in effects


def test_an_order_seen_before_changes_nothing():
    deployment = at(State.PROVING)
    assert core.decide(deployment, core.Ordered(order(1)), NOW) == (deployment, ())


def test_a_clock_that_is_set_by_years_costs_a_deployment_an_hour_at_most():
    deployment = at(State.TRANSFERRING)
    jumped, effects = core.decide(deployment, core.Transferred((NEW,)), NOW + timedelta(days=20000))
    assert jumped.state is State.VERIFYING
    assert [effect.deadline_s for effect in effects if isinstance(effect, core.Begin)] == [1800]
    assert core.deadline_s(jumped.model_copy(update={"state": State.TRANSFERRING}), NOW) == 5 * 3600


def test_waiting_for_the_window_through_restarts_is_no_boot_loop():
    begin = NOW + timedelta(hours=5)
    deployment = at(State.ACTIVATING).model_copy(update={"desired": order(1, window=Window(not_before=begin))})
    for _ in range(20):
        deployment, _ = core.decide(deployment, core.Restarted(), NOW)
    assert deployment.state is State.PROVING


def test_a_failure_meant_for_an_older_order_spares_the_newer():
    deployment = at(State.PROVING)
    assert core.decide(deployment, core.Failed(BROKEN, sequence=0), NOW) == (deployment, ())


def test_a_newer_order_supersedes_the_step_of_the_older():
    superseded, effects = core.decide(at(State.PROBATION), core.Ordered(order(2, OTHER)), NOW)
    assert superseded.state is State.RESOLVING
    assert effects[0] == core.Halt()
    # The one that had been activated is still live: a failure now must bring the committed one back.
    failed, effects = core.decide(superseded, core.Failed(BROKEN), NOW)
    assert failed.state is State.ROLLED_BACK
    assert core.Serve() in effects


def test_an_order_for_what_is_committed_already_is_done_at_once():
    done, effects = core.decide(at(State.COMMITTED), core.Ordered(order(2, NEW)), NOW)
    assert done.state is State.COMMITTED
    assert done.newest_sequence == 2
    assert steps(effects) == []


def test_what_serves_can_be_lost_twice_before_nothing_is_left():
    lost, effects = core.decide(at(State.COMMITTED), core.Unhealthy(NEW.digest, BROKEN), NOW)
    assert (lost.state, lost.committed, lost.previous) == (State.ROLLED_BACK, OLD, None)
    assert effects == (core.Serve(), core.Report())
    gone, effects = core.decide(lost, core.Unhealthy(OLD.digest, CORRUPT), NOW)
    assert (gone.state, gone.committed) == (State.FAILED, None)
    assert core.Serve() in effects


def test_the_last_artifact_is_kept_while_its_bytes_are_whole():
    kept, effects = core.decide(at(State.COMMITTED, committed=None), core.Unhealthy(NEW.digest, BROKEN), NOW)
    assert (kept.state, kept.committed, kept.failure) == (State.COMMITTED, NEW, BROKEN)
    assert effects == (core.Report(),)


def test_old_news_of_an_artifact_that_was_replaced_is_no_news():
    lost, _ = core.decide(at(State.COMMITTED), core.Unhealthy(NEW.digest, BROKEN), NOW)
    assert core.decide(lost, core.Unhealthy(NEW.digest, BROKEN), NOW) == (lost, ())


def test_losing_the_old_artifact_does_not_stop_the_new_one_on_its_way():
    going, effects = core.decide(at(State.TRANSFERRING), core.Unhealthy(OLD.digest, CORRUPT), NOW)
    assert going.state is State.TRANSFERRING
    assert going.committed is None
    assert effects == (core.Serve(), core.Report())


def test_a_link_that_is_away_for_weeks_costs_the_deployment_no_time():
    deployment, when = at(State.WAITING_LINK), NOW
    for _ in range(1000):
        when += timedelta(hours=1)
        deployment, effects = core.decide(deployment, core.Restarted(), when)
        assert steps(effects) == [core.Step.AWAIT_LINK]
    resumed, _ = core.decide(deployment, core.Available(), when)
    assert (resumed.state, resumed.waits_for) == (State.RESOLVING, None)
    assert core.deadline_s(resumed, when) == 6 * 3600


def test_a_full_disk_is_waited_for_until_the_orders_deadline_whose_end_says_why():
    deployment = at(State.WAITING_SPACE)
    assert deployment.waiting == core.Waiting(why=NO_ROOM, needs_bytes=1 << 30)
    assert deployment.waits_for == NO_ROOM
    resumed, _ = core.decide(deployment, core.Available(), NOW + timedelta(minutes=30))
    assert core.deadline_s(resumed, NOW) == 5.5 * 3600
    ended, _ = core.decide(deployment, core.DeadlinePassed(6 * 3600), NOW)
    assert ended.failure is not None
    assert ended.failure.message.endswith("it waited last because 9 bytes are free")


def test_waiting_in_turns_is_counted_so_that_each_wait_begins_with_a_longer_pause():
    deployment = at(State.TRANSFERRING)
    for waits in range(1, 5):
        deployment, _ = core.decide(deployment, core.Failed(NO_LINK), NOW)
        assert deployment.waits == waits
        for event in (core.Available(), core.Resolved((NEW,))):
            deployment, _ = core.decide(deployment, event, NOW)
    deployment, _ = core.decide(deployment, core.Ordered(order(2, OTHER)), NOW)
    assert (deployment.waits, deployment.waiting) == (0, None)


def test_while_it_waits_what_is_committed_serves_even_where_a_newer_order_found_another_live():
    superseded, _ = core.decide(at(State.PROBATION), core.Ordered(order(2, OTHER)), NOW)
    assert superseded.touched
    waiting, effects = core.decide(superseded, core.Failed(NO_LINK), NOW)
    assert effects[0] == core.Serve()
    assert (waiting.state, waiting.touched) == (State.WAITING_LINK, False)


def test_the_window_is_waited_for_but_not_past_the_orders_deadline():
    wait = Window(not_before=NOW + timedelta(hours=1))
    for state in (State.PROVING, State.ACTIVATING):
        waiting = at(state).model_copy(update={"desired": order(1, window=wait)})
        own = core.STATES[state].deadline_s
        assert own is not None
        assert core.deadline_s(waiting, NOW) == 3600 + own
    endless = Window(not_before=NOW + timedelta(days=3))
    waiting = waiting.model_copy(update={"desired": order(1, window=endless)})
    assert core.deadline_s(waiting, NOW) == 6 * 3600


EVENTS: list[core.Event] = [
    *(event for event, _, _ in HAPPY),
    core.Ordered(order(2, OTHER)),
    core.Ordered(order(3, NEW)),
    core.Resolved((OTHER,)),
    core.Transferred((OTHER,)),
    core.Available(),
    core.Failed(NO_LINK),
    core.Failed(NO_ROOM, needs_bytes=1),
    core.Proved(OTHER, PROOF),
    core.Activated(OTHER.digest),
    core.Healthy(OTHER.digest),
    core.Failed(BROKEN),
    core.DeadlinePassed(1),
    core.Unhealthy(NEW.digest, BROKEN),
    core.Unhealthy(OTHER.digest, BROKEN),
    core.Restarted(),
]


@given(st.lists(st.sampled_from(EVENTS), max_size=40))
def test_no_order_of_events_breaks_what_must_hold(events: list[core.Event]):
    deployment = core.Deployment()
    for event in events:
        before = deployment
        try:
            deployment, effects = core.decide(before, event, NOW)
        except core.IllegalTransitionError:
            assert deployment is before
            continue
        # A step is begun exactly when its state is entered, and one at a time.
        assert len(steps(effects)) <= 1
        for step in steps(effects):
            assert core.STATES[deployment.state].step is step
        # Only what passed proof, activation and probation is committed, and only as ordered.
        if deployment.committed != before.committed and deployment.state is State.COMMITTED:
            assert isinstance(event, core.Healthy)
            assert event.digest == deployment.committed.digest
        assert deployment.newest_sequence >= before.newest_sequence
        if deployment.committed:
            assert deployment.committed.digest in deployment.keep()
        # The journal's document survives the disk.
        assert core.Deployment.from_json(deployment.to_json()) == deployment


REFS = st.sampled_from([OLD, NEW, OTHER])
FAILURES = st.builds(Failure, code=st.sampled_from(FailureCode), message=st.just("so it was"))
DEPLOYMENTS = st.builds(
    core.Deployment,
    state=st.sampled_from(State),
    desired=st.none() | st.builds(order, st.integers(1, 5), REFS),
    candidates=st.lists(REFS, max_size=2).map(tuple),
    chosen=st.none() | REFS,
    committed=st.none() | REFS,
    previous=st.none() | REFS,
    failure=st.none() | FAILURES,
    waiting=st.none() | st.builds(core.Waiting, why=FAILURES, needs_bytes=st.integers(0, 1 << 40)),
    waits=st.integers(0, 100),
    restarts=st.integers(0, core.MAX_RESTARTS + 1),
    touched=st.booleans(),
    newest_sequence=st.integers(0, 5),
)
ANY_EVENT: dict[type, st.SearchStrategy[core.Event]] = {
    core.Ordered: st.builds(core.Ordered, st.builds(order, st.integers(1, 7), REFS)),
    core.Resolved: st.builds(core.Resolved, st.lists(REFS, max_size=2).map(tuple)),
    core.Transferred: st.builds(core.Transferred, st.lists(REFS, max_size=2).map(tuple)),
    core.Available: st.just(core.Available()),
    core.Verified: st.just(core.Verified()),
    core.Proved: st.builds(core.Proved, REFS, st.just(PROOF)),
    core.Activated: st.builds(core.Activated, REFS.map(lambda ref: ref.digest)),
    core.Healthy: st.builds(core.Healthy, REFS.map(lambda ref: ref.digest)),
    core.Failed: st.builds(core.Failed, FAILURES, st.none() | st.integers(0, 5), st.integers(0, 1 << 40)),
    core.DeadlinePassed: st.builds(core.DeadlinePassed, st.floats(0, 1e6)),
    core.Unhealthy: st.builds(core.Unhealthy, REFS.map(lambda ref: ref.digest), FAILURES),
    core.Restarted: st.just(core.Restarted()),
}
PAIRS = [(state, kind) for state in State for kind in ANY_EVENT]


def test_the_table_is_complete():
    assert set(core.TABLE) == set(core.CASES) == set(core.Case)
    assert set(core.STATES) == set(State)
    assert all(set(row) == set(State) for row in core.TABLE.values())
    assert {kind for kinds in core.CASES.values() for kind in kinds} == set(ANY_EVENT)


@pytest.mark.parametrize(("state", "kind"), PAIRS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_decide_takes_the_edges_of_the_table_and_no_others(state: State, kind: type):
    edges = {following for origin, case, following in core.edges() if origin is state and kind in core.CASES[case]}
    taken: set[State] = set()

    @settings(max_examples=120)
    @given(deployment=DEPLOYMENTS, event=ANY_EVENT[kind])
    def takes_an_edge_or_refuses(deployment: core.Deployment, event: core.Event) -> None:
        before = deployment.model_copy(update={"state": state})
        case = core.case_of(before, event, NOW)
        assert kind in core.CASES[case]
        try:
            after, _ = core.decide(before, event, NOW)
        except core.IllegalTransitionError:
            assert core.TABLE[case][state] is None
            return
        assert after.state is core.TABLE[case][state]
        taken.add(after.state)

    takes_an_edge_or_refuses()
    assert taken <= edges
    if not edges:
        assert not taken


def example_of(case: core.Case, state: State) -> tuple[core.Deployment, core.Event]:
    """A deployment in this state, and an event that means this case there."""
    base = core.Deployment(
        state=state, desired=order(3, NEW), candidates=(NEW,), chosen=NEW, committed=OLD, newest_sequence=3
    )

    def but(**changes: object) -> core.Deployment:
        return base.model_copy(update=changes)

    examples: dict[core.Case, tuple[core.Deployment, core.Event]] = {
        core.Case.ORDERED: (base, core.Ordered(order(4, OTHER))),
        core.Case.ORDERED_COMMITTED: (base, core.Ordered(order(4, OLD))),
        core.Case.ORDERED_AGAIN: (base, core.Ordered(order(3, NEW))),
        core.Case.RESOLVED: (base, core.Resolved((NEW,))),
        core.Case.TRANSFERRED: (base, core.Transferred((NEW,))),
        core.Case.AVAILABLE: (base, core.Available()),
        core.Case.VERIFIED: (base, core.Verified()),
        core.Case.PROVED: (base, core.Proved(NEW, PROOF)),
        core.Case.ACTIVATED: (base, core.Activated(NEW.digest)),
        core.Case.ACTIVATED_OTHER: (base, core.Activated(OTHER.digest)),
        core.Case.HEALTHY: (base, core.Healthy(NEW.digest)),
        core.Case.HEALTHY_OTHER: (base, core.Healthy(OTHER.digest)),
        core.Case.FAILED: (base, core.Failed(BROKEN)),
        core.Case.FAILED_TOUCHED: (but(touched=True), core.Failed(BROKEN)),
        core.Case.FAILED_OLD: (base, core.Failed(BROKEN, sequence=2)),
        core.Case.LINK_AWAY: (base, core.Failed(NO_LINK)),
        core.Case.DISK_FULL: (base, core.Failed(NO_ROOM)),
        core.Case.UNHEALTHY_NEW: (but(touched=True), core.Unhealthy(NEW.digest, BROKEN)),
        core.Case.UNHEALTHY_BACK: (but(previous=OTHER), core.Unhealthy(OLD.digest, BROKEN)),
        core.Case.UNHEALTHY_DAMAGED: (base, core.Unhealthy(OLD.digest, CORRUPT)),
        core.Case.UNHEALTHY_LIMPING: (base, core.Unhealthy(OLD.digest, BROKEN)),
        core.Case.UNHEALTHY_OLD: (base, core.Unhealthy(OTHER.digest, BROKEN)),
        core.Case.RESTARTED: (base, core.Restarted()),
        core.Case.RESTARTED_TOO_OFTEN: (but(restarts=core.MAX_RESTARTS), core.Restarted()),
    }
    return examples[case]


@pytest.mark.parametrize("case", core.Case, ids=lambda case: case.name)
@pytest.mark.parametrize("state", State, ids=str)
def test_each_cell_of_the_table_is_what_decide_does(case: core.Case, state: State):
    deployment, event = example_of(case, state)
    following = core.TABLE[case][state]
    if core.case_of(deployment, event, NOW) is not case:
        assert following is None, "an edge that nothing can take"
    elif following is None:
        with pytest.raises(core.IllegalTransitionError, match=state.value):
            core.decide(deployment, event, NOW)
    else:
        assert core.decide(deployment, event, NOW)[0].state is following


VERDICTS = [FailureCode.PROBE_FAILED, FailureCode.STORE_CORRUPT, FailureCode.BOOT_LOOP, FailureCode.HEALTH_ERRORS]
NO_VERDICTS = [
    FailureCode.TRANSFER_STALLED,
    FailureCode.STORE_DISK_FULL,
    FailureCode.CANCELLED,
    FailureCode.DEADLINE,
    FailureCode.TRUST_UNREACHABLE,
]


@pytest.mark.parametrize("state", UNDERWAY)
@pytest.mark.parametrize("code", VERDICTS + NO_VERDICTS)
def test_bytes_are_spared_unless_the_failure_speaks_against_them(state: State, code: FailureCode):
    failed, effects = core.decide(at(state), core.Failed(Failure(code=code, message="")), NOW)
    if failed.underway:  # it waits, and keeps all that it has
        assert core.waits(state, code)
        assert failed.keep() == (NEW.digest, OLD.digest)
        return
    assert core.Collect() in effects
    assert failed.keep() == (OLD.digest,)
    assert failed.spare() == ((NEW.digest,) if code in NO_VERDICTS else ())


def test_nothing_is_spared_while_it_is_wanted_or_once_it_is_committed():
    assert at(State.TRANSFERRING).spare() == ()
    assert at(State.COMMITTED).spare() == ()


@pytest.mark.parametrize("kind", ANY_EVENT, ids=lambda kind: kind.__name__)
def test_without_memory_nothing_new_is_begun_and_what_serves_goes_on(kind: type):
    full = Failure(code=FailureCode.STORE_DISK_FULL, message="no room")

    @settings(max_examples=60)
    @given(deployment=DEPLOYMENTS, event=ANY_EVENT[kind])
    def holds(deployment: core.Deployment, event: core.Event) -> None:
        try:
            decided = core.decide(deployment, event, NOW)
        except core.IllegalTransitionError:
            return
        after, effects = core.decide_unsaved(deployment, event, decided, full, NOW)
        if kind is core.Ordered:
            assert (after, effects) == (deployment, (core.Report(),))
        elif kind in (core.Failed, core.DeadlinePassed, core.Unhealthy, core.Restarted):
            assert (after, effects) == decided
        elif after.underway:
            assert (after.state, after.waits_for) == (State.WAITING_SPACE, full)
            assert steps(effects) == [core.Step.AWAIT_SPACE]
            assert after.committed == deployment.committed
        else:
            assert steps(effects) == []
            assert after.failure == full
            assert after.committed == deployment.committed

    holds()


def test_a_transition_that_the_state_does_not_know_names_both():
    with pytest.raises(core.IllegalTransitionError, match="Verified while idle"):
        core.decide(core.Deployment(), core.Verified(), NOW)


def test_a_deadline_without_an_order_is_the_states_own():
    assert core.deadline_s(core.Deployment(state=State.VERIFYING), NOW) == 1800
    assert core.deadline_s(core.Deployment(), NOW) == 0
    assert core.Deployment().deployment_id == ""
