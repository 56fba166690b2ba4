"""The Phi models there are, by their published config.json: for planning without a download, and for the tests.

Source: the model cards and config.json of the microsoft organisation on the hub. Rope factors are left out where only
their presence matters; ``head_dim // 2 * partial_rotary_factor`` factors stand in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fleet.core.plan_shape import ModelShape, shape_of

#: Of all of them, by their model cards.
_LICENSE = "mit"


@dataclass(frozen=True, slots=True)
class Variant:
    """One published model. ``tests`` names what is special about its network."""

    name: str
    hub_ids: tuple[str, ...]
    config: Mapping[str, Any]
    special: str

    @property
    def shape(self) -> ModelShape:
        """For the planner; the tokenizer's size is guessed."""
        return replace(shape_of(self.config, name=self.name), license=_LICENSE)


_PHI3_MINI: Mapping[str, Any] = {
    "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064,
    "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
_LONG = {
    "max_position_embeddings": 131072, "sliding_window": 262144,
    "rope_scaling": {"type": "longrope", "short_factor": [], "long_factor": []},
}  # fmt: skip
_PHI3_MEDIUM = {
    "hidden_size": 5120, "intermediate_size": 17920, "num_hidden_layers": 40, "num_attention_heads": 40,
    "num_key_value_heads": 10,
}  # fmt: skip

VARIANTS: tuple[Variant, ...] = (
    Variant(
        "phi-2", ("microsoft/phi-2",),
        {
            "architectures": ["PhiForCausalLM"], "model_type": "phi", "hidden_size": 2560, "intermediate_size": 10240,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 51200,
            "max_position_embeddings": 2048, "rope_theta": 10000.0, "partial_rotary_factor": 0.4,
            "layer_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "float16", "hidden_act": "gelu_new",
        },
        "parallel attention and MLP, biases, LayerNorm, partial rotary 0.4",
    ),
    Variant(
        "phi-3-mini-4k", ("microsoft/Phi-3-mini-4k-instruct",), {**_PHI3_MINI, "sliding_window": 2047},
        "sliding window of 2047 tokens",
    ),
    Variant(
        "phi-3-mini-128k", ("microsoft/Phi-3-mini-128k-instruct",), {**_PHI3_MINI, **_LONG},
        "LongRoPE from 4096 tokens on",
    ),
    Variant("phi-3.5-mini", ("microsoft/Phi-3.5-mini-instruct",), {**_PHI3_MINI, **_LONG}, "LongRoPE"),
    Variant(
        "phi-4", ("microsoft/phi-4", "microsoft/Phi-4-reasoning"),
        {
            **_PHI3_MINI, **_PHI3_MEDIUM, "vocab_size": 100352, "max_position_embeddings": 16384,
            "original_max_position_embeddings": 16384, "rope_theta": 250000.0, "sliding_window": None,
        },
        "14B, grouped queries 40:10, 100k vocabulary",
    ),
    Variant(
        "phi-4-mini", ("microsoft/Phi-4-mini-instruct", "microsoft/Phi-4-mini-reasoning"),
        {
            **_PHI3_MINI, **_LONG, "num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 200064,
            "partial_rotary_factor": 0.75, "tie_word_embeddings": True,
        },
        "partial rotary 0.75, LongRoPE, tied embeddings, 200k vocabulary",
    ),
    Variant(
        "phi-3.5-moe", ("microsoft/Phi-3.5-MoE-instruct",),
        {
            **_PHI3_MINI, **_LONG, "architectures": ["PhiMoEForCausalLM"], "model_type": "phimoe", "hidden_size": 4096,
            "intermediate_size": 6400, "num_key_value_heads": 8, "num_local_experts": 16, "num_experts_per_tok": 2,
            "attention_bias": True, "lm_head_bias": True, "sliding_window": 131072,
        },
        "16 experts, 2 at work; LayerNorm, biases, LongRoPE",
    ),
)  # fmt: skip


def find_variant(name: str) -> Variant | None:
    """By its name here or on the hub, in any case; None if there is none."""
    wanted = name.lower()
    for variant in VARIANTS:
        if wanted == variant.name or wanted in (hub.lower() for hub in variant.hub_ids):
            return variant
    return None
