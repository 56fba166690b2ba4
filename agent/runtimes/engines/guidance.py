"""Constrained decoding for runtimes that give us their logits: which tokens may come next, by llguidance.

It never raises for a bad grammar and is bounded in time and size; the reason comes from ``validate_grammar``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from agent.core.inference import (
    FinishReason,
    GenerationEvent,
    Guidance,
    GuidanceKind,
    InferenceError,
    TokenLogprob,
)
from agent.runtimes.engines.generation import Generation
from agent.runtimes.engines.sampling import Drawn, Logits, TokenSampler
from agent.runtimes.engines.schema import read, text_of

#: Room to lay JSON out as programs do, a space or a new line with its indentation, and no more: small models like to
#: fill an answer with white space, until it is cut.
_JSON = {"whitespace_pattern": r"( |\n {0,24})?"}


class Constraint(Protocol):
    """What one sequence may say, whoever keeps it to that."""

    @property
    def finished(self) -> bool:
        """Whether nothing may follow, not even the end marker."""
        ...

    def draw(self, sampler: TokenSampler, logits: Logits) -> Drawn:
        """Draw among what may follow.

        Raises:
            InferenceError: nothing may.
        """
        ...


class Guide:
    """What one sequence may say."""

    def __init__(self, matcher: Any, size: int) -> None:
        import llguidance.numpy as masks

        self._matcher = matcher
        self._masks = masks
        self._bits = masks.allocate_token_bitmask(1, size)

    def draw(self, sampler: TokenSampler, logits: Logits) -> Drawn:
        """Draw freely, and only if that is not allowed among what is: the whole mask costs a millisecond."""
        drawn = sampler.draw(logits)
        if self._accepts(drawn.token):
            return drawn
        drawn = sampler.redraw(self._masked(logits), logits, drawn.token)
        if not self._accepts(drawn.token):
            raise InferenceError("crashed", f"the grammar is stuck: {self._matcher.get_error() or 'no token fits'}")
        return drawn

    @property
    def finished(self) -> bool:
        """Whether nothing may follow, not even the end marker."""
        return bool(self._matcher.is_stopped())

    def _accepts(self, token: int) -> bool:
        return bool(self._matcher.try_consume_tokens([token]) == 1)

    def _masked(self, logits: Logits) -> Logits:
        import numpy as np

        self._masks.fill_next_token_bitmask(self._matcher, self._bits, 0)
        allowed = np.unpackbits(self._bits[0].view(np.uint8), bitorder="little")[: len(logits)]
        masked: Logits = np.full(len(logits), -np.inf, np.float32)
        open_ = allowed.astype(bool)
        masked[: len(open_)][open_] = logits[: len(open_)][open_]
        return masked


def draw_token(
    generation: Generation,
    sampler: TokenSampler,
    guide: Constraint | None,
    logits: Logits,
    is_end: Callable[[int], bool],
    logprob_of: Callable[[int, float], TokenLogprob],
) -> tuple[list[GenerationEvent], int | None]:
    """Draw the next token of a generation; returns what is told of it, and the token, or None where it has ended."""
    try:
        drawn = sampler.draw(logits) if guide is None else guide.draw(sampler, logits)
    except InferenceError as error:
        return generation.fail(error.kind, str(error)), None
    if is_end(drawn.token):
        return generation.end_marker(), None
    own = None if drawn.logprob is None else logprob_of(drawn.token, drawn.logprob)
    events = generation.token(drawn.token, own, tuple(logprob_of(*pair) for pair in drawn.top))
    if guide is not None and guide.finished and not generation.done:
        events += generation.finish(FinishReason.STOP)
    return events, None if generation.done else drawn.token


def from_file(path: Path, vocabulary: int, ends: frozenset[int]) -> Callable[[], Any] | None:
    """Return what reads a ``tokenizer.json`` into the library's tokenizer; None where there is no such file."""

    def read_file() -> Any:
        from llguidance import LLTokenizer

        return LLTokenizer(path.read_text("utf-8"), n_vocab=vocabulary, eos_token=sorted(ends))

    return read_file if path.is_file() else None


class Guides:
    """Makes guides for one model.

    ``tokenizer`` makes the library's tokenizer, which takes a second, when the first guide is asked for; None where
    the artifact has none that the library reads.
    """

    KINDS = frozenset(GuidanceKind)

    def __init__(self, tokenizer: Callable[[], Any] | None) -> None:
        self._make = tokenizer
        self._tokenizer: Any = None

    @cached_property
    def kinds(self) -> frozenset[GuidanceKind]:
        """None without the library, or without the tokenizer in the format it reads."""
        return self.KINDS if find_spec("llguidance") is not None and self._make is not None else frozenset()

    def guide(self, guidance: Guidance) -> Guide:
        """Compile.

        Raises:
            InferenceError: it is no grammar, or the library is not there.
        """
        if not self.kinds or self._make is None:
            reason = "guidance needs the package llguidance and the artifact's tokenizer.json"
            raise InferenceError("unsupported", reason, param="response_format")
        from llguidance import LLMatcher

        grammar = _grammar(LLMatcher, guidance)
        if self._tokenizer is None:
            self._tokenizer = self._make()
        reason = LLMatcher.validate_grammar(grammar, self._tokenizer)
        if reason:
            raise InferenceError("invalid", f"no {guidance.kind}: {reason[:300]}", param="response_format")
        return Guide(LLMatcher(self._tokenizer, grammar, log_level=0), self._tokenizer.vocab_size)


def _grammar(matcher: Any, guidance: Guidance) -> str:
    if guidance.kind in (GuidanceKind.JSON_OBJECT, GuidanceKind.JSON_SCHEMA):
        schema = read(text_of(guidance.kind, guidance.data))
        text = json.dumps(schema if isinstance(schema, dict) else {})
        return str(matcher.grammar_from_json_schema(text, overrides=_JSON))
    if guidance.kind is GuidanceKind.REGEX:
        return str(matcher.grammar_from_regex(guidance.data))
    return str(matcher.grammar_from_lark(guidance.data))
