"""MLX safetensors through mlx-lm, on Apple silicon and on Linux alike."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

from agent.contract.manifest import Precision, Target, Toolchain
from agent.contract.profile import Recipe
from fleet.core.allocation import grouped
from fleet.core.plan_memory import kv_element_bytes
from fleet.core.rules import MLX_GROUPS
from fleet.errors import BuildError, ProfileError
from fleet.toolchains.checkpoint.checkpoint import Checkpoint
from fleet.toolchains.checkpoint.phi3_writer import write_json
from fleet.toolchains.checkpoint.source import mirror
from fleet.toolchains.drivers.base import Converted, ConvertJob, SpeakJob
from fleet.toolchains.drivers.mlx_budget import measure_bits
from fleet.toolchains.drivers.mlx_weights import names, replace
from fleet.toolchains.drivers.options import (
    Option,
    check_all_used,
    check_budget,
    check_calibration,
    check_groups,
    complete,
)
from fleet.toolchains.progress import Progress, ProgressCallback
from fleet.toolchains.recovery.choices import Choices, measured
from fleet.toolchains.recovery.gptq import Grid, Quantized
from fleet.toolchains.recovery.recovery import Wanted, check_recovery, recover, recovery_bytes
from fleet.toolchains.recovery.sensitivity import (
    check_same_matrices,
    matrix_columns,
    sensitivities,
    sensitivity_bytes,
)

#: Bits of a weight by the share of the layers that mlx-lm thinks sensitive; ``v_proj`` matches all of ``qkv_proj``.
MIXED = (None, "mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")
#: Bits a weight, on average, that widths can be chosen within.
BUDGETS = (4.25, 9.0)
_GROUPS: Option = (64, MLX_GROUPS)
_INT4_OPTIONS: dict[str, Option] = {
    "group_size": _GROUPS,
    "mixed": (None, MIXED),
    # Part of a matrix's name to its bits, where they are not 4: the first that is found wins.
    "bits_of": ({}, (dict,)),
    # Bits a weight on average, scales and all: each matrix gets the width with which all together lose the least.
    "budget": (None, (None, float, int)),
    # Quantize anew on the calibration text, see ``recovery``, into what mlx-lm laid out.
    "recover": (False, (True, False)),
    "calibration": (None, (None, str)),
}
_INT8_OPTIONS: dict[str, Option] = {"group_size": _GROUPS}
_BITS = {Precision.INT4: 4, Precision.INT8: 8}
_DTYPES = {Precision.FP16: "float16", Precision.BF16: "bfloat16", Precision.FP32: "float32"}


class Mlx:
    """4 and 8 bits, FP16, BF16 and FP32. What is not quantized beside quantized weights is FP16."""

    name: ClassVar[Toolchain] = Toolchain.MLX
    extra: ClassVar[str] = "quantize"
    packages: ClassVar[tuple[str, ...]] = ("mlx", "mlx-lm", "transformers")

    def resolve(self, recipe: Recipe, model: Checkpoint) -> dict[str, Any]:
        """Group size, and at INT4 one of mlx-lm's mixed recipes."""
        what = f"mlx {recipe.precision}"
        if recipe.target not in (Target.CPU, Target.METAL):
            raise ProfileError(f"{what}: MLX runs on metal and cpu, not on {recipe.target}")
        known = {Precision.INT4: _INT4_OPTIONS, Precision.INT8: _INT8_OPTIONS}.get(recipe.precision, {})
        options = complete(what, recipe.options, known)
        _check(what, options)
        check_recovery(what, options, model)
        if options.get("budget") is not None:
            check_budget(what, options["budget"], BUDGETS, options, ("mixed", "bits_of"), model)
        check_calibration(what, options, ("recover", "budget"))
        check_groups(what, model.shape, options.get("group_size", -1), MLX_GROUPS)
        return options

    def peak_memory_bytes(self, recipe: Recipe, model: Checkpoint) -> int:
        """Estimate the memory: weights are read lazily; what is written is held. A recovery has a copy of its own."""
        converting = model.weights_bytes + 2 * model.facts.parameters + 2**30
        if recipe.options.get("budget"):
            largest = model.shape.embedding.weights
            converting = max(converting, sensitivity_bytes(model.facts.parameters, largest))
        return converting + recovery_bytes(recipe, model, output=True)

    def convert(self, job: ConvertJob, progress: ProgressCallback) -> Converted:
        """Convert with mlx-lm."""
        progress(Progress("loading the toolchain"))
        source = mirror(job.source, job.scratch / "source")
        notes = _bake_short_factors(source / "config.json", job.context)
        from mlx_lm.convert import convert

        options = job.options
        if options.get("budget"):
            options, notes["allocated"] = _within_budget(job, source, progress)
        bits = _BITS.get(job.precision)
        out = job.scratch / "mlx"
        progress(Progress("quantizing" if bits else "converting"))
        choose = _Chosen(options) if options.get("bits_of") else None
        convert(
            str(source), mlx_path=str(out), quantize=bits is not None, q_bits=bits,
            q_group_size=job.options.get("group_size"), dtype=_DTYPES.get(job.precision, "float16"),
            quant_predicate=job.options.get("mixed") or choose,
        )  # fmt: skip
        if choose and not options.get("budget"):
            named = {name: name.rpartition(".")[2] for name in choose.asked}
            check_all_used("mlx: bits_of", job.options["bits_of"], lambda part, name: part in name, named)
        if job.options.get("recover"):
            notes["recovered"] = replace(out, _recovered(job, options, source, out, progress))
        _keep(out, job.out)
        recipe = Recipe(toolchain=job.toolchain, precision=job.precision, target=job.target)
        return Converted(entry=".", kv_element_bytes=kv_element_bytes(recipe), notes=notes)

    def speak(self, job: SpeakJob) -> str:
        """Greedy."""
        from mlx_lm import load
        from mlx_lm.generate import generate

        model, tokenizer, *_ = load(str(job.folder / job.entry))
        widen_quantized(model)
        ids = tokenizer.encode(job.prompt, add_special_tokens=False)
        return str(generate(model, tokenizer, prompt=ids, max_tokens=job.max_tokens))


def widen_quantized(model: Any) -> None:
    """Without Metal, compute in float32, as the agent does: MLX's CPU kernels are 40 times slower in float16."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    if not mx.metal.is_available() and any(name.endswith(".scales") for name, _ in tree_flatten(model.parameters())):
        model.set_dtype(mx.float32)


def _check(what: str, options: dict[str, Any]) -> None:
    bits_of = options.get("bits_of", {})
    if wrong := {name: bits for name, bits in bits_of.items() if bits not in (2, 3, 4, 5, 6, 8)}:
        raise ProfileError(f"{what}: bits_of can be 2, 3, 4, 5, 6 or 8, not {wrong}")
    if options.get("mixed") and (bits_of or options["recover"]):
        raise ProfileError(f"{what}: mixed goes neither with bits_of nor with recover")


def _bits(options: dict[str, Any], name: str) -> int:
    return next((int(bits) for part, bits in options["bits_of"].items() if part in name), 4)


class _Chosen:
    """mlx-lm asks it for each module: False, or how to quantize. It remembers the names it was ``asked`` for."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self.asked: set[str] = set()

    def __call__(self, name: str, module: Any, *_: Any) -> Any:
        if not hasattr(module, "to_quantized"):
            return False
        self.asked.add(name)
        return {"group_size": self._options["group_size"], "bits": _bits(self._options, name)}


def _within_budget(job: ConvertJob, source: Path, progress: ProgressCallback) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options with the bits of each matrix, and what the manifest says of them."""
    if job.widths:
        widths, loss = job.widths, dict[str, Any]()
        check_same_matrices(widths, (name.removesuffix(".weight") for name in matrix_columns(source)))
    else:
        widths, loss = _chosen(job, source, progress)
    notes = {"bits": dict(sorted(Counter(widths.values()).items())), **loss, "matrices": grouped(widths)}
    return job.options | {"bits_of": {name: int(bits) for name, bits in widths.items()}}, notes


def _chosen(job: ConvertJob, source: Path, progress: ProgressCallback) -> tuple[dict[str, str], dict[str, Any]]:
    def measure() -> Choices:
        information = sensitivities(source, job.calibration, threads=job.threads, progress=progress)
        return measure_bits(source, job.options["group_size"], information, progress)

    found = measured(job.choices, measure).spend(job.options["budget"])
    return found.names, {"expected_kl": round(found.loss, 4)}


def _recovered(
    job: ConvertJob, options: dict[str, Any], source: Path, made: Path, progress: ProgressCallback
) -> dict[str, Quantized]:
    def grid(name: str) -> Grid:
        return Grid(_bits(options, name), options["group_size"], "affine")

    # The last product is a matrix of its own, or the embedding's.
    wanted = Wanted(grid, output=grid("lm_head" if "lm_head.scales" in names(made) else "model.embed_tokens"))
    return recover(source, job.calibration, wanted, threads=job.threads, progress=progress)


def _bake_short_factors(path: Path, context: int) -> dict[str, Any]:
    """MLX ignores LongRoPE's ``short_factor`` and takes ``long_factor`` at every length.

    Within the original context the short factors alone are right, so there they are given in both places. Beyond it
    an artifact would be wrong for short prompts.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    scaling = config.get("rope_scaling") or {}
    if scaling.get("type") not in ("longrope", "su"):
        return {}
    original = int(config["original_max_position_embeddings"])
    if context > original:
        raise BuildError(f"MLX is wrong for LongRoPE beyond {original} tokens, and the profile's context is {context}; "
                         "lower the profile's context or take another toolchain")  # fmt: skip
    write_json(path, config | {"rope_scaling": scaling | {"long_factor": scaling["short_factor"]}})
    return {"rope_factors": "short"}


def _keep(made: Path, out: Path) -> None:
    """mlx-lm writes a model card with its version and the path it read from; nothing needs it."""
    for file in sorted(made.iterdir()):
        if file.is_file() and file.name != "README.md":
            file.replace(out / file.name)
    if not any(out.glob("*.safetensors")):
        raise BuildError("mlx-lm wrote no weights; the log says why")
