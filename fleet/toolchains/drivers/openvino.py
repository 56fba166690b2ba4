"""OpenVINO IR: exported by optimum-intel, its weights compressed by NNCF, tokenizer and detokenizer beside it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from agent.contract.manifest import Precision, Target, Toolchain
from agent.contract.profile import Recipe
from fleet.core.rules import NPU_GROUPS, OPENVINO_GROUPS
from fleet.errors import BuildError, ProfileError
from fleet.toolchains.checkpoint.checkpoint import Checkpoint
from fleet.toolchains.checkpoint.source import mirror
from fleet.toolchains.drivers.base import Converted, ConvertJob, SpeakJob
from fleet.toolchains.drivers.openvino_weights import Constants, compress
from fleet.toolchains.drivers.options import Option, check_budget, check_calibration, check_groups, complete
from fleet.toolchains.drivers.watching import Watch, watching
from fleet.toolchains.progress import Progress, ProgressCallback
from fleet.toolchains.recovery.choices import Budget
from fleet.toolchains.recovery.gptq import Grid
from fleet.toolchains.recovery.grids import Offer, within_budget
from fleet.toolchains.recovery.recovery import Wanted, check_recovery, recover, recovery_bytes
from fleet.toolchains.recovery.sensitivity import sensitivity_bytes

MODEL = "openvino_model.xml"
_TARGETS = (Target.CPU, Target.GPU, Target.NPU)
_INT4_OPTIONS: dict[str, Option] = {
    "symmetric": (False, (True, False)),
    # Weights that share a scale; -1 is a whole row.
    "group_size": (64, OPENVINO_GROUPS),
    # Share of the weights at INT4; the rest, the most sensitive ones, at INT8.
    "ratio": (1.0, (int, float)),
    # Embeddings and the last layer at INT4 too.
    "all_layers": (False, (True, False)),
    "calibration": (None, (None, str)),
    "awq": (False, (True, False)),
    "scale_estimation": (False, (True, False)),
    "gptq": (False, (True, False)),
    "lora_correction": (False, (True, False)),
    # Quantize anew on the calibration text, see ``recovery``, into what NNCF laid out.
    "recover": (False, (True, False)),
    # Bits a weight on average, scales and all: each matrix, the embedding among them, gets the bits and groups with
    # which all together lose the least.
    "budget": (None, (None, float, int)),
}
_INT8_OPTIONS: dict[str, Option] = {"symmetric": (False, (True, False))}
_NEEDS_TEXT = ("scale_estimation", "gptq", "lora_correction")
#: NNCF's own ways to lose less, which ``recover`` would undo.
_OF_NNCF = ("awq", "scale_estimation", "gptq", "lora_correction", "all_layers")
#: Bits a weight, on average, that widths can be chosen within; the options that a budget stands for.
BUDGETS = (4.25, 8.5)
_BY_BUDGET = ("group_size", "symmetric", "ratio", *_OF_NNCF)
#: Groups that a budget chooses among, at four bits; a scale of two bytes and a zero point of four bits each.
_BUDGET_GROUPS = (32, 64, 128)
#: Tokens of one calibration sample: statistics grow with it, and so does memory.
_SAMPLE_TOKENS = 256


class OpenVino:
    """INT4, INT8, FP16 and FP32 for CPU, GPU and NPU."""

    name: ClassVar[Toolchain] = Toolchain.OPENVINO
    extra: ClassVar[str] = "quantize"
    packages: ClassVar[tuple[str, ...]] = (
        "openvino", "openvino-tokenizers", "openvino-genai", "optimum-intel", "nncf", "torch", "transformers",
    )  # fmt: skip

    def resolve(self, recipe: Recipe, model: Checkpoint) -> dict[str, Any]:
        """See ``_INT4_OPTIONS``. An NPU takes symmetric INT4 in groups of 128 or whole rows only."""
        what = f"openvino {recipe.precision} for {recipe.target}"
        if recipe.target not in _TARGETS:
            raise ProfileError(f"{what}: OpenVINO has no such device; it has {', '.join(_TARGETS)}")
        if recipe.precision is Precision.INT8:
            return complete(what, recipe.options, _INT8_OPTIONS)
        if recipe.precision is not Precision.INT4:
            if recipe.precision is Precision.BF16:
                raise ProfileError(f"{what}: OpenVINO keeps weights in FP16 or FP32")
            return complete(what, recipe.options, {})
        npu = recipe.target is Target.NPU
        fitting = (group for group in ((128,) if npu else (64, 32)) if not model.shape.misfit(group))
        defaults = {"group_size": next(fitting, -1)} | ({"symmetric": True} if npu else {})
        options = complete(what, defaults | recipe.options, _INT4_OPTIONS)
        if options["budget"] is not None:
            check_budget(what, options["budget"], BUDGETS, recipe.options, _BY_BUDGET, model)
            if npu:
                raise ProfileError(f"{what}: an NPU compiles one width for all; leave out budget")
            return {name: value for name, value in options.items() if name not in _BY_BUDGET}
        _check_int4(what, options, recipe.target)
        check_groups(what, model.shape, options["group_size"], NPU_GROUPS if npu else OPENVINO_GROUPS)
        check_recovery(what, options, model)
        return options

    def peak_memory_bytes(self, recipe: Recipe, model: Checkpoint) -> int:
        """The checkpoint as loaded and as traced; a calibration runs it beside its compressed copy."""
        calibrated = 4 * model.facts.parameters if recipe.options.get("calibration") else 0
        budget = bool(recipe.options.get("budget"))
        if budget:
            calibrated = sensitivity_bytes(model.facts.parameters, model.shape.embedding.weights)
        return 2 * model.weights_bytes + calibrated + 3 * 2**30 + recovery_bytes(recipe, model, output=budget)

    def convert(self, job: ConvertJob, progress: ProgressCallback) -> Converted:
        """Export, then compress what was exported."""
        progress(Progress("loading the toolchain"))
        source = mirror(job.source, job.scratch / "source")
        quantized = job.precision in (Precision.INT4, Precision.INT8)
        out = job.scratch / "whole" if quantized else job.out
        _export(source, out, "fp16" if job.precision is Precision.FP16 else "fp32", progress)
        notes: dict[str, Any] = {}
        if quantized:
            notes = _within_budget(job, out, progress) if job.options.get("budget") else _compress(job, out, progress)
            for file in sorted(out.iterdir()):
                if file.is_file() and file.stem != Path(MODEL).stem:
                    file.replace(job.out / file.name)
        # What it says is in openvino_tokenizer.xml, which is what the runtime reads.
        (job.out / "tokenizer.json").unlink(missing_ok=True)
        return Converted(entry=".", kv_element_bytes=2, notes=notes)

    def speak(self, job: SpeakJob) -> str:
        """Greedy, on the CPU, whatever device it was built for."""
        import openvino_genai

        pipeline = openvino_genai.LLMPipeline(str(job.folder / job.entry), "CPU")
        answer = pipeline.generate(
            job.prompt, max_new_tokens=job.max_tokens, do_sample=False, apply_chat_template=False
        )
        return str(answer)


def _check_int4(what: str, options: dict[str, Any], target: Target) -> None:
    if not 0 < options["ratio"] <= 1:  # NNCF takes 0 for not given
        raise ProfileError(f"{what}: ratio is a share, more than 0 and at most 1, not {options['ratio']}; or take int8")
    if wanting := [name for name in _NEEDS_TEXT if options[name] and not options["calibration"]]:
        raise ProfileError(f"{what}: {', '.join(wanting)} needs a calibration: 'bundled', or a text file")
    if options["ratio"] == 1:  # else the text tells which layers are sensitive
        check_calibration(what, options, (*_NEEDS_TEXT, "awq", "recover"))
    if options["recover"] and (undone := [name for name in _OF_NNCF if options[name]]):
        raise ProfileError(f"{what}: recover does not go with {', '.join(undone)}")
    if options["gptq"] and options["lora_correction"]:
        raise ProfileError(f"{what}: gptq and lora_correction exclude each other")
    if target is not Target.NPU:
        return
    if not options["symmetric"] or options["ratio"] != 1 or options["group_size"] not in NPU_GROUPS:
        raise ProfileError(f"{what}: an NPU compiles symmetric weights with ratio 1.0 and group_size -1 or 128 only")


def _export(source: Path, out: Path, dtype: str, progress: ProgressCallback) -> None:
    from optimum.exporters.openvino.__main__ import main_export
    from optimum.intel.openvino.configuration import OVConfig

    progress(Progress("exporting"))
    main_export(
        model_name_or_path=str(source), output=out, task="text-generation-with-past", library_name="transformers",
        ov_config=OVConfig(dtype=dtype), stateful=True, convert_tokenizer=True,
    )  # fmt: skip
    for name in (MODEL, "openvino_tokenizer.xml", "openvino_detokenizer.xml"):
        if not (out / name).is_file():
            raise BuildError(f"optimum-intel wrote no {name}; the log says why")


def _compress(job: ConvertJob, whole: Path, progress: ProgressCallback) -> dict[str, Any]:
    import nncf
    import openvino

    # NNCF says what it did in its log only; the table of precisions is kept there.
    logging.getLogger("nncf").setLevel(logging.INFO)
    model = openvino.Core().read_model(whole / MODEL)
    arguments = _arguments(job)
    if job.options.get("calibration") and not job.options.get("recover"):
        samples = list(_samples(whole, model, job.calibration))
        arguments |= {"dataset": nncf.Dataset(samples), "subset_size": len(samples)}
    watches = (
        Watch(re.compile(r"Statistics collection .*?(\d+)/(\d+)"), "collecting statistics"),
        Watch(re.compile(r"Applying AWQ .*?(\d+)%"), "AWQ", 100),
        Watch(re.compile(r"Applying Scale Estimation .*?(\d+)%"), "estimating scales", 100),
        Watch(re.compile(r"Applying GPTQ .*?(\d+)%"), "GPTQ", 100),
        Watch(re.compile(r"Applying Weight Compression .*?(\d+)%"), "compressing", 100),
    )
    skipped = _Skipped()
    logging.getLogger("nncf").addHandler(skipped)
    with watching(watches, progress):
        compressed = nncf.compress_weights(model, **arguments)
    if skipped.lines:
        raise BuildError(f"NNCF left out what the recipe asks for: {skipped.lines[0]}")
    notes: dict[str, Any] = {"weights": _count_types(compressed)}
    if job.options.get("recover"):
        notes["recovered"] = _recover(job, compressed, progress)
    openvino.save_model(compressed, job.out / MODEL, compress_to_fp16=False)
    return notes


def _within_budget(job: ConvertJob, whole: Path, progress: ProgressCallback) -> dict[str, Any]:
    import openvino

    made = within_budget(
        job.scratch / "source", job.calibration, Budget(job.options["budget"], job.widths, job.choices), _offers,
        recovered=job.options["recover"], threads=job.threads, progress=progress,
    )  # fmt: skip
    model = openvino.Core().read_model(whole / MODEL)
    compress(model, made.matrices, made.grids)
    recovered = {"recovered": len(made.matrices)} if job.options["recover"] else {}
    openvino.save_model(model, job.out / MODEL, compress_to_fp16=False)
    return {**made.notes, **recovered, "weights": _count_types(model)}


def _offers(columns: int) -> list[Offer]:
    """Four bits in groups that divide a row, and eight in whole rows, all with zero points."""
    groups = [group for group in _BUDGET_GROUPS if not columns % group]
    offers = [Offer(Grid(4, group, "asymmetric"), 4 + 20 / group) for group in groups]
    return [*offers, Offer(Grid(8, columns, "asymmetric"), 8 + 24 / columns)]


class _Skipped(logging.Handler):
    """NNCF goes on without an algorithm that finds nothing to do, and says so in its log only."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "will be skipped" in record.getMessage():
            self.lines.append(record.getMessage())


def _recover(job: ConvertJob, compressed: Any, progress: ProgressCallback) -> int:
    constants = Constants(compressed)
    source = job.scratch / "source"
    wanted = Wanted(constants.grid_of)
    found = recover(source, job.calibration, wanted, threads=job.threads, progress=progress)
    for name, matrix in found.items():
        constants.replace(name, matrix)
    return len(found)


def _arguments(job: ConvertJob) -> dict[str, Any]:
    import nncf

    suffix = "SYM" if job.options["symmetric"] else "ASYM"
    if job.precision is Precision.INT8:
        return {"mode": nncf.CompressWeightsMode[f"INT8_{suffix}"]}
    # It would take another size than the recipe's, and say so in its log only.
    fallback = nncf.GroupSizeFallbackMode.ERROR
    return {
        "mode": nncf.CompressWeightsMode[f"INT4_{suffix}"],
        "group_size": job.options["group_size"],
        "ratio": float(job.options["ratio"]),
        "all_layers": job.options["all_layers"],
        "awq": job.options["awq"],
        "scale_estimation": job.options["scale_estimation"],
        "gptq": job.options["gptq"],
        "lora_correction": job.options["lora_correction"],
        "advanced_parameters": nncf.AdvancedCompressionParameters(group_size_fallback_mode=fallback),
    }


def _samples(whole: Path, model: Any, texts: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Inputs of the exported model: shapes (1, tokens), and (1) for ``beam_idx``."""
    import numpy as np
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(whole)
    names = {name for port in model.inputs for name in port.get_names()}
    for text in texts:
        ids = tokenizer(text, return_tensors="np", add_special_tokens=False).input_ids[:, :_SAMPLE_TOKENS]
        ids = ids.astype(np.int64)
        sample = {"input_ids": ids, "attention_mask": np.ones_like(ids), "beam_idx": np.zeros(1, np.int32)}
        if "position_ids" in names:
            sample["position_ids"] = np.arange(ids.shape[1], dtype=np.int64)[None]
        yield sample


def _count_types(model: Any) -> dict[str, int]:
    """Return weights by element type, as they were written: the proof that an option took effect."""
    counts: dict[str, int] = {}
    for node in model.get_ops():
        if node.get_type_name() == "Constant" and len(node.get_output_shape(0)) >= 2:
            size = 1
            for extent in node.get_output_shape(0):
                size *= int(extent)
            name = node.get_output_element_type(0).get_type_name()
            counts[name] = counts.get(name, 0) + size
    return {name: count for name, count in sorted(counts.items()) if count >= 4096}
