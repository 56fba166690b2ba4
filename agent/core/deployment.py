"""A deployment on the device: the state machine, whose table is all there is to decide.

An *order* is the signed document that names what this device should run. A *deployment* is what the device makes of
one order. The daemon feeds events into the pure function ``decide``, saves the deployment that comes back to the
journal, and then performs the effects. It works like this:

1. ``case_of(deployment, event, now)`` reads the event. The same event means different things at different times: an
   order may be new, or the retained one that comes again at every reconnect. Each meaning is a ``Case``.
2. ``TABLE`` (deployment_table.py) has one row for each case and one column for each state. The cell is the next state.
   ``___`` means that this case cannot occur in this state: ``decide`` raises ``IllegalTransitionError``.
3. The case's action (``_ACTIONS``) fills in the deployment and lists the effects. It is given the next state and
   cannot choose another one. A case without an action changes nothing.

So no edge exists beside the table. ``docs/states.md`` is generated from it, and a test compares ``decide`` with it for
every state and event. What a state does, and for how long, is in ``STATES``.

Four rules hold throughout:

* Whatever is committed serves until something better has passed its proof, its activation and its probation.
  ``touched`` says that the endpoint may serve something else; while it is set, every failure rolls back.
* Success is the digest: what the worker says it has loaded must be what was ordered.
* Every state that runs a step has a deadline, and restarts within it are counted, so no deployment lasts for ever.
  ``waiting_link`` alone has none, and its time does not count: without a link nothing is wrong with the deployment.
* What passes by itself (no link, a full disk) is waited for. Each wait begins with a pause that grows, and all other
  time counts, so waiting in turns is bounded too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from types import MappingProxyType

from agent.contract.base import Timestamp, WireModel
from agent.contract.failures import FailureCode
from agent.contract.messages import ArtifactRef, Desired, Failure, Proof, ServedNames, State
from agent.core.deployment_events import (
    Activated,
    Available,
    Begin,
    Collect,
    DeadlinePassed,
    Effect,
    Event,
    Failed,
    Halt,
    Healthy,
    Ordered,
    Proved,
    Report,
    Resolved,
    Restarted,
    Serve,
    Step,
    Transferred,
    Unhealthy,
    Verified,
)
from agent.core.deployment_table import CASES, STATES, TABLE, Case, edges, speaks_against_artifact, waits
from agent.core.names import Former, Names, answered, remembered

__all__ = [
    "CASES",
    "MAX_RESTARTS",
    "MOST_BETWEEN_DECISIONS_S",
    "STATES",
    "TABLE",
    "Activated",
    "Available",
    "Begin",
    "Case",
    "Collect",
    "DeadlinePassed",
    "Deployment",
    "Effect",
    "Event",
    "Failed",
    "Halt",
    "Healthy",
    "IllegalTransitionError",
    "Ordered",
    "Proved",
    "Report",
    "Resolved",
    "Restarted",
    "Serve",
    "Step",
    "Transferred",
    "Unhealthy",
    "Verified",
    "Waiting",
    "case_of",
    "deadline_s",
    "decide",
    "decide_unsaved",
    "edges",
    "speaks_against_artifact",
    "waits",
]

#: More than this between two decisions is a clock that was set, or a device that was off.
MOST_BETWEEN_DECISIONS_S = 3600.0
#: After this many restarts within one deployment the device gives it up by itself.
MAX_RESTARTS = 5
#: What a deadline out of the order may add for loading, proving and the like.
_SLACK_S = 120.0


class Waiting(WireModel):
    """What a deployment waits for: ``why`` a step could not go on."""

    why: Failure
    #: So many must be free on the disk; 0: not known, or no matter of the disk.
    needs_bytes: int = 0


class Deployment(WireModel):
    """Everything that must survive a crash; the journal's document."""

    state: State = State.IDLE
    #: The order.
    desired: Desired | None = None
    candidates: tuple[ArtifactRef, ...] = ()
    chosen: ArtifactRef | None = None
    committed: ArtifactRef | None = None
    previous: ArtifactRef | None = None
    proof: Proof | None = None
    failure: Failure | None = None
    #: Of the wait that is, or that was last in this deployment.
    waiting: Waiting | None = None
    #: How often this deployment has waited.
    waits: int = 0
    restarts: int = 0
    #: Seconds of the order's deadline that are used up, as of ``decided_at``.
    spent_s: float = 0.0
    decided_at: Timestamp | None = None
    #: The endpoint may be serving something else than ``committed``.
    touched: bool = False
    #: The largest sequence number ever accepted: an older order is a replay.
    newest_sequence: int = 0
    #: As the order of what is committed said.
    aliases: tuple[str, ...] = ()
    #: What served before, as long as its names are answered.
    former: tuple[Former, ...] = ()
    #: Names and artifacts of what was activated last, and of what that replaced until it is committed.
    activated: tuple[str, str] | None = None
    replaced: tuple[tuple[str, str], ...] = ()

    @property
    def underway(self) -> bool:
        """Whether a step runs."""
        return STATES[self.state].step is not None

    @property
    def waits_for(self) -> Failure | None:
        """What it waits for now, if it does."""
        is_waiting = STATES[self.state].step in (Step.AWAIT_LINK, Step.AWAIT_SPACE)
        return self.waiting.why if is_waiting and self.waiting is not None else None

    @property
    def deployment_id(self) -> str:
        """Of the order, for log lines; empty before the first."""
        return self.desired.deployment if self.desired else ""

    def names(self, now: datetime) -> Names:
        """What the model that serves now answers to, beside its own name and its artifact's."""
        ordered = self._ordered_names().aliases if self.touched else ()
        replaced = tuple(text for pair in self.replaced for text in pair)
        aliases = tuple(dict.fromkeys([*self.aliases, *ordered]))
        return Names(aliases, tuple(dict.fromkeys([*answered(self.former, now), *replaced])))

    def _ordered_names(self) -> ServedNames:
        return (self.desired.names if self.desired else None) or ServedNames()

    def once_committed(self, now: datetime) -> dict[str, object]:
        """Return what is remembered of names once what was ordered is committed."""
        ordered = self._ordered_names()
        former = remembered(self.former, self.replaced, ordered, now)
        return {"aliases": ordered.aliases, "former": former, "replaced": ()}

    def once_back(self, now: datetime) -> dict[str, object]:
        """Return what is remembered of names once something else serves than what was activated last."""
        gone = [self.activated] if self.activated is not None else []
        former = remembered(self.former, gone, self._ordered_names(), now)
        return {"former": former, "activated": None, "replaced": ()}

    def keep(self) -> tuple[str, ...]:
        """Digests of the artifacts that must stay complete on disk."""
        wanted = (*self.candidates, self.chosen) if self.underway else ()
        refs = (*wanted, self.committed, self.previous)
        return tuple(dict.fromkeys(ref.digest for ref in refs if ref))

    def spare(self) -> tuple[str, ...]:
        """Digests whose bytes are kept for the next order, complete or not: the deployment ended, but not by them."""
        if self.underway or self.failure is None or speaks_against_artifact(self.failure.code):
            return ()
        kept = self.keep()
        return tuple(ref.digest for ref in self.candidates if ref.digest not in kept)


S = State
Decided = tuple[Deployment, tuple[Effect, ...]]


class IllegalTransitionError(Exception):
    """An event that the present state does not know; the deployment is unchanged."""


def decide(deployment: Deployment, event: Event, now: datetime) -> Decided:
    """Return the next deployment, and what the daemon must do about it, in order.

    Raises:
        IllegalTransitionError: the present state does not know this event.
    """
    case = case_of(deployment, event, now)
    following = TABLE[case][deployment.state]
    if following is None:
        raise IllegalTransitionError(f"{type(event).__name__} while {deployment.state.value}: {case.value}")
    action = _ACTIONS.get(case)
    return (deployment, ()) if action is None else action(_age(deployment, now), event, following, now)


def case_of(deployment: Deployment, event: Event, now: datetime) -> Case:
    """Return what the event means now."""
    match event:
        case Ordered(order):
            return _case_of_order(deployment, order)
        case Activated(digest, _, _):
            return Case.ACTIVATED if _is_chosen(deployment, digest) else Case.ACTIVATED_OTHER
        case Healthy(digest):
            return Case.HEALTHY if _is_chosen(deployment, digest) else Case.HEALTHY_OTHER
        case Unhealthy(digest, failure):
            return _case_of_loss(deployment, digest, failure.code)
        case Failed() | DeadlinePassed():
            return _case_of_failure(deployment, event)
        case _:
            too_often = isinstance(event, Restarted) and _restarts(deployment, now) > MAX_RESTARTS
            return Case.RESTARTED_TOO_OFTEN if too_often else _ONE_CASE[type(event)]


_ONE_CASE: Mapping[type[Event], Case] = MappingProxyType(
    {
        Resolved: Case.RESOLVED,
        Transferred: Case.TRANSFERRED,
        Available: Case.AVAILABLE,
        Verified: Case.VERIFIED,
        Proved: Case.PROVED,
        Restarted: Case.RESTARTED,
    }
)


def _case_of_failure(deployment: Deployment, event: Failed | DeadlinePassed) -> Case:
    if isinstance(event, Failed) and event.sequence not in (None, deployment.newest_sequence):
        return Case.FAILED_OLD
    passing = waits(deployment.state, event.failure.code) if isinstance(event, Failed) else None
    if passing is not None:
        return passing
    return Case.FAILED_TOUCHED if deployment.touched else Case.FAILED


def _case_of_order(deployment: Deployment, order: Desired) -> Case:
    if order.sequence <= deployment.newest_sequence:
        return Case.ORDERED_AGAIN  # the broker retains the order: it comes again at every reconnect
    serves = not deployment.touched and deployment.committed == order.artifacts[0]
    return Case.ORDERED_COMMITTED if serves else Case.ORDERED


def _case_of_loss(deployment: Deployment, digest: str, code: FailureCode) -> Case:
    if deployment.underway and deployment.touched and _is_chosen(deployment, digest):
        return Case.UNHEALTHY_NEW
    if deployment.committed is None or digest != deployment.committed.digest:
        return Case.UNHEALTHY_OLD
    if deployment.previous is not None:
        return Case.UNHEALTHY_BACK
    # Bytes that are whole may serve again once what keeps them from it has passed, and nothing is there to go back to.
    return Case.UNHEALTHY_DAMAGED if code is FailureCode.STORE_CORRUPT else Case.UNHEALTHY_LIMPING


def _is_chosen(deployment: Deployment, digest: str) -> bool:
    return deployment.chosen is not None and digest == deployment.chosen.digest


def _restarts(deployment: Deployment, now: datetime) -> int:
    """Return how many count against the deployment, with the one that just happened. 0 where they do not count."""
    if not STATES[deployment.state].counts_restarts:
        return 0
    return deployment.restarts + (0 if _waits_for_window(deployment, now) else 1)


def _waits_for_window(deployment: Deployment, now: datetime) -> bool:
    """Nothing was tried yet that could have brought the device down."""
    begin = deployment.desired.window.not_before if deployment.desired else None
    return deployment.state in (S.PROVING, S.ACTIVATING) and begin is not None and now < begin


def _age(deployment: Deployment, now: datetime) -> Deployment:
    """Count the time since the last decision, but not a clock that jumped: a device without one wakes up years ago."""
    if not deployment.underway or deployment.decided_at is None:
        return deployment
    passed = min(max(0.0, (now - deployment.decided_at).total_seconds()), MOST_BETWEEN_DECISIONS_S)
    if not STATES[deployment.state].clock:
        passed = 0.0
    return deployment.model_copy(update={"spent_s": deployment.spent_s + passed, "decided_at": now})


def deadline_s(deployment: Deployment, now: datetime) -> float | None:
    """Return the seconds that the present state may take, from now; None for as long as it takes."""
    row, order = STATES[deployment.state], deployment.desired
    if not row.clock:
        return None
    if order is None:
        return row.deadline_s or 0.0
    if deployment.state is S.PROBATION:
        return order.probation_s + _SLACK_S
    left = max(0.0, order.deadline_s - deployment.spent_s)
    if deployment.state in (S.PROVING, S.ACTIVATING) and order.window.not_before:
        # The window is the operator's wish to wait; the order's own deadline still bounds it.
        wait = max(0.0, (order.window.not_before - now).total_seconds())
        return min(left, wait + (row.deadline_s or 0.0))
    return left if row.deadline_s is None else min(row.deadline_s, left)


def decide_unsaved(before: Deployment, event: Event, decided: Decided, failure: Failure, now: datetime) -> Decided:
    """Return what to do about a decision that the journal refused with ``failure``.

    Nothing new is begun without memory.

    A new order is left for later. The success of a step is a failure, as the next state would be forgotten. What ends
    a deployment, or keeps the device serving, holds even so.
    """
    if isinstance(event, Ordered):
        return before, (Report(),)
    if isinstance(event, Resolved | Transferred | Available | Verified | Proved | Activated | Healthy):
        return decide(before, Failed(failure), now)
    return decided


# The actions: each makes the deployment of the state that the table names, and lists the effects.


def _enter(deployment: Deployment, state: State, now: datetime, **changes: object) -> Decided:
    """Enter a state that runs a step."""
    entered = deployment.model_copy(update={"state": state, **changes})
    step = STATES[state].step
    assert step is not None, f"{state} runs no step"  # noqa: S101 - a fault of the table, not of an input
    return entered, (Begin(step, deadline_s(entered, now)), Report())


def _order(deployment: Deployment, event: Event, state: State, now: datetime) -> Decided:
    assert isinstance(event, Ordered)  # noqa: S101 - as CASES says
    fresh: dict[str, object] = {
        "desired": event.order,
        "candidates": event.order.artifacts,
        "chosen": None,
        "proof": None,
        "failure": None,
        "waiting": None,
        "waits": 0,
        "restarts": 0,
        "spent_s": 0.0,
        "decided_at": now,
        "newest_sequence": event.order.sequence,
    }
    if state is S.COMMITTED:
        done = deployment.model_copy(update={**fresh, "state": state, "chosen": deployment.committed})
        done = done.model_copy(update=done.once_committed(now))
        return done, (Halt(), Serve(), Report())
    entered, effects = _enter(deployment, state, now, **fresh)
    return entered, (Halt(), *effects)


def _advance(deployment: Deployment, event: Event, state: State, now: datetime) -> Decided:
    match event:
        case Resolved(candidates) | Transferred(candidates):
            return _enter(deployment, state, now, candidates=candidates)
        case Proved(chosen, proof):
            return _enter(deployment, state, now, chosen=chosen, proof=proof, touched=True)
        case Activated(_, serves, before):
            replaced = tuple(dict.fromkeys([*deployment.replaced, *([before] if before else [])]))
            return _enter(deployment, state, now, activated=serves, replaced=replaced)
        case _:
            return _enter(deployment, state, now)


def _wait(deployment: Deployment, event: Event, state: State, now: datetime) -> Decided:
    """Wait for what is missing. Whatever else the endpoint may serve meanwhile, it is what is committed."""
    assert isinstance(event, Failed)  # noqa: S101 - as CASES says
    waiting = Waiting(why=event.failure, needs_bytes=event.needs_bytes)
    names = deployment.once_back(now) if deployment.touched else {}
    changes = {**names, "waiting": waiting, "waits": deployment.waits + 1, "touched": False}
    entered, effects = _enter(deployment, state, now, **changes)
    return entered, (*((Serve(),) if deployment.touched else ()), *effects)


def _commit(deployment: Deployment, _event: Event, state: State, now: datetime) -> Decided:
    chosen = deployment.chosen
    committed = deployment.model_copy(
        update={
            **deployment.once_committed(now),
            "state": state,
            "previous": deployment.previous if deployment.committed == chosen else deployment.committed,
            "committed": chosen,
            "failure": None,
            "touched": False,
        }
    )
    return committed, (Halt(), Report(), Collect())


def _fail(deployment: Deployment, event: Event, state: State, now: datetime) -> Decided:
    changes = {"state": state, "failure": _failure(deployment, event), "touched": False}
    failed = deployment.model_copy(update={**(deployment.once_back(now) if deployment.touched else {}), **changes})
    # Without a touch the committed artifact serves all along.
    return failed, (Halt(), *((Serve(),) if deployment.touched else ()), Report(), Collect())


def _failure(deployment: Deployment, event: Event) -> Failure:
    match event:
        case Failed(failure) | Unhealthy(_, failure):
            return failure
        case DeadlinePassed(seconds):
            text = f"the deployment was still {deployment.state.value} after {seconds:.0f} s, which is its deadline"
            waited = f"; it waited last because {deployment.waiting.why.message}" if deployment.waiting else ""
            return Failure(code=FailureCode.DEADLINE, message=text + waited)
        case Activated(digest, _, _) | Healthy(digest):
            ordered = deployment.chosen.digest[:12] if deployment.chosen else "nothing"
            return Failure(
                code=FailureCode.STORE_CORRUPT, message=f"the worker serves {digest[:12]}, and {ordered} was ordered"
            )
        case _:
            text = f"the agent restarted {MAX_RESTARTS + 1} times while {deployment.state.value}; the device gives up"
            return Failure(code=FailureCode.BOOT_LOOP, message=text)


def _lose(deployment: Deployment, event: Event, state: State, now: datetime) -> Decided:
    """Put the one before, if any, in the place of the committed artifact, which is gone."""
    changes = {
        **({} if deployment.touched else deployment.once_back(now)),
        "state": state,
        "committed": deployment.previous,
        "previous": None,
        "failure": _failure(deployment, event),
        "touched": deployment.touched and deployment.underway,
    }
    return deployment.model_copy(update=changes), (Serve(), Report())


def _limp(deployment: Deployment, event: Event, state: State, _now: datetime) -> Decided:
    return deployment.model_copy(update={"state": state, "failure": _failure(deployment, event)}), (Report(),)


def _resume(deployment: Deployment, _event: Event, state: State, now: datetime) -> Decided:
    # Whatever was live died with the daemon: the committed artifact serves first, whatever else is to be done.
    if STATES[state].step is None:
        return deployment.model_copy(update={"state": state, "touched": False}), (Serve(), Report())
    restarts = max(deployment.restarts, _restarts(deployment, now))
    entered, effects = _enter(deployment, state, now, touched=False, restarts=restarts)
    return entered, (Serve(), *effects)


def _give_up(deployment: Deployment, event: Event, state: State, now: datetime) -> Decided:
    counted = deployment.model_copy(update={"touched": False, "restarts": _restarts(deployment, now)})
    stopped, effects = _fail(counted, event, state, now)
    return stopped, (Serve(), *effects)


#: A case without an action changes nothing.
_ACTIONS: Mapping[Case, Callable[[Deployment, Event, State, datetime], Decided]] = MappingProxyType(
    {
        Case.ORDERED: _order,
        Case.ORDERED_COMMITTED: _order,
        Case.RESOLVED: _advance,
        Case.TRANSFERRED: _advance,
        Case.AVAILABLE: _advance,
        Case.VERIFIED: _advance,
        Case.PROVED: _advance,
        Case.ACTIVATED: _advance,
        Case.ACTIVATED_OTHER: _fail,
        Case.HEALTHY: _commit,
        Case.HEALTHY_OTHER: _fail,
        Case.FAILED: _fail,
        Case.FAILED_TOUCHED: _fail,
        Case.LINK_AWAY: _wait,
        Case.DISK_FULL: _wait,
        Case.UNHEALTHY_NEW: _fail,
        Case.UNHEALTHY_BACK: _lose,
        Case.UNHEALTHY_DAMAGED: _lose,
        Case.UNHEALTHY_LIMPING: _limp,
        Case.RESTARTED: _resume,
        Case.RESTARTED_TOO_OFTEN: _give_up,
    }
)
