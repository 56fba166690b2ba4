"""Replaces quantized matrices in MLX's safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleet.errors import BuildError
from fleet.toolchains.checkpoint.safetensors_scan import read_tensors

if TYPE_CHECKING:
    from fleet.toolchains.recovery.gptq import Quantized


def replace(folder: Path, found: dict[str, Quantized]) -> int:
    """Put quantized matrices in the place of mlx-lm's, in every safetensors file; how many there were.

    Raises:
        BuildError: one has no place, or another shape.
    """
    from safetensors.numpy import load_file, save_file

    left = dict(found)
    tied = "lm_head.scales" not in names(folder)
    for file in sorted(folder.glob("*.safetensors")):
        arrays = load_file(file)
        places = {name.removesuffix(".scales") for name in arrays if name.endswith(".scales")}
        for name in sorted(places):
            source = f"{name}.weight"
            if tied and source == "model.embed_tokens.weight":
                source = "lm_head.weight"
            if source in left:
                _put(arrays, name, left.pop(source))
        save_file(arrays, file, metadata={"format": "mlx"})
        file.chmod(0o644)
    if left:
        raise BuildError(f"mlx-lm left no place for {', '.join(sorted(left)[:3])}")
    return len(found)


def names(folder: Path) -> set[str]:
    """Of the tensors in all safetensors files."""
    return {tensor.name for file in folder.glob("*.safetensors") for tensor in read_tensors(file)}


def _put(arrays: dict[str, Any], name: str, matrix: Quantized) -> None:
    import numpy as np

    kind = arrays[f"{name}.scales"].dtype
    levels = int(matrix.q.max()) + 1
    columns = matrix.q.shape[1]
    bits = arrays[f"{name}.weight"].shape[1] * 32 // columns
    new = {
        "weight": packed(matrix.q.numpy(), bits),
        "scales": matrix.scale.numpy().astype(kind),
        "biases": (-matrix.scale * matrix.zero).numpy().astype(kind),
    }
    for part, array in new.items():
        there = arrays[f"{name}.{part}"]
        if there.shape != array.shape or levels > 2**bits or not np.isfinite(array).all():
            raise BuildError(f"{name}.{part}: mlx-lm has {there.shape} at {bits} bits, the recovered one {array.shape}")
        # safetensors writes an array's memory as it lies, in whatever order its dimensions are.
        arrays[f"{name}.{part}"] = np.ascontiguousarray(array)


def packed(values: Any, bits: int) -> Any:
    """Rows of integers as MLX packs them: one stream of bits, the lowest first, in 32-bit words."""
    import numpy as np

    stream = (values[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(stream.reshape(len(values), -1).astype(np.uint8), axis=1, bitorder="little").view("<u4")
