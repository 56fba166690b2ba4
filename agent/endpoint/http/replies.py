"""How answers and failures leave: at once, or in the middle of a stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import structlog
from aiohttp import web

from agent.core.inference import InferenceError
from agent.endpoint.http.sse import EventStream
from agent.endpoint.openai.errors import ApiError, from_inference

_LOG = structlog.get_logger(component="endpoint")


def json_reply(data: Any, status: int = 200) -> web.Response:
    """Return a JSON body."""
    body = json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()
    return web.Response(body=body, status=status, content_type="application/json")


def error_reply(error: ApiError) -> web.Response:
    """Return an error object with its status and headers."""
    return web.Response(
        body=error.to_json(), status=error.status, content_type="application/json", headers=error.headers
    )


@asynccontextmanager
async def within_time(seconds: float) -> AsyncIterator[None]:
    """A limit on a whole request.

    Raises:
        ApiError: 504, it took longer.
    """
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise ApiError(504, f"the answer took longer than {seconds} s, the limit here", code="timeout") from None


@asynccontextmanager
async def streaming(stream: EventStream, fail: Callable[[ApiError], bytes]) -> AsyncIterator[None]:
    """A failure before the first event keeps its status; a later one becomes the stream's last event, by ``fail``."""
    try:
        yield
    except ConnectionError:
        raise
    except Exception as error:
        if not stream.started:
            raise
        await stream.send(fail(as_api_error(error)))


def as_api_error(error: Exception) -> ApiError:
    """Any failure as what a client may see of it. A fault of ours is logged, and its details stay in the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InferenceError):
        return from_inference(error)
    _LOG.exception("endpoint_fault", exc_info=error)
    return ApiError(500, "the endpoint failed: see the agent's log", code="internal_error", kind="crashed")
