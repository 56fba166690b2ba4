"""Small random checkpoints, one for each published Phi, with that model's own configuration of the network."""

from __future__ import annotations

import functools
import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from fleet.core import phi_variants
from fleet.core.phi_variants import Variant
from fleet.toolchains.checkpoint import gguf_source, phi3_writer
from fleet.toolchains.checkpoint.gguf_source import LlamaGguf
from fleet.toolchains.checkpoint.sample_source import sample_gguf
from tests.models import CACHE

LAYERS, VOCABULARY, CONTEXT = 2, 49152, 16384
#: Past where LongRoPE switches at 4096, and of a length that the slowest runtime bears.
LONG, LAST = 4300, 100
SHORT = 64


def tokens() -> list[int]:
    return [int(token) for token in np.random.default_rng(0).integers(100, 49000, LONG)]


def checkpoint(variant: Variant) -> Path:
    """Made once; the folder's name says what it was made of."""
    folder = CACHE / f"variant-{variant.name}-{_key()}"
    if folder.exists():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    half = Path(tempfile.mkdtemp(prefix=".variant-", dir=CACHE))
    try:
        _write(variant, half)
        half.rename(folder)
    except OSError:
        assert folder.exists(), "another test run made it meanwhile, or nobody did"
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return folder


@functools.cache
def _key() -> str:
    made_by = b"".join(Path(str(one)).read_bytes() for one in (__file__, phi_variants.__file__, phi3_writer.__file__))
    return hashlib.sha256(made_by + Path(gguf_source.__file__).read_bytes()).hexdigest()[:12]


def small_config(variant: Variant) -> dict[str, Any]:
    """The variant's own, with fewer and narrower layers: the ratio of heads, what is rotated, scaled and tied stays."""
    config = dict(variant.config)
    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
    head = 80 if variant.name == "phi-2" else 64
    kv_heads = 4 if heads == keys else 2
    config |= {
        "num_attention_heads": heads // keys * kv_heads, "num_key_value_heads": kv_heads, "num_hidden_layers": LAYERS,
        "hidden_size": heads // keys * kv_heads * head, "intermediate_size": 128, "torch_dtype": "float32",
        "vocab_size": VOCABULARY + (64 if variant.name == "phi-4-mini" else 0),  # more rows than tokens
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "hidden_act": config.get("hidden_act", "silu"),
        "_name_or_path": f"small-{variant.name}",
    }  # fmt: skip
    if variant.name == "phi-2":
        config["intermediate_size"] = 4 * config["hidden_size"]  # llama.cpp's converter takes it for granted
    if "num_local_experts" in config:
        config["num_local_experts"] = 4
    if config.get("rope_scaling"):
        config |= {"max_position_embeddings": CONTEXT, "rope_scaling": _factors(config, head)}
    return config


def _factors(config: dict[str, Any], head: int) -> dict[str, Any]:
    count = int(head * config.get("partial_rotary_factor", 1.0)) // 2
    draw = np.random.default_rng(1)
    scaling = {
        "type": "longrope",
        "short_factor": [round(float(x), 3) for x in 1 + 0.5 * draw.random(count)],
        "long_factor": [round(float(x), 3) for x in 1 + np.linspace(0, 30, count) + draw.random(count)],
    }
    if config["model_type"] == "phimoe":
        scale = round(float(np.sqrt(1 + np.log(CONTEXT / 4096) / np.log(4096))), 9)
        scaling |= {"short_mscale": scale, "long_mscale": scale, "original_max_position_embeddings": 4096}
    return scaling


def _write(variant: Variant, folder: Path) -> None:
    config = small_config(variant)
    vocabulary = LlamaGguf(sample_gguf()).vocabulary()
    if config["model_type"] == "phi3":
        phi3_writer.write_weights(folder, phi3_writer.random_weights(config, seed=1))
    else:
        _write_by_transformers(config, folder)
    phi3_writer.write_config(folder, config, vocabulary)
    phi3_writer.write_tokenizer(folder, vocabulary, config["max_position_embeddings"])


def _write_by_transformers(config: dict[str, Any], folder: Path) -> None:
    import torch
    import transformers

    torch.manual_seed(1)
    own = {name: config[name] for name in config if name not in ("rope_theta", "rope_scaling", "architectures")}
    scaling = config.get("rope_scaling") or {
        "type": "default",
        "partial_rotary_factor": config.get("partial_rotary_factor"),
    }
    rope = {**scaling, "rope_type": scaling["type"], "rope_theta": config["rope_theta"]}
    rope.pop("type")
    if config["model_type"] == "phi":
        model = transformers.PhiForCausalLM(transformers.PhiConfig(**own, rope_parameters=rope))
    else:
        model = transformers.PhimoeForCausalLM(transformers.PhimoeConfig(**own, rope_parameters=rope))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2:
                weight.normal_(0, weight.shape[-1] ** -0.5)
            else:
                weight.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.1)
    model.save_pretrained(folder)
