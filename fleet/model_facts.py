"""Reads what the planner needs of a model: its shape and its tokenizer's size. Weights are not read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from fleet.core.phi_variants import VARIANTS, find_variant
from fleet.core.plan_shape import ModelShape, Vocabulary, shape_of
from fleet.errors import ModelError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


def read_shape(model: str | Path) -> ModelShape:
    """Of a checkpoint's folder, or of a published Phi by its name or hub id, which is not downloaded.

    Raises:
        ModelError: neither, or no Phi.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return _from_folder(path)
    if variant := find_variant(str(model)):
        return variant.shape
    known = ", ".join(variant.name for variant in VARIANTS)
    raise ModelError(f"{model} is neither a checkpoint's folder nor a Phi known by name ({known}, or their hub ids)")


def _from_folder(path: Path) -> ModelShape:
    config = _json(path / "config.json")
    if not isinstance(config, dict):
        raise ModelError(f"{path / 'config.json'}: must hold a JSON object")
    shape = shape_of(config, name=path.resolve().name, vocabulary=_vocabulary(path))
    return replace(shape, tied=_tied(path, shape.tied))


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}; pass a checkpoint's folder") from None
    except ValueError as error:
        raise ModelError(f"{path}: is no JSON: {error}") from None


def _tied(path: Path, claimed: bool) -> bool:
    """By the weights that are there, if any are: config.json may be silent."""
    from fleet.toolchains.safetensors_scan import read_tensors

    shards = sorted(path.glob("*.safetensors"))
    if not shards:
        return claimed
    return not any(tensor.name.startswith("lm_head") for shard in shards for tensor in read_tensors(shard))


def _vocabulary(path: Path) -> Vocabulary | None:
    file = path / "tokenizer.json"
    if not file.is_file():
        return None
    document = _json(file)
    model = document.get("model") or {} if isinstance(document, dict) else {}
    words, merges = model.get("vocab") or {}, model.get("merges") or []
    names = words if isinstance(words, dict) else [word[0] for word in words]
    pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    files = [path / name for name in _TOKENIZER_FILES]
    return Vocabulary(
        text_bytes=sum(len(str(name).encode()) for name in names),
        merges=len(pairs),
        merge_bytes=sum(len(pair.encode()) for pair in pairs),
        file_bytes=sum(one.stat().st_size for one in files if one.is_file()),
    )
