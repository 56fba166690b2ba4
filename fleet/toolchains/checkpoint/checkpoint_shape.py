"""Reads what the planner needs of a model: its shape and its tokenizer's size. Weights are not read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pydantic import Field

from fleet.core.phi_variants import VARIANTS, find_variant
from fleet.core.plan_shape import ModelFile, ModelShape, Vocabulary, shape_of
from fleet.errors import ModelError
from fleet.toolchains.checkpoint.checkpoint_files import license_of, local_path, read_as, read_json
from fleet.toolchains.checkpoint.safetensors_scan import Tensor, read_tensors
from fleet.toolchains.checkpoint.whole import check_config, check_weights, shards_of

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


class _Words(ModelFile):
    """BPE maps tokens to ids, Unigram lists them with scores; older files have a merge as text, newer as a pair."""

    vocab: dict[str, int] | list[Annotated[tuple[str, float], Field(strict=False)]] | None = None
    merges: list[str | list[str]] | None = None


class _Tokenizer(ModelFile):
    model: _Words | None = None


def read_shape(model: str | Path) -> ModelShape:
    """Of a checkpoint's folder, or of a published Phi by its name or hub id, which is not downloaded.

    Raises:
        ModelError: neither, or no Phi.
    """
    path = local_path(model)
    if path.is_dir():
        return _from_folder(path)
    if variant := find_variant(str(model)):
        return variant.shape
    known = ", ".join(variant.name for variant in VARIANTS)
    raise ModelError(f"{model} is neither a checkpoint's folder nor a Phi known by name ({known}, or their hub ids)")


def completed(shape: ModelShape, path: Path, tensors: Iterable[Tensor]) -> ModelShape:
    """``shape`` with what config.json does not tell: licence, size of the tokenizer, whether the output matrix is tied.

    Raises:
        ModelError: a file of the tokenizer is garbled.
    """
    names = [tensor.name for tensor in tensors]
    tied = not any(name.startswith("lm_head") for name in names) if names else shape.tied
    return replace(shape, tied=tied, vocabulary=_vocabulary(path) or shape.vocabulary, license=license_of(path))


def _from_folder(path: Path) -> ModelShape:
    file = path / "config.json"
    config = read_json(file, needed=True)
    shape = shape_of(config, name=path.resolve().name, origin=str(file))
    check_config(config, shape, str(file))
    if not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
        return completed(shape, path, ())  # a plan needs no weights
    shards = {shard: read_tensors(shard) for shard in shards_of(path)}
    check_weights(config, shape, shards, path)
    return completed(shape, path, (tensor for found in shards.values() for tensor in found))


def _vocabulary(path: Path) -> Vocabulary | None:
    file = path / "tokenizer.json"
    if not file.is_file():
        return None
    model = read_as(_Tokenizer, file).model or _Words()
    words = model.vocab or {}
    names = words if isinstance(words, dict) else [word for word, _ in words]
    pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.merges or []]
    files = [path / name for name in _TOKENIZER_FILES]
    return Vocabulary(
        text_bytes=sum(len(name.encode()) for name in names),
        merges=len(pairs),
        merge_bytes=sum(len(pair.encode()) for pair in pairs),
        file_bytes=sum(one.stat().st_size for one in files if one.is_file()),
    )
