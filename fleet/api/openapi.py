"""The API's description, OpenAPI 3.1, made from the table of routes and the shapes of their bodies."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from pydantic.json_schema import models_json_schema

from agent.platform.versions import product_version
from fleet.api.handlers import ROUTES
from fleet.api.problems import CODES, MEDIA_TYPE
from fleet.api.routes import PREFIX, Route
from fleet.api.shapes import ProblemBody

_REF = "#/components/schemas/{model}"
#: What any route may answer with beside its own.
_ALWAYS = (
    "request.malformed",
    "request.invalid",
    "token.missing",
    "token.role",
    "not_found",
    "conflict",
    "database",
    "fault",
)
_EVENTS: dict[str, Any] = {
    "get": {
        "operationId": "get_events",
        "summary": "Follow the audit as server-sent events.",
        "description": "Needs the role viewer, and a token for the whole fleet. Each event's id is the entry's; with "
        "Last-Event-ID a client goes on where it was.",
        "tags": ["events"],
        "parameters": [
            {"name": "Last-Event-ID", "in": "header", "schema": {"type": "integer", "minimum": 0}},
        ],
        "responses": {
            "200": {
                "description": "Events, for ever.",
                "content": {"text/event-stream": {"schema": {"type": "string"}}},
            }
        },
    }
}
_METRICS: dict[str, Any] = {
    "get": {
        "operationId": "get_metrics",
        "summary": "Figures of the controller and of inference on all devices, for Prometheus.",
        "description": "Needs the role viewer, and a token for the whole fleet.",
        "tags": ["metrics"],
        "responses": {
            "200": {"description": "The text format.", "content": {"text/plain": {"schema": {"type": "string"}}}}
        },
    }
}


@lru_cache(maxsize=1)
def describe() -> dict[str, Any]:
    """Return the whole document."""
    routes = ROUTES
    names, schemas = _schemas(routes)
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(f"{PREFIX}{route.path}", {})[route.method.lower()] = _operation(route, names)
    streams = {f"{PREFIX}/events": _EVENTS, "/metrics": _METRICS}
    for item in streams.values():
        item["get"]["responses"] |= _problems(("token.missing", "token.role", "database", "fault"))
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "phifleet",
            "version": product_version(),
            "license": {"name": "MIT", "identifier": "MIT"},
            "description": "The controller of a fleet. Lists are pages: `next` is what `after` takes. A POST with an "
            "`Idempotency-Key` may be sent again within 24 hours and is done once.",
        },
        "servers": [{"url": "/"}],
        "security": [{"token": []}],
        "tags": [{"name": name} for name in sorted({_tag(route) for route in routes} | {"events", "metrics"})],
        "paths": paths | streams,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _schemas(routes: Sequence[Route]) -> tuple[dict[Any, dict[str, Any]], dict[str, Any]]:
    shapes = [(route.body, "validation") for route in routes if route.body]
    shapes += [(route.answer, "serialization") for route in routes if route.answer]
    shapes.append((ProblemBody, "serialization"))
    unique = list(dict.fromkeys(shapes))
    found, shared = models_json_schema(unique, ref_template=_REF)  # type: ignore[arg-type] # its literal type is private
    return dict(found), shared["$defs"]


def _operation(route: Route, names: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": route.operation,
        "summary": route.summary,
        "description": f"Needs the role {route.role.value}." if route.role else "Needs no token.",
        "tags": [_tag(route)],
        "parameters": _parameters(route),
        "responses": {str(route.status): _success(route, names), **_problems((*_ALWAYS, *route.problems))},
    }
    if route.role is None:
        described["security"] = []
    if route.body is not None:
        content = {"application/json": {"schema": names[route.body, "validation"]}}
        described["requestBody"] = {"required": True, "content": content}
    return described


def _success(route: Route, names: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    if route.answer is None:
        return {"description": "Done."}
    schema = names[route.answer, "serialization"]
    return {"description": "Done.", "content": {"application/json": {"schema": schema}}}


def _parameters(route: Route) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in re.findall(r"\{(\w+)\}", route.path)
    ]
    found += [
        {"name": one.name, "in": "query", "description": one.description, "schema": dict(one.schema)}
        for one in route.query
    ]
    if route.method == "POST":
        key = {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"}
        found.append({"name": "Idempotency-Key", "in": "header", "schema": key})
    if route.if_match:
        found.append({"name": "If-Match", "in": "header", "schema": {"type": "string", "pattern": '^"[0-9a-f]{16}"$'}})
    return found


def _problems(codes: Sequence[str]) -> dict[str, Any]:
    content = {MEDIA_TYPE: {"schema": {"$ref": _REF.format(model="ProblemBody")}}}
    by_status: dict[str, list[str]] = {}
    for code in codes:
        by_status.setdefault(str(CODES[code][0]), []).append(code)
    found = {
        status: {"description": ", ".join(sorted(set(names))), "content": content}
        for status, names in by_status.items()
    }
    # Whatever else a gateway or this server may answer with has the same shape.
    return found | {"default": {"description": "Another problem.", "content": content}}


def _tag(route: Route) -> str:
    return route.path.split("/")[1]
