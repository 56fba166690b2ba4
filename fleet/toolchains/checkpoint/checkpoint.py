"""A model to quantize: what it is, whether it is whole, and how it is spoken to."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.contract.base import canonical_json, sha256_hex
from agent.contract.manifest import Chat, ModelFacts, SamplingDefaults
from fleet.core.checkpoint_tensors import Reading
from fleet.core.phi_variants import find_variant
from fleet.core.plan_shape import ModelShape, shape_of
from fleet.errors import ModelError
from fleet.export.export import MANIFEST as EXPORTED
from fleet.toolchains.checkpoint.checkpoint_chat import chat_of, sampling_of
from fleet.toolchains.checkpoint.checkpoint_files import license_of, local_path, read_json
from fleet.toolchains.checkpoint.checkpoint_shape import completed
from fleet.toolchains.checkpoint.safetensors_scan import Tensor, first_not_finite, read_tensors
from fleet.toolchains.checkpoint.whole import check_config, check_weights, shards_of
from fleet.toolchains.progress import Progress, ProgressCallback, silent

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
#: Beside the weights, whatever changes what a toolchain writes.
_OTHER_INPUTS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json",
    "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that was found whole. ``weights_bytes`` as stored; ``config`` is config.json."""

    path: Path
    config: dict[str, Any]
    facts: ModelFacts
    shape: ModelShape
    chat: Chat
    weights_bytes: int
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    #: How its tensors become those of the network, and where they lie.
    reading: Reading = field(default_factory=lambda: Reading({}))
    shards: Mapping[Path, tuple[Tensor, ...]] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """In artifact ids: lower case letters, digits, dots, dashes."""
        return self.facts.name


def inspect(path: Path, *, name: str | None = None, progress: ProgressCallback = silent) -> Checkpoint:
    """Read and check the checkpoint in the folder ``path``; ``name`` replaces the name that it has.

    Every weight is looked at, once.

    Raises:
        ModelError: missing, no Phi, without tokenizer, truncated, or with weights that are no numbers.
    """
    if not path.is_dir():
        what = "is a file, not a checkpoint's folder" if path.exists() else "does not exist"
        raise ModelError(f"{path} {what}; pass a folder with config.json and *.safetensors, or a hub id")
    if (path / EXPORTED).is_file():
        raise ModelError(f"{path} is an artifact that was exported, not a checkpoint; `phifleet artifacts import` "
                         "takes it in")  # fmt: skip
    file = path / "config.json"
    config = read_json(file, needed=True)
    name = slug(name or _own_name(config) or path.resolve().name)
    shape = shape_of(config, name=name, origin=str(file))
    check_config(config, shape, str(file))
    if not any((path / tokenizer).is_file() for tokenizer in _TOKENIZERS):
        raise ModelError(f"{path}: has no tokenizer ({', '.join(_TOKENIZERS)}); fetch the whole checkpoint")
    shards = {shard: read_tensors(shard) for shard in shards_of(path)}
    reading = check_weights(config, shape, shards, path)
    _check_numbers(shards, progress)
    tensors = [tensor for found in shards.values() for tensor in found]
    parameters = sum(tensor.count for tensor in tensors)
    if not parameters:
        raise ModelError(f"{path}: its *.safetensors hold no weights; fetch the whole checkpoint")
    facts = ModelFacts(
        name=name,
        architecture=shape.architecture,
        parameters=parameters,
        source_digest=_source_digest(path, list(shards), progress),
        license=license_of(path),
        max_context=shape.max_context,
    )
    stored = sum(tensor.end - tensor.begin for tensor in tensors)
    chat, sampling = chat_of(path, shape.architecture), sampling_of(path)
    whole = completed(shape, path, tensors)
    return Checkpoint(path, config, facts, whole, chat, stored, sampling, reading, shards)


def resolve_model(model: str | Path, *, progress: ProgressCallback = silent) -> Checkpoint:
    """Return the checkpoint in a folder, or of a hub id such as ``microsoft/phi-4``, downloaded when needed.

    Raises:
        ModelError: as ``inspect``; or the id cannot be had.
    """
    path = local_path(model)
    if not path.exists() and (variant := find_variant(str(model))) and str(model) not in variant.hub_ids:
        raise ModelError(f"{model} is no folder here; on the hub it is {' or '.join(variant.hub_ids)}")
    if path.exists() or not isinstance(model, str) or not _HUB_ID.match(model) or model.startswith("."):
        return inspect(path, progress=progress)
    progress(Progress(f"downloading {model}"))
    return inspect(_download(model), name=model.rpartition("/")[2], progress=progress)


def slug(name: str) -> str:
    """``name`` as it stands in an artifact id."""
    return re.sub(r"[^a-z0-9._]+", "-", name.lower()).strip("-._")[:60] or "model"


def _download(hub_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.constants import ENDPOINT
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    except ModuleNotFoundError:
        raise ModelError(f"{hub_id} is no folder, and huggingface_hub, which would download it, is not installed; "
                         "install phifleet[quantize-onnx]") from None  # fmt: skip
    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*"]
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except GatedRepoError:
        raise ModelError(f"{hub_id} is gated: accept its terms on the hub, then run `hf auth login`") from None
    except RepositoryNotFoundError:
        raise ModelError(f"there is neither a folder nor a hub model named {hub_id}; check the spelling") from None
    except Exception as error:  # the hub client raises its transport's errors
        raise ModelError(
            f"{hub_id} is no folder here, and cannot be downloaded from {ENDPOINT} ({type(error).__name__}: can it be "
            "reached? HF_ENDPOINT names another one). "
            f"On a machine that has one, run `hf download {hub_id} --local-dir DIR`, copy DIR here and pass "
            "--model DIR; "
            "`phifleet sample-model DIR` makes a small speaking model without any hub"
        ) from None


def _own_name(config: dict[str, Any]) -> str:
    return str(config.get("_name_or_path") or "").rstrip("/").rpartition("/")[2]


def _check_numbers(shards: dict[Path, tuple[Tensor, ...]], progress: ProgressCallback) -> None:
    for done, (shard, tensors) in enumerate(shards.items()):
        progress(Progress("checking the weights", done / len(shards)))
        if bad := first_not_finite(shard, tensors):
            raise ModelError(f"{shard}: tensor {bad} holds NaN or infinite weights; the checkpoint is damaged")


def _source_digest(path: Path, shards: list[Path], progress: ProgressCallback) -> str:
    inputs = [path / name for name in _OTHER_INPUTS if (path / name).is_file()] + shards
    entries = []
    for done, file in enumerate(inputs):
        progress(Progress("hashing the checkpoint", done / len(inputs)))
        with file.open("rb") as opened:
            entries.append([file.name, hashlib.file_digest(opened, "sha256").hexdigest()])
    return sha256_hex(canonical_json(sorted(entries)))
