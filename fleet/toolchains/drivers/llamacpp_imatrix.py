"""llama.cpp's importance matrix: the mean square of what each column of a weight is multiplied with.

Its own tool is a program that no wheel carries; this does the same through the callback that llama.cpp calls
for every node of its graph.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleet.errors import BuildError
from fleet.toolchains.drivers.llamacpp_session import Session
from fleet.toolchains.progress import Progress, ProgressCallback

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_CONTEXT = 512
_PRODUCTS = ("MUL_MAT", "MUL_MAT_ID")


class _Tensor(ctypes.Structure):
    """``struct ggml_tensor`` of ggml.h; ``_check_layout`` compares it with the library that is loaded."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    )


@dataclass
class ImportanceMatrix:
    """Tensor name to float32 array, one value a column; and how many tokens were seen."""

    values: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    tokens: int = 0


def measure(model: Path, texts: tuple[str, ...], threads: int, progress: ProgressCallback) -> ImportanceMatrix:
    """Run ``texts`` through the unquantized GGUF and collect the matrix of every weight that is multiplied.

    Raises:
        BuildError: the library cannot load the model, or is laid out otherwise than this code knows.
    """
    import numpy as np

    collector, seen = _Collector(_ggml()), 0
    with Session(model, context=_CONTEXT, threads=threads, watch=collector.see) as session:
        for done, text in enumerate(texts):
            progress(Progress("measuring importance", done / len(texts)))
            ids = session.tokenize(text)[:_CONTEXT]
            # Every token asks for logits, or the last layers would see one row only.
            session.decode(ids, every=True)
            seen += len(ids)
    if collector.failure:
        raise BuildError(f"the importance matrix cannot be measured: {collector.failure}")
    means = {name: (total / collector.counts[name]).astype(np.float32) for name, total in collector.sums.items()}
    return ImportanceMatrix(means, seen)


class _Collector:
    """Sums squares over rows. An exception cannot leave a callback of C, so it is kept."""

    def __init__(self, ggml: Any) -> None:
        self._ggml = ggml
        self._checked = False
        self.sums: dict[str, Any] = {}
        self.counts: dict[str, int] = {}
        self.failure = ""

    def see(self, address: int, ask: bool, _data: Any) -> bool:
        """llama.cpp asks before it computes a node whether we want it, then calls again with the result."""
        try:
            if not self._checked:
                _check_layout(self._ggml, address)
                self._checked = True
            node = _Tensor.from_address(address)
            if self._ggml.ggml_op_name(node.op).decode() not in _PRODUCTS:
                return not ask
            weight = _Tensor.from_address(node.src[0])
            name = weight.name.decode()
            if not name.endswith(".weight"):
                return not ask
            if not ask:
                self._add(name, _Tensor.from_address(node.src[1]))
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"
            return not ask
        return True

    def _add(self, name: str, tensor: _Tensor) -> None:
        import numpy as np

        columns, rows = tensor.ne[0], tensor.ne[1] * tensor.ne[2] * tensor.ne[3]
        if tensor.nb[0] != 4 or tensor.nb[1] != 4 * columns:
            raise ValueError(f"the input of {name} is not contiguous float32")
        flat = (ctypes.c_float * (columns * rows)).from_address(tensor.data)
        values = np.frombuffer(flat, np.float32).reshape(rows, columns).astype(np.float64)
        self.sums[name] = self.sums.get(name, 0.0) + np.square(values).sum(axis=0)
        self.counts[name] = self.counts.get(name, 0) + rows


def _ggml() -> Any:
    from llama_cpp import _ggml as package

    base = package.libggml
    base.ggml_op_name.restype = ctypes.c_char_p
    base.ggml_op_name.argtypes = [ctypes.c_int]
    base.ggml_get_name.restype = ctypes.c_void_p
    base.ggml_get_name.argtypes = [ctypes.c_void_p]
    base.ggml_get_data.restype = ctypes.c_void_p
    base.ggml_get_data.argtypes = [ctypes.c_void_p]
    return base


def _check_layout(ggml: Any, address: int) -> None:
    ours = _Tensor.from_address(address)
    if ggml.ggml_get_name(address) != address + _Tensor.name.offset or ggml.ggml_get_data(address) != ours.data:
        raise BuildError("this llama.cpp lays its tensors out otherwise; use the version that phifleet names")
