"""Writes a Phi-3-architecture checkpoint folder as the hub has it: config, weights, tokenizer, chat template."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleet.toolchains.checkpoint.gguf_source import LlamaShape, Vocabulary

if TYPE_CHECKING:
    from fleet.toolchains.checkpoint.gguf_source import Weights


def write_json(path: Path, value: Any) -> None:
    """Indented, with a newline at the end."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def phi3_config(shape: LlamaShape, vocabulary: Vocabulary, name: str, **changes: Any) -> dict[str, Any]:
    """``config.json`` in the hub's spelling (``rope_theta``, ``rope_scaling``), which every toolchain reads."""
    return {
        "_name_or_path": name,
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": vocabulary.bos_id,
        "embd_pdrop": 0.0,
        "eos_token_id": vocabulary.eos_id,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.context,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "original_max_position_embeddings": shape.context,
        "pad_token_id": vocabulary.pad_id,
        "partial_rotary_factor": 1.0,
        "resid_pdrop": 0.0,
        "rms_norm_eps": shape.norm_epsilon,
        "rope_scaling": None,
        "rope_theta": shape.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": shape.vocabulary,
    } | changes


def write_config(folder: Path, config: dict[str, Any], vocabulary: Vocabulary) -> None:
    """``config.json`` and ``generation_config.json``."""
    write_json(folder / "config.json", config)
    generation = {
        "bos_token_id": vocabulary.bos_id,
        "do_sample": False,  # drawn at temperature 1, a model as small as these answers nonsense
        "eos_token_id": vocabulary.eos_id,
        "pad_token_id": vocabulary.pad_id,
    }
    write_json(folder / "generation_config.json", generation)


def write_tokenizer(folder: Path, vocabulary: Vocabulary, context: int) -> None:
    """A byte-level BPE with digits split one by one, built from the vocabulary itself.

    ``tokenizer_class`` is GPT2Tokenizer: it sends llama.cpp's converter down its byte-level path.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in vocabulary.merges)]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [vocabulary.tokens[i] for i in vocabulary.special_ids]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {
        "bos_token": vocabulary.tokens[vocabulary.bos_id],
        "eos_token": vocabulary.tokens[vocabulary.eos_id],
        "pad_token": vocabulary.tokens[vocabulary.pad_id],
        "unk_token": vocabulary.tokens[vocabulary.unknown_id],
    }
    write_json(folder / "special_tokens_map.json", roles)
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(i): _added(vocabulary.tokens[i]) for i in vocabulary.special_ids},
        "chat_template": vocabulary.chat_template,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "tokenizer_class": "GPT2Tokenizer",
    }
    write_json(folder / "tokenizer_config.json", config | roles)


def _added(token: str) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {"content": token} | flags


def fuse(weights: dict[str, Weights], layers: int) -> dict[str, Weights]:
    """Llama's q, k, v as one ``qkv_proj`` and gate, up as one ``gate_up_proj``, joined on the output dimension."""
    import numpy as np

    fused = dict(weights)
    for layer in range(layers):
        attention, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        fused[attention + "qkv_proj.weight"] = np.concatenate(
            [fused.pop(f"{attention}{part}_proj.weight") for part in "qkv"]
        )
        fused[mlp + "gate_up_proj.weight"] = np.concatenate(
            [fused.pop(f"{mlp}{part}_proj.weight") for part in ("gate", "up")]
        )
    return fused


def random_weights(config: dict[str, Any], seed: int) -> dict[str, Weights]:
    """Return weights of a Phi-3 network of this configuration, drawn so that activations neither vanish nor explode."""
    import numpy as np

    draw = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> Weights:
        drawn: Weights = draw.standard_normal((rows, columns), dtype=np.float32)
        drawn /= np.float32(math.sqrt(columns))
        return drawn

    def gain() -> Weights:
        drawn: Weights = draw.standard_normal(hidden, dtype=np.float32)
        drawn *= np.float32(0.1)
        drawn += np.float32(1)
        return drawn

    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = hidden // heads
    kv_rows = config["num_key_value_heads"] * head
    weights = {"model.embed_tokens.weight": matrix(config["vocab_size"], hidden), "model.norm.weight": gain()}
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = matrix(config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        weights |= {
            prefix + "input_layernorm.weight": gain(),
            prefix + "post_attention_layernorm.weight": gain(),
            prefix + "self_attn.qkv_proj.weight": matrix(heads * head + 2 * kv_rows, hidden),
            prefix + "self_attn.o_proj.weight": matrix(hidden, heads * head),
            prefix + "mlp.gate_up_proj.weight": matrix(2 * config["intermediate_size"], hidden),
            prefix + "mlp.down_proj.weight": matrix(hidden, config["intermediate_size"]),
        }
    return weights


def write_weights(folder: Path, weights: dict[str, Weights]) -> None:
    """``model.safetensors``, in float32.

    Raises:
        OSError: it cannot be written.
    """
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    path = folder / "model.safetensors"
    try:
        # safetensors writes an array's memory as it lies, in whatever order its dimensions are.
        ordered = {name: np.ascontiguousarray(weights[name]) for name in sorted(weights)}
        save_file(ordered, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from None
    path.chmod(0o644)
