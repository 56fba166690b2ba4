"""Which of llama.cpp's types each matrix gets, so that a budget of bits loses the least.

What a type costs a matrix is what llama.cpp's own quantizer does to it, weighed by how much its weights matter
(``recovery.sensitivity``).
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleet.core.allocation import Choice
from fleet.core.plan_size import GGML_BLOCKS
from fleet.errors import BuildError
from fleet.toolchains.progress import Progress, ProgressCallback
from fleet.toolchains.recovery.choices import Choices
from fleet.toolchains.recovery.sensitivity import expected_loss, sampled

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: Of four bits and more, as INT4 is meant; a row that has no whole blocks of 256 has those of 32 alone.
TYPES = ("IQ4_XS", "IQ4_NL", "Q4_K", "Q4_0", "Q5_K", "Q5_0", "Q5_1", "Q6_K", "Q8_0")
#: Of a GGUF's matrices, the names in the checkpoint.
_NAMES = {
    "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj", "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip


def measure_types(
    whole: Path, information: Mapping[str, NDArray[Any]], importance: Mapping[str, NDArray[Any]],
    progress: ProgressCallback,
) -> Choices:  # fmt: skip
    """Return what each type costs each matrix of the GGUF ``whole``.

    ``importance`` is the importance matrix by a tensor's name, ``information`` is by names in the checkpoint.
    """
    matrices = dict(_matrices(whole))
    weights = sum(tensor.n_elements for tensor in matrices.values())
    choices: dict[str, list[Choice]] = {}
    for done, (name, tensor) in enumerate(matrices.items()):
        progress(Progress("measuring what each width costs", done / len(matrices)))
        choices[name] = list(_choices(tensor, information[_in_checkpoint(name)], importance.get(name)))
    return Choices(weights, choices)


def names_of(whole: Path) -> list[str]:
    """Return the names of the GGUF's matrices."""
    return [name for name, _ in _matrices(whole)]


def _matrices(whole: Path) -> Iterator[tuple[str, Any]]:
    from gguf import GGUFReader

    for tensor in GGUFReader(whole).tensors:
        if len(tensor.shape) == 2 and tensor.name.endswith(".weight"):
            yield tensor.name, tensor


def _in_checkpoint(name: str) -> str:
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output.weight":
        return "lm_head.weight"
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if found is None or found[2] not in _NAMES:
        raise BuildError(f"llama.cpp's converter wrote a matrix {name}, which is not known here")
    return f"model.layers.{found[1]}.{_NAMES[found[2]]}.weight"


def _choices(tensor: Any, information: NDArray[Any], importance: NDArray[Any] | None) -> Iterator[Choice]:
    import numpy as np
    from gguf.quants import dequantize

    numbers, weighed = sampled(information)
    columns = int(tensor.shape[0])
    values = np.ascontiguousarray(dequantize(tensor.data[numbers], tensor.tensor_type), dtype=np.float32)
    for kind in TYPES:
        size, block = GGML_BLOCKS[kind]
        if columns % block:
            continue
        loss = expected_loss(weighed, _quantized(kind, values, importance) - values)
        yield Choice(kind, tensor.n_elements // block * size, loss)


def _quantized(kind: str, values: NDArray[np.float32], importance: NDArray[Any] | None) -> NDArray[np.float32]:
    """Through llama.cpp's quantizer and back."""
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize
    from llama_cpp._ggml import libggml

    number = GGMLQuantizationType[kind]
    size, block = GGML_BLOCKS[kind]
    rows, columns = values.shape
    packed = np.zeros((rows, columns // block * size), dtype=np.uint8)
    call = libggml.ggml_quantize_chunk
    call.restype = ctypes.c_size_t
    call.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    given = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
    written = call(
        int(number),
        values.ctypes.data,
        packed.ctypes.data,
        0,
        rows,
        columns,
        None if given is None else given.ctypes.data,
    )
    if written != packed.size:
        raise BuildError(f"llama.cpp's quantizer wrote {written} bytes of {kind}, {packed.size} were expected")
    return np.asarray(dequantize(packed, number), dtype=np.float32)
