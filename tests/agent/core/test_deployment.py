"""The deployment's table: the way through it, each way out of it, and that nothing else is possible."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
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


HAPPY: list[tuple[core.Event, State, core.Work | None]] = [
    (core.Ordered(order()), State.RESOLVING, core.Work.RESOLVE),
    (core.Resolved((NEW,)), State.TRANSFERRING, core.Work.TRANSFER),
    (core.Transferred((NEW,)), State.VERIFYING, core.Work.VERIFY),
    (core.Verified(), State.PROVING, core.Work.PROVE),
    (core.Proved(NEW, PROOF), State.ACTIVATING, core.Work.ACTIVATE),
    (core.Activated(NEW.digest), State.PROBATION, core.Work.WATCH),
    (core.Healthy(NEW.digest), State.COMMITTED, None),
]


def at(state: State, committed: ArtifactRef | None = OLD) -> core.Deployment:
    """A deployment that went the happy way up to ``state``."""
    deployment = core.Deployment(committed=committed)
    for event, reached, _ in HAPPY:
        if deployment.state is state:
            break
        deployment, _ = core.decide(deployment, event, NOW)
        assert deployment.state is reached
    assert deployment.state is state
    return deployment


def works(effects: tuple[core.Effect, ...]) -> list[core.Work]:
    return [effect.work for effect in effects if isinstance(effect, core.Begin)]


UNDERWAY = [state for state, row in core.TABLE.items() if row.work]


def test_the_happy_way_begins_each_states_work_and_commits():
    deployment = core.Deployment()
    for event, state, work in HAPPY:
        deployment, effects = core.decide(deployment, event, NOW)
        assert deployment.state is state
        assert works(effects) == ([work] if work else [])
        assert core.Report() in effects
    assert deployment.committed == NEW
    assert deployment.previous is None


def test_committing_keeps_the_one_before_for_rollback():
    deployment = at(State.COMMITTED)
    assert (deployment.committed, deployment.previous) == (NEW, OLD)
    assert deployment.keep() == (NEW.digest, OLD.digest)


@pytest.mark.parametrize("state", UNDERWAY)
def test_every_state_with_work_has_a_deadline_and_a_way_out(state: State):
    row = core.TABLE[state]
    assert row.then and row.on_failure and row.success
    assert 0 < core.deadline_s(at(state), NOW) <= 6 * 3600


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
    row = core.TABLE[state]
    assert effects[0] == core.Serve()
    assert resumed.state is row.on_restart
    assert works(effects) == [core.TABLE[row.on_restart].work]
    assert resumed.restarts == int(row.counts_restarts)


@pytest.mark.parametrize("state", [state for state in UNDERWAY if core.TABLE[state].counts_restarts])
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


def test_a_newer_order_supersedes_the_work_of_the_older():
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
    assert works(effects) == []


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


def test_the_window_is_waited_for_but_not_past_the_orders_deadline():
    wait = Window(not_before=NOW + timedelta(hours=1))
    for state in (State.PROVING, State.ACTIVATING):
        waiting = at(state).model_copy(update={"desired": order(1, window=wait)})
        own = core.TABLE[state].deadline_s
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
        # Work is begun exactly when a state of work is entered, and one work at a time.
        assert len(works(effects)) <= 1
        for work in works(effects):
            assert core.TABLE[deployment.state].work is work
        # Only what passed proof, activation and probation is committed, and only as ordered.
        if deployment.committed != before.committed and deployment.state is State.COMMITTED:
            assert isinstance(event, core.Healthy)
            assert event.digest == deployment.committed.digest
        assert deployment.newest_sequence >= before.newest_sequence
        if deployment.committed:
            assert deployment.committed.digest in deployment.keep()
        # The journal's document survives the disk.
        assert core.Deployment.from_json(deployment.to_json()) == deployment
