"""Answering a request from its sequences' events, whole or streamed; ``openai`` knows what an answer looks like."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from typing import Any, Protocol

from aiohttp import web

from agent.core.inference import GenerationEvent, GenerationRequest
from agent.endpoint.http.context import CONTEXT, Context, call
from agent.endpoint.http.generation import Call
from agent.endpoint.http.replies import json_reply, streaming, within_time
from agent.endpoint.http.sse import EventStream
from agent.endpoint.openai.errors import ApiError


class WholeAnswer(Protocol):
    """Grows by events, and is sent when all sequences have ended."""

    def add(self, index: int, event: GenerationEvent) -> None:
        """Take one event of sequence ``index`` in."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Return the body."""
        ...


class StreamedAnswer(Protocol):
    """Gives the bytes to send for each event."""

    def add(self, index: int, event: GenerationEvent) -> bytes:
        """Return what one event of sequence ``index`` makes; may be nothing."""
        ...

    def finish(self) -> bytes:
        """What follows when all sequences have ended; may be nothing."""
        ...

    def fail(self, error: ApiError) -> bytes:
        """Return the last bytes of a stream that breaks off."""
        ...


async def reply_whole(
    request: web.Request, requests: Sequence[GenerationRequest], digest: str, prompt_param: str, answer: WholeAnswer
) -> web.Response:
    """Run the sequences on the model with ``digest``, then answer.

    Raises:
        ApiError: 504, it took too long; or what ``answer`` raises.
        InferenceError: a sequence cannot be served.
    """
    await run_whole(request.app[CONTEXT], requests, digest, call(request, prompt_param), answer)
    return json_reply(answer.to_dict())


async def run_whole(
    context: Context, requests: Sequence[GenerationRequest], digest: str, asked: Call, answer: WholeAnswer
) -> None:
    """Run the sequences until ``answer`` is whole.

    Raises:
        ApiError: 504, it took too long; or what ``answer`` raises.
        InferenceError: a sequence cannot be served.
    """
    async with (
        within_time(context.config.limits.request_timeout_s),
        aclosing(context.runner.events(requests, asked, digest)) as events,
    ):
        async for index, event in events:
            answer.add(index, event)


async def reply_stream(
    request: web.Request, requests: Sequence[GenerationRequest], digest: str, prompt_param: str, answer: StreamedAnswer
) -> web.StreamResponse:
    """Return the same as a stream.

    A failure before its first bytes keeps its status; a later one is sent by ``answer.fail``.

    Raises:
        ConnectionError: the client is gone.
    """
    context = request.app[CONTEXT]
    stream = EventStream(request, context.config.limits.write_timeout_s)
    async with (
        streaming(stream, answer.fail),
        within_time(context.config.limits.request_timeout_s),
        aclosing(context.runner.events(requests, call(request, prompt_param), digest)) as events,
    ):
        async for index, event in events:
            if out := answer.add(index, event):
                await stream.send(out)
        if out := answer.finish():
            await stream.send(out)
    return await stream.finish()
