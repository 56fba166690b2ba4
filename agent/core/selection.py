"""Enumerate, constrain, prove: which variants of a model may run on this device, and which of those that ran to take.

Flags that claim a device are not proof: what is left after ``constrain`` is loaded and measured, and ``fastest``
chooses among what passed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from agent.contract.manifest import RUNTIME_OF, Manifest, Target
from agent.contract.messages import Proof, RuntimeFact
from agent.core.memory import Placement, plan

#: Tokens of the answer that variants are compared by: long enough that the speed counts, short enough that the
#: time to the first token does.
TYPICAL_ANSWER = 128
#: A variant must be faster by more than this share to go before one that the order prefers.
NOISE = 0.03

#: What a runtime calls the device of a target. GGUF and MLX artifacts run on whatever there is.
DEVICE_OF: Mapping[Target, str] = {
    Target.CPU: "CPU",
    Target.CUDA: "CUDA",
    Target.DML: "DML",
    Target.GPU: "GPU",
    Target.NPU: "NPU",
    Target.METAL: "METAL",
    Target.QNN: "QNN",
}


@dataclass(frozen=True, slots=True)
class Resources:
    """What the device has now; sizes in bytes. ``held``: what the model that serves would give back."""

    runtimes: Sequence[RuntimeFact]
    available: int
    held: int = 0
    limit: int | None = None
    sequences: int = 1


@dataclass(frozen=True, slots=True)
class Refusal:
    """A variant that cannot run here, and why."""

    manifest: Manifest
    reason: str


@dataclass(frozen=True, slots=True)
class Measured:
    """A variant that was loaded, passed its probes, and how fast it was."""

    manifest: Manifest
    proof: Proof

    @property
    def answer_ms(self) -> float:
        """Milliseconds of a typical answer."""
        return self.proof.ttft_ms + TYPICAL_ANSWER * self.proof.tpot_ms


def constrain(variants: Sequence[Manifest], has: Resources) -> tuple[tuple[Manifest, ...], tuple[Refusal, ...]]:
    """Return those that may run, in the order given, and the others with the reason."""
    fit, refused = [], []
    for manifest in variants:
        reason = why_not(manifest, has)
        if reason is None:
            fit.append(manifest)
        else:
            refused.append(Refusal(manifest, reason))
    return tuple(fit), tuple(refused)


def why_not(manifest: Manifest, has: Resources) -> str | None:
    """Why a variant cannot run here, or None."""
    name = RUNTIME_OF[manifest.toolchain]
    runtime = next((fact for fact in has.runtimes if fact.name == name), None)
    if runtime is None:
        return f"needs the runtime {name}, which this agent does not know"
    if not runtime.usable:
        return f"needs the runtime {name}: {runtime.reason}"
    device = DEVICE_OF.get(manifest.target)
    if device is not None and runtime.devices and not any(one.split(".")[0] == device for one in runtime.devices):
        return f"needs the device {device}; {name} has {', '.join(runtime.devices)}"
    chosen = plan(
        manifest.memory,
        context=manifest.context,
        sequences=has.sequences,
        available=has.available,
        held=has.held,
        limit=has.limit,
    )
    return chosen.sentence() if chosen.placement is Placement.REFUSED else None


def fastest(passed: Sequence[Measured]) -> Measured:
    """Return the shortest typical answer; within the noise, the one that comes first.

    Raises:
        ValueError: nothing passed.
    """
    if not passed:
        raise ValueError("no variant passed")
    best = min(one.answer_ms for one in passed)
    return next(one for one in passed if one.answer_ms <= best * (1 + NOISE))
