from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.inference import Sampling
from agent.runtimes.engines.sampling import Noise, TokenSampler

LOGITS = np.array([2.0, 1.0, 0.0, -1.0, -2.0], np.float32)
_logits = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=40).map(lambda row: np.array(row, np.float32))


def _draws(count: int = 4000, logits: np.ndarray = LOGITS, **sampling: object) -> Counter[int]:
    sampler = TokenSampler(Sampling(**{"seed": 1, **sampling}))  # type: ignore[arg-type]
    return Counter(sampler.draw(logits).token for _ in range(count))


def _expected(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    weights = np.exp((logits - logits.max()) / temperature)
    return np.asarray(weights / weights.sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    drawn = _draws(temperature=temperature)
    for token, share in enumerate(_expected(LOGITS, temperature)):
        assert abs(drawn[token] / 4000 - share) < 0.03


def test_temperature_zero_takes_the_likeliest() -> None:
    assert _draws(10, temperature=0.0) == {0: 10}


@given(_logits, st.floats(0.01, 0.99))
def test_the_nucleus_is_the_smallest_that_holds_its_share(logits: np.ndarray, top_p: float) -> None:
    order = np.argsort(-logits, kind="stable")
    mass = np.cumsum(_expected(logits)[order])
    size = int(np.searchsorted(mass, top_p - 1e-6)) + 1
    least = logits[order[size - 1]]
    for token in _draws(30, logits, top_p=top_p):
        assert logits[token] >= least - 1e-6


def test_a_flat_nucleus_larger_than_the_head_is_whole() -> None:
    drawn = _draws(3000, np.zeros(3000, np.float32), top_p=0.999)
    assert len(drawn) > 1500


@given(_logits, st.integers(1, 50))
def test_top_k_draws_among_the_k_likeliest(logits: np.ndarray, top_k: int) -> None:
    least = np.sort(logits)[-min(top_k, len(logits))]
    assert all(logits[token] >= least - 1e-6 for token in _draws(20, logits, top_k=top_k))


@given(_logits, st.floats(0.01, 1.0))
def test_min_p_drops_what_is_far_less_likely_than_the_likeliest(logits: np.ndarray, min_p: float) -> None:
    shares = _expected(logits)
    assert all(shares[token] >= shares.max() * min_p * 0.999 for token in _draws(20, logits, min_p=min_p))


def test_a_bias_of_minus_100_bans_and_unknown_tokens_are_ignored() -> None:
    assert 0 not in _draws(200, logit_bias={0: -100.0, 10_000: 5.0, -3: 5.0})


def test_penalties_make_repeats_less_likely() -> None:
    flat = np.zeros(4, np.float32)
    for penalised in (
        Sampling(temperature=0.0, presence_penalty=2.0),
        Sampling(temperature=0.0, frequency_penalty=2.0),
        Sampling(temperature=0.0, repetition_penalty=5.0),
    ):
        sampler = TokenSampler(penalised)
        drawn = [sampler.draw(flat + 1.0).token for _ in range(4)]
        assert sorted(drawn) == [0, 1, 2, 3]


def test_repetition_counts_the_prompt_too() -> None:
    sampler = TokenSampler(Sampling(temperature=0.0, repetition_penalty=2.0), prompt=[0])
    assert sampler.draw(np.array([1.5, 1.0, 0.5], np.float32)).token == 1


def test_log_probabilities_are_the_models_own() -> None:
    sampler = TokenSampler(Sampling(temperature=0.0, top_logprobs=2, logit_bias={0: -100.0}))
    drawn = sampler.draw(LOGITS)
    assert drawn.token == 1
    assert drawn.logprob == pytest.approx(np.log(_expected(LOGITS)[1]), abs=1e-5)
    assert [token for token, _ in drawn.top] == [0, 1]


def test_logits_are_left_as_they_are() -> None:
    before = LOGITS.copy()
    _draws(5, top_p=0.5, top_k=2, min_p=0.1, presence_penalty=1.0, logit_bias={1: 3.0}, top_logprobs=1)
    assert np.array_equal(LOGITS, before)


def test_drawing_again_among_the_allowed_is_fair_and_counts_once() -> None:
    masked = np.where(np.isin(np.arange(5), [1, 2]), LOGITS, -np.inf).astype(np.float32)
    sampler = TokenSampler(Sampling(temperature=1.0, seed=5))
    drawn: Counter[int] = Counter()
    for _ in range(4000):
        one = sampler.draw(LOGITS)
        drawn[one.token if one.token in (1, 2) else sampler.redraw(masked, LOGITS, one.token).token] += 1
    for token, share in zip((1, 2), _expected(LOGITS[[1, 2]]), strict=True):
        assert abs(drawn[token] / 4000 - share) < 0.03
    counted = TokenSampler(Sampling(temperature=0.0, frequency_penalty=0.1))
    counted.draw(LOGITS)
    counted.redraw(masked, LOGITS, 0)
    assert counted._counts == {1: 1}


def test_noise_is_that_of_seed_position_and_token_alone() -> None:
    tokens = np.arange(1000)
    noise = Noise(7).at(3, tokens)
    assert np.array_equal(Noise(7).at(3, tokens[::-1]), noise[::-1])
    for other in (Noise(8).at(3, tokens), Noise(7).at(4, tokens), Noise(-7).at(3, tokens)):
        assert abs(float(np.corrcoef(noise, other)[0, 1])) < 0.1
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.15)
    assert float(noise.var()) == pytest.approx(np.pi**2 / 6, abs=0.4)


@given(st.integers(0, 2**63 - 1))
def test_logits_that_differ_in_their_last_digits_give_the_same_answer(seed: int) -> None:
    random = np.random.default_rng(seed)
    logits = random.normal(0, 4, (30, 500)).astype(np.float32)
    wobbled = logits + random.normal(0, 1e-6, logits.shape).astype(np.float32)
    answers = []
    for rows in (logits, wobbled):
        sampler = TokenSampler(Sampling(seed=seed, temperature=1.0, top_p=0.95))
        answers.append([sampler.draw(row).token for row in rows])
    assert sum(one != other for one, other in zip(*answers, strict=True)) <= 1


def test_a_row_without_a_number_still_gives_a_token() -> None:
    broken = np.full(5, np.nan, np.float32)
    assert 0 <= TokenSampler(Sampling(temperature=1.0)).draw(broken).token < 5
