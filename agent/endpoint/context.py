"""What every route shares, under one key of the application, and how a body is read within its limits."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from aiohttp import web

from agent.core.ports import Inference
from agent.endpoint.config import EndpointConfig
from agent.endpoint.errors import ApiError
from agent.endpoint.generation import Call, Runner
from agent.endpoint.metrics import Metrics, StatsSource
from agent.endpoint.stored import ResponseStore


@dataclass(frozen=True, slots=True)
class Context:
    """Of one application."""

    inference: Inference
    config: EndpointConfig
    runner: Runner
    metrics: Metrics
    store: ResponseStore
    stats: StatsSource


CONTEXT = web.AppKey("context", Context)


@dataclass(slots=True)
class Asker:
    """Of one request. ``client`` is the name of the bearer key, or the address; ``origin`` a page's, where allowed."""

    id: str
    arrived: float
    client: str = "local"
    origin: str | None = None


ASKER = web.RequestKey("asker", Asker)


def call(request: web.Request, prompt_param: str) -> Call:
    """Whom this request's sequences are for."""
    return Call(request[ASKER].client, prompt_param, request[ASKER].arrived)


async def read_body(request: web.Request) -> bytes:
    """The whole body, which must be JSON by its Content-Type.

    Raises:
        ApiError: 413 too large, 408 too slow, 415 not JSON.
    """
    limits = request.app[CONTEXT].config.limits
    if request.content_type != "application/json":
        # A browser may send other types across origins without asking first.
        raise ApiError(415, "Content-Type must be application/json", code="unsupported_media_type")
    if (request.content_length or 0) > limits.body_bytes:
        raise too_large(limits.body_bytes)
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            return await request.read()
    except TimeoutError:
        raise ApiError(
            408, f"the body did not arrive within {limits.body_timeout_s} s", code="request_timeout"
        ) from None
    except web.HTTPRequestEntityTooLarge:
        raise too_large(limits.body_bytes) from None


def too_large(limit: int) -> ApiError:
    """413, with the limit."""
    return ApiError(413, f"the body is larger than {limit} bytes, which is the limit here", code="body_too_large")
