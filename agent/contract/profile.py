"""A device profile: what a class of devices is, may hold and must reach. Data only; one TOML file each."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from agent.contract.base import MAX_INTEGER, GrownModel
from agent.contract.manifest import Precision, Target, Toolchain
from agent.contract.mirrors import Mirrors
from agent.contract.windows import TransferWindows


class DeviceClass(StrEnum):
    """The policy hangs on it: mobile and IoT get INT4, AI PCs may have more."""

    IOT = "iot"
    MOBILE = "mobile"
    EDGE_GPU = "edge_gpu"
    AI_PC = "ai_pc"
    WORKSTATION = "workstation"
    SERVER = "server"


class Architecture(StrEnum):
    """Of the processor, as Linux names it; devices that say ``arm64`` or ``AMD64`` mean the same."""

    X86_64 = "x86_64"
    AARCH64 = "aarch64"
    ARMV7L = "armv7l"
    ANY = "any"


class System(StrEnum):
    """The operating system."""

    LINUX = "linux"
    WINDOWS = "windows"
    MACOS = "macos"
    ANDROID = "android"
    IOS = "ios"
    ANY = "any"


class _Strict(BaseModel):
    """Profiles are written by people: an unknown field is a typing mistake, and is named."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class HealthLimits(GrownModel):
    """What a deployment must stay inside to be committed. None: not limited."""

    _later: ClassVar[frozenset[str]] = frozenset({"device_share_min"})

    ttft_ms_p95: (
        Annotated[float, Field(gt=0, description="milliseconds to the first token, 95th percentile")] | None
    ) = None
    tokens_per_s_min: Annotated[float, Field(gt=0, description="tokens a second of one stream, at least")] | None = None
    error_rate_max: Annotated[float, Field(ge=0, le=1, description="share of requests")] = 0.05
    worker_restarts_max: Annotated[int, Field(ge=0, description="worker deaths in the window")] = 3
    memory_bytes_max: Annotated[int, Field(gt=0, description="resident bytes of the worker")] | None = None
    device_share_min: (
        Annotated[
            float,
            Field(
                gt=0,
                le=1,
                description="share of the model, by node or layer, that the artifact's own device computes, at least;"
                " 1: nothing on the CPU in its place",
            ),
        ]
        | None
    ) = None


class ProfileHealth(HealthLimits):
    """The same, as a person writes it in a profile."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class QualityGate(_Strict):
    """An artifact past it is not published, unless forced with a recorded reason. None: not limited."""

    kl_divergence_max: Annotated[float, Field(gt=0, description="mean, nats per token")] | None = None
    perplexity_ratio_max: Annotated[float, Field(gt=0)] | None = None
    foreign_kl_divergence_max: (
        Annotated[float, Field(gt=0, description="on foreign plain text, nats per token")] | None
    ) = None


class Admission(_Strict):
    """What a model must be, whatever it can, to be planned, built or deployed for this class."""

    licenses: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...],
        Field(description="SPDX names of the licences that a checkpoint may have; none listed: any"),
    ] = ()


class Recipe(_Strict):
    """One way to build for this class; a profile lists them in order of preference."""

    toolchain: Toolchain
    precision: Precision
    target: Target
    options: Annotated[dict[str, Any], Field(description="the toolchain's own options")] = {}


class Delivery(_Strict):
    """How bytes reach this class."""

    bandwidth_bytes_per_s: Annotated[int, Field(gt=0, description="expected, for estimates")]
    window_bytes: Annotated[int, Field(gt=0, description="bytes in flight")] = 4 * 1024 * 1024
    max_bytes_per_s: Annotated[
        int | None, Field(ge=1024, description="no device of this class takes more; none: not limited")
    ] = None
    windows: TransferWindows = ()
    mirrors: Mirrors = ()
    metered_bytes: Annotated[
        int | None,
        Field(ge=0, le=MAX_INTEGER, description="an artifact that lacks more waits to be allowed; none: not metered"),
    ] = None

    @property
    def rate(self) -> int:
        """Bytes a second that a transfer may be expected to reach."""
        return min(self.bandwidth_bytes_per_s, self.max_bytes_per_s or self.bandwidth_bytes_per_s)


class DeviceProfile(_Strict):
    """A class of devices."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
    description: str
    device_class: DeviceClass
    arch: Architecture
    system: System = System.ANY
    accelerators: Annotated[tuple[Target, ...], Field(description="beside the CPU")] = ()
    memory_bytes: Annotated[int, Field(gt=0, description="bytes that the model may take, KV cache included")]
    disk_bytes: Annotated[int, Field(gt=0, description="bytes that artifacts may take, two kept at once")]
    context: Annotated[int, Field(gt=0, description="tokens")] = 4096
    probation_s: Annotated[float, Field(ge=0, description="seconds of health before commit")] = 60.0
    recipes: Annotated[tuple[Recipe, ...], Field(min_length=1)]
    health: ProfileHealth = ProfileHealth()
    quality: QualityGate = QualityGate()
    admission: Admission = Admission()
    delivery: Delivery

    @model_validator(mode="after")
    def _targets_are_there(self) -> Self:
        for recipe in self.recipes:
            if recipe.target is not Target.CPU and recipe.target not in self.accelerators:
                there = ", ".join(self.accelerators) or "none"
                raise ValueError(f"recipe target {recipe.target} is not among the accelerators ({there})")
        return self
