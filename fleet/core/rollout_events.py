"""What happens to a rollout, and what it asks for."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fleet.core.rollout_spec import Counts, Frozen

# Events.


class Started(Frozen):
    """The operator starts it."""


class Assigned(Frozen):
    """The wave's devices were chosen."""

    devices: Annotated[int, Field(ge=0)]


class Progress(Frozen):
    """The wave's devices as they are now."""

    counts: Counts


class Stopped(Frozen):
    """The gate's verdict: stop, and why."""

    reason: str


class Approved(Frozen):
    """A person lets the next wave begin."""


class PauseAsked(Frozen):
    """No further device is ordered, until it is resumed."""


class ResumeAsked(Frozen):
    """It goes on where it was paused."""


class AbortAsked(Frozen):
    """A person ends it. ``revert``: devices that have changed go back."""

    revert: bool
    reason: str = "the operator aborted it"


class TakenBack(Frozen):
    """Devices that have changed and have not gone back yet."""

    remaining: Annotated[int, Field(ge=0)]


class Ticked(Frozen):
    """Time has passed."""


Event = Started | Assigned | Progress | Stopped | Approved | PauseAsked | ResumeAsked | AbortAsked | TakenBack | Ticked


# Effects.


class OpenWave(Frozen):
    """Choose the devices of a wave."""

    wave: int

    @property
    def key(self) -> str:
        """Names the effect within its rollout."""
        return f"open-{self.wave}"


class Order(Frozen):
    """Order devices of the wave that wait, as concurrency and rate allow."""

    wave: int

    @property
    def key(self) -> str:
        """Names the effect within its rollout."""
        return f"order-{self.wave}"


class CancelWaiting(Frozen):
    """Devices that wait are not ordered any more."""

    key: str = "cancel"


class TakeBack(Frozen):
    """Order every device that has changed to go back, the one that changed last first, also those that are offline."""

    key: str = "take-back"


Effect = OpenWave | Order | CancelWaiting | TakeBack
