"""A rollout: an update of many devices in waves, which stops by itself when devices run worse than before.

The controller feeds events into the pure function ``decide`` and, in the transaction that stores the rollout that
comes back, writes down the effects. It works on counts and on the gate's verdict, never on devices:

1. ``_case(rollout, event)`` reads the event; what the same event means depends on the counts. Each meaning is a
   ``Case``.
2. ``TABLE`` has a row for each case and the states in which it may come; the cell is the next state. A case that has no
   cell in a state raises ``TransitionError``, and the rollout is unchanged.
3. ``_ACTIONS`` fills in the rollout and lists the effects. It cannot choose another state.

Each effect has a key, so that performing it twice changes nothing. Every state that awaits something has a deadline.
Devices that are offline are counted apart: a wave does not wait for them longer than its deadline, and their orders
stay retained. ``docs/rollouts.md`` is generated from the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta
from enum import StrEnum
from types import MappingProxyType

from agent.contract.base import Timestamp
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
from fleet.core.rollout_spec import DAY_S, Counts, Frozen, RolloutSpec
from fleet.errors import ConflictError


class State(StrEnum):
    """Where a rollout stands."""

    PLANNED = "planned"
    OPENING = "opening"
    RUNNING = "running"
    BAKING = "baking"
    APPROVING = "approving"
    PAUSED = "paused"
    STOPPING = "stopping"
    TAKING_BACK = "taking_back"
    COMPLETED = "completed"
    TAKEN_BACK = "taken_back"
    INCOMPLETE = "incomplete"
    ABORTED = "aborted"


class Rollout(Frozen):
    """What ``decide`` looks at."""

    id: str
    spec: RolloutSpec
    state: State = State.PLANNED
    #: Counts from 0.
    wave: int = 0
    counts: Counts = Counts()
    #: When the state began, and when it gives up; None where it awaits nothing.
    entered_at: Timestamp
    due_at: Timestamp | None = None
    #: When the wave's devices have settled, and baking may end.
    baked_at: Timestamp | None = None
    paused_from: State | None = None
    #: Devices of earlier waves that did not get there.
    left_behind: int = 0
    #: Why it is being stopped, or was; and what becomes of devices that have changed.
    reason: str = ""
    revert: bool = False
    by_operator: bool = False


class Row(Frozen):
    """Of a state. ``deadline``: in words; ``restart``: what a controller that starts anew does in it."""

    meaning: str
    deadline: str
    restart: str
    final: bool = False


OPENING_S = 600.0
APPROVING_S = 14 * DAY_S
PAUSED_S = 90 * DAY_S
STOPPING_S = 3600.0
TAKING_BACK_S = 7 * DAY_S

STATES: Mapping[State, Row] = MappingProxyType(
    {
        State.PLANNED: Row(meaning="recorded, and not started", deadline="none: rests", restart="nothing"),
        State.OPENING: Row(meaning="the wave's devices are chosen", deadline="10 minutes", restart="chooses again"),
        State.RUNNING: Row(meaning="the wave's devices are ordered", deadline="the wave's", restart="orders on"),
        State.BAKING: Row(meaning="all have settled, and are watched", deadline="the bake time", restart="watches on"),
        State.APPROVING: Row(meaning="waits for a person", deadline="14 days", restart="waits on"),
        State.PAUSED: Row(meaning="nothing is ordered", deadline="90 days", restart="waits on"),
        State.STOPPING: Row(meaning="nothing is ordered; what runs ends", deadline="1 hour", restart="waits on"),
        State.TAKING_BACK: Row(
            meaning="devices that have changed go back", deadline="7 days", restart="orders those that were not yet"
        ),
        State.COMPLETED: Row(meaning="every device got there", deadline="none", restart="nothing", final=True),
        State.TAKEN_BACK: Row(meaning="every device went back", deadline="none", restart="nothing", final=True),
        State.INCOMPLETE: Row(
            meaning="over, and some devices are not where they should be",
            deadline="none",
            restart="nothing",
            final=True,
        ),
        State.ABORTED: Row(meaning="ended by a person", deadline="none", restart="nothing", final=True),
    }
)


class Case(StrEnum):
    """What an event means."""

    START = "the operator starts it"
    CHOSEN = "the wave has devices"
    EMPTY_MORE = "the wave has no device, and another wave follows"
    EMPTY_LAST = "the last wave has no device"
    EMPTY_LAST_LEFT = "the last wave has no device, and devices were left behind"
    GOING_ON = "devices are under way"
    SETTLED = "every device has settled, or the wave's time is up"
    BAKED_MORE = "the bake time is over, and another wave follows"
    BAKED_ASK = "the bake time is over, and a person decides about the next wave"
    BAKED_LAST = "the bake time of the last wave is over, and every device got there"
    BAKED_LAST_LEFT = "the bake time of the last wave is over, and devices were left behind"
    APPROVE = "a person lets the next wave begin"
    PAUSE = "a person pauses it, or the wave could not be chosen in time"
    RESUME_OPENING = "a person resumes it: the wave is chosen"
    RESUME_RUNNING = "a person resumes it: devices are ordered"
    RESUME_BAKING = "a person resumes it: devices are watched"
    RESUME_APPROVING = "a person resumes it: it waits for one"
    GATE = "devices run worse than before"
    ABORT = "a person aborts it, or nobody has decided in time"
    ABORT_UNSTARTED = "a person aborts it before it has begun"
    DRAINED_REVERT = "nothing is under way, or time is up; devices go back"
    DRAINED_KEEP = "nothing is under way, or time is up; devices keep what they have, as the gate was told"
    DRAINED_ABORT = "nothing is under way, or time is up; devices keep what they have, as the person said"
    RETURNED = "every device went back"
    RETURN_LATE = "time is up, and devices have not gone back: their orders wait for them"
    NOTHING = "nothing changes"


_S, _C = State, Case
_ACTIVE = (_S.OPENING, _S.RUNNING, _S.BAKING, _S.APPROVING)
TABLE: Mapping[Case, Mapping[State, State]] = MappingProxyType(
    {
        _C.START: {_S.PLANNED: _S.OPENING},
        _C.CHOSEN: {_S.OPENING: _S.RUNNING},
        _C.EMPTY_MORE: {_S.OPENING: _S.OPENING},
        _C.EMPTY_LAST: {_S.OPENING: _S.COMPLETED},
        _C.EMPTY_LAST_LEFT: {_S.OPENING: _S.INCOMPLETE},
        _C.GOING_ON: {_S.RUNNING: _S.RUNNING, _S.BAKING: _S.RUNNING},
        _C.SETTLED: {_S.RUNNING: _S.BAKING},
        _C.BAKED_MORE: {_S.BAKING: _S.OPENING},
        _C.BAKED_ASK: {_S.BAKING: _S.APPROVING},
        _C.BAKED_LAST: {_S.BAKING: _S.COMPLETED},
        _C.BAKED_LAST_LEFT: {_S.BAKING: _S.INCOMPLETE},
        _C.APPROVE: {_S.APPROVING: _S.OPENING},
        _C.PAUSE: dict.fromkeys(_ACTIVE, _S.PAUSED),
        _C.RESUME_OPENING: {_S.PAUSED: _S.OPENING},
        _C.RESUME_RUNNING: {_S.PAUSED: _S.RUNNING},
        _C.RESUME_BAKING: {_S.PAUSED: _S.BAKING},
        _C.RESUME_APPROVING: {_S.PAUSED: _S.APPROVING},
        _C.GATE: dict.fromkeys((*_ACTIVE, _S.PAUSED), _S.STOPPING),
        _C.ABORT: dict.fromkeys((*_ACTIVE, _S.PAUSED), _S.STOPPING) | {_S.STOPPING: _S.STOPPING},
        _C.ABORT_UNSTARTED: {_S.PLANNED: _S.ABORTED},
        _C.DRAINED_REVERT: {_S.STOPPING: _S.TAKING_BACK},
        _C.DRAINED_KEEP: {_S.STOPPING: _S.INCOMPLETE},
        _C.DRAINED_ABORT: {_S.STOPPING: _S.ABORTED},
        _C.RETURNED: {_S.TAKING_BACK: _S.TAKEN_BACK},
        _C.RETURN_LATE: {_S.TAKING_BACK: _S.INCOMPLETE},
        _C.NOTHING: {state: state for state in _S},
    }
)


class TransitionError(ConflictError):
    """An event that the table does not allow in this state; the rollout is unchanged."""


#: What an event would have made of the rollout.
_PAST: Mapping[type[Event], str] = MappingProxyType(
    {
        Started: "started",
        Assigned: "given devices",
        Progress: "moved",
        Stopped: "stopped",
        Approved: "approved",
        PauseAsked: "paused",
        ResumeAsked: "resumed",
        AbortAsked: "aborted",
        TakenBack: "taken back",
        Ticked: "moved",
    }
)


def plan(rollout_id: str, spec: RolloutSpec, at: datetime) -> Rollout:
    """Return a new rollout, not started."""
    return Rollout(id=rollout_id, spec=spec, entered_at=at)


def decide(rollout: Rollout, event: Event, at: datetime) -> tuple[Rollout, tuple[Effect, ...]]:
    """Return the rollout after the event, and what is to be done.

    Raises:
        TransitionError: the event cannot come in this state.
    """
    case = _case(rollout, event, at)
    following = TABLE[case].get(rollout.state)
    if following is None:
        state = rollout.state.replace("_", " ")
        raise TransitionError(f"rollout {rollout.id} is {state}: it cannot be {_PAST[type(event)]} now")
    if case is Case.NOTHING:
        return (rollout.model_copy(update={"counts": event.counts}) if isinstance(event, Progress) else rollout), ()
    after, effects = _ACTIONS.get(case, _keep)(_read(rollout, event), event, at)
    entered = rollout.state is not following or case is Case.EMPTY_MORE
    after = after.model_copy(update={"state": following, "entered_at": at if entered else after.entered_at})
    return after.model_copy(update={"due_at": _due_at(after)}), effects


def edges() -> Iterable[tuple[State, Case, State]]:
    """Return every transition that there is, without those that change nothing."""
    for case, cells in TABLE.items():
        for state, following in cells.items():
            if case is not Case.NOTHING:
                yield state, case, following


def _case(rollout: Rollout, event: Event, at: datetime) -> Case:  # noqa: PLR0911 - one line a kind of event
    match event:
        case Started():
            return Case.START
        case Assigned(devices=devices):
            return Case.CHOSEN if devices else _without_devices(rollout)
        case Progress(counts=counts):
            return _progress(rollout, counts)
        case Stopped():
            return Case.GATE if Case.GATE in _cases_of(rollout.state) else Case.NOTHING
        case Approved():
            return Case.APPROVE
        case PauseAsked():
            return Case.PAUSE
        case ResumeAsked():
            return Case[f"RESUME_{(rollout.paused_from or State.RUNNING).name}"]
        case AbortAsked():
            return Case.ABORT_UNSTARTED if rollout.state is State.PLANNED else Case.ABORT
        case TakenBack(remaining=remaining):
            return Case.NOTHING if remaining or rollout.state is not State.TAKING_BACK else Case.RETURNED
        case Ticked():
            return _ticked(rollout, at)


def _cases_of(state: State) -> frozenset[Case]:
    return frozenset(case for case, cells in TABLE.items() if state in cells)


def _without_devices(rollout: Rollout) -> Case:
    if _more(rollout):
        return Case.EMPTY_MORE
    return Case.EMPTY_LAST_LEFT if rollout.left_behind else Case.EMPTY_LAST


def _progress(rollout: Rollout, counts: Counts) -> Case:
    match rollout.state:
        case State.RUNNING:
            return Case.SETTLED if counts.settled and counts.offline == 0 else Case.GOING_ON
        case State.BAKING if not counts.settled:  # a device has come back, or was ordered again
            return Case.GOING_ON
        case State.STOPPING if counts.under_way == 0:
            return _drained(rollout)
        case _:
            return Case.NOTHING


def _ticked(rollout: Rollout, at: datetime) -> Case:  # noqa: PLR0911 - one line a state
    if rollout.due_at is None or at < rollout.due_at:
        return Case.NOTHING
    match rollout.state:
        case State.OPENING:
            return Case.PAUSE
        case State.RUNNING:
            return Case.SETTLED
        case State.BAKING:
            return _baked(rollout)
        case State.APPROVING | State.PAUSED:
            return Case.ABORT
        case State.STOPPING:
            return _drained(rollout)
        case State.TAKING_BACK:
            return Case.RETURN_LATE
        case _:
            return Case.NOTHING


def _baked(rollout: Rollout) -> Case:
    if _more(rollout):
        return Case.BAKED_ASK if rollout.spec.approval else Case.BAKED_MORE
    return Case.BAKED_LAST_LEFT if rollout.left_behind + rollout.counts.left_behind else Case.BAKED_LAST


def _drained(rollout: Rollout) -> Case:
    if rollout.revert:
        return Case.DRAINED_REVERT
    return Case.DRAINED_ABORT if rollout.by_operator else Case.DRAINED_KEEP


def _more(rollout: Rollout) -> bool:
    return rollout.wave + 1 < len(rollout.spec.waves)


def _due_at(rollout: Rollout) -> datetime | None:
    """When the state gives up."""
    seconds: Mapping[State, float] = {
        State.OPENING: OPENING_S,
        State.RUNNING: rollout.spec.wave_deadline_s,
        State.BAKING: rollout.spec.bake_s,
        State.APPROVING: APPROVING_S,
        State.PAUSED: PAUSED_S,
        State.STOPPING: STOPPING_S,
        State.TAKING_BACK: TAKING_BACK_S,
    }
    limit = seconds.get(rollout.state)
    return None if limit is None else rollout.entered_at + timedelta(seconds=limit)


def _read(rollout: Rollout, event: Event) -> Rollout:
    return rollout.model_copy(update={"counts": event.counts}) if isinstance(event, Progress) else rollout


Action = Callable[[Rollout, Event, datetime], tuple[Rollout, tuple[Effect, ...]]]


def _keep(rollout: Rollout, _event: Event, _at: datetime) -> tuple[Rollout, tuple[Effect, ...]]:
    return rollout, ()


def _open(rollout: Rollout, _event: Event, _at: datetime) -> tuple[Rollout, tuple[Effect, ...]]:
    return rollout, (OpenWave(wave=rollout.wave),)


def _open_next(rollout: Rollout, _event: Event, _at: datetime) -> tuple[Rollout, tuple[Effect, ...]]:
    wave = rollout.wave + 1
    left = rollout.left_behind + rollout.counts.left_behind
    return rollout.model_copy(update={"wave": wave, "counts": Counts(), "left_behind": left}), (OpenWave(wave=wave),)


def _chosen(rollout: Rollout, event: Event, _at: datetime) -> tuple[Rollout, tuple[Effect, ...]]:
    devices = event.devices if isinstance(event, Assigned) else 0
    counts = Counts(assigned=devices, waiting=devices)
    return rollout.model_copy(update={"counts": counts}), (Order(wave=rollout.wave),)


def _order(rollout: Rollout, _event: Event, _at: datetime) -> tuple[Rollout, tuple[Effect, ...]]:
    return rollout, (Order(wave=rollout.wave),)


def _pause(rollout: Rollout, _event: Event, _at: datetime) -> tuple[Rollout, tuple[Effect, ...]]:
    return rollout.model_copy(update={"paused_from": rollout.state}), ()


def _gate(rollout: Rollout, event: Event, _at: datetime) -> tuple[Rollout, tuple[Effect, ...]]:
    reason = event.reason if isinstance(event, Stopped) else ""
    changed = {"reason": reason, "revert": rollout.spec.on_stop == "revert", "by_operator": False}
    return rollout.model_copy(update=changed), (CancelWaiting(),)


def _abort(rollout: Rollout, event: Event, _at: datetime) -> tuple[Rollout, tuple[Effect, ...]]:
    asked = event if isinstance(event, AbortAsked) else AbortAsked(revert=False, reason="nobody decided in time")
    changed = {"reason": asked.reason, "revert": asked.revert, "by_operator": True}
    return rollout.model_copy(update=changed), (CancelWaiting(),)


def _take_back(rollout: Rollout, _event: Event, _at: datetime) -> tuple[Rollout, tuple[Effect, ...]]:
    return rollout, (TakeBack(),)


_ACTIONS: Mapping[Case, Action] = MappingProxyType(
    {
        _C.START: _open,
        _C.CHOSEN: _chosen,
        _C.EMPTY_MORE: _open_next,
        _C.GOING_ON: _order,
        _C.BAKED_MORE: _open_next,
        _C.APPROVE: _open_next,
        _C.PAUSE: _pause,
        _C.RESUME_OPENING: _open,
        _C.RESUME_RUNNING: _order,
        _C.GATE: _gate,
        _C.ABORT: _abort,
        _C.ABORT_UNSTARTED: _abort,
        _C.DRAINED_REVERT: _take_back,
    }
)
