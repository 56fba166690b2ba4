"""The API's own description, OpenAPI 3.1, made from the very shapes that requests are checked against."""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pydantic.json_schema import models_json_schema

from agent.endpoint.anthropic.shapes import CountRequest, MessagesRequest
from agent.endpoint.openai.response_shapes import (
    AddItemsRequest,
    ConversationRequest,
    InputTokensRequest,
    ResponseRequest,
    UpdateConversationRequest,
)
from agent.endpoint.openai.shapes import ApiModel, ChatRequest, CompletionRequest

_REF = "#/components/schemas/{model}"
_POSTS: dict[str, tuple[type[ApiModel], str]] = {
    "/v1/chat/completions": (ChatRequest, "Answer a conversation, at once or as server-sent events."),
    "/v1/completions": (CompletionRequest, "Continue a text, without a chat template."),
    "/v1/messages": (MessagesRequest, "Answer a conversation, as Anthropic's API has it."),
    "/v1/messages/count_tokens": (CountRequest, "Count the tokens of such a conversation."),
    "/v1/responses": (ResponseRequest, "Answer items, going on from a stored response or a conversation."),
    "/v1/responses/input_tokens": (InputTokensRequest, "Count the tokens of what would be asked."),
    "/v1/conversations": (ConversationRequest, "Begin a conversation that responses can add to."),
    "/v1/conversations/{id}": (UpdateConversationRequest, "Set a conversation's metadata."),
    "/v1/conversations/{id}/items": (AddItemsRequest, "Add items to a conversation."),
}
_GETS = {
    "/v1/models": "What serves now.",
    "/v1/models/{name}": "One model.",
    "/v1/responses/{id}": "A stored response; with stream=true as server-sent events.",
    "/v1/responses/{id}/input_items": "What a stored response was asked.",
    "/v1/conversations/{id}": "A conversation.",
    "/v1/conversations/{id}/items": "What a conversation holds.",
    "/v1/conversations/{id}/items/{item}": "One item of a conversation.",
    "/props": "The signed facts of what serves, and what was measured here.",
    "/health/live": "This process answers.",
    "/health/ready": "A model serves.",
}
_ERRORS = {
    "400": "The request is wrong; param says where.",
    "401": "The key is missing or unknown.",
    "403": "This host or origin may not ask.",
    "404": "There is no such model or response.",
    "408": "The body came too slowly.",
    "413": "The body is too large.",
    "415": "The body is not JSON.",
    "429": "Too many are waiting, or the key's limit is reached; Retry-After says when.",
    "500": "The worker or the endpoint failed.",
    "503": "No model serves now; Retry-After says when.",
    "504": "It took too long.",
}
_ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}

#: Of Anthropic's API.
_MESSAGE_ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["type", "error", "request_id"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
        "request_id": {"type": "string"},
    },
}


@lru_cache(maxsize=4)
def description(names: tuple[str, ...] = (), *, strict: bool = False) -> dict[str, Any]:
    """Return the whole document; ``names`` are what ``model`` may be now.

    ``strict``: unknown parameters are refused.
    """
    models = [(model, "validation") for model, _ in _POSTS.values()]
    _, shared = models_json_schema(models, ref_template=_REF)  # type: ignore[arg-type] # its literal type is private
    for model, _ in _POSTS.values():
        if names and "model" in model.model_fields:
            shared["$defs"][model.__name__]["properties"]["model"] = {"enum": list(names)}
    if not strict:
        for schema in shared["$defs"].values():
            schema.pop("additionalProperties", None)
    paths: dict[str, Any] = {path: {"post": _post(path, model, text)} for path, (model, text) in _POSTS.items()}
    paths["/v1/embeddings"] = {"post": _embeddings()}
    for path, text in _GETS.items():
        paths.setdefault(path, {})["get"] = _operation(path, text)
    for path in ("/v1/responses/{id}", "/v1/conversations/{id}", "/v1/conversations/{id}/items/{item}"):
        paths[path]["delete"] = _operation(path, "Forget it.")
    ending = "/v1/responses/{id}/cancel"
    paths[ending] = {"post": _operation(ending, "End a response that is made in the background.")}
    paths["/metrics"] = {"get": _operation("/metrics", "Prometheus metrics.", "text/plain")}
    return {
        "openapi": "3.1.0",
        "info": {"title": "phifleet endpoint", "version": _version()},
        "paths": paths,
        "components": {
            "schemas": {**shared["$defs"], "Error": _ERROR_SCHEMA, "MessageError": _MESSAGE_ERROR_SCHEMA},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _version() -> str:
    try:
        return version("phifleet")
    except PackageNotFoundError:
        return "0"


def _post(path: str, model: type[ApiModel], text: str) -> dict[str, Any]:
    operation = _operation(path, text)
    if "stream" in model.model_fields:
        operation["responses"]["200"]["content"]["text/event-stream"] = {}
    operation["requestBody"] = _body({"$ref": _REF.format(model=model.__name__)})
    return operation


def _embeddings() -> dict[str, Any]:
    operation = _operation("", "Refused: the models served here make no embeddings.")
    del operation["responses"]["200"]
    operation["requestBody"] = _body({"type": "object"})
    return operation


def _body(schema: dict[str, Any]) -> dict[str, Any]:
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def _operation(path: str, text: str, kind: str = "application/json") -> dict[str, Any]:
    name = "MessageError" if path.startswith("/v1/messages") else "Error"
    error = {"application/json": {"schema": {"$ref": _REF.format(model=name)}}}
    responses: dict[str, Any] = {"200": {"description": "Done.", "content": {kind: {"schema": {}}}}}
    responses |= {status: {"description": words, "content": error} for status, words in _ERRORS.items()}
    names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    parameters = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
    return {"summary": text, "responses": responses, **({"parameters": parameters} if parameters else {})}
