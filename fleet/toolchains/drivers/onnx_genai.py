"""ONNX through the model builder of ONNX Runtime GenAI, offline."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, ClassVar

from agent.contract.manifest import Precision, Target, Toolchain
from agent.contract.profile import Recipe
from fleet.core.rules import BUILDS
from fleet.errors import ProfileError
from fleet.toolchains.checkpoint.checkpoint import Checkpoint
from fleet.toolchains.checkpoint.phi3_writer import write_json
from fleet.toolchains.checkpoint.source import mirror
from fleet.toolchains.drivers.base import Converted, ConvertJob, SpeakJob
from fleet.toolchains.drivers.onnx_graph import OnnxGraph
from fleet.toolchains.drivers.onnx_window import attend_within_window
from fleet.toolchains.drivers.options import Option, check_budget, check_calibration, check_groups, complete
from fleet.toolchains.drivers.watching import Watch, watching
from fleet.toolchains.progress import Progress, ProgressCallback
from fleet.toolchains.recovery.choices import Budget
from fleet.toolchains.recovery.gptq import Grid
from fleet.toolchains.recovery.grids import Offer, Requantized, within_budget
from fleet.toolchains.recovery.recovery import Wanted, check_recovery, recover, recovery_bytes
from fleet.toolchains.recovery.sensitivity import sensitivity_bytes

_BLOCK_SIZES = (16, 32, 64, 128, 256)
_COMMON: dict[str, Option] = {"block_size": (32, _BLOCK_SIZES), "symmetric": (True, (True, False))}
_QUANTIZED: dict[Precision, dict[str, Option]] = {
    Precision.INT4: _COMMON | {
        "algorithm": ("default", ("default", "rtn", "k_quant")),
        # Quantize anew on the calibration text, see ``recovery``, into what the builder laid out.
        "recover": (False, (True, False)),
        # What is INT8 all the same: the last product, or that and the layers that llama.cpp thinks sensitive.
        "mixed": (None, (None, "last", "layers")),
        # Bits a weight on average, scales and all: each matrix gets the bits and blocks with which all together lose
        # the least.
        "budget": (None, (None, float, int)),
        "calibration": (None, (None, str)),
    },
    Precision.INT8: _COMMON | {"algorithm": ("default", ("default", "rtn", "k_quant"))},
}  # fmt: skip
_BITS = {Precision.INT4: 4, Precision.INT8: 8}
#: Bits a weight, on average, that widths can be chosen within.
BUDGETS = (4.25, 8.5)
#: The blocks that a budget chooses among: sixteen weights with a scale of four bytes are six bits each.
_BUDGET_BLOCKS = (32, 64, 128, 256)
#: Options that a budget stands for.
_BY_BUDGET = ("block_size", "symmetric", "algorithm", "mixed")
#: What the builder lays out for a budget, before it is replaced.
_LAID_OUT: dict[str, Any] = {"block_size": 32, "symmetric": True, "algorithm": "default", "mixed": None}
#: How the embedding is stored beside products of eight bits, and where it is not the last product's.
_EMBEDDING = Grid(8, 32, "symmetric")
_MIXED = {"last": "last_matmul:int8", "layers": "last_matmul:int8,mixed_layers:int8"}


class OnnxGenai:
    """INT4, INT8 and FP32 for the CPU; INT4 and FP16 for GPUs, which building does not need."""

    name: ClassVar[Toolchain] = Toolchain.ONNX_GENAI
    extra: ClassVar[str] = "quantize-onnx"
    packages: ClassVar[tuple[str, ...]] = (
        "onnxruntime-genai",
        "onnxruntime",
        "onnx",
        "onnx-ir",
        "torch",
        "transformers",
    )

    def resolve(self, recipe: Recipe, model: Checkpoint) -> dict[str, Any]:
        """Options of the builder for quantized precisions; none otherwise."""
        if recipe.precision not in BUILDS[Toolchain.ONNX_GENAI].get(recipe.target, ()):
            raise ProfileError(f"onnx_genai does not build {recipe.precision} for {recipe.target}")
        what = f"onnx_genai {recipe.precision} for {recipe.target}"
        known = _QUANTIZED.get(recipe.precision, {})
        if known:
            # Accuracy level 4: activations in INT8 too, what the builder takes on a CPU; 0 leaves it to the device.
            known = known | {"accuracy_level": (4 if recipe.target is Target.CPU else 0, (0, 1, 2, 3, 4))}
        options = complete(what, recipe.options, known)
        check_recovery(what, options, model)
        check_calibration(what, options, ("recover", "budget"))
        if options.get("budget") is not None:
            check_budget(what, options["budget"], BUDGETS, recipe.options, _BY_BUDGET, model)
            if recipe.target is not Target.CPU:
                raise ProfileError(f"{what}: budget is for cpu, whose kernels have all widths")
            return {name: value for name, value in options.items() if name not in _BY_BUDGET}
        if options.get("recover") and (options["mixed"] or options["algorithm"] == "k_quant"):
            raise ProfileError(f"{what}: recover goes with algorithm default or rtn, and not with mixed")
        if options.get("recover"):  # the builder pads rows, a recovery does not
            check_groups(what, model.shape, options["block_size"], _BLOCK_SIZES)
        if options.get("algorithm") == "default" and not options["symmetric"]:
            # Its embedding reads zero points that are not there, where it shares the last product's weights.
            raise ProfileError(
                f"{what}: the builder lays asymmetric weights out wrongly by default; take rtn or k_quant"
            )
        return options

    def peak_memory_bytes(self, recipe: Recipe, model: Checkpoint) -> int:
        """Estimate the memory: weights in float32 as loaded, and what is written, beside the libraries."""
        converting = 4 * model.facts.parameters * 3 + 2**30
        if recipe.options.get("budget"):
            largest = model.shape.embedding.weights
            converting = max(converting, sensitivity_bytes(model.facts.parameters, largest))
        return converting + recovery_bytes(recipe, model, output=True)

    def convert(self, job: ConvertJob, progress: ProgressCallback) -> Converted:
        """Run the builder, and take out what differs from build to build."""
        progress(Progress("loading the toolchain"))
        source = mirror(job.source, job.scratch / "source")
        layers = int(json.loads((source / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"])
        watches = (
            Watch(re.compile(r"^Reading layer (\d+)"), "reading layers", layers),
            Watch(re.compile(r"complete quantization of /model/layers\.(\d+)/"), "quantizing", layers),
            Watch(re.compile(r"^Saving ONNX"), "writing"),
        )
        with watching(watches, progress):
            _run_builder(job, source)
        attend_within_window(job.out)
        progress(Progress("checking"))
        graph = OnnxGraph(job.out / "model.onnx")
        notes = graph.check(_BITS[job.precision], _LAID_OUT | job.options) if job.options else {}
        if job.options.get("budget") or job.options.get("recover"):
            notes |= _requantize(job, source, graph, progress)
        if job.options and job.target is Target.CPU:
            tied = bool(json.loads((source / "config.json").read_text(encoding="utf-8")).get("tie_word_embeddings"))
            graph.quantize_embedding(_EMBEDDING, tied=tied)
        graph.unstamp()
        _limit_context(job.out / "genai_config.json", job.context)
        return Converted(entry=".", kv_element_bytes=graph.kv_element_bytes(), notes=notes)

    def speak(self, job: SpeakJob) -> str:
        """Greedy, on the CPU."""
        import onnxruntime_genai as og

        model = og.Model(str(job.folder / job.entry))
        tokenizer = og.Tokenizer(model)
        ids = tokenizer.encode(job.prompt)
        params = og.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=min(job.context, len(ids) + job.max_tokens))
        generator = og.Generator(model, params)
        generator.append_tokens(ids)
        made: list[int] = []
        while not generator.is_done() and len(made) < job.max_tokens:
            generator.generate_next_token()
            made.append(int(generator.get_next_tokens()[0]))
        return str(tokenizer.decode(made))


def _run_builder(job: ConvertJob, source: Path) -> None:
    from onnxruntime_genai.models import builder

    pairs = {}
    if job.options:
        options = _LAID_OUT | job.options
        pairs = {
            "algo_config": options["algorithm"],
            "block_size": options["block_size"],
            "is_symmetric": str(options["symmetric"]).lower(),
            "accuracy_level": options["accuracy_level"],
        }
        if options["mixed"]:
            pairs["matmul_mixed_precision"] = _MIXED[options["mixed"]]
    arguments = ("", str(source), str(job.out), str(job.precision), str(job.target), str(job.scratch / "cache"))
    extra = builder.parse_extra_options(*arguments, [f"{key}={value}" for key, value in pairs.items()])
    builder.create_model(*arguments, **extra)


def _requantize(job: ConvertJob, source: Path, graph: OnnxGraph, progress: ProgressCallback) -> dict[str, Any]:
    """Put matrices in the place of the builder's: within the budget, recovered, or both; what the manifest says."""
    options = job.options
    if options.get("budget"):
        made = within_budget(
            source, job.calibration, Budget(options["budget"], job.widths, job.choices), _offers,
            recovered=options["recover"], threads=job.threads, progress=progress,
        )  # fmt: skip
    else:
        grid = Grid(4, options["block_size"], "symmetric" if options["symmetric"] else "asymmetric")
        wanted = Wanted(lambda _: grid, output=grid)
        matrices = recover(source, job.calibration, wanted, threads=job.threads, progress=progress)
        made = Requantized(matrices, dict.fromkeys(matrices, grid), {})
    replaced = graph.replace(made.matrices, made.grids)
    recovered = {"recovered": replaced} if options["recover"] else {}
    return {**made.notes, **recovered, "products": graph.widths()}


def _offers(columns: int) -> list[Offer]:
    """Four bits with zero points, and eight without, in the blocks that divide a row; scales are float32.

    At eight bits small blocks gain next to nothing, so that there is the largest alone.
    """
    blocks = [block for block in _BUDGET_BLOCKS if not columns % block]
    offers = [Offer(Grid(4, block, "asymmetric"), 4 + 36 / block) for block in blocks]
    return [*offers, Offer(Grid(8, blocks[-1], "symmetric"), 8 + 32 / blocks[-1])]


def _limit_context(path: Path, context: int) -> None:
    """The runtime reserves the KV cache for ``max_length`` at once where it shares past and present."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["search"]["max_length"] = min(context, config["model"]["context_length"])
    write_json(path, config)
