"""What works, what builds and what is refused: variant x toolchain x precision x target, from the linter's own rules.

``docs/support-matrix.md`` is generated from it; the tests of the variants build what it says works or builds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from agent.contract.manifest import Precision, Target, Toolchain
from agent.contract.profile import Recipe
from fleet.core.phi_variants import VARIANTS, Variant
from fleet.core.plan_memory import RUNTIMES
from fleet.core.rules import BUILDS, RULES, Case, refusals

#: Where the tests run: Linux on a CPU. MLX runs there too, without Metal.
RUN_HERE = Target.CPU
#: Targets whose files are those for the CPU byte for byte: the toolchain does not ask which device it is for. Tests
#: build one recipe for both and compare, so that what they find of all files for the CPU holds for these.
SAME_FILES = {
    Toolchain.OPENVINO: (Target.GPU,),
    Toolchain.LLAMACPP: (Target.CUDA, Target.METAL),
    Toolchain.MLX: (Target.METAL,),
}


class Status(StrEnum):
    """Of a cell."""

    WORKS = "works"
    BUILDS = "builds"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Cell:
    """``context``: tokens up to which it holds, or 0 when refused at every length. ``why``: the rule that refuses."""

    variant: Variant
    toolchain: Toolchain
    precision: Precision
    target: Target
    status: Status
    context: int
    rule: str = ""
    why: str = ""

    @property
    def built_for(self) -> Target:
        """The target whose files the tests build for this cell."""
        return RUN_HERE if self.target in SAME_FILES.get(self.toolchain, ()) else self.target


def cells() -> Iterator[Cell]:
    """Yield every cell, variant by variant."""
    for variant in VARIANTS:
        for toolchain in Toolchain:
            for target in BUILDS[toolchain]:
                for precision in Precision:
                    yield cell(variant, toolchain, precision, target)


def cell(variant: Variant, toolchain: Toolchain, precision: Precision, target: Target) -> Cell:
    """Return one cell: legal at the longest of the lengths at which models change, or refused by the first rule."""
    recipe = Recipe(toolchain=toolchain, precision=precision, target=target)
    shape = variant.shape
    lengths = {shape.max_context, min(shape.max_context, shape.original_context), shape.sliding_window or 0}
    first = ""
    for context in sorted(lengths - {0}, reverse=True):
        found = refusals(Case(shape, recipe, context))
        if not found:
            status = Status.WORKS if target is RUN_HERE else Status.BUILDS
            return Cell(variant, toolchain, precision, target, status, context, rule=first)
        first = first or found[0].rule
    why = refusals(Case(shape, recipe, min(lengths - {0})))[0]
    return Cell(variant, toolchain, precision, target, Status.REFUSED, 0, why.rule, why.reason)


def markdown() -> str:
    """docs/support-matrix.md, without the notice at its head."""
    same = ", ".join(f"`{toolchain}` {' and '.join(targets)}" for toolchain, targets in SAME_FILES.items())
    return "\n".join([_INTRODUCTION.format(same=same), *_matrix(), _DEVICES, *_rules(), *_memory()])


_INTRODUCTION = """\
# What works, what builds, what is refused

- **works**: tests build it from a small random checkpoint with the variant's own configuration, load it in the
  toolchain's own runtime, and compare its logits with those of transformers, at FP32 for short and for long prompts.
- builds: tests build it from the same checkpoint; it was not run on the device, for want of one. Of `onnx_genai` they
  look at the bits of the weights and the provider named, and compare what ONNX Runtime computes of it on a CPU with
  transformers, at FP16 for long prompts too; BF16 has no kernels there, so that its graph and types alone are checked.
  Of `openvino` npu they compare what OpenVINO computes on a CPU, and of `onnx_qnn` what ONNX Runtime computes there of
  the graphs before their compilation; one artifact of `onnx_qnn` answers in Qualcomm's simulator. The files of
  {same}
  are those of the cpu row byte for byte. This is tested on one recipe for each of these targets; for the others, what
  is tested is the cpu row.
- refused: the planner says no. The rules are below; `phifleet plan` gives the reason for each case.

A length in tokens is the longest context that it holds for; without one it holds for the model's own. Networks were
tested, not the published weights, which were not to be had where this was written.
"""
_DEVICES = """\
## Devices

A profile adds its own limits: mobile and IoT devices get INT4, an accelerator must be one that the profile names, and
weights, KV cache and runtime must fit its memory, two artifacts its disk.
"""
_MEMORY = """\
## Memory

`peak = weights x copies + context x KV bytes of a token + prompt piece x vocabulary x 4 + runtime`

The KV bytes of a token are `2 x layers x KV heads x head size x bytes of an element`; an element is 4 bytes for ONNX on
a CPU, and in MLX for FP32 and for quantized weights on a CPU, and 2 otherwise. The weights are the artifact's bytes;
MLX on a CPU holds the scales and offsets of quantized weights in float32: 4 bytes more for each group.

| toolchain | copies of the weights | prompt piece, tokens | runtime, MiB |
|---|---|---|---|"""


def _matrix() -> Iterator[str]:
    for variant in VARIANTS:
        yield f"## {variant.name}\n"
        yield f"{', '.join(variant.hub_ids)}: {variant.special}.\n"
        yield "| toolchain | target | " + " | ".join(Precision) + " |"
        yield "|---|---|" + "---|" * len(Precision)
        for toolchain in Toolchain:
            for target in BUILDS[toolchain]:
                row = [cell(variant, toolchain, precision, target) for precision in Precision]
                yield f"| {toolchain} | {target} | " + " | ".join(_shown(one) for one in row) + " |"
        yield ""


def _shown(one: Cell) -> str:
    if one.status is Status.REFUSED:
        return f"refused: {one.rule}"
    text = f"**{one.status}**" if one.status is Status.WORKS else str(one.status)
    return text if one.context == one.variant.shape.max_context else f"{text} to {one.context} ({one.rule})"


def _rules() -> Iterator[str]:
    yield "## Rules\n"
    yield "| rule | refuses | known from |"
    yield "|---|---|---|"
    for rule in RULES:
        yield f"| `{rule.name}` | {rule.refuses} | {rule.source} |"
    yield "| `memory-budget`, `disk-budget` | what does not fit the profile | the formula below |"
    yield "| `toolchain-options` | an option that the toolchain has not | the toolchain's own list of options |\n"


def _memory() -> Iterator[str]:
    yield _MEMORY
    for toolchain, runtime in RUNTIMES.items():
        yield f"| {toolchain} | {runtime.copies:g} | {runtime.prompt_piece} | {runtime.runtime_bytes // 2**20} |"
    yield ""
