"""What each recipe loses: mean KL divergence from FP32 in the artifact's own runtime, against llama.cpp's plain Q4_0.

On the bundled evaluation set, which no calibration saw. Sizes are of the whole artifact.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from agent.contract.manifest import Precision, Target, Toolchain
from bench.figures import Figure
from fleet.core.rules import toolchains_for
from fleet.profiles_loader import load_profile
from fleet.toolchains.quality import quality
from tests.models import CACHE, built, sample_checkpoint

MEASURE_S = 60.0


@dataclass(frozen=True, slots=True)
class Case:
    """A recipe; ``megabytes`` (of a million bytes) is what its target is for."""

    toolchain: Toolchain
    precision: Precision
    label: str
    options: dict[str, Any] = field(default_factory=dict)
    at_most: float | None = None
    megabytes: float | None = None


T, P = Toolchain, Precision
RECOVERED = {"recover": True, "calibration": "bundled"}
BASELINE = Case(T.LLAMACPP, P.INT4, "Q4_0", {"type": "Q4_0"})
CASES = (
    Case(T.LLAMACPP, P.INT4, "Q4_0, importance matrix", {"type": "Q4_0", "calibration": "bundled"}),
    Case(T.LLAMACPP, P.INT4, "Q4_K_M, the default"),
    Case(T.LLAMACPP, P.INT4, "IQ4_XS, importance matrix", {"type": "IQ4_XS", "calibration": "bundled"}, 0.45, 92),
    Case(T.ONNX_GENAI, P.INT4, "round to nearest, the default"),
    Case(T.ONNX_GENAI, P.INT4, "recovered", RECOVERED, 0.75, 92),
    Case(T.OPENVINO, P.INT4, "the default"),
    Case(T.OPENVINO, P.INT4, "recovered", RECOVERED),
    Case(T.OPENVINO, P.INT4, "recovered in whole rows", RECOVERED | {"group_size": -1}, 0.75, 88),
    Case(T.MLX, P.INT4, "the default"),
    Case(T.MLX, P.INT4, "recovered", RECOVERED, 0.9, 88),
    *(Case(toolchain, P.INT8, "", {}, 0.03) for toolchain in toolchains_for(Target.CPU)),
    Case(T.ONNX_QNN, P.INT4, "recovered, with the last matrix at INT4", {"head_bits": 4}, 0.3, 112),
    Case(T.ONNX_QNN, P.INT4, "recovered, the default", {}, 0.22, 126),
    Case(T.ONNX_QNN, P.INT8, "recovered, the default", {}, 0.02),
)


def figures() -> list[Figure]:
    """One for each recipe, and how long measuring takes."""
    base, _, slowest = _measure(BASELINE)
    found = []
    for case in CASES:
        measured, size, seconds = _measure(case)
        slowest, lost = max(slowest, seconds), measured.quality
        foreign = (
            f"{measured.foreign.kl_divergence:.4f} +-{measured.foreign.kl_divergence_se:.4f}"
            if measured.foreign
            else "-"
        )
        name = " ".join(part for part in (case.toolchain.value, case.precision.value.upper(), case.label) if part)
        found.append(
            Figure(
                name,
                lost.kl_divergence, "nats", "Q4_0", base.quality.kl_divergence,
                lost.kl_divergence / base.quality.kl_divergence,
                at_most=case.at_most,
                note=f"{size:.1f} MB; +-{lost.kl_divergence_se:.4f}; foreign text {foreign};"
                f" p99 {lost.kl_divergence_p99:.2f};"
                f" perplexity x {lost.perplexity_ratio:.3f}; same top token {lost.same_top_token:.1%}",
            )
        )  # fmt: skip
        if case.megabytes is not None:
            found.append(Figure(f"{name}, size", size, "MB", at_most=case.megabytes))
    return [*found, Figure("measuring one artifact, the slowest of these", slowest, "s", at_most=MEASURE_S)]


def _measure(case: Case) -> tuple[quality.Measured, float, float]:
    sample, cache = sample_checkpoint(), CACHE / "references"
    target, profile = Target.CPU, None
    if case.toolchain is T.ONNX_QNN:  # a static graph computes its whole context for every token
        target, profile = Target.QNN, load_profile("copilot-pc-qnn").model_copy(update={"context": 512})
    artifact = built(sample, case.toolchain, case.precision, target, profile, **case.options)
    manifest = artifact.manifest
    for one in (quality.evaluation.bundled(), quality.evaluation.foreign()):
        quality.prepare(sample, manifest.model.source_digest, manifest.chat, one, cache)
    began = time.monotonic()
    measured = quality.measure(sample, artifact.files.parent, manifest, cache=cache)
    return measured, manifest.size / 1e6, time.monotonic() - began
