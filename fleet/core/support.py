"""What works, what builds and what is refused: variant x toolchain x precision x target, from the linter's own rules.

``docs/support-matrix.md`` is generated from it; the tests of the variants go through the cells that say "works".
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

#: Targets whose artifacts run where the tests run, Linux on a CPU. A GGUF is the same file for every target, and MLX
#: runs there too, without Metal; so both are tested by the files that a device would get.
RUN_HERE = {
    Toolchain.ONNX_GENAI: (Target.CPU,),
    Toolchain.OPENVINO: (Target.CPU,),
    Toolchain.LLAMACPP: (Target.CPU,),
    Toolchain.MLX: (Target.CPU,),
}
#: Beside what the toolchains build: what people ask for.
_ASKED = {Toolchain.ONNX_GENAI: (Target.QNN,)}


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


def cells() -> Iterator[Cell]:
    """Every cell, variant by variant."""
    for variant in VARIANTS:
        for toolchain in Toolchain:
            for target in (*BUILDS[toolchain], *_ASKED.get(toolchain, ())):
                for precision in Precision:
                    yield cell(variant, toolchain, precision, target)


def cell(variant: Variant, toolchain: Toolchain, precision: Precision, target: Target) -> Cell:
    """One cell: legal at the longest of the lengths at which models change, or refused by the first rule."""
    recipe = Recipe(toolchain=toolchain, precision=precision, target=target)
    shape = variant.shape
    lengths = {shape.max_context, min(shape.max_context, shape.original_context), shape.sliding_window or 0}
    first = ""
    for context in sorted(lengths - {0}, reverse=True):
        found = refusals(Case(shape, recipe, context))
        if not found:
            here = target in RUN_HERE[toolchain]
            status = Status.WORKS if here else Status.BUILDS
            return Cell(variant, toolchain, precision, target, status, context, rule=first)
        first = first or found[0].rule
    why = refusals(Case(shape, recipe, min(lengths - {0})))[0]
    return Cell(variant, toolchain, precision, target, Status.REFUSED, 0, why.rule, why.reason)


def markdown() -> str:
    """docs/support-matrix.md, without the notice at its head."""
    return "\n".join([_INTRODUCTION, *_matrix(), _DEVICES, *_rules(), *_memory()])


_INTRODUCTION = """\
# What works, what builds, what is refused

- **works**: tests build it from a small random checkpoint with the variant's own configuration, load it in the
  toolchain's own runtime, and compare its logits with those of transformers, at FP32 for short and for long prompts.
- builds: the toolchain makes it here; it was not run, for want of the device.
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
            for target in (*BUILDS[toolchain], *_ASKED.get(toolchain, ())):
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
