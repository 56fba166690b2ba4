"""What a config.json may say about the network beside its sizes: a closed list, and the rest is refused by name.

A toolchain that does not know a field builds another network without a word. So each field that changes the numbers
that come out is either known here with the values that every toolchain builds, or refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fleet.core.plan_shape import Block, ModelShape

#: Kinds of rotary embeddings that every toolchain builds; ``su`` is what LongRoPE was called first.
ROPE_KINDS = ("default", "longrope", "su")
_ACTIVATIONS = {
    Block.PHI2: ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
    Block.PHI3: ("silu", "swish"),
    Block.PHIMOE: ("silu", "swish"),
}
#: Fields of other architectures that multiply, cap or normalise what a Phi leaves alone.
_FOREIGN = (
    "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "logit_scale", "logits_scaling",
    "embedding_multiplier", "residual_multiplier", "attention_multiplier", "attention_scaling", "no_rope_layers",
)  # fmt: skip


def refusals(config: Mapping[str, Any], shape: ModelShape) -> Iterator[str]:
    """Yield each field that no toolchain here builds, with its value and what to do; none: the network is known."""
    if config.get("quantization_config") is not None:
        yield "quantization_config: it is quantized already; take the checkpoint that this was made from"
    yield from _rope(config, shape)
    activation = config.get("hidden_act", _ACTIVATIONS[shape.block][0])
    if activation not in _ACTIVATIONS[shape.block]:
        known = " or ".join(_ACTIVATIONS[shape.block])
        yield f"hidden_act is {activation!r:.40}, and a {shape.architecture} has {known}"
    if config.get("attention_bias") and shape.block is Block.PHI3:
        yield "attention_bias is true, and a Phi-3 has no biases"
    if config.get("mlp_bias"):
        yield "mlp_bias is true, and no Phi has that"
    if config.get("qk_layernorm"):
        yield "qk_layernorm is true, and no toolchain builds it"
    for name in _FOREIGN:
        if config.get(name) not in (None, False, []):
            yield f"{name} is set, and it belongs to another architecture"
    for name, least in (("rope_theta", 1.0), ("rms_norm_eps", 0.0), ("layer_norm_eps", 0.0)):
        value = config.get(name)
        if value is not None and not (isinstance(value, int | float) and not isinstance(value, bool) and value > least):
            yield f"{name} is {value!r:.40}, and must be a number above {least:g}"


def _rope(config: Mapping[str, Any], shape: ModelShape) -> Iterator[str]:
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(scaling, Mapping):
        return  # its shape is checked with the sizes
    kind = scaling.get("type") or scaling.get("rope_type") or "default"
    if kind not in ROPE_KINDS:
        yield f"rope_scaling is of type {kind!r:.40}; toolchains build {', '.join(ROPE_KINDS)} alike, and no other"
        return
    if kind == "default":
        return
    rotated = int(shape.head_size * shape.partial_rotary) // 2
    for name in ("short_factor", "long_factor"):
        factors = scaling.get(name)
        if not isinstance(factors, list) or not all(_is_positive(one) for one in factors):
            yield f"rope_scaling.{name} must be a list of positive numbers"
        elif factors and len(factors) != rotated:
            yield f"rope_scaling.{name} has {len(factors)} factors, and {rotated} pairs of each head are rotated"


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e9
