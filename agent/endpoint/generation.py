"""Running sequences for a request: a place in the queue, events as they come, and the figures when it is over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from agent.core.inference import (
    DoneEvent,
    FinishReason,
    GenerationEvent,
    GenerationRequest,
    InferenceError,
    ModelInfo,
    TokenEvent,
)
from agent.core.ports import Inference
from agent.endpoint.admission import Admission
from agent.endpoint.errors import ApiError, from_inference


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """One sequence that is over, as the application saw it. Times in milliseconds, waiting in the queue included.

    ``error`` is None, one of ``InferenceError.KINDS``, or ``cancelled`` when the client went away; the daemon counts
    the server's own faults against the model's health, and not the client's (see ``failed``).
    """

    digest: str
    ttft_ms: float = 0.0
    tpot_ms: float = 0.0
    queue_ms: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    error: str | None = None

    @property
    def failed(self) -> bool:
        """Whether the model or its host is to blame."""
        return self.error in ("crashed", "timeout")


OnFinished = Callable[[FinishedRequest], None]


class _Figures:
    """Of one sequence while it runs; seconds of the loop's clock."""

    __slots__ = ("admitted", "arrived", "first", "last", "tokens")

    def __init__(self, now: float) -> None:
        self.arrived = now
        self.admitted = now
        self.first: float | None = None
        self.last = now
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
            queue_ms=(self.admitted - self.arrived) * 1000,
            prompt_tokens=done.prompt_tokens if done else 0,
            completion_tokens=done.completion_tokens if done else self.tokens,
            cached_tokens=done.cached_tokens if done else 0,
            error=error,
        )


class Runner:
    """Runs requests on the model host."""

    def __init__(self, inference: Inference, admission: Admission, on_finished: OnFinished) -> None:
        self._inference = inference
        self._admission = admission
        self._on_finished = on_finished

    def model(self) -> ModelInfo:
        """What serves now.

        Raises:
            ApiError: 503: nothing does.
        """
        info = self._inference.active()
        if info is None:
            raise from_inference(InferenceError("unavailable", "no model is loaded: try again in a moment"))
        return info

    async def events(
        self, requests: Sequence[GenerationRequest], client: str, digest: str
    ) -> AsyncGenerator[tuple[int, GenerationEvent], None]:
        """``(index, event)`` of all sequences as they come; each ends with its ``DoneEvent``.

        Closing it, or cancelling the task that iterates, cancels the generation.

        Raises:
            InferenceError: one of them cannot be served; the others are cancelled.
        """
        self._admission.room_for(len(requests))
        if len(requests) == 1:
            async with aclosing(self._one(requests[0], client, digest)) as events:
                async for event in events:
                    yield 0, event
            return
        async with aclosing(self._several(requests, client, digest)) as merged:
            async for pair in merged:
                yield pair

    async def _one(self, request: GenerationRequest, client: str, digest: str) -> AsyncGenerator[GenerationEvent, None]:
        clock = asyncio.get_running_loop().time
        figures = _Figures(clock())
        done: DoneEvent | None = None
        error: str | None = "cancelled"
        try:
            async with self._admission.place(client):
                figures.admitted = clock()
                generated = self._inference.generate(request)
                try:
                    async for event in generated:
                        if isinstance(event, TokenEvent):
                            figures.token(clock(), event.tokens)
                        else:
                            done = event
                            error = _kind(event)
                        yield event
                finally:
                    await _close(generated)
            if done is None:
                error = "crashed"
                yield DoneEvent(request.id, FinishReason.ERROR, error="the model host ended without a word")
        except InferenceError as refused:
            error = refused.kind
            raise
        except TimeoutError:
            error = "timeout"
            raise
        finally:
            self._on_finished(figures.finished(digest, done, error))

    async def _several(
        self, requests: Sequence[GenerationRequest], client: str, digest: str
    ) -> AsyncGenerator[tuple[int, GenerationEvent], None]:
        merged: asyncio.Queue[tuple[int, GenerationEvent] | Exception] = asyncio.Queue(maxsize=64)

        async def pump(index: int, request: GenerationRequest) -> None:
            try:
                async with aclosing(self._one(request, client, digest)) as events:
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


async def _close(events: AsyncIterator[GenerationEvent]) -> None:
    close = getattr(events, "aclose", None)
    if close is not None:
        await close()


def check_model(asked: str, info: ModelInfo) -> None:
    """A model may be asked for by its name or by its artifact.

    Raises:
        ApiError: 404, naming what is there.
    """
    if asked not in (info.name, info.artifact):
        raise ApiError(
            404,
            f"the model {asked[:128]!r} does not exist here: this device serves {info.name!r}",
            param="model",
            code="model_not_found",
        )
