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
from fleet.toolchains.recovery.choices import Budget, Choices, measured
from fleet.toolchains.recovery.gptq import Grid, Quantized, nearest
from fleet.toolchains.recovery.recovery import EMBEDDING, OUTPUT, Wanted, recover
from fleet.toolchains.recovery.sensitivity import (
    check_same_matrices,
    expected_loss,
    matrix_columns,
    sampled,
    sensitivities,
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
    source: Path, texts: Sequence[str], budget: Budget, offers: Callable[[int], Sequence[Offer]], *,
    recovered: bool, threads: int, progress: ProgressCallback,
) -> Requantized:  # fmt: skip
    """Quantize every matrix of the checkpoint within the budget, or to the widths that it names.

    ``offers`` are the grids for rows of so many columns. ``recovered``: on the calibration text ``texts``, which
    tells what matters in any case.

    Raises:
        BuildError: the budget is less than the smallest grids take, the widths are of other matrices or grids, or the
            text is too short.
        ModelError: transformers does not read the checkpoint whole.
    """

    def measure() -> Choices:
        information = sensitivities(source, texts, threads=threads, progress=progress)
        return measure_grids(source, information, offers, progress)

    widths, loss = budget.widths, dict[str, Any]()
    if not widths:
        found = measured(budget.choices, measure).spend(budget.bits)
        widths, loss = found.names, {"expected_kl": round(found.loss, 4)}
    chosen = _named_grids(source, widths, offers)
    counts = Counter(f"{grid.bits} bits in groups of {grid.group}" for grid in chosen.values())
    notes = {"allocated": {"grids": dict(sorted(counts.items())), **loss, "matrices": grouped(widths)}}
    grids = _by_use(chosen)
    if not recovered:
        return Requantized(_by_use(_rounded(source, chosen, progress)), grids, notes)
    wanted = Wanted(grids.get, output=grids[OUTPUT], embedding=grids.get(EMBEDDING))
    return Requantized(recover(source, texts, wanted, threads=threads, progress=progress), grids, notes)


def measure_grids(
    source: Path, information: Mapping[str, NDArray[Any]], offers: Callable[[int], Sequence[Offer]],
    progress: ProgressCallback,
) -> Choices:  # fmt: skip
    """Return what each grid costs each matrix of the checkpoint; ``information`` is what ``sensitivities`` gives."""
    choices: dict[str, list[Choice]] = {}
    weights = 0
    for done, (name, values) in enumerate(_matrices(source, set(information))):
        progress(Progress("measuring what each width costs", done / len(information)))
        choices[name] = [
            Choice(repr(offer.grid), int(values.numel() * offer.bits / 8), _loss(values, offer.grid, information[name]))
            for offer in offers(values.shape[1])
        ]
        weights += values.numel()
    return Choices(weights, choices)


def _named_grids(source: Path, widths: Mapping[str, str], offers: Callable[[int], Sequence[Offer]]) -> dict[str, Grid]:
    found = {}
    matrices = matrix_columns(source)
    check_same_matrices(widths, matrices)
    for name, columns in matrices.items():
        grids = {repr(offer.grid): offer.grid for offer in offers(columns)}
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
