"""What a toolchain is to the rest: one Protocol, and the jobs that its child process is given."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict

from agent.contract.manifest import Precision, Target, Toolchain
from agent.contract.profile import Recipe
from fleet.errors import BuildError
from fleet.toolchains.checkpoint.checkpoint import Checkpoint
from fleet.toolchains.progress import ProgressCallback

#: What a child calls an error of a full disk, which may have room again when the parent looks.
DISK_FULL = "disk-full"


class _Job(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ConvertJob(_Job):
    """One conversion. ``out`` and ``scratch`` exist and are empty; ``options`` are complete, see ``resolve``.

    ``beside`` does not exist: a toolchain whose artifacts do not run on a build machine makes that folder, and what it
    writes there is asked and measured in their place. It is never delivered.

    ``calibration`` holds texts where the options ask for a calibration. ``widths``: what each matrix has, by the names
    that an earlier build of the same recipe recorded; empty: the budget decides. ``choices`` is where what each width
    costs is kept (``recovery.choices``); None: it is not."""

    toolchain: Toolchain
    source: Path
    out: Path
    scratch: Path
    beside: Path
    name: str
    precision: Precision
    target: Target
    options: dict[str, Any]
    context: int
    threads: int
    calibration: tuple[str, ...] = ()
    widths: dict[str, str] = {}
    choices: Path | None = None


class Converted(_Job):
    """What a conversion says of its result.

    ``entry`` is what the runtime opens, relative to ``out``; ``kv_element_bytes`` the bytes of one element of the KV
    cache; ``notes`` are facts found out while converting (an accuracy level, tensors that fell back).
    """

    entry: str
    kv_element_bytes: float
    notes: dict[str, Any] = {}


class SpeakJob(_Job):
    """Generate greedily with a built artifact in its own runtime."""

    toolchain: Toolchain
    folder: Path
    entry: str
    prompt: str
    max_tokens: int
    context: int
    threads: int


class ToolchainDriver(Protocol):
    """One toolchain. ``convert`` and ``speak`` run in a child process; the rest is cheap and imports nothing heavy."""

    name: ClassVar[Toolchain]
    #: What to install: ``phifleet[<extra>]``.
    extra: ClassVar[str]
    #: Whose versions decide the bytes that come out.
    packages: ClassVar[tuple[str, ...]]

    def resolve(self, recipe: Recipe, model: Checkpoint) -> dict[str, Any]:
        """Return every option that the conversion will be given, defaults filled in.

        Raises:
            ProfileError: an option is unknown, has a wrong value, or the combination cannot be built.
        """
        ...

    def peak_memory_bytes(self, recipe: Recipe, model: Checkpoint) -> int:
        """Estimate of the conversion's resident memory at its peak."""
        ...

    def convert(self, job: ConvertJob, progress: ProgressCallback) -> Converted:
        """Convert ``job.source`` into ``job.out``.

        Raises:
            BuildError: the toolchain refuses.
        """
        ...

    def speak(self, job: SpeakJob) -> str:
        """Return the text that follows ``job.prompt``, whose special tokens are parsed."""
        ...


#: What a recovery, or a choice of widths, computes with, in every toolchain that has one.
RECOVERY_PACKAGES = ("torch",)


def computes_with_torch(options: Mapping[str, Any]) -> bool:
    """Whether a conversion with these options runs the checkpoint in torch, whatever the toolchain itself needs."""
    return bool(options.get("recover") or options.get("budget"))


def installed_versions(driver: ToolchainDriver, options: Mapping[str, Any]) -> dict[str, str]:
    """Package to version of everything that decides the driver's output: phifleet, which drives and mends, too.
    Which packages those are may depend on the recipe's ``options``.

    Raises:
        BuildError: one is not installed; names the extra.
    """
    found, missing = {}, []
    needed = (*driver.packages, *(RECOVERY_PACKAGES if computes_with_torch(options) else ()), "phifleet")
    for package in dict.fromkeys(needed):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            missing.append(package)
    if missing:
        raise BuildError(f"toolchain {driver.name} needs {', '.join(missing)}; install phifleet[{driver.extra}]")
    return found
