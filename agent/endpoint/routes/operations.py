"""What is not inference: models, health, metrics, and the signed facts of what serves."""

from __future__ import annotations

import time
from typing import Any

from aiohttp import web

from agent.contract.manifest import Manifest
from agent.core.inference import ModelInfo
from agent.endpoint.http.context import CONTEXT, read_body
from agent.endpoint.http.metrics import CONTENT_TYPE
from agent.endpoint.http.replies import json_reply
from agent.endpoint.openai.errors import ApiError
from agent.endpoint.openai.sampling import effective_defaults

_STARTED = int(time.time())


async def models(request: web.Request) -> web.Response:
    """``GET /v1/models``: what serves now, or an empty list."""
    info = request.app[CONTEXT].inference.active()
    return json_reply({"object": "list", "data": [] if info is None else [_model(info)]})


async def model(request: web.Request) -> web.Response:
    """``GET /v1/models/{name}``."""
    info = request.app[CONTEXT].inference.active()
    name = request.match_info["name"]
    if info is None or name not in (info.name, info.artifact):
        raise ApiError(404, f"the model {name[:128]!r} does not exist here", param="model", code="model_not_found")
    return json_reply(_model(info))


def _model(info: ModelInfo) -> dict[str, Any]:
    return {
        "id": info.name,
        "object": "model",
        "created": _STARTED,
        "owned_by": "phifleet",
        "artifact": info.artifact,
        "digest": info.digest,
        "runtime": info.runtime,
        "context": info.context,
        "sampling_defaults": effective_defaults(info),
    }


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
    return json_reply({"ready": True, **_loaded(info), **({} if manifest is None else _signed(manifest))})


def _loaded(info: ModelInfo) -> dict[str, Any]:
    can = info.capabilities
    return {
        "model": info.name,
        "artifact": info.artifact,
        "digest": info.digest,
        "runtime": info.runtime,
        "device": info.device,
        "context": info.context,
        "load_s": info.load_s,
        "memory_bytes": info.memory_bytes,
        "capabilities": {
            "parameters": sorted(can.parameters),
            "guidance": sorted(can.guidance),
            "prefix_reuse": can.prefix_reuse,
            "max_sequences": can.max_sequences,
        },
        "sampling_defaults": effective_defaults(info),
        "facts": info.facts,
    }


def _signed(manifest: Manifest) -> dict[str, Any]:
    return {
        "quantization": {
            "toolchain": manifest.toolchain,
            "precision": manifest.precision,
            "target": manifest.target,
            "size_bytes": manifest.size,
        },
        "quality": manifest.quality.model_dump(mode="json") if manifest.quality else None,
        "source": manifest.model.model_dump(mode="json"),
        "profile": manifest.profile,
        "versions": manifest.versions,
        "chat": {"tools_in_template": "tools" in manifest.chat.template, "stop": list(manifest.chat.stop)},
    }


async def openapi(request: web.Request) -> web.Response:
    """``GET /openapi.json``: the API's own description."""
    # Made when it is asked for: few ask, and its schemas take memory.
    from agent.endpoint.openai.openapi import description

    info = request.app[CONTEXT].inference.active()
    return json_reply(description((info.name, info.artifact) if info else ()))
