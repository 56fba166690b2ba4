"""Reads GGUF files, version 2 and 3, as far as the sample needs: metadata, and tensors as float32.

The package that carries llama.cpp's own reader requires PyTorch, which the demo does without. The layout is that of
llama.cpp's `gguf specification <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>`_; a test compares every
value and every weight of the sample with what llama.cpp's own reader gives.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Weights = NDArray[np.float32]
    Raw = NDArray[np.uint8]

_MAGIC = b"GGUF"
_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
#: ``struct`` codes of the scalar value types, by their number in the file.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
#: No key, token or template is longer, in bytes; a damaged length must not take the machine's memory.
_LONGEST = 1 << 24


@dataclass(frozen=True, slots=True)
class _TensorInfo:
    shape: tuple[int, ...]
    kind: int
    offset: int


class GgufFile:
    """One GGUF, mapped into memory. ``metadata`` has each value by its key, ``tensors`` the tensors' names in order."""

    def __init__(self, path: Path) -> None:
        """Map ``path`` and read its head.

        Raises:
            ValueError: the file is no GGUF, or is damaged.
            OSError: it cannot be read.
        """
        import numpy as np

        self._bytes: Raw = np.memmap(path, dtype=np.uint8, mode="r")
        self._at = 0
        self.metadata: dict[str, Any] = {}
        if bytes(self._bytes[:4]) != _MAGIC:
            raise ValueError("the file does not begin with GGUF")
        self._at = 4
        version = self._scalar("I")
        if version not in (2, 3):
            raise ValueError(f"GGUF version {version} is not supported; 2 and 3 are")
        tensors, values = self._scalar("Q"), self._scalar("Q")
        for _ in range(values):
            key = self._string()
            self.metadata[key] = self._value(self._scalar("I"))
        self._infos = dict(self._info() for _ in range(tensors))
        alignment = int(self.metadata.get("general.alignment", _ALIGNMENT))
        self._data = -(-self._at // alignment) * alignment

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names, in the order of the file."""
        return tuple(self._infos)

    def tensor(self, name: str) -> Weights:
        """Return one tensor as float32, of the shape (out, in) for matrices.

        Raises:
            ValueError: it is of a type that this reader does not know, or the file is cut short.
        """
        import numpy as np

        info = self._infos[name]
        if info.kind not in _TYPES:
            raise ValueError(f"tensor {name} is of type {info.kind}; known are {', '.join(map(str, _TYPES))}")
        elements, size, decode = _TYPES[info.kind]
        count = math.prod(info.shape)
        begin, length = self._data + info.offset, count // elements * size
        raw = self._bytes[begin : begin + length]
        if len(raw) != length:
            raise ValueError(f"tensor {name} ends beyond the end of the file")
        return np.ascontiguousarray(decode(raw.reshape(-1, size)).reshape(info.shape), dtype=np.float32)

    def _take(self, count: int) -> bytes:
        if self._at + count > len(self._bytes):
            raise ValueError(f"the file ends within its head, at byte {len(self._bytes)}")
        taken = bytes(self._bytes[self._at : self._at + count])
        self._at += count
        return taken

    def _scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def _string(self) -> str:
        length = self._scalar("Q")
        if length > _LONGEST:
            raise ValueError(f"a text of {length} bytes at byte {self._at}: the file is damaged")
        return self._take(length).decode("utf-8", errors="replace")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            inner, count = self._scalar("I"), self._scalar("Q")
            if count > _LONGEST:
                raise ValueError(f"an array of {count} values at byte {self._at}: the file is damaged")
            return [self._value(inner) for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"a value of type {kind} at byte {self._at}: the file is damaged")
        return self._scalar(_SCALARS[kind])

    def _info(self) -> tuple[str, _TensorInfo]:
        name = self._string()
        dimensions = self._scalar("I")
        if dimensions > 4:
            raise ValueError(f"tensor {name} has {dimensions} dimensions: the file is damaged")
        # The file names the fastest dimension first; arrays name it last.
        shape = tuple(reversed([self._scalar("Q") for _ in range(dimensions)]))
        return name, _TensorInfo(shape, self._scalar("I"), self._scalar("Q"))


def _floats(code: str) -> Callable[[Raw], Weights]:
    return lambda raw: raw.view(code).astype("<f4")


def _nibbles(raw: Raw) -> Weights:
    """Return blocks of 16 bytes to 32 values: the low halves first, then the high ones."""
    import numpy as np

    return np.concatenate([raw & 0x0F, raw >> 4], axis=1).astype(np.float32)


def _half(raw: Raw) -> Weights:
    import numpy as np

    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


#: Elements a block, bytes a block, and the decoder of an array (blocks, bytes), by the type's number in the file.
_TYPES: dict[int, tuple[int, int, Callable[[Raw], Weights]]] = {
    0: (1, 4, _floats("<f4")),
    1: (1, 2, _floats("<f2")),
    2: (32, 18, lambda raw: (_nibbles(raw[:, 2:]) - 8) * _half(raw[:, :2])),  # Q4_0
    3: (32, 20, lambda raw: _nibbles(raw[:, 4:]) * _half(raw[:, :2]) + _half(raw[:, 2:4])),  # Q4_1
    8: (32, 34, lambda raw: raw[:, 2:].view("i1").astype("<f4") * _half(raw[:, :2])),  # Q8_0
}
