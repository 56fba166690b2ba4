"""What is not inference: models, health, metrics, and the signed facts of what serves."""

from __future__ import annotations

import time

from aiohttp import web

from agent.endpoint.http.context import CONTEXT, read_body
from agent.endpoint.http.metrics import CONTENT_TYPE
from agent.endpoint.http.replies import json_reply
from agent.endpoint.openai.errors import ApiError
from agent.endpoint.openai.models import loaded_facts, model_object, signed_facts
from agent.endpoint.openai.strictness import Strictness

_STARTED = int(time.time())


async def models(request: web.Request) -> web.Response:
    """``GET /v1/models``: what serves now, or an empty list."""
    info = request.app[CONTEXT].inference.active()
    return json_reply({"object": "list", "data": [] if info is None else [model_object(info, _STARTED)]})


async def model(request: web.Request) -> web.Response:
    """``GET /v1/models/{name}``."""
    info = request.app[CONTEXT].inference.active()
    name = request.match_info["name"]
    if info is None or name not in (info.name, info.artifact):
        raise ApiError(404, f"the model {name[:128]!r} does not exist here", param="model", code="model_not_found")
    return json_reply(model_object(info, _STARTED))


async def embeddings(request: web.Request) -> web.Response:
    """``POST /v1/embeddings``: refused, clearly."""
    await read_body(request)
    raise ApiError(
        400,
        "the models served here are language models that make no embeddings: use a server with an embedding model",
        param="model",
        code="unsupported_endpoint",
        kind="unsupported",
    )


async def live(_: web.Request) -> web.Response:
    """``GET /health/live``: this process answers."""
    return json_reply({"status": "live"})


async def ready(request: web.Request) -> web.Response:
    """``GET /health/ready``: 200 while a model serves, else 503."""
    info = request.app[CONTEXT].inference.active()
    if info is None:
        raise request.app[CONTEXT].runner.unavailable()
    return json_reply({"status": "ready", "model": info.name, "digest": info.digest})


async def metrics(request: web.Request) -> web.Response:
    """``GET /metrics``: Prometheus text."""
    return web.Response(body=request.app[CONTEXT].metrics.render(), headers={"Content-Type": CONTENT_TYPE})


async def props(request: web.Request) -> web.Response:
    """``GET /props``: the signed facts, and what was measured here."""
    context = request.app[CONTEXT]
    info, manifest = context.inference.active(), context.inference.active_manifest()
    if info is None:
        stats = context.stats()
        return json_reply({"ready": False, "state": stats.state, "reason": stats.reason})
    return json_reply({"ready": True, **loaded_facts(info), **({} if manifest is None else signed_facts(manifest))})


async def openapi(request: web.Request) -> web.Response:
    """``GET /openapi.json``: the API's own description."""
    # Made when it is asked for: few ask, and its schemas take memory.
    from agent.endpoint.openai.openapi import description

    info = request.app[CONTEXT].inference.active()
    strict = request.app[CONTEXT].config.unknown_parameters is Strictness.REFUSE
    return json_reply(description((info.name, info.artifact) if info else (), strict=strict))
