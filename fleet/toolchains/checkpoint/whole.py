"""Whether a checkpoint's weights are the network that its config.json describes, and putting right what can be.

Matrices that were saved apart are joined, and a prefix is taken off, by copying bytes: rows of row-major matrices that
stand one below the other are one matrix. Nothing is computed, so the network is exactly the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

from pydantic import Field

from fleet.core.checkpoint_config import refusals
from fleet.core.checkpoint_tensors import Reading, expected, read
from fleet.core.plan_shape import ModelFile, ModelShape
from fleet.errors import BuildError, ModelError
from fleet.toolchains.checkpoint.checkpoint_files import read_as
from fleet.toolchains.checkpoint.safetensors_scan import Tensor

if TYPE_CHECKING:
    from fleet.toolchains.checkpoint.checkpoint import Checkpoint

Shards = Mapping[Path, Sequence[Tensor]]

_COPY_BYTES = 8 * 2**20
_FLOATS = ("F64", "F32", "F16", "BF16")
#: Of one written file.
_NAME = "model.safetensors"


class _Index(ModelFile):
    """model.safetensors.index.json: which shard has a tensor. Shards lie beside it, where every toolchain looks."""

    weight_map: Annotated[
        dict[str, Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,200}\.safetensors$")]], Field(min_length=1)
    ]


def shards_of(path: Path) -> list[Path]:
    """Return the files of its weights.

    Raises:
        ModelError: there are none, one that the index names is absent, or one is there that it does not name.
    """
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(read_as(_Index, index).weight_map.values()))
        absent = [name for name in names if not (path / name).is_file()]
        if absent:
            raise ModelError(f"{index}: names {', '.join(absent)}, absent from the folder; fetch the whole checkpoint")
        _refuse_second_copies(path, index, names)
        return [path / name for name in names]
    found = sorted(path.glob("*.safetensors"))
    if not found:
        older = " (there are PyTorch .bin files; save it again as safetensors)" if any(path.glob("*.bin")) else ""
        raise ModelError(f"{path}: has no *.safetensors{older}")
    return found


def check_config(config: Mapping[str, Any], shape: ModelShape, origin: str) -> None:
    """See that every toolchain builds the network that config.json describes.

    Raises:
        ModelError: a field is one that they do not; names each.
    """
    found = list(refusals(config, shape))
    if found:
        raise ModelError(f"{origin}: {'; '.join(found)}")


def check_weights(config: Mapping[str, Any], shape: ModelShape, shards: Shards, path: Path) -> Reading:
    """Compare the tensors with those of the network; returns how they are to be read.

    Raises:
        ModelError: one is missing, twice there, of another shape or kind, or not of this network; names the first ones
            and what to do.
    """
    if shape.multimodal:  # its text part is taken out by the toolchains that can
        return Reading({tensor.name: tensor.name for found in shards.values() for tensor in found})
    places: dict[str, Path] = {}
    stored: dict[str, tuple[int, ...]] = {}
    for file, tensors in shards.items():
        for tensor in tensors:
            if tensor.name in places:
                both = f"{places[tensor.name].name} and {file.name}"
                raise ModelError(f"{path}: {tensor.name} is in {both}: a second copy of the weights? Move one away")
            places[tensor.name], stored[tensor.name] = file, tensor.shape
            if tensor.dtype not in _FLOATS:
                raise ModelError(
                    f"{file}: tensor {tensor.name} is of {tensor.dtype}, and weights are {', '.join(_FLOATS)}: it may "
                    "be quantized already; take the checkpoint that this was made from"
                )
    tied = bool(config.get("tie_word_embeddings"))
    wanted = expected(
        dataclasses.replace(shape, tied=tied),
        attention_bias=bool(config.get("attention_bias")),
        head_bias=bool(config.get("lm_head_bias")),
    )
    reading = read(stored, wanted, tied=tied)
    if reading.problems:
        raise ModelError(f"{path}: {'; '.join(reading.problems)}")
    if reading.tied_head is not None and not _same_bytes(shards, reading):
        raise ModelError(
            f"{path}: config.json ties the head to the embedding, and {reading.tied_head} is another matrix than the "
            "embedding; set tie_word_embeddings to false if the model was trained so, or fetch the whole checkpoint"
        )
    return reading


def _refuse_second_copies(path: Path, index: Path, named: Sequence[str]) -> None:
    """Weights that the index does not name would be taken by some toolchains and not by others.

    Raises:
        ModelError: there are some.
    """
    extra = sorted(file.name for file in path.glob("*.safetensors") if file.name not in named)
    if extra:
        raise ModelError(
            f"{path}: {index.name} does not name {', '.join(extra[:3])}: a second copy of the weights, or an adapter; "
            "move it away"
        )


@contextlib.contextmanager
def as_network(checkpoint: Checkpoint, scratch: Path) -> Iterator[Checkpoint]:
    """The checkpoint with its tensors named and joined as the network has them; itself where they are so already.

    What has to be written lies in ``scratch`` until the end of the block, and takes as much room as the weights.

    Raises:
        BuildError: there is no room for it.
    """
    if checkpoint.reading.as_stored and checkpoint.reading.tied_head is None:
        yield checkpoint
        return
    folder = scratch / f"whole-{checkpoint.facts.source_digest[:12]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in checkpoint.path.iterdir():
            if file.is_file() and file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
                shutil.copyfile(file, folder / file.name)
        _write(checkpoint, folder / _NAME)
        yield dataclasses.replace(checkpoint, path=folder, reading=Reading({}))
    except OSError as error:
        raise BuildError(f"{folder}: the checkpoint cannot be put right there: {error.strerror or error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(checkpoint: Checkpoint, target: Path) -> None:
    """One file of all tensors, in the hub's names; a joined one is its parts' bytes one after the other."""
    where = {
        checkpoint.reading.names[tensor.name]: (file, tensor)
        for file, tensors in checkpoint.shards.items()
        for tensor in tensors
        if tensor.name in checkpoint.reading.names and tensor.name != checkpoint.reading.tied_head
    }
    joined = {fusion.name: fusion.parts for fusion in checkpoint.reading.fusions}
    parts = {part for names in joined.values() for part in names}
    plan = {name: (name,) for name in where if name not in parts} | joined
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, pieces in plan.items():
        tensors = [where[piece][1] for piece in pieces]
        if len({tensor.dtype for tensor in tensors}) != 1:
            raise BuildError(f"{', '.join(pieces)}: are of different kinds of numbers, and cannot be joined exactly")
        rows = sum(tensor.shape[0] for tensor in tensors)
        size = sum(tensor.end - tensor.begin for tensor in tensors)
        shape = [rows, *tensors[0].shape[1:]] if len(tensors) > 1 else list(tensors[0].shape)
        header[name] = {"dtype": tensors[0].dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with target.open("wb") as out:
        out.write(len(encoded).to_bytes(8, "little") + encoded)
        for pieces in plan.values():
            for piece in pieces:
                file, tensor = where[piece]
                with file.open("rb") as source:
                    _copy(source, tensor, out)


def _copy(source: BinaryIO, tensor: Tensor, out: BinaryIO) -> None:
    source.seek(tensor.begin)
    left = tensor.end - tensor.begin
    while left:
        piece = source.read(min(left, _COPY_BYTES))
        out.write(piece)
        left -= len(piece)


def _same_bytes(shards: Shards, reading: Reading) -> bool:
    """Return whether the head is the embedding."""
    places = {reading.names.get(tensor.name): (file, tensor) for file, tensors in shards.items() for tensor in tensors}
    (one, head), (other, embedding) = places["lm_head.weight"], places["model.embed_tokens.weight"]
    if (head.dtype, head.shape) != (embedding.dtype, embedding.shape):
        return False
    with one.open("rb") as left, other.open("rb") as right:
        left.seek(head.begin)
        right.seek(embedding.begin)
        todo = head.end - head.begin
        while todo:
            size = min(todo, _COPY_BYTES)
            if left.read(size) != right.read(size):
                return False
            todo -= size
    return True
