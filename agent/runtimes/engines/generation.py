"""The bookkeeping of one sequence that every adapter shares: text, stop strings, counts, times, events."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from agent.core.inference import (
    DoneEvent,
    FinishReason,
    GenerationEvent,
    GenerationRequest,
    InferenceError,
    TokenEvent,
    TokenLogprob,
)
from agent.runtimes.engines.text import StopStrings


class Detokenizer(Protocol):
    """Text of a token, as far as it is complete."""

    def feed(self, token: int, /) -> str:
        """Return text that is complete now."""
        ...

    def flush(self) -> str:
        """Return what is left."""
        ...


class Generation:
    """One request on its way. ``limit``: tokens that may be generated (see ``check_fits``)."""

    def __init__(
        self,
        request: GenerationRequest,
        detokenizer: Detokenizer,
        prompt_tokens: int,
        limit: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.request = request
        self.prompt_tokens = prompt_tokens
        self.limit = limit
        self.cached_tokens = 0
        self.completion_tokens = 0
        self.done = False
        self._detokenizer = detokenizer
        self._stop = StopStrings(request.sampling.stop)
        self._clock = clock
        self._arrived = clock()
        self._first = 0.0
        self._last = 0.0

    def token(
        self, token: int, logprob: TokenLogprob | None = None, top: tuple[TokenLogprob, ...] = ()
    ) -> list[GenerationEvent]:
        """A token was drawn that is no end marker."""
        self._tick()
        text = self._stop.feed(self._detokenizer.feed(token))
        events: list[GenerationEvent] = [TokenEvent(self.request.id, text, 1, logprob, top)]
        if self._stop.matched is not None:
            return [*events, self._done(FinishReason.STOP)]
        if self.completion_tokens >= self.limit:
            return [*events, *self.finish(FinishReason.LENGTH)]
        return events

    def end_marker(self) -> list[GenerationEvent]:
        """The model drew its end marker: it counts as a token and shows no text."""
        self._tick()
        return self.finish(FinishReason.STOP)

    def finish(self, reason: FinishReason) -> list[GenerationEvent]:
        """End it; text that was held back comes first."""
        text = self._stop.feed(self._detokenizer.flush()) + self._stop.flush()
        done = self._done(reason)
        return [TokenEvent(self.request.id, text, 0), done] if text else [done]

    def fail(self, kind: str, message: str) -> list[GenerationEvent]:
        """End it with an error of ``InferenceError``'s kinds."""
        return [self._done(FinishReason.ERROR, message, kind)]

    def _tick(self) -> None:
        self._last = self._clock()
        self.completion_tokens += 1
        if self.completion_tokens == 1:
            self._first = self._last

    def _done(self, reason: FinishReason, error: str = "", kind: str = "") -> DoneEvent:
        self.done = True
        spread = self.completion_tokens - 1
        return DoneEvent(
            id=self.request.id,
            reason=reason,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            cached_tokens=self.cached_tokens,
            ttft_ms=(self._first - self._arrived) * 1e3 if self.completion_tokens else 0.0,
            tpot_ms=(self._last - self._first) * 1e3 / spread if spread > 0 else 0.0,
            error=error,
            error_kind=kind,
            stop=self._stop.matched or "" if reason is FinishReason.STOP else "",
        )


def check_fits(prompt_tokens: int, max_tokens: int, context: int) -> int:
    """Return the tokens that may be generated, at most ``max_tokens``.

    Raises:
        InferenceError: ``context_overflow``, with the counts, when the prompt leaves no room for a single token;
            ``invalid`` when it is empty.
    """
    if prompt_tokens == 0:
        raise InferenceError("invalid", "the prompt is empty", param="prompt")
    if prompt_tokens >= context:
        raise InferenceError(
            "context_overflow",
            f"the prompt has {prompt_tokens} tokens and the model's context holds {context}, answer included; "
            "shorten the messages",
            param="messages",
        )
    return min(max_tokens, context - prompt_tokens)


def common_prefix(left: list[int], right: list[int]) -> int:
    """Return the length of the common beginning, found by halves: slices are compared far quicker than tokens."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
