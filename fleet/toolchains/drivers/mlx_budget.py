"""How many bits each matrix gets in MLX, so that a budget of bits loses the least (see ``recovery.sensitivity``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleet.core.allocation import Choice
from fleet.toolchains.progress import Progress, ProgressCallback
from fleet.toolchains.recovery.choices import Choices
from fleet.toolchains.recovery.sensitivity import expected_loss, sampled

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: That MLX has kernels for, of four and more.
WIDTHS = (4, 5, 6, 8)


def measure_bits(
    source: Path, group: int, information: Mapping[str, NDArray[Any]], progress: ProgressCallback
) -> Choices:
    """Return what each width, as text, costs each matrix of the checkpoint; sizes are with their scales."""
    choices: dict[str, list[Choice]] = {}
    weights = 0
    for done, (name, values) in enumerate(_matrices(source, set(information))):
        progress(Progress("measuring what each width costs", done / len(information)))
        choices[name.removesuffix(".weight")] = list(_choices(values, group, information[name]))
        weights += values.size
    return Choices(weights, choices)


def _matrices(source: Path, names: set[str]) -> Iterator[tuple[str, Any]]:
    import mlx.core as mx

    for file in sorted(source.glob("*.safetensors")):
        loaded = mx.load(str(file))
        assert isinstance(loaded, dict)  # noqa: S101 - what it returns for a .safetensors
        for name in sorted(names & set(loaded)):
            yield name, loaded[name]


def _choices(values: Any, group: int, information: NDArray[Any]) -> Iterator[Choice]:
    import mlx.core as mx
    import numpy as np

    numbers, weighed = sampled(information)
    some = values[mx.array(numbers)].astype(mx.float32)
    for bits in WIDTHS:
        back = mx.dequantize(*mx.quantize(some, group_size=group, bits=bits), group_size=group, bits=bits)
        size = values.size * bits // 8 + values.size // group * 4
        yield Choice(str(bits), size, expected_loss(weighed, np.array(back - some)))
