"""What an operator asks of a rollout, and the counts that it is decided on."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from agent.contract.base import Alias, Timestamp
from agent.contract.windows import WindowText, open_from, parsed
from fleet.core.evidence import Gate

DAY_S = 86_400.0


class Frozen(BaseModel):
    """Immutable, and strict about names."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Wave(Frozen):
    """How many devices it takes of those that are left: a number, a percentage of all, or those of a selector."""

    devices: Annotated[int | None, Field(ge=1)] = None
    percent: Annotated[float | None, Field(gt=0, le=100)] = None
    selector: str | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if sum(value is not None for value in (self.devices, self.percent, self.selector)) != 1:
            raise ValueError("a wave has devices, percent, or selector, and one of them alone")
        return self

    def take(self, all_devices: int) -> int | None:
        """Return how many devices it is to have at most; None where its selector says which."""
        if self.devices is not None:
            return self.devices
        return max(1, round(all_devices * self.percent / 100)) if self.percent is not None else None

    def __str__(self) -> str:
        if self.selector is not None:
            return self.selector
        return f"{self.percent:g}%" if self.percent is not None else f"{self.devices}"


#: What applications may call any fleet's model by, unless the order says otherwise.
DEFAULT_ALIASES = ("chat",)


class RolloutSpec(Frozen):
    """What the operator asks for."""

    selector: Annotated[str, Field(description="which devices")]
    artifacts: Annotated[tuple[str, ...], Field(min_length=1, description="digests of the variants")]
    waves: Annotated[tuple[Wave, ...], Field(min_length=1, max_length=50)] = (Wave(percent=100),)
    concurrency: Annotated[int | None, Field(ge=1, description="devices that change at a time")] = None
    rate_per_minute: Annotated[float | None, Field(gt=0, description="orders a minute")] = None
    bake_s: Annotated[float, Field(ge=0, le=30 * DAY_S, description="seconds of watching after a wave")] = 300.0
    approval: Annotated[bool, Field(description="a person lets each wave after the first begin")] = False
    retries: Annotated[int, Field(ge=0, le=10, description="new orders to a device that failed")] = 0
    device_deadline_s: Annotated[float | None, Field(gt=0, description="None: as the profile has it")] = None
    wave_deadline_s: Annotated[float, Field(gt=0, le=365 * DAY_S)] = 7 * DAY_S
    probation_s: Annotated[float | None, Field(ge=0, description="None: as the profile has it")] = None
    not_before: Timestamp | None = None
    not_after: Timestamp | None = None
    windows: Annotated[
        tuple[WindowText, ...],
        Field(max_length=50, description="devices are ordered only within these, such as mon-fri 22:00-05:00 UTC"),
    ] = ()
    aliases: Annotated[
        tuple[Alias, ...], Field(max_length=16, description="what applications may call the model by")
    ] = DEFAULT_ALIASES
    gate: Gate | None = Gate()
    on_stop: Annotated[Literal["revert", "keep"], Field(description="of devices that have changed")] = "revert"
    priority: Annotated[int, Field(ge=0, le=100)] = 50
    dynamic: Annotated[bool, Field(description="the last wave takes devices that are meant later, too")] = False

    def opens_at(self, at: datetime) -> datetime | None:
        """Return when devices may be ordered again; None if they may be now."""
        opens = open_from(parsed(self.windows), at)
        return opens if opens > at else None

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        shares = sum(wave.percent or 0 for wave in self.waves[:-1])
        last = self.waves[-1].percent
        if shares >= 100 or (last is not None and last < 100 and shares + last > 100):
            raise ValueError(f"the waves take {shares + (last or 0):g}% of the devices")
        return self


class Counts(Frozen):
    """Of the devices of one wave. ``offline`` are those of the others that are not connected."""

    assigned: Annotated[int, Field(ge=0)] = 0
    waiting: Annotated[int, Field(ge=0, description="not ordered yet")] = 0
    under_way: Annotated[int, Field(ge=0, description="ordered, connected, and neither committed nor failed")] = 0
    offline: Annotated[int, Field(ge=0, description="waiting or under way, and not connected")] = 0
    succeeded: Annotated[int, Field(ge=0)] = 0
    failed: Annotated[int, Field(ge=0)] = 0

    @property
    def settled(self) -> bool:
        """Nothing more is to come of a device that is connected."""
        return self.waiting == 0 and self.under_way == 0

    @property
    def left_behind(self) -> int:
        """Devices that did not get there."""
        return self.assigned - self.succeeded
