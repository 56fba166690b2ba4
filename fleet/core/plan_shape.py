"""A Phi's network as far as sizes, memory and legality follow from its config.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from fleet.errors import ModelError


class Block(StrEnum):
    """What an architecture's layers are made of."""

    PHI2 = "phi2"
    PHI3 = "phi3"
    PHIMOE = "phimoe"


_BLOCKS = {
    "PhiForCausalLM": Block.PHI2,
    "Phi3ForCausalLM": Block.PHI3,
    "PhimoeForCausalLM": Block.PHIMOE,
    "PhiMoEForCausalLM": Block.PHIMOE,
    "Phi3VForCausalLM": Block.PHI3,
    "Phi4MMForCausalLM": Block.PHI3,
    "Phi4MultimodalForCausalLM": Block.PHI3,
}
#: Their text part alone is exported.
MULTIMODAL = ("Phi3VForCausalLM", "Phi4MMForCausalLM", "Phi4MultimodalForCausalLM")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Bytes that the tokenizer takes; guessed from the vocabulary's size where its files were not read.

    ``text_bytes`` and ``merge_bytes`` are of the tokens and merges as text, ``merges`` their number, ``file_bytes`` of
    the tokenizer's files.
    """

    text_bytes: int
    merges: int
    merge_bytes: int
    file_bytes: int

    @classmethod
    def guess(cls, size: int) -> Vocabulary:
        """A byte-level BPE of ``size`` tokens: seven bytes a token, and a merge for nearly each."""
        return cls(text_bytes=7 * size, merges=size, merge_bytes=9 * size, file_bytes=72 * size)


@dataclass(frozen=True, slots=True)
class Matrix:
    """``rows`` outputs of ``columns`` inputs; toolchains group weights along the columns. ``name`` as GGUF has it."""

    name: str
    rows: int
    columns: int
    count: int = 1
    layer: int | None = None

    @property
    def weights(self) -> int:
        """In all of ``count``."""
        return self.rows * self.columns * self.count


@dataclass(frozen=True, slots=True)
class ModelShape:
    """One model. Lengths in tokens, sizes in elements; ``sliding_window`` None: full attention."""

    name: str
    architecture: str
    block: Block
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary_size: int
    tied: bool
    max_context: int
    original_context: int
    longrope: bool = False
    partial_rotary: float = 1.0
    sliding_window: int | None = None
    experts: int = 0
    stored_bytes: int = 4
    vocabulary: Vocabulary = field(default_factory=lambda: Vocabulary.guess(0))

    @property
    def multimodal(self) -> bool:
        """Whether there is more than text in the checkpoint."""
        return self.architecture in MULTIMODAL

    @property
    def embedding(self) -> Matrix:
        """Token to hidden state; when ``tied`` also the output matrix."""
        return Matrix("token_embd", self.vocabulary_size, self.hidden)

    @property
    def output(self) -> Matrix | None:
        """Hidden state to logits, None when ``tied``."""
        return None if self.tied else Matrix("output", self.vocabulary_size, self.hidden)

    def linears(self) -> Iterator[Matrix]:
        """Every matrix of every layer, q, k, v and gate, up fused where the architecture has them so."""
        for layer in range(self.layers):
            yield from self._layer(layer)

    def _layer(self, layer: int) -> Iterator[Matrix]:
        hidden, inner = self.hidden, self.intermediate
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        if self.block is Block.PHI3:
            yield Matrix("attn_qkv", queries + 2 * keys, hidden, layer=layer)
        else:
            yield Matrix("attn_q", queries, hidden, layer=layer)
            yield Matrix("attn_k", keys, hidden, layer=layer)
            yield Matrix("attn_v", keys, hidden, layer=layer)
        yield Matrix("attn_output", hidden, queries, layer=layer)
        if self.block is Block.PHIMOE:
            yield Matrix("ffn_gate_exps", inner, hidden, self.experts, layer)
            yield Matrix("ffn_up_exps", inner, hidden, self.experts, layer)
            yield Matrix("ffn_down_exps", hidden, inner, self.experts, layer)
        else:
            yield Matrix("ffn_up", 2 * inner if self.block is Block.PHI3 else inner, hidden, layer=layer)
            yield Matrix("ffn_down", hidden, inner, layer=layer)

    @property
    def vectors(self) -> int:
        """Elements of norms, biases and routers, which no toolchain quantizes."""
        if self.block is Block.PHI3:
            return (2 * self.layers + 1) * self.hidden
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        if self.block is Block.PHIMOE:
            each = 5 * self.hidden + queries + 2 * keys + self.experts * self.hidden
            return self.layers * each + 2 * self.hidden + self.vocabulary_size
        each = 4 * self.hidden + queries + 2 * keys + self.intermediate
        return self.layers * each + 2 * self.hidden + self.vocabulary_size

    @property
    def parameters(self) -> int:
        """Weights in all, the output matrix counted once when tied."""
        output = self.output.weights if self.output else 0
        return self.embedding.weights + output + sum(one.weights for one in self.linears()) + self.vectors

    @property
    def kv_elements_per_token(self) -> int:
        """Keys and values of every layer for one token of context."""
        return 2 * self.layers * self.kv_heads * self.head_size


def shape_of(config: Mapping[str, Any], *, name: str, vocabulary: Vocabulary | None = None) -> ModelShape:
    """The shape in a config.json, of the hub's spelling or of transformers 5's.

    Raises:
        ModelError: the architecture is no Phi that has a planner, or a size is missing.
    """
    architecture = str((config.get("architectures") or [f"model_type {config.get('model_type')!r}"])[0])
    if architecture not in _BLOCKS:
        raise ModelError(f"{name}: its architecture is {architecture}; phifleet plans {', '.join(_BLOCKS)}")
    try:
        return _shape(config, name, architecture, vocabulary)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(f"{name}: config.json lacks or garbles a size of the network: {error}") from None


def _shape(config: Mapping[str, Any], name: str, architecture: str, vocabulary: Vocabulary | None) -> ModelShape:
    hidden, heads, size = int(config["hidden_size"]), int(config["num_attention_heads"]), int(config["vocab_size"])
    longest = int(config["max_position_embeddings"])
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    longrope = str(rope.get("type") or rope.get("rope_type") or "") in ("longrope", "su")
    original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    partial = config.get("partial_rotary_factor") or rope.get("partial_rotary_factor")
    block = _BLOCKS[architecture]
    dtype = str(config.get("torch_dtype") or config.get("dtype") or "float32")
    return ModelShape(
        name=name, architecture=architecture, block=block, layers=int(config["num_hidden_layers"]), hidden=hidden,
        intermediate=int(config["intermediate_size"]), heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_size=int(config.get("head_dim") or hidden // heads), vocabulary_size=size,
        tied=bool(config.get("tie_word_embeddings", False)), max_context=longest,
        original_context=int(original) if longrope and original else longest, longrope=longrope,
        partial_rotary=float(partial or (0.5 if block is Block.PHI2 else 1.0)),
        sliding_window=_window(config, longest), experts=int(config.get("num_local_experts") or 0),
        stored_bytes=4 if dtype == "float32" else 2, vocabulary=vocabulary or Vocabulary.guess(size),
    )  # fmt: skip


def _window(config: Mapping[str, Any], longest: int) -> int | None:
    """A window as long as the context is none; the 128k models carry 262144."""
    window = config.get("sliding_window")
    return int(window) if window and int(window) < longest else None
