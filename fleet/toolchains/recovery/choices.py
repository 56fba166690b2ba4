"""What each width costs each matrix, measured once for a checkpoint and kept: builds and plans spend budgets on it.

Measuring takes minutes and depends on the checkpoint, the calibration text and the toolchain alone; a budget is only
what is bought with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.platform.files import write_atomic
from fleet.core.allocation import Allocation, Choice, allocate, least_bytes
from fleet.errors import BuildError


@dataclass(frozen=True, slots=True)
class Choices:
    """``weights`` counts those of all matrices, which ``of`` has by name, each with its choices."""

    weights: int
    of: Mapping[str, Sequence[Choice]]

    def spend(self, bits: float) -> Allocation:
        """Return the allocation of ``bits`` a weight, on average and at most.

        Raises:
            BuildError: it is less than the smallest choices take.
        """
        found = allocate(self.of, int(bits * self.weights / 8))
        if found is None:
            least = 8 * least_bytes(self.of) / self.weights
            raise BuildError(f"a budget of {bits:g} bits a weight is too small: the smallest widths take {least:.2f}")
        return found


@dataclass(frozen=True, slots=True)
class Budget:
    """How many bits a weight there are. ``widths`` and ``choices``: see ``ConvertJob``."""

    bits: float
    widths: Mapping[str, str]
    choices: Path | None


def measured(path: Path | None, measure: Callable[[], Choices]) -> Choices:
    """Return what is kept in ``path``, or else what ``measure`` says, which is kept then. None: nothing is kept."""
    if path is None:
        return measure()
    found = kept(path)
    if found is None:
        found = measure()
        keep(path, found)
    return found


def kept(path: Path) -> Choices | None:
    """Return what is kept there; None where there is nothing, or it cannot be read: it can be measured again."""
    try:
        read = json.loads(path.read_bytes())
        of = {name: [_choice(*one) for one in some] for name, some in read["of"].items()}
        return Choices(int(read["weights"]), of) if of and all(of.values()) else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _choice(name: object, size_bytes: object, loss: object) -> Choice:
    return Choice(str(name), int(str(size_bytes)), float(str(loss)))


def keep(path: Path, choices: Choices) -> None:
    """Keep them; a disk that refuses costs the next build its time, and this one nothing."""
    of = {name: [[one.name, one.size_bytes, one.loss] for one in some] for name, some in choices.of.items()}
    try:
        write_atomic(path, json.dumps({"weights": choices.weights, "of": of}).encode())
    except OSError:
        return
