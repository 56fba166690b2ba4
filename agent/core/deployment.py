"""A deployment on the device: one visible table, and a pure ``decide(deployment, event, now)``.

The daemon performs the effects that ``decide`` returns and feeds the results back as events; it saves the new
deployment to the journal before it performs anything. ``docs/states.md`` is generated from ``TABLE``.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from types import MappingProxyType

from agent.contract.base import Timestamp, WireModel
from agent.contract.failures import FailureCode
from agent.contract.messages import ArtifactRef, Desired, Failure, Proof, State

#: More than this between two decisions is a clock that was set, or a device that was off.
MOST_BETWEEN_DECISIONS_S = 3600.0
#: After this many restarts within one deployment the device rolls back by itself.
MAX_RESTARTS = 5


class Work(StrEnum):
    """What the daemon does while the deployment is in a state. One at a time."""

    RESOLVE = "resolve"
    TRANSFER = "transfer"
    VERIFY = "verify"
    PROVE = "prove"
    ACTIVATE = "activate"
    WATCH = "watch"


@dataclass(frozen=True, slots=True)
class Ordered:
    """A verified order arrived."""

    desired: Desired


@dataclass(frozen=True, slots=True)
class Resolved:
    """These variants have verified manifests and may run here."""

    candidates: tuple[ArtifactRef, ...]


@dataclass(frozen=True, slots=True)
class Transferred:
    """Every byte of these variants is on disk."""

    candidates: tuple[ArtifactRef, ...]


@dataclass(frozen=True, slots=True)
class Verified:
    """The bytes on disk are those that the manifests name."""


@dataclass(frozen=True, slots=True)
class Proved:
    """This variant loaded, answered the signed probes, and is the fastest that did."""

    chosen: ArtifactRef
    proof: Proof


@dataclass(frozen=True, slots=True)
class Activated:
    """The endpoint serves it; ``digest`` is what the worker says it has loaded."""

    digest: str


@dataclass(frozen=True, slots=True)
class Healthy:
    """Health stayed inside the limits for the probation time, and ``digest`` still serves."""

    digest: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The work of the present state failed. ``sequence`` names the order, where another may have come meanwhile."""

    failure: Failure
    sequence: int | None = None


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """The present state took too long."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Unhealthy:
    """The artifact of this digest cannot go on serving, or the person at the device wants the previous one."""

    digest: str
    failure: Failure


@dataclass(frozen=True, slots=True)
class Restarted:
    """The daemon came up and found this deployment in the journal."""


Event = (
    Ordered
    | Resolved
    | Transferred
    | Verified
    | Proved
    | Activated
    | Healthy
    | Failed
    | DeadlinePassed
    | Unhealthy
    | Restarted
)


@dataclass(frozen=True, slots=True)
class Begin:
    """Start this work; send ``DeadlinePassed`` after so many seconds."""

    work: Work
    deadline_s: float


@dataclass(frozen=True, slots=True)
class Halt:
    """Stop the work that is under way, if any; its results no longer count."""


@dataclass(frozen=True, slots=True)
class Serve:
    """Serve the committed artifact, or nothing if there is none."""


@dataclass(frozen=True, slots=True)
class Report:
    """Publish the deployment's state."""


@dataclass(frozen=True, slots=True)
class Collect:
    """Delete artifacts that are neither committed, previous, nor wanted."""


Effect = Begin | Halt | Serve | Report | Collect


class Deployment(WireModel):
    """Everything that must survive a crash; the journal's document."""

    state: State = State.IDLE
    desired: Desired | None = None
    candidates: tuple[ArtifactRef, ...] = ()
    chosen: ArtifactRef | None = None
    committed: ArtifactRef | None = None
    previous: ArtifactRef | None = None
    proof: Proof | None = None
    failure: Failure | None = None
    restarts: int = 0
    #: Seconds of the order's deadline that are used up, as of ``decided_at``.
    spent_s: float = 0.0
    decided_at: Timestamp | None = None
    #: The endpoint may be serving something else than ``committed``.
    touched: bool = False
    #: The largest sequence number ever accepted: an older order is a replay.
    newest_sequence: int = 0

    @property
    def underway(self) -> bool:
        """Whether work is going on."""
        return TABLE[self.state].work is not None

    @property
    def deployment_id(self) -> str:
        """Of the order, for log lines; empty before the first."""
        return self.desired.deployment if self.desired else ""

    def keep(self) -> tuple[str, ...]:
        """Digests that garbage collection must not touch."""
        wanted = self.candidates if self.underway else ()
        refs = (*wanted, self.chosen if self.underway else None, self.committed, self.previous)
        return tuple(dict.fromkeys(ref.digest for ref in refs if ref))


@dataclass(frozen=True, slots=True)
class Row:
    """One state. ``deadline_s`` None beside a work means: what is left of the order's own deadline."""

    work: Work | None
    deadline_s: float | None
    success: type[Event] | None
    then: State | None
    on_failure: State | None
    on_restart: State
    counts_restarts: bool
    meaning: str


def _rest(state: State, meaning: str) -> Row:
    return Row(None, None, None, None, None, state, False, meaning)


S, W = State, Work
TABLE: MappingProxyType[State, Row] = MappingProxyType(
    {
        S.IDLE: _rest(S.IDLE, "no order yet"),
        S.RESOLVING: Row(
            W.RESOLVE, None, Resolved, S.TRANSFERRING, S.FAILED, S.RESOLVING, True, "asks TUF for the signed manifests"
        ),
        # A device that loses power during a long transfer is in no boot loop: the stall limit and the order's own
        # deadline bound it, so restarts do not count here.
        S.TRANSFERRING: Row(
            W.TRANSFER, None, Transferred, S.VERIFYING, S.FAILED, S.TRANSFERRING, False, "brings the missing chunks"
        ),
        S.VERIFYING: Row(
            W.VERIFY,
            1800,
            Verified,
            S.PROVING,
            S.FAILED,
            S.VERIFYING,
            True,
            "reads the files back against the manifest",
        ),
        S.PROVING: Row(
            W.PROVE, 1800, Proved, S.ACTIVATING, S.FAILED, S.PROVING, True, "loads, asks the signed probes, measures"
        ),
        # From here on the endpoint may serve the new model, so a failure rolls back; and a restart begins with the
        # proof again, as the proven worker died with the daemon.
        S.ACTIVATING: Row(
            W.ACTIVATE, 900, Activated, S.PROBATION, S.ROLLED_BACK, S.PROVING, True, "moves new requests over"
        ),
        S.PROBATION: Row(
            W.WATCH, None, Healthy, S.COMMITTED, S.ROLLED_BACK, S.PROVING, True, "serves, under watch of its health"
        ),
        S.COMMITTED: _rest(S.COMMITTED, "the digest reported is the digest loaded, and it kept its limits"),
        S.ROLLED_BACK: _rest(S.ROLLED_BACK, "the artifact before serves again"),
        S.FAILED: _rest(S.FAILED, "nothing on the device changed, or nothing is left to serve"),
    }
)
#: What a deadline out of the order may add for loading, proving and the like.
_SLACK_S = 120.0


class IllegalTransitionError(Exception):
    """An event that the present state does not know; the deployment is unchanged."""


def decide(deployment: Deployment, event: Event, now: datetime) -> tuple[Deployment, tuple[Effect, ...]]:
    """The next deployment, and what the daemon must do about it, in order.

    Raises:
        IllegalTransitionError: the present state does not know this event.
    """
    deployment = _age(deployment, now)
    match event:
        case Ordered(desired):
            return _order(deployment, desired, now)
        case Restarted():
            return _restart(deployment, now)
        case Unhealthy(digest, failure):
            return _lose(deployment, digest, failure)
        case Failed(failure, sequence):
            meant = sequence in (None, deployment.newest_sequence)
            return _fail(deployment, failure) if meant else (deployment, ())
        case DeadlinePassed(seconds):
            return _fail(deployment, _deadline_failure(deployment, seconds))
        case _:
            return _advance(deployment, event, now)


def _age(deployment: Deployment, now: datetime) -> Deployment:
    """Count the time since the last decision, but not a clock that jumped: a device without one wakes up years ago."""
    if not deployment.underway or deployment.decided_at is None:
        return deployment
    passed = min(max(0.0, (now - deployment.decided_at).total_seconds()), MOST_BETWEEN_DECISIONS_S)
    return deployment.model_copy(update={"spent_s": deployment.spent_s + passed, "decided_at": now})


def _order(deployment: Deployment, desired: Desired, now: datetime) -> tuple[Deployment, tuple[Effect, ...]]:
    if desired.sequence <= deployment.newest_sequence:
        return deployment, ()  # the retained order comes again at every reconnect
    fresh = deployment.model_copy(
        update={
            "desired": desired,
            "candidates": desired.artifacts,
            "chosen": None,
            "proof": None,
            "failure": None,
            "restarts": 0,
            "spent_s": 0.0,
            "decided_at": now,
            "newest_sequence": desired.sequence,
        }
    )
    if not deployment.touched and deployment.committed == desired.artifacts[0]:
        return fresh.model_copy(update={"state": S.COMMITTED, "chosen": deployment.committed}), (
            Halt(),
            Serve(),
            Report(),
        )
    return _enter(fresh, S.RESOLVING, now, before=(Halt(),))


def _restart(deployment: Deployment, now: datetime) -> tuple[Deployment, tuple[Effect, ...]]:
    row = TABLE[deployment.state]
    # Whatever was live died with the daemon: the committed artifact serves first, whatever else is to be done.
    fresh = deployment.model_copy(update={"touched": False})
    if row.work is None:
        return fresh, (Serve(), Report())
    if row.counts_restarts and not _waits_for_window(deployment, now):
        fresh = fresh.model_copy(update={"restarts": fresh.restarts + 1})
    if fresh.restarts > MAX_RESTARTS:
        reason = f"the agent restarted {fresh.restarts} times while {deployment.state.value}; giving this artifact up"
        stopped, effects = _fail(fresh, Failure(code=FailureCode.BOOT_LOOP, message=reason))
        return stopped, (Serve(), *(effect for effect in effects if not isinstance(effect, Serve)))
    return _enter(fresh, row.on_restart, now, before=(Serve(),))


def _waits_for_window(deployment: Deployment, now: datetime) -> bool:
    """Nothing was tried yet that could have brought the device down."""
    begin = deployment.desired.window.not_before if deployment.desired else None
    return deployment.state in (S.PROVING, S.ACTIVATING) and begin is not None and now < begin


def _lose(deployment: Deployment, digest: str, failure: Failure) -> tuple[Deployment, tuple[Effect, ...]]:
    if deployment.underway and deployment.touched and deployment.chosen and digest == deployment.chosen.digest:
        return _fail(deployment, failure)  # it is the new artifact that serves
    if deployment.committed is None or digest != deployment.committed.digest:
        return deployment, ()  # it has been replaced since: the news is old
    back = deployment.previous
    if back is None and failure.code is not FailureCode.STORE_CORRUPT:
        # Its bytes are whole: what keeps it from serving may pass, and there is nothing to go back to.
        return deployment.model_copy(update={"failure": failure}), (Report(),)
    lost = deployment.model_copy(update={"committed": back, "previous": None, "failure": failure})
    if deployment.underway:  # the old one is lost; the new one is on its way, and goes on
        return lost, (Serve(), Report())
    state = S.ROLLED_BACK if back else S.FAILED
    return lost.model_copy(update={"state": state, "touched": False}), (Serve(), Report())


def _fail(deployment: Deployment, failure: Failure) -> tuple[Deployment, tuple[Effect, ...]]:
    row = TABLE[deployment.state]
    if row.on_failure is None:
        raise IllegalTransitionError(f"{deployment.state.value} has no work that could fail")
    # A failure before activation changes nothing, unless an order that this one superseded had already activated.
    restore = deployment.touched
    state = S.ROLLED_BACK if restore or row.on_failure is S.ROLLED_BACK else S.FAILED
    failed = deployment.model_copy(update={"state": state, "failure": failure, "touched": False})
    return failed, (Halt(), *((Serve(),) if restore else ()), Report(), Collect())


def _deadline_failure(deployment: Deployment, seconds: float) -> Failure:
    text = f"still {deployment.state.value} after {seconds:.0f} s, which is its deadline"
    return Failure(code=FailureCode.DEADLINE, message=text)


def _advance(deployment: Deployment, event: Event, now: datetime) -> tuple[Deployment, tuple[Effect, ...]]:
    row = TABLE[deployment.state]
    if row.success is None or row.then is None or not isinstance(event, row.success):
        raise IllegalTransitionError(f"{type(event).__name__} while {deployment.state.value}")
    match event:
        case Resolved(candidates) | Transferred(candidates):
            deployment = deployment.model_copy(update={"candidates": candidates})
        case Proved(chosen, proof):
            deployment = deployment.model_copy(update={"chosen": chosen, "proof": proof, "touched": True})
        case Activated(digest) | Healthy(digest):
            return _accept(deployment, digest, row.then, now)
        case _:
            pass
    return _enter(deployment, row.then, now)


def _accept(deployment: Deployment, digest: str, then: State, now: datetime) -> tuple[Deployment, tuple[Effect, ...]]:
    """Only if the digest that serves is the digest that was ordered."""
    chosen = deployment.chosen
    if chosen is None or digest != chosen.digest:
        text = f"the worker serves {digest[:12]}, not {chosen.digest[:12] if chosen else 'nothing'}"
        return _fail(deployment, Failure(code=FailureCode.STORE_CORRUPT, message=text))
    if then is not S.COMMITTED:
        return _enter(deployment, then, now)
    committed = deployment.model_copy(
        update={
            "state": S.COMMITTED,
            "previous": deployment.previous if deployment.committed == chosen else deployment.committed,
            "committed": chosen,
            "failure": None,
            "touched": False,
        }
    )
    return committed, (Halt(), Report(), Collect())


def _enter(
    deployment: Deployment, state: State, now: datetime, before: tuple[Effect, ...] = ()
) -> tuple[Deployment, tuple[Effect, ...]]:
    entered = deployment.model_copy(update={"state": state})
    work = TABLE[state].work
    assert work is not None, f"{state} is no state of work"  # noqa: S101 - a fault of the table, not of an input
    return entered, (*before, Begin(work, deadline_s(entered, now)), Report())


def deadline_s(deployment: Deployment, now: datetime) -> float:
    """Seconds that the present state may take, from now."""
    row, desired = TABLE[deployment.state], deployment.desired
    if desired is None:
        return row.deadline_s or 0.0
    if deployment.state is S.PROBATION:
        return desired.probation_s + _SLACK_S
    left = max(0.0, desired.deadline_s - deployment.spent_s)
    if deployment.state in (S.PROVING, S.ACTIVATING) and desired.window.not_before:
        # The window is the operator's wish to wait; the order's own deadline still bounds it.
        wait = max(0.0, (desired.window.not_before - now).total_seconds())
        return min(left, wait + (row.deadline_s or 0.0))
    return left if row.deadline_s is None else min(row.deadline_s, left)


def mermaid() -> str:
    """The table as a Mermaid state diagram."""
    lines = ["stateDiagram-v2", "    [*] --> idle", "    idle --> resolving: Ordered"]
    for state, row in TABLE.items():
        if row.success is not None and row.then is not None:
            lines.append(f"    {state.value} --> {row.then.value}: {row.success.__name__}")
        if row.on_failure is not None:
            lines.append(f"    {state.value} --> {row.on_failure.value}: Failed, DeadlinePassed")
    lines += [f"    {state.value} --> resolving: Ordered" for state in (S.COMMITTED, S.ROLLED_BACK, S.FAILED)]
    lines += ["    committed --> rolled_back: Unhealthy, and a previous artifact is there"]
    lines += ["    committed --> failed: Unhealthy, and none is"]
    return "\n".join(lines)
