"""Looks into safetensors files without loading them: shapes, lengths, and whether every weight is a number.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import mmap
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from fleet.errors import ModelError

_LARGEST_HEADER = 100_000_000
#: Bits of the exponent: all of them set means NaN or an infinity (IEEE 754, and bfloat16 alike).
_EXPONENT = {
    "F64": ("<u8", 0x7FF << 52),
    "F32": ("<u4", 0xFF << 23),
    "F16": ("<u2", 0x1F << 10),
    "BF16": ("<u2", 0xFF << 7),
}
_SCAN_BYTES = 2**20


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
    """Every tensor that the header names, after comparing its offsets with the file's length.

    Raises:
        ModelError: truncated, or no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > _LARGEST_HEADER:
            raise ModelError(f"{path}: is no safetensors file; fetch it again")
        if size < 8 + length:
            raise ModelError(f"{path}: is truncated: {size} bytes, its header alone takes {8 + length}; fetch it again")
        raw = file.read(length)
    try:
        header: dict[str, Any] = json.loads(raw)
        tensors = tuple(
            Tensor(
                name, str(entry["dtype"]), tuple(entry["shape"]), *(8 + length + int(o) for o in entry["data_offsets"])
            )
            for name, entry in header.items()
            if name != "__metadata__"
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ModelError(f"{path}: its header cannot be read; fetch it again") from None
    expected = max((tensor.end for tensor in tensors), default=8 + length)
    if expected > size:
        raise ModelError(f"{path}: is truncated: {size} bytes, its header names {expected}; fetch it again")
    return tensors


def first_not_finite(path: Path, tensors: tuple[Tensor, ...]) -> str | None:
    """The name of the first tensor that holds NaN or an infinity, or None."""
    import numpy as np

    if not tensors:
        return None
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for tensor in tensors:
            if tensor.dtype not in _EXPONENT:
                continue
            kind, mask = _EXPONENT[tensor.dtype]
            step = _SCAN_BYTES
            for begin in range(tensor.begin, tensor.end, step):
                # A copy, so that nothing refers to the map when it closes.
                bits = np.frombuffer(mapped[begin : min(begin + step, tensor.end)], dtype=kind)
                if bool(((bits & mask) == mask).any()):
                    return tensor.name
    return None
