"""Bits where they count, held to what trying every allocation finds."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.core.allocation import Allocation, Choice, allocate, least_bytes

CHOICES = st.lists(
    st.builds(
        Choice,
        name=st.sampled_from(["q4", "q5", "q6", "q8"]),
        size_bytes=st.integers(1, 60),
        loss=st.floats(0, 10, allow_nan=False),
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda one: one.name,
)
MATRICES = st.dictionaries(st.sampled_from("abcd"), CHOICES, min_size=1, max_size=4)


def best(matrices: Mapping[str, Sequence[Choice]], budget: int) -> float | None:
    """Of every allocation there is."""
    every = (Allocation(dict(zip(matrices, each, strict=True))) for each in itertools.product(*matrices.values()))
    return min((one.loss for one in every if one.size_bytes <= budget), default=None)


@given(MATRICES, st.integers(0, 250))
def test_it_keeps_the_budget_and_nothing_that_still_fits_would_lose_less(
    matrices: dict[str, list[Choice]], budget: int
) -> None:
    found = allocate(matrices, budget)
    if found is None:
        assert best(matrices, budget) is None and least_bytes(matrices) > budget
        return
    assert found.size_bytes <= budget
    assert set(found.chosen) == set(matrices)
    assert all(choice in matrices[name] for name, choice in found.chosen.items())
    left = budget - found.size_bytes
    for name, chosen in found.chosen.items():
        for choice in matrices[name]:
            assert choice.loss >= chosen.loss or choice.size_bytes - chosen.size_bytes > left


@given(MATRICES, st.integers(0, 250))
def test_it_is_as_good_as_any_uniform_one_and_as_the_optimum_but_for_one_matrix(
    matrices: dict[str, list[Choice]], budget: int
) -> None:
    found, optimum = allocate(matrices, budget), best(matrices, budget)
    if found is None or optimum is None:
        return
    for name in {choice.name for choices in matrices.values() for choice in choices}:
        uniform = [[choice for choice in choices if choice.name == name] for choices in matrices.values()]
        if all(uniform) and sum(one[0].size_bytes for one in uniform) <= budget:
            assert found.loss <= sum(one[0].loss for one in uniform) + 1e-9
    widest = max(max(one.loss for one in choices) - min(one.loss for one in choices) for choices in matrices.values())
    assert optimum - 1e-9 <= found.loss <= optimum + widest + 1e-9


def test_bits_go_where_they_count() -> None:
    def matrix(weights: int, sensitivity: float) -> list[Choice]:
        return [Choice(f"q{bits}", weights * bits // 8, sensitivity * 4.0 ** (4 - bits)) for bits in (4, 5, 6, 8)]

    matrices = {"qkv": matrix(1000, 7.6), "down": matrix(2000, 7.6), "embedding": matrix(8000, 0.3)}
    found = allocate(matrices, 6600)
    assert found is not None
    assert {name: choice.name for name, choice in found.chosen.items()} == {
        "qkv": "q8",
        "down": "q6",
        "embedding": "q4",
    }


def test_ten_thousand_matrices_take_no_time_worth_speaking_of() -> None:
    one = [Choice("q4", 4, 1.0), Choice("q8", 8, 0.1)]
    found = allocate({str(number): one for number in range(10_000)}, 60_000)
    assert found is not None and found.size_bytes == 60_000


@pytest.mark.parametrize("budget", [0, 3])
def test_a_budget_below_the_smallest_is_none(budget: int) -> None:
    assert allocate({"a": [Choice("q4", 4, 1.0)]}, budget) is None
