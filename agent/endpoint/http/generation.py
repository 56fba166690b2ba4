"""Running sequences for a request: events as the model host gives them, and the figures when it is over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from agent.contract.manifest import Manifest
from agent.core.inference import (
    RESTARTING,
    DoneEvent,
    FinishReason,
    GenerationEvent,
    GenerationRequest,
    InferenceError,
    ModelInfo,
    TokenEvent,
)
from agent.core.ports import Inference
from agent.endpoint.http.metrics import FinishedRequest, StatsSource
from agent.endpoint.openai.errors import ApiError, from_inference

OnFinished = Callable[[FinishedRequest], None]
Events = AsyncGenerator[tuple[int, GenerationEvent], None]

#: Seconds until a client should try again, by what the model host is doing.
_RETRY_S = {"swapping": 2.0, "empty": 10.0, "failed": 30.0, RESTARTING: 5.0}


@dataclass(frozen=True, slots=True)
class Call:
    """Whom sequences are for. ``prompt_param`` is what the API calls the prompt: an overflow is reported there."""

    client: str
    prompt_param: str
    #: Seconds of the loop's clock.
    arrived: float


class _Figures:
    """Of one sequence while it runs; seconds of the loop's clock."""

    __slots__ = ("arrived", "first", "last", "tokens")

    def __init__(self, arrived: float) -> None:
        self.arrived = arrived
        self.first: float | None = None
        self.last = arrived
        self.tokens = 0

    def token(self, now: float, tokens: int) -> None:
        if self.first is None and tokens:
            self.first = now
        self.last = now
        self.tokens += tokens

    def finished(self, digest: str, done: DoneEvent | None, error: str | None) -> FinishedRequest:
        first = self.first if self.first is not None else self.last
        gaps = max(1, self.tokens - 1)
        return FinishedRequest(
            digest=digest,
            ttft_ms=(first - self.arrived) * 1000,
            tpot_ms=(self.last - first) * 1000 / gaps,
            queue_ms=max(0.0, (first - self.arrived) * 1000 - done.ttft_ms) if done and done.ttft_ms else 0.0,
            prompt_tokens=done.prompt_tokens if done else 0,
            completion_tokens=done.completion_tokens if done else self.tokens,
            cached_tokens=done.cached_tokens if done else 0,
            error=error,
        )


class Runner:
    """Runs requests on the model host, which queues them, fairly between clients."""

    def __init__(
        self, inference: Inference, stats: StatsSource, on_finished: OnFinished, request_timeout_s: float
    ) -> None:
        self._inference = inference
        self._stats = stats
        self._on_finished = on_finished
        self._timeout_s = request_timeout_s

    def model(self) -> ModelInfo:
        """Return what serves now.

        Raises:
            ApiError: 503: nothing does, and why.
        """
        info = self._inference.active()
        if info is None:
            raise self.unavailable()
        return info

    def manifest(self) -> Manifest:
        """Return the signed facts of what serves now.

        Raises:
            ApiError: 503: nothing does, and why.
        """
        manifest = self._inference.active_manifest()
        if manifest is None:
            raise self.unavailable()
        return manifest

    async def count_tokens(self, text: str) -> int:
        """Return the number of tokens of ``text`` for the model that serves now.

        Raises:
            ApiError: it cannot be counted: no model serves, or its process has ended.
        """
        try:
            return await self._inference.count_tokens(text)
        except InferenceError as error:
            raise from_inference(error) from None

    def unavailable(self) -> ApiError:
        """503, with the model host's reason and when to try again."""
        stats = self._stats()
        why = stats.reason or "no model is loaded"
        if stats.state == "swapping":
            why = "the model is being replaced"
        elif stats.state == RESTARTING:
            why = f"the model is being loaded again: {stats.reason}"
        return from_inference(InferenceError("unavailable", why, retry_after_s=_RETRY_S.get(stats.state, 2.0)))

    async def events(self, requests: Sequence[GenerationRequest], call: Call, digest: str) -> Events:
        """``(index, event)`` of all sequences as they come; each ends with its ``DoneEvent``.

        Closing it, or cancelling the task that iterates, cancels the generation.

        Raises:
            InferenceError: one of them cannot be served; the others are cancelled.
        """
        try:
            if len(requests) == 1:
                async with aclosing(self._one(requests[0], call, digest)) as events:
                    async for event in events:
                        yield 0, event
            else:
                async with aclosing(self._several(requests, call, digest)) as merged:
                    async for pair in merged:
                        yield pair
        except InferenceError as error:
            if error.kind == "context_overflow" and error.param is None:
                error.param = call.prompt_param
            raise

    async def _one(self, request: GenerationRequest, call: Call, digest: str) -> AsyncGenerator[GenerationEvent, None]:
        clock = asyncio.get_running_loop().time
        figures = _Figures(call.arrived)
        done: DoneEvent | None = None
        error: str | None = None
        try:
            async with aclosing(_closable(self._inference.generate(request))) as generated:
                async for event in generated:
                    if isinstance(event, TokenEvent):
                        figures.token(clock(), event.tokens)
                    else:
                        done, error = event, _kind(event)
                    yield event
            if done is None:
                error = "crashed"
                yield DoneEvent(request.id, FinishReason.ERROR, error="the model host ended without a word")
        except InferenceError as refused:
            error = refused.kind
            raise
        except OSError as fault:
            # A broken pipe to the worker must not look like a client that went away.
            error = "crashed"
            raise InferenceError("crashed", f"the model host failed: {fault}") from fault
        except Exception:
            error = "crashed"
            raise
        except (asyncio.CancelledError, GeneratorExit):
            if done is None:
                error = "deadline" if clock() - call.arrived >= self._timeout_s else "cancelled"
            raise
        finally:
            self._on_finished(figures.finished(digest, done, error))

    async def _several(self, requests: Sequence[GenerationRequest], call: Call, digest: str) -> Events:
        merged: asyncio.Queue[tuple[int, GenerationEvent] | Exception] = asyncio.Queue(maxsize=64)

        async def pump(index: int, request: GenerationRequest) -> None:
            try:
                async with aclosing(self._one(request, call, digest)) as events:
                    async for event in events:
                        await merged.put((index, event))
            except Exception as error:
                await merged.put(error)

        tasks = [asyncio.create_task(pump(index, request)) for index, request in enumerate(requests)]
        try:
            left = len(requests)
            while left:
                item = await merged.get()
                if isinstance(item, Exception):
                    raise item
                left -= isinstance(item[1], DoneEvent)
                yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _kind(done: DoneEvent) -> str | None:
    if done.reason is FinishReason.ERROR:
        return done.error_kind or "crashed"
    return "cancelled" if done.reason is FinishReason.CANCELLED else None


def _closable(events: AsyncIterator[GenerationEvent]) -> AsyncGenerator[GenerationEvent, None]:
    if isinstance(events, AsyncGenerator):
        return events
    return _relay(events)


async def _relay(events: AsyncIterator[GenerationEvent]) -> AsyncGenerator[GenerationEvent, None]:
    async for event in events:
        yield event
