"""What can happen to a deployment (events), and what the daemon has to do about it (effects)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from agent.contract.messages import ArtifactRef, Desired, Failure, Proof


class Step(StrEnum):
    """What the daemon does while the deployment is in a state. Only one step runs at a time."""

    RESOLVE = "resolve"
    TRANSFER = "transfer"
    AWAIT_LINK = "await_link"
    AWAIT_SPACE = "await_space"
    VERIFY = "verify"
    PROVE = "prove"
    ACTIVATE = "activate"
    WATCH = "watch"


@dataclass(frozen=True, slots=True)
class Ordered:
    """A verified order arrived."""

    order: Desired


@dataclass(frozen=True, slots=True)
class Resolved:
    """These variants have verified manifests and may run here."""

    candidates: tuple[ArtifactRef, ...]


@dataclass(frozen=True, slots=True)
class Transferred:
    """Every byte of these variants is on disk."""

    candidates: tuple[ArtifactRef, ...]


@dataclass(frozen=True, slots=True)
class Available:
    """What the deployment waited for is there: the broker and the controller answer, or the disk has room."""


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
    """The endpoint serves the new model; ``digest`` is what the worker says it has loaded.

    ``serves`` and ``replaced``: the model's name and its artifact's id, now and before, where something served.
    """

    digest: str
    serves: tuple[str, str] | None = None
    replaced: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Healthy:
    """Health stayed inside the limits for the probation time, and ``digest`` still serves."""

    digest: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The step of the present state failed. ``sequence`` names the order, where another may have come meanwhile.

    ``needs_bytes`` of a full disk: so many must be free for the step to succeed; 0 where that is not known.
    """

    failure: Failure
    sequence: int | None = None
    needs_bytes: int = 0


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """The present state took longer than ``seconds``."""

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
    | Available
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
    """Start this step; send ``DeadlinePassed`` after so many seconds, or never."""

    step: Step
    deadline_s: float | None


@dataclass(frozen=True, slots=True)
class Halt:
    """Stop the step that runs, if any; its result no longer counts."""


@dataclass(frozen=True, slots=True)
class Serve:
    """Serve the committed artifact, or nothing if there is none."""


@dataclass(frozen=True, slots=True)
class Report:
    """Publish the deployment's state."""


@dataclass(frozen=True, slots=True)
class Collect:
    """Delete the artifacts that the device no longer needs: see ``Deployment.keep`` and ``Deployment.spare``."""


Effect = Begin | Halt | Serve | Report | Collect
