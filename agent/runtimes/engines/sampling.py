"""Drawing the next token from logits, the same for every runtime that gives us its logits.

The order is: bias and penalties, temperature, then top-k, top-p and min-p, each on what the one before left.
Log probabilities are the model's own, before any of these, as vLLM reports them.

A draw is the largest of the logits with Gumbel noise added, which is a sample of their softmax (Gumbel, 1954). The
noise is a function of seed, position and token alone: logits that differ in their last digits, as kernels for other
batch sizes give them, change the answer only where two tokens are all but tied.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agent.core.inference import Sampling

Logits = NDArray[np.float32]

#: Candidates looked at first for top-p; only flat distributions need more.
_HEAD = 512
#: Tokens that are e to the power of this less likely than the likeliest are never drawn: all together, of a vocabulary
#: of 200,000, they would be once in ten million draws.
_NEVER = 28.0
_WORD = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token, and the log probabilities asked for: its own, and the most likely ones, best first."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class TokenSampler:
    """Draws for one sequence. Deterministic for a seed."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int] = ()) -> None:
        self._sampling = sampling
        self._noise = Noise(secrets.randbits(63) if sampling.seed is None else sampling.seed)
        self._position = 0
        self._counts: dict[int, int] = {}
        repeats = sampling.repetition_penalty
        self._seen = dict.fromkeys(prompt) if repeats not in (None, 1.0) else {}
        self._penalised = bool(sampling.presence_penalty or sampling.frequency_penalty or repeats not in (None, 1.0))
        bias = {token: value for token, value in sampling.logit_bias.items() if value}
        self._bias_ids = np.fromiter(bias.keys(), np.int64, len(bias))
        self._bias = np.fromiter(bias.values(), np.float32, len(bias))

    def draw(self, logits: Logits) -> Drawn:
        """From ``logits`` of shape (vocabulary,), which are left as they are."""
        return self.drawn(self._choose(logits), logits)

    def redraw(self, masked: Logits, logits: Logits, refused: int) -> Drawn:
        """Instead of ``refused``, which guidance forbids: from ``masked``, the logits with what it forbids at -inf.

        The noise is the same as before, so this is the draw among the allowed, whatever was drawn first.
        """
        self._position -= 1
        if self._penalised:
            self._counts[refused] -= 1
            if not self._counts[refused]:
                del self._counts[refused]
        return self.drawn(self._choose(masked), logits)

    def _choose(self, logits: Logits) -> int:
        adjusted = self._adjust(logits)
        if self._sampling.temperature <= 0:
            return int(adjusted.argmax())
        ids, scaled = self._candidates(adjusted)
        if not len(ids):  # no number among them: a model that is broken still ends in good order
            return int(adjusted.argmax())
        return int(ids[np.argmax(scaled + self._noise.at(self._position, ids))])

    def drawn(self, token: int, logits: Logits) -> Drawn:
        """``token`` was drawn (by whomever): remember it, and give the log probabilities asked for."""
        self._position += 1
        if self._penalised:
            self._counts[token] = self._counts.get(token, 0) + 1
        if self._sampling.top_logprobs is None:
            return Drawn(token)
        return _with_logprobs(token, logits, self._sampling.top_logprobs)

    def _adjust(self, logits: Logits) -> Logits:
        if not self._penalised and not len(self._bias):
            return logits
        adjusted = logits.copy()
        if len(self._bias):
            inside = (self._bias_ids >= 0) & (self._bias_ids < len(adjusted))
            adjusted[self._bias_ids[inside]] += self._bias[inside]
        if self._penalised:
            self._penalise(adjusted)
        return adjusted

    def _penalise(self, logits: Logits) -> None:
        """Repetition over prompt and answer (CTRL's), presence and frequency over the answer (OpenAI's)."""
        ids = np.fromiter(self._counts.keys(), np.int64, len(self._counts))
        repetition = self._sampling.repetition_penalty
        if repetition not in (None, 1.0):
            seen = np.fromiter({**self._seen, **self._counts}.keys(), np.int64)
            values = logits[seen]
            logits[seen] = np.where(values > 0, values / repetition, values * repetition)
        if len(ids):
            counts = np.fromiter(self._counts.values(), np.float32, len(ids))
            logits[ids] -= counts * (self._sampling.frequency_penalty or 0.0) + (self._sampling.presence_penalty or 0.0)

    def _candidates(self, logits: Logits) -> tuple[NDArray[np.int64], Logits]:
        """Ids, and their logits divided by the temperature, after the filters."""
        options = self._sampling
        scaled = (logits - logits.max()) / np.float32(options.temperature)
        ids = np.flatnonzero(scaled > -_NEVER)
        if options.top_k and 0 < options.top_k < len(ids):
            ids = ids[np.argpartition(scaled[ids], -options.top_k)[-options.top_k :]]
        if options.top_p is not None and options.top_p < 1.0:
            ids = ids[_nucleus(np.exp(scaled[ids]), options.top_p)]
        if options.min_p:
            ids = ids[scaled[ids] >= np.log(np.float32(options.min_p))]
        return ids, scaled[ids]


class Noise:
    """Gumbel noise of any token at any position of an answer, without a state that goes on."""

    def __init__(self, seed: int) -> None:
        self._seed = _mixed(seed & _WORD)

    def at(self, position: int, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the noise of ``tokens``, of their shape."""
        base = _mixed((self._seed + position) & _WORD)
        # SplitMix64's output function over a counter (Steele, Lea and Flood, 2014), for all tokens at once.
        word = tokens.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(base)
        word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        word ^= word >> np.uint64(31)
        uniform = ((word >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        noise: NDArray[np.float64] = -np.log(-np.log(uniform))
        return noise


def _mixed(word: int) -> int:
    word = (word + 0x9E3779B97F4A7C15) & _WORD
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & _WORD
    return word ^ (word >> 31)


def _nucleus(weights: Logits, top_p: float) -> NDArray[np.int64]:
    """Return the fewest, likeliest entries that hold ``top_p`` of the weight; always at least one."""
    goal = float(weights.sum(dtype=np.float64)) * top_p
    size = min(_HEAD, len(weights))
    while True:
        head = np.argpartition(weights, -size)[-size:] if size < len(weights) else np.arange(len(weights))
        order = head[np.argsort(-weights[head], kind="stable")]
        mass = np.cumsum(weights[order], dtype=np.float64)
        if mass[-1] >= goal or size == len(weights):
            return order[: int(np.searchsorted(mass, goal)) + 1]
        size = min(size * 8, len(weights))


def _with_logprobs(token: int, logits: Logits, count: int) -> Drawn:
    top = logits.max()
    base = float(top) + float(np.log(np.exp(logits - top).sum(dtype=np.float64)))
    best: tuple[tuple[int, float], ...] = ()
    if count > 0:
        head = np.argpartition(logits, -count)[-count:] if count < len(logits) else np.arange(len(logits))
        head = head[np.argsort(-logits[head], kind="stable")]
        best = tuple((int(one), float(logits[one]) - base) for one in head)
    return Drawn(token, float(logits[token]) - base, best)


def is_plain_greedy(sampling: Sampling) -> bool:
    """Return whether the likeliest token is all that is asked for, so that a runtime may take it itself."""
    return (
        sampling.temperature <= 0
        and not sampling.logit_bias
        and not sampling.presence_penalty
        and not sampling.frequency_penalty
        and sampling.repetition_penalty in (None, 1.0)
    )
