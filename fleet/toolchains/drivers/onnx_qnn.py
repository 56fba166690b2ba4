"""Static graphs for Qualcomm's NPU, compiled on any x86-64 machine by the compiler in ``onnxruntime-qnn``.

The graphs before their compilation are kept beside the artifact: ONNX Runtime computes them on a CPU, which is how the
loss of an artifact is measured without a Snapdragon.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from agent.contract.manifest import Precision, Toolchain
from agent.contract.profile import Recipe
from agent.contract.static_graph import DESCRIPTION, StaticEmbedding, StaticModel, StaticPart
from fleet.core.plan_shape import shape_of
from fleet.core.plan_size import qnn_bits, qnn_parts
from fleet.core.rules import BUILDS, QNN_BLOCK
from fleet.errors import ProfileError
from fleet.toolchains.checkpoint.checkpoint import Checkpoint
from fleet.toolchains.checkpoint.checkpoint_chat import end_ids
from fleet.toolchains.checkpoint.checkpoint_files import read_json
from fleet.toolchains.checkpoint.source import mirror
from fleet.toolchains.drivers.base import Converted, ConvertJob, SpeakJob
from fleet.toolchains.drivers.options import Option, check_groups, complete
from fleet.toolchains.drivers.static_cpu import StaticCpu
from fleet.toolchains.progress import Progress, ProgressCallback
from fleet.toolchains.qnn.compiling import SOC_OF, compile_graphs
from fleet.toolchains.qnn.graph import Sizes, WeightFile, head_graph, layers_graph
from fleet.toolchains.qnn.network import Ranges, equalise, fold_gains, heads_of, observe
from fleet.toolchains.qnn.weights import Matrices, embedding, grid_of, rope
from fleet.toolchains.recovery.gptq import Quantized
from fleet.toolchains.recovery.recovery import Wanted, check_recovery, load, recover_model, recovery_bytes, use_threads

_COMMON: dict[str, Option] = {
    # Generation of the HTP: 73 is Snapdragon X and 8 Gen 2, 75 is 8 Gen 3, 79 is 8 Elite.
    "htp_arch": (73, tuple(SOC_OF)),
    # One binary for both graphs of a part, half the bytes. The simulator does not load such a binary.
    "share_weights": (True, (True, False)),
    # Quantize on the calibration text, see ``recovery``, or round.
    "recover": (True, (True, False)),
    # Tokens of a prompt that go through at once.
    "window": (64, (16, 32, 64, 128)),
    # The ranges of all activations come from it.
    "calibration": ("bundled", (str,)),
}
_OPTIONS: dict[Precision, dict[str, Option]] = {
    Precision.INT8: _COMMON,
    # Queries, keys and values lose most at 4 bits, and are few; then the last matrix.
    Precision.INT4: _COMMON | {"attention_bits": (8, (4, 8)), "head_bits": (8, (4, 8))},
}
_BITS = {Precision.INT4: 4, Precision.INT8: 8}
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
_SIZES = "sizes.bin"
#: Numbers of a row of the embedding that share a scale.
_EMBEDDING_GROUP = 32
#: Beyond the largest distance of two scores: what a token must not see has no share that 16 bits could tell from 0.
_HIDDEN = 16.0
#: Hidden states are held at most so large: their squares, summed, stay far within float16.
_LARGEST_HIDDEN = 64.0


class OnnxQnn:
    """INT4 and INT8 weights, 16-bit activations, a cache of 8 bits, for the HTP in Snapdragon."""

    name: ClassVar[Toolchain] = Toolchain.ONNX_QNN
    extra: ClassVar[str] = "quantize-qnn"
    packages: ClassVar[tuple[str, ...]] = ("onnxruntime-qnn", "onnxruntime", "onnx", "torch", "transformers")

    def resolve(self, recipe: Recipe, model: Checkpoint) -> dict[str, Any]:
        """Options as in ``_OPTIONS``; INT4 in blocks of 64 alone, which every row must divide into."""
        what = f"onnx_qnn {recipe.precision} for {recipe.target}"
        if recipe.precision not in BUILDS[Toolchain.ONNX_QNN].get(recipe.target, ()):
            raise ProfileError(f"onnx_qnn does not build {recipe.precision} for {recipe.target}")
        options = complete(what, recipe.options, _OPTIONS[recipe.precision])
        check_recovery(what, options, model)
        if recipe.precision is Precision.INT4:
            check_groups(what, model.shape, QNN_BLOCK, (QNN_BLOCK,))
        return options

    def peak_memory_bytes(self, recipe: Recipe, model: Checkpoint) -> int:
        """Estimate the memory: the network in float32, and what the compiler takes for the largest part."""
        resolved = recipe.model_copy(update={"options": _defaults(recipe) | recipe.options})
        compiler = 6 * max(model.shape.embedding.weights, 4 * model.facts.parameters // len(qnn_parts(model.shape, 8)))
        return 4 * model.facts.parameters + 2**30 + max(compiler, recovery_bytes(resolved, model, output=True))

    def convert(self, job: ConvertJob, progress: ProgressCallback) -> Converted:
        """Make the network ready, write its graphs, compile them."""
        progress(Progress("loading the toolchain"))
        use_threads(job.threads)
        source = mirror(job.source, job.scratch / "source")
        return _Conversion(job, source, progress).run()

    def speak(self, job: SpeakJob) -> str:
        """Greedy, with the graphs before their compilation, on the CPU."""
        return StaticCpu(job.folder / job.entry, job.threads).speak(job.prompt, job.max_tokens)


def _defaults(recipe: Recipe) -> dict[str, Any]:
    return {name: default for name, (default, _) in _OPTIONS.get(recipe.precision, {}).items()}


class _Conversion:
    def __init__(self, job: ConvertJob, source: Path, progress: ProgressCallback) -> None:
        self._job, self._source, self._progress = job, source, progress
        self._bits = _BITS[job.precision]
        self._graphs = job.beside
        self._graphs.mkdir()

    def run(self) -> Converted:
        job = self._job
        model, ids = load(self._source, job.calibration)
        fold_gains(model)
        equalise(model, ids, self._progress)
        recovered: dict[str, Quantized] = {}
        if job.options.get("recover"):
            columns = {
                f"{name}.weight": part.weight.shape[1] for name, part in model.named_modules() if _is_matrix(part)
            }
            grids = {name: grid_of(self._bits_of(name), count) for name, count in columns.items()}
            wanted = Wanted(grids.get, grids["lm_head.weight"])
            recovered = recover_model(model, ids, wanted, self._progress)
        ranges = observe(model, ids, self._progress)
        described = self._written(model, ranges, Matrices(model, self._bits_of, recovered))
        del model, recovered
        compiled = self._compiled(described)
        notes: dict[str, Any] = {
            "soc_model": SOC_OF[job.options["htp_arch"]],
            "parts": len(described.parts),
            "activations": "uint16",
            "cache": "uint8",
        }
        for folder, description in ((self._graphs, described), (job.out, compiled)):
            (folder / DESCRIPTION).write_bytes(description.to_json())
            for name in _TOKENIZER:
                if (self._source / name).is_file():
                    shutil.copyfile(self._source / name, folder / name)
        for name in (described.embedding.values, described.embedding.scales, described.sizes):
            shutil.copyfile(self._graphs / name, job.out / name)
        return Converted(entry=".", kv_element_bytes=1, notes=notes)

    def _bits_of(self, name: str) -> int:
        """Of the matrix with that name in the checkpoint."""
        known = "output" if name == "lm_head.weight" else "attn_qkv" if ".qkv_proj." in name else ""
        return qnn_bits(self._job.precision, self._job.options, known)

    def _written(self, model: Any, ranges: Ranges, matrices: Matrices) -> StaticModel:
        """Write all graphs before their compilation, and return what describes them."""
        job, config = self._job, model.config
        shape = shape_of(read_json(self._source / "config.json", needed=True), name=job.name)
        context = job.context
        hidden_by = -(_HIDDEN + max(one.scores.high - one.scores.low for one in ranges.layers))
        largest = max(-ranges.hidden.low, ranges.hidden.high)
        hidden_scale = 2.0 ** math.floor(math.log2(_LARGEST_HIDDEN / largest))
        epsilon = config.rms_norm_eps * hidden_scale**2
        sizes = Sizes(config.hidden_size, heads_of(model), epsilon, context, job.options["window"], hidden_by)
        parts, all_sizes = [], b""
        for number, (first, last) in enumerate(qnn_parts(shape, self._bits)):
            self._progress(Progress("writing graphs", number / len(ranges.layers)))
            weights = [
                (at, matrices.layer(at, ranges.layers[at], hidden_scale), ranges.layers[at])
                for at in range(first, last)
            ]
            for _, layer, _ in weights:
                all_sizes += layer.out_sizes.tobytes() + layer.down_sizes.tobytes()
            file = WeightFile(self._graphs / f"part{number}.data")
            names = {kind: f"part{number}_{kind}.onnx" for kind in ("window", "token")}
            for kind, tokens in (("window", sizes.tokens), ("token", 1)):
                layers_graph(self._graphs / names[kind], replace(sizes, tokens=tokens), weights, file)
            parts.append(StaticPart(first=first, last=last, **names))
        (self._graphs / _SIZES).write_bytes(all_sizes)
        head, file = matrices.head(), WeightFile(self._graphs / "head.data")
        for name, tokens in (("head.onnx", 1), ("head_window.onnx", sizes.tokens)):
            wanted = replace(sizes, tokens=tokens)
            head_graph(self._graphs / name, wanted, head, ranges.last_norm, ranges.logits, file)
        return StaticModel(
            context=context, window=sizes.tokens, layers=len(ranges.layers), hidden=sizes.hidden,
            kv_heads=sizes.heads.keys, head_size=sizes.heads.size, vocabulary=config.vocab_size,
            sliding_window=shape.sliding_window, hidden_by=hidden_by, ends=end_ids(self._source),
            rope=rope(model, context), embedding=self._embedding(model, hidden_scale), sizes=_SIZES, parts=tuple(parts),
            head="head.onnx", head_window="head_window.onnx",
        )  # fmt: skip

    def _embedding(self, model: Any, hidden_scale: float) -> StaticEmbedding:
        hidden = model.config.hidden_size
        group = _EMBEDDING_GROUP if hidden % _EMBEDDING_GROUP == 0 else hidden
        values, scales = embedding(model, self._bits, group)
        described = StaticEmbedding(
            values="embedding.bin", scales="embedding_scales.bin", bits=self._bits, group=group, times=hidden_scale
        )
        (self._graphs / described.values).write_bytes(values)
        (self._graphs / described.scales).write_bytes(scales)
        return described

    def _compiled(self, described: StaticModel) -> StaticModel:
        """Compile each part, and return what describes the artifact."""
        pairs = [[part.window, part.token] for part in described.parts]
        shared = self._job.options["share_weights"]
        together = [*(pairs if shared else ([name] for pair in pairs for name in pair)), [described.head]]
        for done, names in enumerate(together):
            scratch = self._job.scratch / f"compiled{done}"
            scratch.mkdir()
            compile_graphs(
                [self._graphs / name for name in names], self._job.out, scratch,
                arch=self._job.options["htp_arch"], progress=self._progress, done=done / len(together),
            )  # fmt: skip
        return described.model_copy(update={"head_window": None, "shared": shared})


def _is_matrix(part: Any) -> bool:
    return type(part).__name__ == "Linear"
