"""Predicts the memory that a loaded artifact takes at its peak.

    peak = weights x copies + context x (KV cache + activations of a token) + prompt piece x logits + runtime

- weights: the artifact's bytes. OpenVINO's CPU plugin holds a repacked copy beside the mapped file: two copies.
  MLX on a CPU holds the scales and offsets of quantized weights in float32, where the file has float16.
- KV cache of a token: 2 x layers x KV heads x head size x bytes of an element.
- logits: 4 bytes x vocabulary for each token of a prompt piece. ONNX Runtime GenAI keeps those of the whole piece: the
  agent gives it 512 tokens at once, and a LongRoPE model past its switch all that are before it.
- runtime: libraries, tokenizer and buffers, measured on the build machine.
"""

from __future__ import annotations

from dataclasses import dataclass

from agent.contract.manifest import MemoryNeed, Precision, Target, Toolchain
from agent.contract.profile import Recipe
from fleet.core.plan_shape import ModelShape

MIB = 1024 * 1024

FORMULA = "weights x copies + context x KV bytes per token + logits of a prompt piece + runtime"


@dataclass(frozen=True, slots=True)
class RuntimeMemory:
    """Of one runtime. ``prompt_piece``: tokens whose logits are held at once."""

    runtime_bytes: int
    copies: float = 1.0
    prompt_piece: int = 1


RUNTIMES = {
    # Measured with prompts of 64 and 2048 tokens on the sample: 107 MiB beside weights and KV cache, the logits apart.
    Toolchain.ONNX_GENAI: RuntimeMemory(128 * MIB, prompt_piece=512),
    # 35 to 40 MiB, and as much again for a vocabulary four times as large.
    Toolchain.LLAMACPP: RuntimeMemory(80 * MIB),
    # 145 to 153 MiB beside two copies of the weights.
    Toolchain.OPENVINO: RuntimeMemory(160 * MIB, copies=2.0),
    # Python, mlx-lm and its tokenizer.
    Toolchain.MLX: RuntimeMemory(192 * MIB),
    # Not measured on a device: ONNX Runtime, its plug-in and the tokenizer, in Qualcomm's simulator.
    Toolchain.ONNX_QNN: RuntimeMemory(192 * MIB),
}


def _in_float32(recipe: Recipe) -> bool:
    """MLX computes so on a CPU if weights are quantized: its kernels there are slow in float16."""
    quantized = recipe.precision in (Precision.INT4, Precision.INT8)
    return recipe.toolchain is Toolchain.MLX and recipe.target is Target.CPU and quantized


def kv_element_bytes(recipe: Recipe) -> int:
    """Of one key or value: in float32 or float16.

    ONNX computes in float32 on a CPU, MLX there too if weights are quantized, and else in the model's dtype.
    """
    if recipe.toolchain is Toolchain.ONNX_QNN:
        return 1
    if recipe.toolchain is Toolchain.ONNX_GENAI:
        return 4 if recipe.target is Target.CPU else 2
    wide = recipe.precision is Precision.FP32 or _in_float32(recipe)
    return 4 if recipe.toolchain is Toolchain.MLX and wide else 2


def memory_need(shape: ModelShape, recipe: Recipe, size: int, context: int) -> MemoryNeed:
    """Return what loading an artifact of ``size`` bytes takes, for a context of up to ``context`` tokens."""
    runtime = RUNTIMES[recipe.toolchain]
    piece = runtime.prompt_piece
    if piece > 1 and shape.longrope and context > shape.original_context:
        piece = shape.original_context + 1
    # A scale and an offset for each group, two bytes more each.
    widened = 4 * shape.parameters // int(recipe.options.get("group_size", 64)) if _in_float32(recipe) else 0
    return MemoryNeed(
        weights_bytes=int(size * runtime.copies) + widened,
        kv_bytes_per_token=shape.kv_elements_per_token * kv_element_bytes(recipe),
        overhead_bytes=runtime.runtime_bytes + min(piece, context) * shape.vocabulary_size * 4,
    )
