"""Bits where they count: which width each matrix gets, so that a budget of bytes loses the least.

Each matrix has a few choices, each with its size and the loss that it is expected to cost; the losses of different
matrices add up, which holds while they are small. Choosing one for each within a budget is the multiple-choice
knapsack problem. It is solved on the lower convex hull of each matrix's choices (Sinha and Zoltners, 1979), which is
the optimum but for the last matrix that no longer fits; what is left over is then spent on whatever gains most.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to store a matrix. ``loss`` in nats a token, as expected."""

    name: str
    size_bytes: int
    loss: float


@dataclass(frozen=True, slots=True)
class Allocation:
    """A choice for each matrix; ``loss`` and ``size_bytes`` are of all of them together."""

    chosen: Mapping[str, Choice]

    @property
    def size_bytes(self) -> int:
        """Of all matrices."""
        return sum(choice.size_bytes for choice in self.chosen.values())

    @property
    def loss(self) -> float:
        """Nats a token, as expected."""
        return sum(choice.loss for choice in self.chosen.values())

    @property
    def names(self) -> dict[str, str]:
        """The choice of each matrix, by name."""
        return {matrix: choice.name for matrix, choice in self.chosen.items()}


def grouped(names: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the matrices of each choice: as a manifest has them."""
    found: dict[str, list[str]] = {}
    for matrix, choice in sorted(names.items()):
        found.setdefault(choice, []).append(matrix)
    return dict(sorted(found.items()))


def named(groups: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return the choice of each matrix, out of what ``grouped`` returned."""
    return {matrix: choice for choice, matrices in groups.items() for matrix in matrices}


def least_bytes(matrices: Mapping[str, Sequence[Choice]]) -> int:
    """Return what the smallest choices take."""
    return sum(min(choice.size_bytes for choice in choices) for choices in matrices.values())


def allocate(matrices: Mapping[str, Sequence[Choice]], budget_bytes: int) -> Allocation | None:
    """Return the allocation within the budget that is expected to lose the least; None: nothing is so small.

    No allocation that gives every matrix the choice of one name is better than it.
    """
    hulls = {name: _hull(choices) for name, choices in matrices.items()}
    place = dict.fromkeys(hulls, 0)
    left = budget_bytes - sum(hull[0].size_bytes for hull in hulls.values())
    if left < 0:
        return None
    steps = [step for name, hull in hulls.items() if (step := _step(name, hull, 0))]
    heapq.heapify(steps)
    while steps:
        _, name, cost = heapq.heappop(steps)
        if cost > left:
            continue
        left -= cost
        place[name] += 1
        if step := _step(name, hulls[name], place[name]):
            heapq.heappush(steps, step)
    found = Allocation(_spent(matrices, {name: hulls[name][at] for name, at in place.items()}, left))
    return min([found, *_uniform(matrices, budget_bytes)], key=lambda one: (one.loss, one.size_bytes))


def _hull(choices: Sequence[Choice]) -> list[Choice]:
    """By size: those on the lower convex hull, where each byte more gains less than the one before."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda one: (one.size_bytes, one.loss, one.name)):
        if hull and choice.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], choice):
            hull.pop()
        if hull and hull[-1].size_bytes == choice.size_bytes:
            hull.pop()
        hull.append(choice)
    return hull


def _gain(smaller: Choice, larger: Choice) -> float:
    """Loss that a byte more takes away."""
    return (smaller.loss - larger.loss) / max(1, larger.size_bytes - smaller.size_bytes)


def _step(name: str, hull: Sequence[Choice], at: int) -> tuple[float, str, int] | None:
    if at + 1 >= len(hull):
        return None
    return -_gain(hull[at], hull[at + 1]), name, hull[at + 1].size_bytes - hull[at].size_bytes


def _spent(matrices: Mapping[str, Sequence[Choice]], chosen: dict[str, Choice], left: int) -> dict[str, Choice]:
    """Spend what is left over, each time on what gains most of what still fits."""
    while True:
        better = [
            (chosen[name].loss - choice.loss, name, choice)
            for name, choices in matrices.items()
            for choice in choices
            if choice.loss < chosen[name].loss and choice.size_bytes - chosen[name].size_bytes <= left
        ]
        if not better:
            return chosen
        _, name, choice = max(better, key=lambda one: (one[0], one[1]))
        left -= choice.size_bytes - chosen[name].size_bytes
        chosen[name] = choice


def _uniform(matrices: Mapping[str, Sequence[Choice]], budget_bytes: int) -> list[Allocation]:
    """The allocations of one name throughout that fit."""
    by_name: dict[str, dict[str, Choice]] = {}
    for matrix, choices in matrices.items():
        for choice in choices:
            by_name.setdefault(choice.name, {})[matrix] = choice
    whole = [Allocation(chosen) for chosen in by_name.values() if len(chosen) == len(matrices)]
    return [one for one in whole if one.size_bytes <= budget_bytes]
