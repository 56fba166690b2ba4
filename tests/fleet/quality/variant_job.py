"""One toolchain over some cells, in a process of its own: ``python -m tests.fleet.quality.variant_job`` with
``TOOLCHAIN RESULT VARIANT:PRECISION:TARGET...``. The toolchain is imported once; each cell is an entry in the result.

What is measured on this machine's CPU: the mean KL divergence to transformers over a short prompt; and where the
weights are as good as the model's own the largest difference of logits, for that prompt and at the end of a long one.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from agent.contract.manifest import Precision, Toolchain
from agent.contract.profile import Recipe
from fleet.core.phi_variants import Variant
from fleet.core.support import Cell, Status, cells
from fleet.toolchains.checkpoint.checkpoint import Checkpoint, inspect
from fleet.toolchains.checkpoint.checkpoint_shape import read_shape
from fleet.toolchains.drivers.base import Converted, ConvertJob
from fleet.toolchains.drivers.registry import driver_of
from fleet.toolchains.quality import calibration
from fleet.toolchains.quality.calibration import BUNDLED
from fleet.toolchains.quality.divergence import compare
from fleet.toolchains.quality.scorers import Opened, open_scorer
from tests.fleet.quality import variant_files, variants

#: MLX multiplies slowly on a CPU: its long prompt is shorter, and past no switch, where the plan refuses it anyway.
MLX_LONG = 300


def reference(variant: Variant) -> dict[str, Any]:
    """Logits of transformers in FP32: ``short`` of the first tokens, ``long`` of the last ones before each length."""
    import numpy as np

    folder = variants.checkpoint(variant)
    file = folder / "reference.npz"
    if not file.exists():
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        found = {}
        with torch.inference_mode():
            for length in _lengths(variant):
                ids = variants.tokens()[:length]
                logits = model(torch.tensor([ids])).logits[0].numpy()
                found[str(length)] = logits[-variants.LAST - 1 : -1] if length > variants.SHORT else logits[:-1]
        part = folder / f".{os.getpid()}.npz"
        np.savez(part, **found)
        part.replace(file)
    with np.load(file) as stored:
        return {name: stored[name] for name in stored.files}


def _lengths(variant: Variant) -> list[int]:
    longest = min(variants.LONG, variant.shape.max_context)
    return sorted({variants.SHORT, MLX_LONG, min(longest, 2000), min(longest, 4090), longest})


def long_length(one: Cell) -> int:
    """The longest prompt of the reference's that the cell holds for."""
    limit = MLX_LONG if one.toolchain is Toolchain.MLX else one.context
    return max(length for length in _lengths(one.variant) if length <= limit)


def is_close(one: Cell) -> bool:
    """Whether logits are compared one by one: at FP32, and at FP16 of ONNX for GPUs, whose graphs are their own."""
    return one.precision is Precision.FP32 or (one.toolchain, one.precision) == (Toolchain.ONNX_GENAI, Precision.FP16)


def measure(one: Cell, folder: Path) -> dict[str, Any]:
    model = inspect(variants.checkpoint(one.variant))
    # What the artifact is allocated for decides LongRoPE's factors: at most what the cell holds for.
    context = min(one.context, 8192, model.facts.max_context)
    converted, size = _convert(one, model, context, folder)
    found: dict[str, Any] = {"bytes": size[0], "predicted": size[1], "notes": converted.notes}
    path = (folder / "beside" if (folder / "beside").exists() else folder / "out") / converted.entry
    if one.toolchain is Toolchain.ONNX_GENAI:
        found |= variant_files.look(path)
        if not variant_files.has_kernels(path):
            return found
    scorer = open_scorer(one.toolchain, Opened(path, one.target, context, 2))
    if one.toolchain is Toolchain.OPENVINO:
        scorer.prepare_logits()
    logits, ids = reference(one.variant), variants.tokens()
    short = scorer.logits(ids[: variants.SHORT], 1)
    expected = logits[str(variants.SHORT)]
    losses = compare(expected, short, ids[1 : variants.SHORT])
    found |= {"divergence": float(losses.divergence.mean()), "short": _difference(short, expected)}
    if is_close(one):
        length = long_length(one)
        found["long"] = _difference(scorer.logits(ids[:length], length - variants.LAST), logits[str(length)])
    return found


def _difference(found: Any, expected: Any) -> float:
    width = min(found.shape[1], expected.shape[1])
    return float(abs(found[:, :width] - expected[:, :width]).max())


def _convert(one: Cell, model: Checkpoint, context: int, folder: Path) -> tuple[Converted, tuple[int, int]]:
    from fleet.core.plan_size import predicted_bytes

    driver = driver_of(one.toolchain)
    recipe = Recipe(toolchain=one.toolchain, precision=one.precision, target=one.target)
    options = driver.resolve(recipe, model)
    out, scratch = folder / "out", folder / "scratch"
    out.mkdir()
    scratch.mkdir()
    job = ConvertJob(
        toolchain=one.toolchain, source=model.path, out=out, scratch=scratch, beside=folder / "beside",
        name=model.name, precision=one.precision,
        target=one.target, options=options, context=context, threads=2,
        calibration=calibration.load(BUNDLED, model.chat).texts[::5] if options.get("calibration") else (),
    )  # fmt: skip
    converted = driver.convert(job, lambda _: None)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return converted, (size, predicted_bytes(read_shape(model.path), recipe, options))


def built(toolchain: Toolchain) -> list[Cell]:
    """The cells that are not refused and have files of their own."""
    every = (one for one in cells() if one.toolchain is toolchain and one.status is not Status.REFUSED)
    return [one for one in every if one.built_for is one.target]


def name_of(one: Cell) -> str:
    return f"{one.variant.name}:{one.precision}:{one.target}"


def main(toolchain: Toolchain, result: Path, names: list[str]) -> None:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    by_name = {name_of(one): one for one in built(toolchain)}
    found: dict[str, Any] = {}
    for name in names:
        with tempfile.TemporaryDirectory(dir=result.parent) as folder:
            try:
                found[name] = measure(by_name[name], Path(folder))
            except Exception as error:
                traceback.print_exc()
                found[name] = {"error": f"{type(error).__name__}: {error}"[:600]}
        result.write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # native runtimes may crash in their destructors


if __name__ == "__main__":
    main(Toolchain(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
