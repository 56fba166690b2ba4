"""Predicts an artifact's size in bytes from the model's shape and the recipe, before anything is built.

Each toolchain's rule is its own: which tensors it quantizes, in what groups, with what scales, and what it writes
beside the weights. Tests compare the predictions with what the toolchains build.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from math import ceil
from typing import Any

from agent.contract.manifest import Precision, Target, Toolchain
from agent.contract.profile import Recipe
from fleet.core.plan_shape import Block, Matrix, ModelShape

_FLOATS = {Precision.FP16: 2, Precision.BF16: 2, Precision.FP32: 4}
_SMALL_FILES = 8_000


def predicted_bytes(shape: ModelShape, recipe: Recipe, options: Mapping[str, Any] | None = None) -> int:
    """Return the bytes of all the artifact's files. ``options`` are the toolchain's; else the recipe's and defaults."""
    given = {**recipe.options, **(options or {})}
    return {
        Toolchain.LLAMACPP: _gguf,
        Toolchain.ONNX_GENAI: _onnx,
        Toolchain.OPENVINO: _openvino,
        Toolchain.MLX: _mlx,
        Toolchain.ONNX_QNN: _qnn,
    }[recipe.toolchain](shape, recipe, given)


def recorded(options: Mapping[str, Any]) -> dict[str, Any]:
    """As they stand in a manifest and in an artifact's id: tables whose order counts as lists of pairs.

    Canonical JSON sorts the names of a table, and of several that match the first one wins.
    """
    return {
        name: [list(pair) for pair in value.items()] if isinstance(value, dict) and value else value
        for name, value in options.items()
    }


def in_order(table: Mapping[str, Any] | Iterable[Sequence[Any]] | None) -> Iterable[Sequence[Any]]:
    """Return the pairs of an option that is a table, also as it was ``recorded``."""
    return table.items() if isinstance(table, Mapping) else table or ()


# --- llama.cpp -------------------------------------------------------------------------------------------------------

#: Bytes and weights of a block (ggml's block_* structures).
GGML_BLOCKS = {
    "F32": (4, 1), "F16": (2, 1), "BF16": (2, 1), "Q8_0": (34, 32), "Q4_0": (18, 32), "Q4_1": (20, 32),
    "Q5_0": (22, 32), "Q5_1": (24, 32), "IQ4_NL": (18, 32), "IQ4_XS": (136, 256),
    "Q4_K": (144, 256), "Q5_K": (176, 256), "Q6_K": (210, 256), "Q3_K": (110, 256), "Q2_K": (84, 256),
}  # fmt: skip
#: What a type becomes where a row is no multiple of its block (llama-quant.cpp, tensor_type_fallback).
_FALLBACK = {
    "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL", "Q3_K": "IQ4_NL", "Q2_K": "IQ4_NL",
}  # fmt: skip
_BASE = {"Q4_K_M": "Q4_K", "Q4_K_S": "Q4_K"}


def block_of(kind: str) -> int:
    """Return weights that a block of this type has: rows are whole blocks."""
    return GGML_BLOCKS[kind][1]


def ggml_type(matrix: Matrix, shape: ModelShape, kind: str, options: Mapping[str, Any]) -> str:
    """Return the type llama.cpp gives a tensor in a file of type ``kind`` (llama-quant.cpp, llama_tensor_get_type)."""
    override = _override(matrix, shape, options)
    wanted = override or _ggml_wanted(matrix, shape, kind, calibrated=bool(options.get("calibration")))
    return _FALLBACK[wanted] if wanted in _FALLBACK and matrix.columns % 256 else wanted


def _override(matrix: Matrix, shape: ModelShape, options: Mapping[str, Any]) -> str | None:
    own = {"token_embd": options.get("embedding_type"), "output": options.get("output_type")}.get(matrix.name)
    if own:
        return str(own)
    full = f"{matrix.name}.weight" if matrix.layer is None else f"blk.{matrix.layer}.{matrix.name}.weight"
    for pattern, kind in in_order(options.get("tensor_types")):
        if re.search(pattern, full):
            return str(kind)
    tied = shape.tied and matrix.name == "token_embd"
    return str(options["output_type"]) if tied and options.get("output_type") else None


def _ggml_wanted(matrix: Matrix, shape: ModelShape, kind: str, *, calibrated: bool) -> str:
    base = _BASE.get(kind, kind)
    if base in ("F32", "F16", "BF16", "Q8_0"):
        return base
    if matrix.name == "output" or (shape.tied and matrix.name == "token_embd"):
        return "Q6_K"
    if matrix.layer is None:
        return base
    early, last = shape.layers // 8, shape.layers
    more = matrix.layer < early or matrix.layer >= 7 * last // 8 or (matrix.layer - early) % 3 == 2
    if matrix.name in ("attn_v", "attn_qkv"):
        return _attention_values(matrix, shape, kind, base, more=more)
    if matrix.name.startswith("ffn_down"):
        return _down(matrix, kind, base, early, more=more, calibrated=calibrated)
    return base


def _attention_values(matrix: Matrix, shape: ModelShape, kind: str, base: str, *, more: bool) -> str:
    if kind == "Q4_K_M" and more:
        return "Q6_K"
    if kind == "Q4_K_S" and matrix.layer is not None and matrix.layer < 4:
        return "Q5_K"
    if kind in ("IQ4_NL", "IQ4_XS") and shape.heads // shape.kv_heads >= 4:
        return "Q5_K"
    return base


def _down(matrix: Matrix, kind: str, base: str, early: int, *, more: bool, calibrated: bool) -> str:
    if kind == "Q4_K_M" and more:
        return "Q6_K"
    first = matrix.layer is not None and matrix.layer < early
    if first and (kind == "Q4_K_S" or (kind in ("IQ4_NL", "IQ4_XS") and not calibrated)):
        return "Q5_K"
    if first and kind == "Q4_0" and calibrated:
        return "Q4_1"
    return base


def _gguf(shape: ModelShape, recipe: Recipe, options: Mapping[str, Any]) -> int:
    direct = {Precision.FP16: "F16", Precision.BF16: "BF16", Precision.FP32: "F32", Precision.INT8: "Q8_0"}
    kind = direct.get(recipe.precision) or str(options.get("type", "Q4_K_M"))
    total = 4 * shape.vectors
    matrices = [shape.embedding, *([shape.output] if shape.output else []), *shape.linears()]
    if options.get("budget"):
        total += int(options["budget"] * sum(matrix.weights for matrix in matrices) / 8)
        matrices = []
    for matrix in matrices:
        size, block = GGML_BLOCKS[ggml_type(matrix, shape, kind, options)]
        total += matrix.weights // block * size
    words = shape.vocabulary
    tokens = words.text_bytes + 12 * shape.vocabulary_size + words.merge_bytes + 8 * words.merges
    factors = 8 * shape.head_size if shape.longrope else 0
    return total + tokens + factors + 4096 + 90 * (shape.layers * 6)


# --- ONNX Runtime GenAI ----------------------------------------------------------------------------------------------


def _onnx(shape: ModelShape, recipe: Recipe, options: Mapping[str, Any]) -> int:
    floats = _onnx_float_bytes(recipe)
    matrices = list(shape.linears())
    output = shape.output or Matrix("output", shape.vocabulary_size, shape.hidden)
    if recipe.precision in _FLOATS:
        weights = floats * sum(one.weights for one in [*matrices, output])
        embedding = 0 if shape.tied else floats * shape.embedding.weights
    elif options.get("budget"):
        own = [] if shape.tied else [shape.embedding]
        weights = int(options["budget"] * sum(one.weights for one in [*matrices, output, *own]) / 8)
        embedding = 0
    else:
        bits = 4 if recipe.precision is Precision.INT4 else 8
        weights = sum(
            _onnx_quantized(one, _onnx_bits(one, shape, bits, options), floats, options) for one in [*matrices, output]
        )
        embedding = _onnx_embedding(shape, recipe, floats)
    graph = 9_800 if recipe.target is Target.DML else 7_400
    files = shape.vocabulary.file_bytes + _SMALL_FILES + graph * shape.layers
    return weights + embedding + floats * shape.vectors + floats * _rope_cache(shape) + files


def _onnx_embedding(shape: ModelShape, recipe: Recipe, floats: int) -> int:
    """On a CPU it shares the output's weights where they are one matrix, and is INT8 in blocks of 32 where not.

    Elsewhere it shares them at INT4 alone.
    """
    if shape.tied and (recipe.precision is Precision.INT4 or recipe.target is Target.CPU):
        return 0
    if recipe.target is Target.CPU and not shape.hidden % 32:
        return _onnx_quantized(shape.embedding, 8, floats, {"block_size": 32})
    return floats * shape.embedding.weights


def _onnx_float_bytes(recipe: Recipe) -> int:
    """Quantized models compute in float32 on a CPU and in float16 elsewhere."""
    if recipe.precision in _FLOATS:
        return _FLOATS[recipe.precision]
    return 4 if recipe.target is Target.CPU else 2


def _onnx_bits(matrix: Matrix, shape: ModelShape, bits: int, options: Mapping[str, Any]) -> int:
    """INT8 where ``mixed`` says so (builders/base.py, mixed_layers)."""
    mixed = options.get("mixed")
    if matrix.layer is None:
        return 8 if mixed and matrix.name == "output" else bits
    eighth = shape.layers / 8
    more = matrix.layer < eighth or matrix.layer >= 7 * eighth or (matrix.layer - round(eighth)) % 3 == 2
    sensitive = matrix.name in ("attn_v", "attn_qkv") or matrix.name.startswith("ffn_down")
    return 8 if mixed == "layers" and more and sensitive else bits


def _onnx_quantized(matrix: Matrix, bits: int, floats: int, options: Mapping[str, Any]) -> int:
    group = int(options.get("block_size", 32))
    groups = ceil(matrix.columns / group)
    symmetric = options.get("symmetric", True) and options.get("algorithm") != "k_quant"
    zeros = 0 if symmetric else ceil(groups * bits / 8)
    row = groups * group * bits // 8 + groups * floats + zeros
    return row * matrix.rows * matrix.count


def _rope_cache(shape: ModelShape) -> int:
    """Cosines and sines of every position; LongRoPE has them twice, for short and for long contexts."""
    positions = shape.max_context + (shape.original_context if shape.longrope else 0)
    return positions * int(shape.head_size * shape.partial_rotary)


# --- OpenVINO --------------------------------------------------------------------------------------------------------


def _openvino(shape: ModelShape, recipe: Recipe, options: Mapping[str, Any]) -> int:
    edges = [shape.embedding, *([shape.output] if shape.output else [])]
    matrices = list(shape.linears())
    if recipe.precision in _FLOATS:
        each = _FLOATS[recipe.precision]
        weights = each * (sum(one.weights for one in [*matrices, *edges]) + shape.vectors)
    elif recipe.precision is Precision.INT8:
        weights = sum(_openvino_int8(one, options) for one in [*matrices, *edges]) + 4 * shape.vectors
    else:
        budget = options.get("budget")
        weights = (
            int(budget * sum(one.weights for one in [*matrices, *edges]) / 8)
            if budget
            else _openvino_int4(shape, matrices, edges, options)
        ) + 4 * shape.vectors
    words = shape.vocabulary
    text = 2 * words.text_bytes + words.merge_bytes + 16 * shape.vocabulary_size + 8 * words.merges
    graph = 88_000 if recipe.precision in (Precision.INT4, Precision.INT8) else 74_000
    # The checkpoint's own tokenizer.json is not kept: the runtime reads what it was converted to.
    return weights + text + graph * shape.layers + 60_000


def _openvino_int4(shape: ModelShape, matrices: list[Matrix], edges: list[Matrix], options: Mapping[str, Any]) -> int:
    ratio = float(options.get("ratio", 1.0))
    everything = bool(options.get("all_layers", False))
    quantized = [*matrices, *edges] if everything else matrices
    int4 = sum(_openvino_grouped(one, options) for one in quantized)
    int8 = sum(_openvino_int8(one, {}) for one in quantized)
    rest = 0 if everything else sum(_openvino_int8(one, {}) for one in edges)
    adapters = sum(map(_openvino_adapters, quantized)) if options.get("lora_correction") else 0
    return int(ratio * int4 + (1 - ratio) * int8) + rest + adapters


def _openvino_adapters(matrix: Matrix) -> int:
    """NNCF's of rank 8, in INT8, and what they take in the graph."""
    return (8 * (matrix.rows + matrix.columns) + 9_000) * matrix.count


def _openvino_int8(matrix: Matrix, options: Mapping[str, Any]) -> int:
    """Return one scale of FP16 for a row, and a zero point of a byte unless symmetric."""
    zero = 0 if options.get("symmetric", False) else 1
    return (matrix.columns + 2 + zero) * matrix.rows * matrix.count


def _openvino_grouped(matrix: Matrix, options: Mapping[str, Any]) -> int:
    group = int(options.get("group_size", 64))
    groups = 1 if group <= 0 else ceil(matrix.columns / group)
    zeros = 0.0 if options.get("symmetric", False) else groups / 2
    return int((matrix.columns / 2 + 2 * groups + zeros) * matrix.rows) * matrix.count


# --- MLX -------------------------------------------------------------------------------------------------------------


def _mlx(shape: ModelShape, recipe: Recipe, options: Mapping[str, Any]) -> int:
    matrices = [*shape.linears(), shape.embedding, *([shape.output] if shape.output else [])]
    if recipe.precision in _FLOATS:
        weights = _FLOATS[recipe.precision] * (sum(one.weights for one in matrices) + shape.vectors)
    else:
        group = int(options.get("group_size", 64))
        quantized = sum(_mlx_bytes(one, shape, recipe, options, group) for one in matrices)
        if options.get("budget"):
            quantized = options["budget"] * sum(one.weights for one in matrices) / 8
        weights = 2 * shape.vectors + int(quantized)
    tensors = shape.layers * (26 if shape.block is Block.PHIMOE else 16) + 6
    return weights + shape.vocabulary.file_bytes + _SMALL_FILES + 180 * tensors


def _mlx_bytes(matrix: Matrix, shape: ModelShape, recipe: Recipe, options: Mapping[str, Any], group: int) -> float:
    """Return a scale and a bias of FP16 for each group."""
    named = next((bits for part, bits in in_order(options.get("bits_of")) if part in _mlx_name(matrix)), None)
    bits = 8 if recipe.precision is Precision.INT8 else named or _mlx_bits(matrix, shape, options.get("mixed"))
    return matrix.weights * (bits / 8 + 4 / group)


def _mlx_name(matrix: Matrix) -> str:
    """As the checkpoint has it."""
    if matrix.layer is None:
        return "lm_head" if matrix.name == "output" else "model.embed_tokens"
    part = {"attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj", "ffn_up": "mlp.gate_up_proj"}
    return f"model.layers.{matrix.layer}.{part.get(matrix.name, 'mlp.down_proj')}"


def _mlx_bits(matrix: Matrix, shape: ModelShape, mixed: str | None) -> int:
    """mlx_lm.convert, mixed_quant_predicate_builder: its layers of use, and ``v_proj`` matching all of ``qkv_proj``."""
    if not mixed:
        return 4
    low, high = (int(part) for part in mixed.removeprefix("mixed_").split("_"))
    if matrix.layer is None:
        return high if matrix.name == "output" else low
    early = shape.layers // 8
    more = matrix.layer < early or matrix.layer >= 7 * shape.layers // 8 or (matrix.layer - early) % 3 == 2
    sensitive = matrix.name in ("attn_v", "attn_qkv") or matrix.name.startswith("ffn_down")
    return high if more and sensitive else low


# --- QNN -------------------------------------------------------------------------------------------------------------

#: Of the weights of one compiled part: well below what an HTP maps at once.
QNN_PART_BYTES = 512 * 1024 * 1024


def parts_of(layers: int, layer_bytes: int) -> tuple[tuple[int, int], ...]:
    """Return the first layer of each part, and the one after its last: as few parts as may be, of one size."""
    parts = max(1, min(layers, ceil(layers * layer_bytes / QNN_PART_BYTES)))
    ends = [round(layers * number / parts) for number in range(parts + 1)]
    return tuple(pairwise(ends))


def qnn_parts(shape: ModelShape, bits: int) -> tuple[tuple[int, int], ...]:
    """Return the parts that a network is compiled in."""
    weights = sum(one.weights for one in shape.linears()) // shape.layers
    return parts_of(shape.layers, weights * bits // 8)


def qnn_bits(precision: Precision, options: Mapping[str, Any], name: str) -> int:
    """Of a weight of the matrix with this name, as GGUF has it: ``attn_qkv`` and ``output`` may have 8 beside INT4."""
    if precision is not Precision.INT4:
        return 8
    own = {"attn_qkv": ("attention_bits", 8), "output": ("head_bits", 8)}
    option, default = own.get(name, ("", 4))
    return int(options.get(option, default))


def _qnn(shape: ModelShape, recipe: Recipe, options: Mapping[str, Any]) -> int:
    matrices = sum(_qnn_bytes(one, qnn_bits(recipe.precision, options, one.name)) for one in shape.linears())
    head_bytes = _qnn_bytes(shape.output or shape.embedding, qnn_bits(recipe.precision, options, "output"))
    embedding = shape.embedding.weights * (qnn_bits(recipe.precision, options, "token_embd") / 8 + 2 / 32)
    # What the compiler writes beside the weights of a layer, for both graphs; measured on the sample.
    graph = 330_000 if recipe.precision is Precision.INT4 else 170_000
    return int(matrices + head_bytes + embedding) + graph * shape.layers + shape.vocabulary.file_bytes + _SMALL_FILES


def _qnn_bytes(matrix: Matrix, bits: int) -> float:
    """Return int8 with a number for each row, or int4 with the multiples of its blocks, as the compiler pads them."""
    return matrix.rows * (matrix.columns * bits / 8 + (32 if bits == 4 else 8))
