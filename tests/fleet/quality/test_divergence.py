from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.errors import BuildError
from fleet.toolchains.quality.divergence import Losses, compare, summarise


def logits(tokens: int, vocabulary: int, seed: int, scale: float = 3.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal((tokens, vocabulary))).astype(np.float32)


def losses(seed: int, tokens: int = 40) -> Losses:
    draw = np.random.default_rng(seed)
    kl = draw.random(tokens)
    return Losses(kl, draw.random(tokens), draw.random(tokens), (draw.random(tokens) < 0.9).astype(float))


def test_a_distribution_written_out_by_hand() -> None:
    p, q = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.5, 0.25]])
    found = compare(np.log(p), np.log(q), [0])
    assert found.divergence[0] == pytest.approx(0.25 * math.log(2), abs=1e-6)
    assert found.surprise[0] == pytest.approx(-math.log(0.25), abs=1e-6)
    assert found.reference_surprise[0] == pytest.approx(math.log(2), abs=1e-6)
    assert found.same[0] == 0


@given(st.integers(0, 1000), st.integers(1, 300), st.integers(2, 50), st.floats(-50, 50))
def test_a_divergence_is_never_negative_and_a_shift_changes_nothing(
    seed: int, tokens: int, vocabulary: int, shift: float
) -> None:
    reference, artifact = logits(tokens, vocabulary, seed), logits(tokens, vocabulary, seed + 1)
    following = [seed % vocabulary] * tokens
    found = compare(reference, artifact, following)
    assert (found.divergence >= 0).all()
    assert len(found.same) == tokens
    again = compare(reference + np.float32(shift), artifact, following)
    assert np.allclose(found.divergence, again.divergence, atol=1e-3)
    itself = compare(reference, reference, following)
    assert itself.divergence.max() < 1e-5
    assert itself.same.all()


def test_a_padded_vocabulary_is_cut_and_renormalised() -> None:
    reference = logits(10, 50, 1)
    padded = np.concatenate([reference, np.full((10, 14), 5.0, np.float32)], axis=1)
    assert compare(reference, padded, [3] * 10).divergence.max() < 1e-5


@pytest.mark.parametrize(
    ("artifact", "said"),
    [
        (np.full((4, 8), np.nan, np.float32), "NaN"),
        (np.zeros((3, 8), np.float32), "3 tokens"),
        (np.zeros((4, 5), np.float32), "vocabulary of 5"),
    ],
)
def test_logits_that_are_none_are_an_error(artifact: np.ndarray, said: str) -> None:
    with pytest.raises(BuildError, match=said):
        compare(logits(4, 8, 0), artifact, [1, 2, 3, 7])


def test_standard_errors_are_those_of_drawing_sequences_again() -> None:
    """1000 sequences of which each estimate gets 50: the spread of the estimates is the standard error claimed."""
    draw = np.random.default_rng(3)
    levels = draw.random(1000)  # tokens of a sequence have its level in common
    every = [
        Losses(*(np.full(20, level) + 0.1 * draw.random(20) for _ in range(3)), np.full(20, float(level > 0.2)))
        for level in levels
    ]
    estimates = [summarise([every[i] for i in draw.integers(0, 1000, 50)], "x") for _ in range(60)]
    for name in ("kl_divergence", "same_top_token"):
        spread = np.std([getattr(one, name) for one in estimates])
        claimed = np.mean([getattr(one, f"{name}_se") for one in estimates])
        assert claimed == pytest.approx(spread, rel=0.35)


def test_the_summary_is_over_tokens_and_reproducible() -> None:
    made = [losses(1, 10), losses(2, 90)]
    found = summarise(made, "text:abc")
    everything = np.concatenate([one.divergence for one in made])
    assert found.tokens == 100
    assert found.evaluation == "text:abc"
    assert found.kl_divergence == pytest.approx(everything.mean())
    assert found.kl_divergence_p99 == pytest.approx(np.percentile(everything, 99))
    assert found.perplexity == pytest.approx(math.exp(np.concatenate([one.surprise for one in made]).mean()))
    assert found.kl_divergence_p99_se > 0
    assert summarise(made, "text:abc") == found


@pytest.mark.parametrize("made", [[], [losses(1, 0), losses(2, 0)], [losses(1)]])
def test_what_no_standard_error_can_be_told_of_is_an_error(made: list[Losses]) -> None:
    with pytest.raises(BuildError, match="too few tokens"):
        summarise(made, "x")
