"""A deployment as the controller sees it: one visible table, and a pure ``decide(deployment, event)``.

The device's own table (agent/core/deployment.py) decides what happens on the device; this one says what the
controller may believe about it, and when it stops waiting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from types import MappingProxyType

from agent.contract.failures import FailureCode
from agent.contract.messages import Failure, State

#: The device keeps the deadline itself; the controller allows this much more for its last report to arrive.
GRACE_S = 300.0


#: A deployment has at least so long: a device may be off for most of a day, or share its line.
LEAST_DEADLINE_S = 24 * 3600.0
#: So many times the time that the bytes need at the profile's bandwidth, as lines are shared, and so much for the rest.
SLOWER_LINE = 3.0
BESIDE_THE_TRANSFER_S = 6 * 3600.0


class Stage(StrEnum):
    """Where a deployment stands: first the controller's own stages, then the device's states."""

    QUEUED = "queued"
    PUBLISHED = "published"
    RESOLVING = "resolving"
    TRANSFERRING = "transferring"
    WAITING_LINK = "waiting_link"
    WAITING_SPACE = "waiting_space"
    VERIFYING = "verifying"
    PROVING = "proving"
    ACTIVATING = "activating"
    PROBATION = "probation"
    COMMITTED = "committed"
    ROLLED_BACK = "rolled_back"
    FAILED = "failed"
    SUPERSEDED = "superseded"


class Deadline(StrEnum):
    """Which clock ends a stage."""

    NONE = "none: nothing is awaited"
    EXPIRY = "when the signed order expires"
    DEVICE = (
        "the order's deadline_s and probation_s after the device's first report, or after it was connected again,"
        " and a grace for its last one"
    )


@dataclass(frozen=True, slots=True)
class Row:
    """A stage's line of the table. ``follows``: the stages that a report of the device may move it to."""

    deadline: Deadline
    follows: frozenset[Stage]
    outstanding: bool
    meaning: str


_FINAL = frozenset({Stage.COMMITTED, Stage.ROLLED_BACK, Stage.FAILED})
# The device's word is the truth. One that restarts steps back, and one that was installed anew takes up the order
# that is retained for it again: any state of the device may follow any other.
_DEVICE = frozenset(Stage(state.value) for state in State if state is not State.IDLE)


def _waiting(meaning: str) -> Row:
    return Row(Deadline.EXPIRY, _DEVICE, outstanding=True, meaning=meaning)


def _working(meaning: str) -> Row:
    return Row(Deadline.DEVICE, _DEVICE, outstanding=True, meaning=meaning)


def _over(meaning: str, follows: frozenset[Stage] = _DEVICE) -> Row:
    return Row(Deadline.NONE, follows, outstanding=False, meaning=meaning)


TABLE: Mapping[Stage, Row] = MappingProxyType(
    {
        Stage.QUEUED: _waiting("recorded and signed; no controller has published it yet"),
        Stage.PUBLISHED: _waiting("retained at the broker; the device has not answered"),
        Stage.RESOLVING: _working("the device verifies the order and fetches the manifest"),
        Stage.TRANSFERRING: _working("the device fetches chunks"),
        Stage.WAITING_LINK: _waiting("the device waited for a link or a controller, and does not count that time"),
        Stage.WAITING_SPACE: _working("the device waits until its disk has room for the artifact"),
        Stage.VERIFYING: _working("the device reads every file again"),
        Stage.PROVING: _working("the device loads the model in a worker and asks the signed probes"),
        Stage.ACTIVATING: _working("the device moves new requests over"),
        Stage.PROBATION: _working("the device serves it and watches its health"),
        Stage.COMMITTED: _over("served, proven and healthy; may still be rolled back"),
        Stage.ROLLED_BACK: _over("the device went back to what it served before"),
        Stage.FAILED: _over("ended without being served"),
        Stage.SUPERSEDED: _over("a newer order for the same device replaced it", follows=frozenset()),
    }
)


#: Stages whose ``failure`` is what the device waits for, and no end.
WAITING = frozenset({Stage.WAITING_LINK, Stage.WAITING_SPACE})


def usual_deadline_s(size_bytes: int, bandwidth_bytes_per_s: float, opens_in_s: float = 0.0) -> float:
    """Return the seconds of a deployment whose operator named none, whose window opens in ``opens_in_s``."""
    needed = SLOWER_LINE * size_bytes / bandwidth_bytes_per_s + BESIDE_THE_TRANSFER_S
    return max(LEAST_DEADLINE_S, needed) + max(0.0, opens_in_s)


class TransitionError(Exception):
    """An event that the table does not allow; the deployment is unchanged."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """What ``decide`` looks at. ``presumed``: the controller's own verdict, which a final report may correct."""

    stage: Stage
    expires_at: datetime
    deadline_s: float
    probation_s: float = 0.0
    started_at: datetime | None = None
    #: Of a stage that waits: for what.
    failure: Failure | None = None
    presumed: bool = False
    #: Of the variants that were ordered: to serve one of them is success, and nothing else is.
    digests: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Published:
    """The broker has acknowledged the signed order."""


@dataclass(frozen=True, slots=True)
class Report:
    """The device says where it stands with this deployment."""

    state: State
    failure: Failure | None
    at: datetime
    #: What the device says that it serves.
    digest: str | None = None
    waiting: Failure | None = None


@dataclass(frozen=True, slots=True)
class Returned:
    """The device is connected again: while it was not, its own clock may have stood still."""

    at: datetime


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""

    at: datetime


@dataclass(frozen=True, slots=True)
class Superseded:
    """A newer order for the same device was recorded."""


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """The operator removed or revoked the device; ``reason`` is a sentence for people."""

    reason: str


Event = Published | Report | Returned | Tick | Superseded | Withdrawn


def due_at(deployment: Deployment) -> datetime | None:
    """When the controller stops waiting in this stage, or None for a stage that awaits nothing."""
    deadline = TABLE[deployment.stage].deadline
    if deadline is Deadline.NONE:
        return None
    if deadline is Deadline.EXPIRY or deployment.started_at is None:
        return deployment.expires_at
    return deployment.started_at + timedelta(seconds=deployment.deadline_s + deployment.probation_s + GRACE_S)


def decide(deployment: Deployment, event: Event) -> Deployment:
    """Return the deployment after the event.

    Raises:
        TransitionError: the table does not allow it; nothing has changed.
    """
    match event:
        case Published():
            return replace(deployment, stage=Stage.PUBLISHED) if deployment.stage is Stage.QUEUED else deployment
        case Report():
            return _reported(deployment, event)
        case Returned(at):
            is_working = TABLE[deployment.stage].outstanding and deployment.started_at is not None
            return replace(deployment, started_at=at) if is_working else deployment
        case Tick(at):
            return _ticked(deployment, at)
        case Superseded():
            return replace(deployment, stage=Stage.SUPERSEDED) if TABLE[deployment.stage].outstanding else deployment
        case Withdrawn(reason):
            return _withdrawn(deployment, reason)


def _reported(deployment: Deployment, report: Report) -> Deployment:
    if report.state is State.IDLE:
        raise TransitionError("an idle device says nothing about a deployment")
    stage, row = Stage(report.state.value), TABLE[deployment.stage]
    # After the controller gave up, "still at it" would only bring the same verdict again at the next tick.
    if stage not in (_FINAL if deployment.presumed else row.follows):
        raise TransitionError(f"{deployment.stage} does not become {stage} by a report")
    if stage is Stage.COMMITTED and report.digest not in deployment.digests:
        return _not_what_was_ordered(deployment, report)
    again = TABLE[stage].outstanding and (not row.outstanding or deployment.stage is Stage.WAITING_LINK)
    return replace(
        deployment,
        stage=stage,
        started_at=report.at if again or deployment.started_at is None else deployment.started_at,
        failure=report.failure if stage in (Stage.FAILED, Stage.ROLLED_BACK) else report.waiting,
        presumed=False,
    )


def _not_what_was_ordered(deployment: Deployment, report: Report) -> Deployment:
    """The device calls it success and serves something else: the digest decides, and a later report may correct it."""
    serves = f"it serves {report.digest[:12]}" if report.digest else "it says nothing about what it serves"
    ordered = " or ".join(sorted(digest[:12] for digest in deployment.digests))
    failure = Failure(
        code=FailureCode.WRONG_DIGEST, message=f"the device reports committed, but {serves}; ordered was {ordered}"
    )
    return replace(
        deployment, stage=Stage.FAILED, started_at=deployment.started_at or report.at, failure=failure, presumed=True
    )


def _ticked(deployment: Deployment, at: datetime) -> Deployment:
    due = due_at(deployment)
    if due is None or at < due:
        return deployment
    waited = "the order expired before the device took it up" if deployment.started_at is None else "no final report"
    message = f"{waited}: last seen {deployment.stage}, awaited until {due.isoformat(timespec='seconds')}"
    failure = Failure(code=FailureCode.DEADLINE, message=message)
    return replace(deployment, stage=Stage.FAILED, failure=failure, presumed=True)


def _withdrawn(deployment: Deployment, reason: str) -> Deployment:
    if not TABLE[deployment.stage].outstanding:
        return deployment
    failure = Failure(code=FailureCode.CANCELLED, message=reason)
    return replace(deployment, stage=Stage.FAILED, failure=failure)
