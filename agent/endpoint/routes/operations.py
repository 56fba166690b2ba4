"""What is not inference: models, health, metrics, and the signed facts of what serves."""

from __future__ import annotations

import time

from aiohttp import web

from agent.endpoint.http.context import CONTEXT, read_body
from agent.endpoint.http.metrics import CONTENT_TYPE, is_ready
from agent.endpoint.http.replies import json_reply
from agent.endpoint.openai.errors import ApiError
from agent.endpoint.openai.models import check_model, loaded_facts, model_object, signed_facts
from agent.endpoint.openai.strictness import Strictness

_STARTED = int(time.time())


async def models(request: web.Request) -> web.Response:
    """``GET /v1/models``: what serves now, under its name and its aliases, or an empty list."""
    context = request.app[CONTEXT]
    info = context.inference.active()
    listed = [] if info is None else list(dict.fromkeys([info.name, *context.names().aliases]))
    return json_reply({"object": "list", "data": [model_object(info, _STARTED, name) for name in listed if info]})


async def model(request: web.Request) -> web.Response:
    """``GET /v1/models/{name}``."""
    context, name = request.app[CONTEXT], request.match_info["name"]
    info = context.inference.active()
    if info is None:
        raise ApiError(404, f"the model {name[:128]!r} does not exist here", param="model", code="model_not_found")
    check_model(name, info, context.names())
    return json_reply(model_object(info, _STARTED, None if name == info.artifact else name))


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
    """``GET /health/ready``: 200 while a model serves, else 503; requests wait while its worker is started again."""
    context = request.app[CONTEXT]
    info = context.inference.active()
    if info is None or not is_ready(context.inference, context.stats()):
        raise context.runner.unavailable()
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
    signed = {} if manifest is None else signed_facts(manifest)
    return json_reply({"ready": True, "aliases": context.names().aliases, **loaded_facts(info), **signed})


async def openapi(request: web.Request) -> web.Response:
    """``GET /openapi.json``: the API's own description."""
    # Made when it is asked for: few ask, and its schemas take memory.
    from agent.endpoint.http.openapi import description

    context = request.app[CONTEXT]
    info, strict = context.inference.active(), context.config.unknown_parameters is Strictness.REFUSE
    names = (info.name, info.artifact, *context.names().aliases) if info else ()
    return json_reply(description(tuple(dict.fromkeys(names)), strict=strict))
