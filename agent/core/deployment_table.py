"""The table of a deployment: what each state does, what an event can mean, and which state follows.

``agent/core/deployment.py`` has the theory of operation; ``docs/states.md`` is generated from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from agent.contract.failures import FailureCode
from agent.contract.messages import State
from agent.core.deployment_events import (
    Activated,
    Available,
    DeadlinePassed,
    Event,
    Failed,
    Healthy,
    Ordered,
    Proved,
    Resolved,
    Restarted,
    Step,
    Transferred,
    Unhealthy,
    Verified,
)


@dataclass(frozen=True, slots=True)
class StateRow:
    """One state. ``deadline_s`` None beside a step means: what is left of the order's own deadline.

    ``clock``: whether time in this state is counted against that deadline; where it is not, the state has no deadline.
    """

    step: Step | None
    deadline_s: float | None
    counts_restarts: bool
    meaning: str
    clock: bool = True


S = State
# fmt: off
#: In the order of the table's columns.
STATES: Mapping[State, StateRow] = MappingProxyType(
    {
        S.IDLE:         StateRow(None,          None, False, "no order has come yet"),
        S.RESOLVING:    StateRow(Step.RESOLVE,  None, True,  "asks TUF for the signed manifests"),
        # A device that loses power during a long transfer is in no boot loop: the stall limit and the order's own
        # deadline bound it, so restarts do not count here.
        S.TRANSFERRING: StateRow(Step.TRANSFER, None, False, "brings the missing chunks"),
        # Nothing is wrong with the deployment, and nobody can say how long a link is away.
        S.WAITING_LINK: StateRow(
            Step.AWAIT_LINK, None, False, "waits for the broker, or for a controller that answers", clock=False
        ),
        S.WAITING_SPACE: StateRow(Step.AWAIT_SPACE, None, False, "waits until the disk has room for the artifact"),
        S.VERIFYING:    StateRow(Step.VERIFY,   1800, True,  "reads the files back against the manifest"),
        S.PROVING:      StateRow(Step.PROVE,    1800, True,  "loads the model, asks the signed probes, measures"),
        S.ACTIVATING:   StateRow(Step.ACTIVATE,  900, True,  "moves new requests over"),
        S.PROBATION:    StateRow(Step.WATCH,    None, True,  "serves the new model and watches its health"),
        S.COMMITTED:    StateRow(None,          None, False, "the digest reported is the digest loaded, and healthy"),
        S.ROLLED_BACK:  StateRow(None,          None, False, "the artifact before serves again"),
        S.FAILED:       StateRow(None,          None, False, "nothing changed on the device, or nothing is left"),
    }
)
# fmt: on


class Case(StrEnum):
    """What an event means at the time when it comes; the value is a name for documents."""

    ORDERED = "a newer order"
    ORDERED_COMMITTED = "a newer order for what is committed and serves"
    ORDERED_AGAIN = "an order that was taken before"
    RESOLVED = "some variants may run here"
    TRANSFERRED = "their bytes are here"
    AVAILABLE = "what was waited for is there"
    VERIFIED = "they are the right bytes"
    PROVED = "a variant passed its proof"
    ACTIVATED = "the digest that was ordered"
    ACTIVATED_OTHER = "another digest"
    HEALTHY = "the digest that was ordered still"
    HEALTHY_OTHER = "another digest by now"
    FAILED = "before the endpoint was touched"
    FAILED_TOUCHED = "while the endpoint may serve the new model"
    FAILED_OLD = "an older order's step"
    LINK_AWAY = "for want of a link or a controller"
    DISK_FULL = "for want of room on the disk"
    UNHEALTHY_NEW = "the new model serves and cannot go on"
    UNHEALTHY_BACK = "the committed one, and a previous one is there"
    UNHEALTHY_DAMAGED = "the committed one is damaged, and none is before it"
    UNHEALTHY_LIMPING = "the committed one is whole, and none is before it"
    UNHEALTHY_OLD = "one that was replaced since"
    RESTARTED = "the daemon resumes"
    RESTARTED_TOO_OFTEN = "the daemon restarted too often"


#: The events that each case is a meaning of.
CASES: Mapping[Case, tuple[type[Event], ...]] = MappingProxyType(
    {
        Case.ORDERED: (Ordered,),
        Case.ORDERED_COMMITTED: (Ordered,),
        Case.ORDERED_AGAIN: (Ordered,),
        Case.RESOLVED: (Resolved,),
        Case.TRANSFERRED: (Transferred,),
        Case.AVAILABLE: (Available,),
        Case.VERIFIED: (Verified,),
        Case.PROVED: (Proved,),
        Case.ACTIVATED: (Activated,),
        Case.ACTIVATED_OTHER: (Activated,),
        Case.HEALTHY: (Healthy,),
        Case.HEALTHY_OTHER: (Healthy,),
        Case.FAILED: (Failed, DeadlinePassed),
        Case.FAILED_TOUCHED: (Failed, DeadlinePassed),
        Case.FAILED_OLD: (Failed,),
        Case.LINK_AWAY: (Failed,),
        Case.DISK_FULL: (Failed,),
        Case.UNHEALTHY_NEW: (Unhealthy,),
        Case.UNHEALTHY_BACK: (Unhealthy,),
        Case.UNHEALTHY_DAMAGED: (Unhealthy,),
        Case.UNHEALTHY_LIMPING: (Unhealthy,),
        Case.UNHEALTHY_OLD: (Unhealthy,),
        Case.RESTARTED: (Restarted,),
        Case.RESTARTED_TOO_OFTEN: (Restarted,),
    }
)


def _row(*cells: State | None) -> Mapping[State, State | None]:
    return MappingProxyType(dict(zip(STATES, cells, strict=True)))


___ = None
IDL, RES, TRA, LNK, SPC, VER, PRO, ACT, WAT, COM, BCK, FLD = STATES
# fmt: off
TABLE: Mapping[Case, Mapping[State, State | None]] = MappingProxyType(
    {
        #                    from:     IDL  RES  TRA  LNK  SPC  VER  PRO  ACT  WAT  COM  BCK  FLD
        Case.ORDERED:             _row(RES, RES, RES, RES, RES, RES, RES, RES, RES, RES, RES, RES),
        Case.ORDERED_COMMITTED:   _row(COM, COM, COM, COM, COM, COM, COM, COM, COM, COM, COM, COM),
        Case.ORDERED_AGAIN:       _row(IDL, RES, TRA, LNK, SPC, VER, PRO, ACT, WAT, COM, BCK, FLD),
        Case.RESOLVED:            _row(___, TRA, ___, ___, ___, ___, ___, ___, ___, ___, ___, ___),
        Case.TRANSFERRED:         _row(___, ___, VER, ___, ___, ___, ___, ___, ___, ___, ___, ___),
        # From the manifests on: they may have been signed anew since.
        Case.AVAILABLE:           _row(___, ___, ___, RES, RES, ___, ___, ___, ___, ___, ___, ___),
        Case.VERIFIED:            _row(___, ___, ___, ___, ___, PRO, ___, ___, ___, ___, ___, ___),
        Case.PROVED:              _row(___, ___, ___, ___, ___, ___, ACT, ___, ___, ___, ___, ___),
        Case.ACTIVATED:           _row(___, ___, ___, ___, ___, ___, ___, WAT, ___, ___, ___, ___),
        Case.ACTIVATED_OTHER:     _row(___, ___, ___, ___, ___, ___, ___, BCK, ___, ___, ___, ___),
        Case.HEALTHY:             _row(___, ___, ___, ___, ___, ___, ___, ___, COM, ___, ___, ___),
        Case.HEALTHY_OTHER:       _row(___, ___, ___, ___, ___, ___, ___, ___, BCK, ___, ___, ___),
        # From activation on the endpoint may serve the new model, so a failure rolls back.
        Case.FAILED:              _row(___, FLD, FLD, FLD, FLD, FLD, FLD, BCK, BCK, ___, ___, ___),
        # An order that superseded another may find the other one's model live: a failure then rolls back, too.
        Case.FAILED_TOUCHED:      _row(___, BCK, BCK, BCK, BCK, BCK, BCK, BCK, BCK, ___, ___, ___),
        Case.FAILED_OLD:          _row(IDL, RES, TRA, LNK, SPC, VER, PRO, ACT, WAT, COM, BCK, FLD),
        # Before the endpoint was touched. Both are left by themselves; the full disk within the order's deadline.
        Case.LINK_AWAY:           _row(___, LNK, LNK, ___, ___, LNK, ___, ___, ___, ___, ___, ___),
        Case.DISK_FULL:           _row(___, SPC, SPC, SPC, SPC, SPC, SPC, ___, ___, ___, ___, ___),
        Case.UNHEALTHY_NEW:       _row(___, BCK, BCK, BCK, BCK, BCK, BCK, BCK, BCK, ___, ___, ___),
        # While a step runs the old artifact may be lost: the new one is on its way, and goes on.
        Case.UNHEALTHY_BACK:      _row(___, RES, TRA, LNK, SPC, VER, PRO, ACT, WAT, BCK, BCK, BCK),
        Case.UNHEALTHY_DAMAGED:   _row(___, RES, TRA, LNK, SPC, VER, PRO, ACT, WAT, FLD, FLD, FLD),
        Case.UNHEALTHY_LIMPING:   _row(___, RES, TRA, LNK, SPC, VER, PRO, ACT, WAT, COM, BCK, FLD),
        Case.UNHEALTHY_OLD:       _row(IDL, RES, TRA, LNK, SPC, VER, PRO, ACT, WAT, COM, BCK, FLD),
        # The proven worker died with the daemon, so a restart after the proof begins with the proof again.
        Case.RESTARTED:           _row(IDL, RES, TRA, LNK, SPC, VER, PRO, PRO, PRO, COM, BCK, FLD),
        Case.RESTARTED_TOO_OFTEN: _row(___, FLD, ___, ___, ___, FLD, FLD, BCK, BCK, ___, ___, ___),
    }
)
# fmt: on


def edges() -> list[tuple[State, Case, State]]:
    """Return every transition that the table allows, state by state."""
    return [(state, case, row[state]) for state in STATES for case, row in TABLE.items() if row[state] is not None]  # type: ignore[misc]


#: Failures of the link, the disk, the clock or the people. They say nothing about the artifact, so what has arrived of
#: it is kept for the next order.
_NOT_THE_ARTIFACT = frozenset(
    {
        FailureCode.TRUST_UNREACHABLE,
        FailureCode.TRUST_EXPIRED,
        FailureCode.TRANSFER_STALLED,
        FailureCode.TRANSFER_UNAVAILABLE,
        FailureCode.STORE_DISK_FULL,
        FailureCode.STORE_IO,
        FailureCode.RUNTIME_MISSING,
        FailureCode.RUNTIME_MEMORY,
        FailureCode.DEADLINE,
        FailureCode.CANCELLED,
        FailureCode.INTERNAL,
    }
)


#: Failures that pass by themselves, and what the deployment then waits for.
_PASSING: Mapping[FailureCode, Case] = MappingProxyType(
    {
        FailureCode.TRUST_UNREACHABLE: Case.LINK_AWAY,
        FailureCode.TRANSFER_STALLED: Case.LINK_AWAY,
        FailureCode.STORE_DISK_FULL: Case.DISK_FULL,
    }
)


def waits(state: State, code: FailureCode) -> Case | None:
    """Return the case of a failure after which this state waits, and does not end; None for any other."""
    case = _PASSING.get(code)
    return case if case is not None and TABLE[case][state] is not None else None


def speaks_against_artifact(code: FailureCode) -> bool:
    """Return whether a failure is a verdict on the artifact; the others leave its bytes worth keeping."""
    return code not in _NOT_THE_ARTIFACT
