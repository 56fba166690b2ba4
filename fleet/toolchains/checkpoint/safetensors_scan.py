"""Looks into safetensors files without loading them: shapes, lengths, and whether every weight is a number.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import mmap
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated

from pydantic import Field

from fleet.core.plan_shape import ModelFile
from fleet.errors import ModelError

_LARGEST_HEADER = 100_000_000
#: Bytes of a number, and bits of its exponent: all of them set means NaN or an infinity (IEEE 754, and bfloat16 alike).
_FLOATS = {
    "F64": (8, 0x7FF << 52),
    "F32": (4, 0xFF << 23),
    "F16": (2, 0x1F << 10),
    "BF16": (2, 0xFF << 7),
}
_SCAN_BYTES = 2**20
_Natural = Annotated[int, Field(ge=0, le=2**53)]


class _Entry(ModelFile):
    dtype: str
    shape: list[_Natural]
    data_offsets: Annotated[tuple[_Natural, _Natural], Field(strict=False)]


class _Header(ModelFile):
    tensors: dict[str, _Entry]


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor; ``begin`` and ``end`` are offsets in bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def count(self) -> int:
        """Of weights."""
        return prod(self.shape)


def read_tensors(path: Path) -> tuple[Tensor, ...]:
    """Return every tensor that the header names, its offsets compared with its shape and with the file's length.

    Raises:
        ModelError: unreadable, truncated, or no safetensors file; names the tensor that is wrong.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > _LARGEST_HEADER:
                raise ModelError(f"{path}: is no safetensors file; fetch it again")
            if size < 8 + length:
                needs = f"its header alone takes {8 + length}"
                raise ModelError(f"{path}: is truncated: {size} bytes, {needs}; fetch it again")
            raw = file.read(length)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}; fetch it again") from None
    tensors = _tensors(raw, path)
    expected = max((tensor.end for tensor in tensors), default=8 + length)
    if expected > size:
        raise ModelError(f"{path}: is truncated: {size} bytes, its header names {expected}; fetch it again")
    return tensors


def _tensors(raw: bytes, path: Path) -> tuple[Tensor, ...]:
    try:
        entries = json.loads(raw)
        entries.pop("__metadata__", None)
    except (ValueError, RecursionError, AttributeError, TypeError):
        raise ModelError(f"{path}: its header is no JSON object; fetch it again") from None
    header = _Header.parse({"tensors": entries}, str(path))
    start = 8 + len(raw)
    tensors = []
    for name, entry in header.tensors.items():
        begin, end = entry.data_offsets
        tensors.append(Tensor(name, entry.dtype, tuple(entry.shape), start + begin, start + end))
        _check_length(tensors[-1], path)
    return tuple(tensors)


def _check_length(tensor: Tensor, path: Path) -> None:
    found = tensor.end - tensor.begin
    width = _FLOATS[tensor.dtype][0] if tensor.dtype in _FLOATS else None
    if found < 0 or (width and found != width * tensor.count):
        raise ModelError(f"{path}: tensor {tensor.name}: {tensor.dtype} of shape {list(tensor.shape)} does not take "
                         f"{found} bytes, as its data_offsets have it; fetch it again")  # fmt: skip


def first_not_finite(path: Path, tensors: tuple[Tensor, ...]) -> str | None:
    """Return the name of the first tensor that holds NaN or an infinity, or None."""
    import numpy as np

    if not tensors:
        return None
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for tensor in tensors:
            if tensor.dtype not in _FLOATS:
                continue
            width, mask = _FLOATS[tensor.dtype]
            step = _SCAN_BYTES
            for begin in range(tensor.begin, tensor.end, step):
                # A copy, so that nothing refers to the map when it closes.
                bits = np.frombuffer(mapped[begin : min(begin + step, tensor.end)], dtype=f"<u{width}")
                if bool(((bits & mask) == mask).any()):
                    return tensor.name
    return None
