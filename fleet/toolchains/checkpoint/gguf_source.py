"""Reads a Llama-architecture GGUF: its shape, vocabulary, merges, chat template and weights as float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleet.errors import ModelError
from fleet.toolchains.checkpoint.gguf_file import GgufFile

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Weights = NDArray[np.float32]

#: ``gguf.TokenType.CONTROL``: a special token, never produced from text.
_CONTROL = 3
_LLAMA_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """Sizes of the network, in elements; ``context`` in tokens."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    context: int
    rope_theta: float
    norm_epsilon: float
    vocabulary: int


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A byte-level BPE: tokens by id, merges in order, ids of the special tokens, and the chat template."""

    tokens: tuple[str, ...]
    merges: tuple[str, ...]
    special_ids: tuple[int, ...]
    bos_id: int
    eos_id: int
    unknown_id: int
    pad_id: int
    chat_template: str


class LlamaGguf:
    """One open GGUF of the Llama architecture."""

    def __init__(self, path: Path) -> None:
        """Open ``path``.

        Raises:
            ModelError: the file cannot be read, is damaged, or is of another architecture.
        """
        try:
            self._file = GgufFile(path)
        except (ValueError, OSError) as error:
            raise ModelError(f"{path}: cannot be read as GGUF: {error}") from None
        if (architecture := self._value("general.architecture")) != "llama":
            raise ModelError(f"{path}: is of architecture {architecture}, not llama")

    def _value(self, key: str, default: Any = None) -> Any:
        return self._file.metadata.get(key, default)

    @property
    def name(self) -> str:
        """As the file names itself."""
        return str(self._value("general.name", "unnamed"))

    @property
    def license(self) -> str:
        """SPDX-like identifier."""
        return str(self._value("general.license", "unknown"))

    def shape(self) -> LlamaShape:
        """Return the network's sizes."""
        value = self._value
        return LlamaShape(
            layers=value("llama.block_count"),
            hidden=value("llama.embedding_length"),
            intermediate=value("llama.feed_forward_length"),
            heads=value("llama.attention.head_count"),
            kv_heads=value("llama.attention.head_count_kv"),
            context=value("llama.context_length"),
            rope_theta=float(value("llama.rope.freq_base")),
            # float32 in the file, 1e-5 in the checkpoint it was made of
            norm_epsilon=float(f"{value('llama.attention.layer_norm_rms_epsilon'):.6g}"),
            vocabulary=value("llama.vocab_size"),
        )

    def vocabulary(self) -> Vocabulary:
        """Return what a tokenizer is built from."""
        value = self._value
        kinds = value("tokenizer.ggml.token_type")
        return Vocabulary(
            tokens=tuple(value("tokenizer.ggml.tokens")),
            merges=tuple(value("tokenizer.ggml.merges")),
            special_ids=tuple(i for i, kind in enumerate(kinds) if kind == _CONTROL),
            bos_id=value("tokenizer.ggml.bos_token_id"),
            eos_id=value("tokenizer.ggml.eos_token_id"),
            unknown_id=value("tokenizer.ggml.unknown_token_id"),
            pad_id=value("tokenizer.ggml.padding_token_id"),
            chat_template=value("tokenizer.chat_template"),
        )

    def weights(self) -> Iterator[tuple[str, Weights]]:
        """Yield names as in ``LlamaForCausalLM``, and float32 arrays of shape (out, in)."""
        shape = self.shape()
        for tensor in self._file.tensors:
            array, name = self._file.tensor(tensor), _llama_name(tensor)
            if name.endswith("q_proj.weight"):
                array = _undo_rope_order(array, shape.heads)
            elif name.endswith("k_proj.weight"):
                array = _undo_rope_order(array, shape.kv_heads)
            yield name, array


def _llama_name(name: str) -> str:
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    if name == "output.weight":
        return "lm_head.weight"
    _, layer, part, suffix = name.split(".")
    return f"model.layers.{layer}.{_LLAMA_NAMES[part]}.{suffix}"


def _undo_rope_order(weights: Weights, heads: int) -> Weights:
    """Checkpoints keep the two rotated halves of each head of q and k apart; GGUF interleaves a Llama's."""
    rows, columns = weights.shape
    return weights.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
