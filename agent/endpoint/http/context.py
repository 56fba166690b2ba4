"""What every route shares, under one key of the application, and how a body is read within its limits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from aiohttp import web
from pydantic import BaseModel

from agent.core.names import Names
from agent.core.ports import Inference
from agent.endpoint.http.background import Background
from agent.endpoint.http.config import EndpointConfig
from agent.endpoint.http.connections import GuardedConnection
from agent.endpoint.http.generation import Call, Runner
from agent.endpoint.http.metrics import Metrics, StatsSource
from agent.endpoint.http.peers import program_at
from agent.endpoint.openai.errors import ApiError
from agent.endpoint.openai.stored import BoundedStore, Conversation, StoredResponse
from agent.endpoint.openai.strictness import Strictness, understand

Model = TypeVar("Model", bound=BaseModel)


class Budget:
    """Bytes that bodies may take, over all requests in flight."""

    def __init__(self, limit: int) -> None:
        self.left = limit

    def take(self, size: int) -> None:
        """Set some aside.

        Raises:
            ApiError: 429: there is not as much left.
        """
        if size > self.left:
            message = "the requests in flight are too large together: try again in a moment"
            raise ApiError(429, message, code="bodies_too_large", kind="busy", retry_after_s=1)
        self.left -= size

    def give(self, size: int) -> None:
        """Back."""
        self.left += size


@dataclass(frozen=True, slots=True)
class Context:
    """Of one application."""

    inference: Inference
    config: EndpointConfig
    runner: Runner
    metrics: Metrics
    store: BoundedStore[StoredResponse | Conversation]
    stats: StatsSource
    budget: Budget
    #: What the model that serves answers to, beside its own name.
    names: Callable[[], Names]
    background: Background


CONTEXT = web.AppKey("context", Context)


@dataclass(slots=True)
class RequestContext:
    """Of one request.

    ``client`` is the name of the bearer key, or the address: what is stored belongs to it. ``program`` takes turns with
    others in the queue; it is of the same client. ``concurrent`` is how many requests its key allows at once.
    ``origin`` is a page's, where allowed.
    """

    id: str
    arrived: float
    client: str = "local"
    program: str = "local"
    concurrent: int | None = None
    origin: str | None = None
    #: Parameters that changed nothing, to be named in the answer.
    unused: tuple[str, ...] = ()
    #: Bytes of the budget, given back when the request is over.
    taken: int = 0


REQUEST_CONTEXT = web.RequestKey("request_context", RequestContext)


def call(request: web.Request, prompt_param: str) -> Call:
    """Whom this request's sequences are for."""
    return Call(request[REQUEST_CONTEXT].client, prompt_param, request[REQUEST_CONTEXT].arrived)


async def read_body(request: web.Request) -> bytes:
    """Return the whole body, which must be JSON by its Content-Type.

    Raises:
        ApiError: 413 too large, 408 too slow, 415 not JSON or compressed, 429 too many at once.
    """
    context, request_context = request.app[CONTEXT], request[REQUEST_CONTEXT]
    limits = context.config.limits
    if request.content_type != "application/json":
        # A browser may send other types across origins without asking first.
        raise ApiError(415, "Content-Type must be application/json", code="unsupported_media_type")
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        message = f"the body is encoded as {encoding[:64]!r}, which is not taken here: send it as it is"
        raise ApiError(415, message, code="unsupported_content_encoding", headers={"Accept-Encoding": "identity"})
    if (request.content_length or 0) > limits.body_bytes:
        raise too_large(limits.body_bytes)
    expected = limits.body_bytes if request.content_length is None else request.content_length
    context.budget.take(expected)
    request_context.taken = expected
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            body = await request.read()
    except TimeoutError:
        raise ApiError(
            408, f"the body did not arrive within {limits.body_timeout_s} s", code="request_timeout"
        ) from None
    except web.HTTPRequestEntityTooLarge:
        raise too_large(limits.body_bytes) from None
    context.budget.give(expected - len(body))
    request_context.taken = len(body)
    return body


async def read_request(request: web.Request, model: type[Model]) -> Model:
    """Return the body as its shape; what in it was not used is named in a header of the answer.

    Raises:
        ApiError: as ``read_body``; or 400, naming the parameter that is wrong.
    """
    strictness = request.app[CONTEXT].config.unknown_parameters
    await find_program(request)
    parsed, unused = understand(model, await read_body(request), strictness)
    if strictness is Strictness.WARN:
        request[REQUEST_CONTEXT].unused = unused
    return parsed


async def find_program(request: web.Request) -> None:
    """Tell programs of one client apart, where others are at work: else nobody has to wait for a turn."""
    context, request_context = request.app[CONTEXT], request[REQUEST_CONTEXT]
    connection = request.protocol
    if request.transport is None or not context.stats().active:
        request_context.program = request_context.client
        return
    if isinstance(connection, GuardedConnection):
        connection.program = connection.program or await program_at(request.transport)
        request_context.program = f"{request_context.client}, {connection.program}"


def too_large(limit: int) -> ApiError:
    """413, with the limit."""
    return ApiError(413, f"the body is larger than {limit} bytes, which is the limit here", code="body_too_large")
