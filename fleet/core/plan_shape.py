"""A Phi's network as far as sizes, memory and legality follow from its config.json."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from agent.contract.base import explain
from fleet.core.licenses import UNKNOWN
from fleet.errors import ModelError

#: The limits are far above any network there is: beyond them stands a mistake, over which the planner would count long.
Size = Annotated[int, Field(gt=0, le=2**24)]
Count = Annotated[int, Field(gt=0, le=4096)]
Share = Annotated[float, Field(gt=0, le=1)]


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
#: With vision or speech in the checkpoint.
MULTIMODAL = ("Phi3VForCausalLM", "Phi4MMForCausalLM", "Phi4MultimodalForCausalLM")


class ModelFile(BaseModel):
    """Base of what is read of a checkpoint's JSON: strict, and blind to the fields that nobody here needs."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    @classmethod
    def parse(cls, values: Mapping[str, Any], origin: str) -> Self:
        """Return the fields in ``values``; ``origin`` is the file's name, for messages.

        Raises:
            ModelError: a field is missing or wrong; names file and field, and what stood there.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ModelError(f"{origin}: {explain(error)}; correct the file, or fetch it again") from None


class Rope(ModelFile):
    """``rope_scaling`` on the hub, ``rope_parameters`` in transformers 5; the factors are the toolchains' matter."""

    type: str | None = None
    rope_type: str | None = None
    original_max_position_embeddings: Size | None = None
    partial_rotary_factor: Share | None = None


class NetworkConfig(ModelFile):
    """The sizes in a config.json. The order matters: a check sees the fields above its own."""

    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Count
    head_dim: Size | None = None
    num_attention_heads: Count
    num_key_value_heads: Count | None = None
    vocab_size: Size
    max_position_embeddings: Size
    original_max_position_embeddings: Size | None = None
    sliding_window: Size | None = None
    rope_scaling: Rope | None = None
    rope_parameters: Rope | None = None
    partial_rotary_factor: Share | None = None
    num_local_experts: Annotated[int, Field(ge=0, le=4096)] | None = None
    tie_word_embeddings: bool | None = None
    torch_dtype: str | None = None
    dtype: str | None = None

    @field_validator("num_attention_heads")
    @classmethod
    def _heads_share_the_hidden_state(cls, heads: int, info: ValidationInfo) -> int:
        hidden = info.data.get("hidden_size", 0)
        if hidden % heads and not info.data.get("head_dim"):
            raise ValueError(f"must divide hidden_size, {hidden}, where there is no head_dim")
        return heads

    @field_validator("num_key_value_heads")
    @classmethod
    def _heads_share_keys(cls, kv_heads: int | None, info: ValidationInfo) -> int | None:
        heads = info.data.get("num_attention_heads", 0)
        if kv_heads and heads % kv_heads:
            raise ValueError(f"must divide num_attention_heads, {heads}")
        return kv_heads

    @property
    def kv_heads(self) -> int:
        """As many as attention heads where config.json is silent."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Elements of one head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


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
        """Return a byte-level BPE of ``size`` tokens: seven bytes a token, and a merge for nearly each."""
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
    #: As the checkpoint's card names it.
    license: str = UNKNOWN

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
        """Yield every matrix of every layer, q, k, v and gate, up fused where the architecture has them so."""
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

    def misfit(self, group: int, offered: Iterable[int] = ()) -> str | None:
        """Return what is wrong with groups of so many weights, and what of ``offered`` fits.

        None where all rows divide.

        A group of -1 is a whole row.
        """
        rows = sorted({matrix.columns for matrix in self.linears()})
        wrong = [columns for columns in rows if group > 0 and columns % group]
        if not wrong:
            return None
        fitting = [str(one) for one in offered if one != group and not any(columns % one for columns in rows)]
        instead = f"; take {' or '.join(fitting)}" if fitting else ""
        return f"rows of {' and '.join(map(str, wrong))} weights do not divide into groups of {group}{instead}"

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


def architecture_of(config: Mapping[str, Any]) -> str:
    """Return the first that config.json names, or a few words on what is there instead."""
    match config.get("architectures"):
        case [str(first), *_]:
            return first
        case None | []:
            return f"unnamed, model_type {config.get('model_type')!r:.80}"
        case found:
            return f"garbled: architectures is {found!r:.80}, where a list of names should be"


def shape_of(
    config: Mapping[str, Any], *, name: str, origin: str = "config.json", vocabulary: Vocabulary | None = None
) -> ModelShape:
    """Return the shape in a config.json, of the hub's spelling or of transformers 5's.

    ``origin`` is the file, for messages.

    Raises:
        ModelError: the architecture is no Phi that has a planner, or a size is missing or wrong.
    """
    architecture = architecture_of(config)
    if architecture not in _BLOCKS:
        raise ModelError(f"{origin}: is no Phi that phifleet knows: its architecture is {architecture}; "
                         f"it knows {', '.join(_BLOCKS)}")  # fmt: skip
    network = NetworkConfig.parse(config, origin)
    longest, block = network.max_position_embeddings, _BLOCKS[architecture]
    rope = network.rope_scaling or network.rope_parameters or Rope()
    longrope = (rope.type or rope.rope_type) in ("longrope", "su")
    original = rope.original_max_position_embeddings or network.original_max_position_embeddings
    partial = network.partial_rotary_factor or rope.partial_rotary_factor
    dtype = network.torch_dtype or network.dtype or "float32"
    return ModelShape(
        name=name, architecture=architecture, block=block, layers=network.num_hidden_layers, hidden=network.hidden_size,
        intermediate=network.intermediate_size, heads=network.num_attention_heads, kv_heads=network.kv_heads,
        head_size=network.head_size, vocabulary_size=network.vocab_size, tied=bool(network.tie_word_embeddings),
        max_context=longest, original_context=original if longrope and original else longest, longrope=longrope,
        partial_rotary=partial or (0.5 if block is Block.PHI2 else 1.0),
        sliding_window=_window(network.sliding_window, longest), experts=network.num_local_experts or 0,
        stored_bytes=4 if dtype == "float32" else 2, vocabulary=vocabulary or Vocabulary.guess(network.vocab_size),
    )  # fmt: skip


def _window(window: int | None, longest: int) -> int | None:
    """A window as long as the context is none; the 128k models carry 262144."""
    return window if window and window < longest else None
