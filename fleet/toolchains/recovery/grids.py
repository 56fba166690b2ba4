"""Which grid each matrix gets, so that a budget of bits loses the least, and rounding to grids without a calibration.

For toolchains whose kernels read grids as ``gptq`` knows them; what an error costs is ``sensitivity``'s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fleet.core.allocation import Choice, grouped
from fleet.errors import BuildError
from fleet.toolchains.progress import Progress, ProgressCallback
from fleet.toolchains.recovery.gptq import Grid, Quantized, nearest
from fleet.toolchains.recovery.recovery import EMBEDDING, OUTPUT, Wanted, recover
from fleet.toolchains.recovery.sensitivity import (
    check_same_matrices,
    expected_loss,
    matrix_names,
    sampled,
    sensitivities,
    spend,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

_T = TypeVar("_T")

#: Rows of a matrix that are rounded for an estimate: each grid's scales are searched for, which takes its time.
_ROWS = 256


@dataclass(frozen=True, slots=True)
class Offer:
    """A grid that a toolchain has for a matrix, and the bits that a weight takes in it, scales and zeros included."""

    grid: Grid
    bits: float


@dataclass(frozen=True, slots=True)
class Requantized:
    """Matrices by their use, the grid of each, and what the manifest says of them.

    Names are those of the checkpoint, but for an embedding that is the last product too, which is ``OUTPUT``.
    """

    matrices: Mapping[str, Quantized]
    grids: Mapping[str, Grid]
    notes: Mapping[str, Any]


def within_budget(
    source: Path, texts: Sequence[str], bits: float, offers: Callable[[int], Sequence[Offer]], *,
    recovered: bool, threads: int, progress: ProgressCallback, widths: Mapping[str, str] | None = None,
) -> Requantized:  # fmt: skip
    """Quantize every matrix of the checkpoint to ``bits`` a weight on average, at most; or as ``widths`` has it.

    ``offers`` are the grids for rows of so many columns. ``recovered``: on the calibration text ``texts``, which
    tells what matters in any case.

    Raises:
        BuildError: the budget is less than the smallest grids take, or the text is too short.
        ModelError: transformers does not read the checkpoint whole.
    """
    if widths:
        chosen, loss = same_grids(source, widths, offers), {}
    else:
        information = sensitivities(source, texts, threads=threads, progress=progress)
        chosen, expected = choose_grids(source, bits, information, offers, progress)
        loss = {"expected_kl": round(expected, 4)}
    counts = Counter(f"{grid.bits} bits in groups of {grid.group}" for grid in chosen.values())
    matrices = grouped({name: repr(grid) for name, grid in chosen.items()})
    notes = {"allocated": {"grids": dict(sorted(counts.items())), **loss, "matrices": matrices}}
    grids = _by_use(chosen)
    if not recovered:
        return Requantized(_by_use(_rounded(source, chosen, progress)), grids, notes)
    wanted = Wanted(grids.get, output=grids[OUTPUT], embedding=grids.get(EMBEDDING))
    return Requantized(recover(source, texts, wanted, threads=threads, progress=progress), grids, notes)


def choose_grids(
    source: Path, bits: float, information: Mapping[str, NDArray[Any]], offers: Callable[[int], Sequence[Offer]],
    progress: ProgressCallback,
) -> tuple[dict[str, Grid], float]:  # fmt: skip
    """Return a grid for each matrix of the checkpoint, and what all are expected to lose, in nats a token.

    ``information`` is what ``sensitivities`` gives.

    Raises:
        BuildError: the budget is less than the smallest grids take.
    """
    choices: dict[str, list[Choice]] = {}
    named: dict[str, Grid] = {}
    weights = 0
    for done, (name, values) in enumerate(_matrices(source, set(information))):
        progress(Progress("measuring what each width costs", done / len(information)))
        choices[name] = []
        for offer in offers(values.shape[1]):
            label = repr(offer.grid)
            named[label] = offer.grid
            size = int(values.numel() * offer.bits / 8)
            choices[name].append(Choice(label, size, _loss(values, offer.grid, information[name])))
        weights += values.numel()
    found = spend(choices, bits, weights)
    return {name: named[choice.name] for name, choice in found.chosen.items()}, found.loss


def same_grids(source: Path, widths: Mapping[str, str], offers: Callable[[int], Sequence[Offer]]) -> dict[str, Grid]:
    """Return the grid of each matrix as an earlier build recorded it.

    Raises:
        BuildError: it has other matrices, or a grid that there is not.
    """
    found = {}
    names = matrix_names(source)
    check_same_matrices(widths, names)
    for name, values in _matrices(source, set(names)):
        grids = {repr(offer.grid): offer.grid for offer in offers(values.shape[1])}
        if widths[name] not in grids:
            raise BuildError(f"the artifact to build after has {name} in {widths[name]}, which there is not here")
        found[name] = grids[widths[name]]
    return found


def _rounded(source: Path, grids: Mapping[str, Grid], progress: ProgressCallback) -> dict[str, Quantized]:
    """Each weight at the value of its grid that is nearest."""
    found = {}
    for done, (name, values) in enumerate(_matrices(source, set(grids))):
        progress(Progress("quantizing", done / len(grids)))
        found[name] = nearest(values, grids[name])
    return found


def _by_use(by_name: Mapping[str, _T]) -> dict[str, _T]:
    if OUTPUT in by_name:
        return dict(by_name)
    return {OUTPUT if name == EMBEDDING else name: value for name, value in by_name.items()}


def _loss(values: Tensor, grid: Grid, information: NDArray[Any]) -> float:
    import torch

    numbers, weighed = sampled(information, _ROWS)
    some = values[torch.from_numpy(numbers)].float()
    return expected_loss(weighed, (nearest(some, grid).dequantized() - some).numpy())


def _matrices(source: Path, names: set[str]) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in sorted(names & set(opened.keys())):
                yield name, opened.get_tensor(name)
