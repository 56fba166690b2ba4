"""Every way a request can go wrong, as the error object that OpenAI's clients know.

``{"error": {"message": str, "type": str, "param": str | None, "code": str | None}}``
"""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise
from typing import Any

from pydantic import ValidationError

from agent.core.inference import DoneEvent, InferenceError

INVALID = "invalid_request_error"
#: Of InferenceError.KINDS: HTTP status, OpenAI's type, code.
_KINDS: dict[str, tuple[int, str, str]] = {
    "invalid": (400, INVALID, "invalid_value"),
    "unsupported": (400, INVALID, "unsupported_parameter"),
    "context_overflow": (400, INVALID, "context_length_exceeded"),
    "busy": (429, "rate_limit_error", "queue_full"),
    "unavailable": (503, "server_error", "model_unavailable"),
    "crashed": (500, "server_error", "worker_crashed"),
    "timeout": (504, "server_error", "timeout"),
}
_RETRY_S = {"busy": 1.0, "unavailable": 1.0}
_STATUS_TYPES = {401: "authentication_error", 403: "permission_error", 404: INVALID, 429: "rate_limit_error"}
_PARAMETER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
#: What pydantic puts into a location for the branch of a union: a type, a class of ours, a tag after a list's index.
_CLASS = re.compile(r"[A-Z][a-z]+([A-Z][a-z]+)+\Z")
_TAGS = frozenset({"message", "function_call", "function_call_output", "reasoning"})
_BRANCHES = frozenset({"str", "int", "float", "bool", "list", "dict", "none", "is-instance", "constrained-str"})


class ApiError(Exception):
    """A request that is answered with an error object. ``kind`` is what health and metrics count it as."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid",
        type_: str | None = None,
        retry_after_s: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.kind = kind
        self.type = type_ or _STATUS_TYPES.get(status) or (INVALID if status < 500 else "server_error")
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            self.headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))

    def to_json(self) -> bytes:
        """Return the error object as UTF-8 JSON."""
        return error_body(str(self), self.type, self.param, self.code)


def error_body(message: str, type_: str, param: str | None = None, code: str | None = None) -> bytes:
    """Return the error object as UTF-8 JSON."""
    return json.dumps({"error": {"message": message, "type": type_, "param": param, "code": code}}).encode()


def invalid(message: str, param: str | None, code: str = "invalid_value") -> ApiError:
    """400: the request is at fault, and ``param`` is where."""
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, why: str) -> ApiError:
    """400: the request is right, and the model that is loaded cannot do it."""
    return ApiError(400, why, param=param, code="unsupported_parameter", kind="unsupported")


def from_inference(error: InferenceError) -> ApiError:
    """As the model host's refusal reaches a client."""
    status, type_, code = _KINDS.get(error.kind, (500, "server_error", "internal_error"))
    retry = error.retry_after_s if error.retry_after_s is not None else _RETRY_S.get(error.kind)
    param = error.param or ("messages" if error.kind == "context_overflow" else None)
    return ApiError(status, str(error), param=param, code=code, kind=error.kind, type_=type_, retry_after_s=retry)


def from_done(event: DoneEvent) -> ApiError:
    """As a generation that failed on the way reaches a client."""
    kind = event.error_kind if event.error_kind in _KINDS else "crashed"
    return from_inference(InferenceError(kind, event.error or "the generation failed in the worker"))


def from_validation(error: ValidationError) -> ApiError:
    """Return the deepest complaint about the first parameter that is wrong, named like ``messages[0].role``."""
    problems = error.errors(include_url=False, include_input=False)
    # A union complains once for each branch; the branch of another type says least.
    problems = [one for one in problems if one["loc"][:1] == problems[0]["loc"][:1]]
    problem = max(problems, key=lambda one: (len(one["loc"]), not one["type"].endswith("_type")))
    if problem["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {problem['msg']}", code="invalid_json")
    where = location(problem["loc"])
    if problem["type"] == "extra_forbidden":
        return invalid(f"unknown parameter {where!r}", where, "unknown_parameter")
    if problem["type"] == "missing":
        return invalid(f"missing required parameter {where!r}", where, "missing_required_parameter")
    code = "invalid_type" if problem["type"].endswith("_type") else "invalid_value"
    message = problem["msg"].removeprefix("Value error, ")
    return invalid(f"{where or 'the body'}: {message}", where, code)


def location(loc: tuple[Any, ...]) -> str | None:
    """``("messages", 0, "content", "str")`` as ``messages[0].content``."""
    path = ""
    for before, step in pairwise((None, *loc)):
        if isinstance(step, int):
            path += f"[{step}]"
        elif _is_branch(step, before):
            continue
        elif _PARAMETER.match(step):
            path += f".{step}" if path else step
        elif step == loc[-1]:
            path += f"[{step[:64]!r}]"
    return path or None


def _is_branch(step: str, before: Any) -> bool:
    if isinstance(before, int):
        return step in _TAGS
    return step in _BRANCHES or step.endswith("]") or step.startswith("function-") or _CLASS.match(step) is not None
