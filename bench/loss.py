"""What each recipe loses: mean KL divergence from FP32 in the artifact's own runtime, against llama.cpp's plain Q4_0.

On two evaluation sets: the bundled prompts, continued by the model itself, and foreign plain text. No calibration saw
either. Sizes are of the whole artifact.

The sample was once a GGUF, so its weights lie on grids that llama.cpp's types have, and a type that hits the same grid
again loses nothing. The rows "off the grid" are of the sample with noise of half a step of such a grid on every weight,
against that model's own FP32: what weights lose that were never quantized.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from agent.contract.manifest import Precision, Target, Toolchain
from bench.figures import Figure
from fleet.core.rules import toolchains_for
from fleet.profiles_loader import load_profile
from fleet.toolchains.quality import evaluation, quality
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
    off_grid: bool = False
    seconds: float | None = None


T, P = Toolchain, Precision
RECOVERED = {"recover": True, "calibration": "bundled"}
BASELINE = Case(T.LLAMACPP, P.INT4, "Q4_0", {"type": "Q4_0"})
BUDGET = {"budget": 5.25, "calibration": "bundled"}
IQ4_XS = {"type": "IQ4_XS", "calibration": "bundled"}
CASES = (
    Case(T.LLAMACPP, P.INT4, "Q4_0, importance matrix", {"type": "Q4_0", "calibration": "bundled"}),
    Case(T.LLAMACPP, P.INT4, "Q4_K_M"),
    Case(T.LLAMACPP, P.INT4, "IQ4_XS, importance matrix", IQ4_XS, 0.45, 92),
    Case(T.LLAMACPP, P.INT4, "5.25 bits a weight", BUDGET, 0.45, 92, seconds=120),
    Case(T.LLAMACPP, P.INT4, "6.3 bits a weight", BUDGET | {"budget": 6.3}, 0.13, 108),
    Case(T.LLAMACPP, P.INT4, "Q4_K_M, off the grid", off_grid=True),
    Case(T.LLAMACPP, P.INT4, "IQ4_XS, importance matrix, off the grid", IQ4_XS, off_grid=True),
    Case(T.LLAMACPP, P.INT4, "5.25 bits a weight, off the grid", BUDGET, off_grid=True),
    Case(T.ONNX_GENAI, P.INT4, "round to nearest"),
    Case(T.ONNX_GENAI, P.INT4, "recovered", RECOVERED, 0.75, 92, seconds=120),
    Case(T.ONNX_GENAI, P.INT4, "5.1 bits a weight, recovered", RECOVERED | {"budget": 5.1}, 0.29, 92, seconds=120),
    Case(T.ONNX_GENAI, P.INT4, "6.05 bits a weight, recovered", RECOVERED | {"budget": 6.05}, 0.13, 108),
    Case(T.OPENVINO, P.INT4, "the toolchain's own"),
    Case(T.OPENVINO, P.INT4, "recovered", RECOVERED, seconds=120),
    Case(T.OPENVINO, P.INT4, "recovered in whole rows", RECOVERED | {"group_size": -1}, 0.75, 88),
    Case(T.OPENVINO, P.INT4, "5.15 bits a weight, recovered", RECOVERED | {"budget": 5.15}, 0.26, 92, seconds=120),
    Case(T.OPENVINO, P.INT4, "6.1 bits a weight, recovered", RECOVERED | {"budget": 6.1}, 0.13, 108),
    Case(T.MLX, P.INT4, "the toolchain's own"),
    Case(T.MLX, P.INT4, "recovered", RECOVERED, 0.9, 88),
    Case(T.MLX, P.INT4, "5.2 bits a weight", BUDGET | {"budget": 5.2}),
    Case(T.MLX, P.INT4, "5.2 bits a weight, recovered", RECOVERED | {"budget": 5.2}, 0.27, 92, seconds=120),
    Case(T.MLX, P.INT4, "6.2 bits a weight, recovered", RECOVERED | {"budget": 6.2}, 0.13, 108),
    *(Case(toolchain, P.INT8, "", {}, 0.03) for toolchain in toolchains_for(Target.CPU)),
)
QNN_CASES = (
    Case(T.ONNX_QNN, P.INT4, "recovered, with the last matrix at INT4", {"head_bits": 4}, 0.3, 112),
    Case(T.ONNX_QNN, P.INT4, "recovered, the default", {}, 0.22, 126),
    Case(T.ONNX_QNN, P.INT8, "recovered, the default", {}, 0.02),
)


def figures(cases: Sequence[Case] = CASES) -> list[Figure]:
    """One for each recipe, and how long building and measuring take."""
    bases = {}
    found, slowest = [], 0.0
    for case in cases:
        if case.off_grid not in bases:
            bases[case.off_grid] = _measure(replace(BASELINE, off_grid=case.off_grid)).measured.quality.kl_divergence
        one = _measure(case)
        lost, foreign = one.measured.quality, one.measured.foreign
        assert foreign is not None
        slowest = max(slowest, one.measuring_s)
        name = " ".join(part for part in (case.toolchain.value, case.precision.value.upper(), case.label) if part)
        base = bases[case.off_grid]
        found.append(
            Figure(
                name, lost.kl_divergence, "nats", "Q4_0", base, lost.kl_divergence / base, at_most=case.at_most,
                note=f"{one.megabytes:.1f} MB; +-{lost.kl_divergence_se:.4f}; foreign text {foreign.kl_divergence:.4f}"
                f" +-{foreign.kl_divergence_se:.4f}; p99 {lost.kl_divergence_p99:.2f}; perplexity x"
                f" {lost.perplexity_ratio:.3f}; same top token {lost.same_top_token:.1%}; built in"
                f" {one.building_s:.0f} s",
            )
        )  # fmt: skip
        if case.megabytes is not None:
            found.append(Figure(f"{name}, size", one.megabytes, "MB", at_most=case.megabytes))
        if case.seconds is not None and one.building_s > 1:
            found.append(Figure(f"{name}, building", one.building_s, "s", at_most=case.seconds))
    return [*found, Figure("measuring one artifact, the slowest of these", slowest, "s", at_most=MEASURE_S)]


@dataclass(frozen=True, slots=True)
class _Row:
    measured: quality.Measured
    megabytes: float
    building_s: float
    measuring_s: float


def _measure(case: Case) -> _Row:
    sample = off_grid() if case.off_grid else sample_checkpoint()
    cache, target, profile = CACHE / "references", Target.CPU, None
    if case.toolchain is T.ONNX_QNN:  # a static graph computes its whole context for every token
        target, profile = Target.QNN, load_profile("copilot-pc-qnn").model_copy(update={"context": 512})
    began = time.monotonic()
    artifact = built(sample, case.toolchain, case.precision, target, profile, **case.options)
    built_at = time.monotonic()
    manifest = artifact.manifest
    for one in (evaluation.bundled(), evaluation.foreign()):
        quality.prepare(sample, manifest.model.source_digest, manifest.chat, one, cache)
    prepared = time.monotonic()
    measured = quality.measure(sample, artifact.files.parent, manifest, cache=cache)
    return _Row(measured, manifest.size / 1e6, built_at - began, time.monotonic() - prepared)


def off_grid() -> Path:
    """The sample with noise of up to half a step of a block of 32 at five bits on every weight of a matrix."""
    folder = CACHE / "off-grid"
    if (folder / "config.json").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    half = Path(shutil.copytree(sample_checkpoint(), folder.with_name(".off-grid"), dirs_exist_ok=True))
    draw, weights = np.random.default_rng(0), load_file(half / "model.safetensors")
    for name, values in weights.items():
        if values.ndim == 2:
            blocks = values.astype(np.float32).reshape(len(values), -1, 32)
            step = (blocks.max(-1, keepdims=True) - blocks.min(-1, keepdims=True)) / 31
            noise = draw.uniform(-0.5, 0.5, blocks.shape).astype(np.float32)
            weights[name] = (blocks + noise * step).reshape(values.shape)
    save_file(weights, half / "model.safetensors", metadata={"format": "pt"})
    half.rename(folder)
    return folder
