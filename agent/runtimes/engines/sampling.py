"""Drawing the next token from logits, the same for every runtime that gives us its logits.

The order is: bias and penalties, temperature, then top-k, top-p and min-p, each on what the one before left.
Log probabilities are the model's own, before any of these, as vLLM reports them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agent.core.inference import Sampling

Logits = NDArray[np.float32]

#: Candidates looked at first for top-p; only flat distributions need more.
_HEAD = 512
#: What a filtered token gets under guidance: below every other, its order among the filtered kept.
_FILTERED = 1e6


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
        self._random = np.random.Generator(np.random.PCG64(sampling.seed))
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

        Drawing, and drawing again among the allowed when the first is not, is a draw among the allowed.
        """
        if self._penalised:
            self._counts[refused] -= 1
            if not self._counts[refused]:
                del self._counts[refused]
        return self.drawn(self._choose(masked), logits)

    def _choose(self, logits: Logits) -> int:
        adjusted = self._adjust(logits)
        if self._sampling.temperature <= 0:
            return int(adjusted.argmax())
        ids, weights = self._candidates(adjusted)
        total = np.cumsum(weights, dtype=np.float64)
        at = int(np.searchsorted(total, self._random.random() * total[-1], side="right"))
        at = min(at, len(total) - 1)
        return int(ids[at]) if ids is not None else at

    def drawn(self, token: int, logits: Logits) -> Drawn:
        """``token`` was drawn (by whomever): remember it, and give the log probabilities asked for."""
        if self._penalised:
            self._counts[token] = self._counts.get(token, 0) + 1
        if self._sampling.top_logprobs is None:
            return Drawn(token)
        return _with_logprobs(token, logits, self._sampling.top_logprobs)

    def scores(self, logits: Logits) -> Logits:
        """Scores whose largest *allowed* entry is a fair draw, for a runtime that masks and takes the largest itself.

        Adding Gumbel noise to logits makes the argmax a sample of their softmax, whatever is masked afterwards.
        Filtered tokens stay in order below all others: a mask that leaves only them still gets its likeliest.
        """
        adjusted = self._adjust(logits)
        if self._sampling.temperature <= 0:
            return adjusted
        scaled = adjusted / np.float32(self._sampling.temperature)
        kept, _ = self._candidates(adjusted)
        noisy: Logits = scaled + self._random.gumbel(size=scaled.shape).astype(np.float32)
        if kept is not None:
            filtered = np.ones(scaled.shape, dtype=bool)
            filtered[kept] = False
            noisy[filtered] -= np.float32(_FILTERED)
        return noisy

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

    def _candidates(self, logits: Logits) -> tuple[NDArray[np.int64] | None, Logits]:
        """Ids (None: all of them, in order) and their unnormalised weights after the filters."""
        options = self._sampling
        weights = np.exp((logits - logits.max()) / np.float32(options.temperature))
        ids: NDArray[np.int64] | None = None
        if options.top_k and 0 < options.top_k < len(weights):
            ids = np.argpartition(weights, -options.top_k)[-options.top_k :]
            weights = weights[ids]
        if options.top_p is not None and options.top_p < 1.0:
            chosen = _nucleus(weights, options.top_p)
            ids = chosen if ids is None else ids[chosen]
            weights = weights[chosen]
        if options.min_p:
            chosen = np.flatnonzero(weights >= weights.max() * options.min_p)
            ids = chosen if ids is None else ids[chosen]
            weights = weights[chosen]
        return ids, weights


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
