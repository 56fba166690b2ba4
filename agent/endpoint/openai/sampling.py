"""From a client's parameters to those of the loaded model; one that it does not have is refused by name. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from agent.core.inference import Capabilities, Guidance, GuidanceKind, ModelInfo, Sampling
from agent.endpoint.openai.errors import invalid, unsupported
from agent.endpoint.openai.jsonschema import check_schema
from agent.endpoint.openai.response_shapes import ResponseRequest
from agent.endpoint.openai.shapes import ChatRequest, CompletionRequest, ResponseFormat, SamplingFields

#: Values that say "off": a client that sends them asks for nothing.
_NEUTRAL: dict[str, Any] = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "logit_bias": {},
}
#: Parameters that not every runtime has.
_OPTIONAL = ("top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed")
#: OpenAI's default for completions.
_COMPLETION_TOKENS = 16
_ANY_OBJECT = '{"type": "object"}'


def for_chat(request: ChatRequest, info: ModelInfo, guidance: Guidance | None) -> Sampling:
    """Of a chat request; ``guidance`` is of its tools or its ``response_format``.

    Raises:
        ApiError: 400 naming the parameter that the model does not have.
    """
    if request.top_logprobs is not None and not request.logprobs:
        raise invalid("top_logprobs needs logprobs to be true", "top_logprobs")
    asked = request.max_completion_tokens or request.max_tokens
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return _sampling(request, info, asked or info.context, logprobs, "logprobs", guidance)


def for_completion(request: CompletionRequest, info: ModelInfo) -> Sampling:
    """Of a completions request.

    Raises:
        ApiError: 400 naming the parameter that the model does not have.
    """
    return _sampling(request, info, request.max_tokens or _COMPLETION_TOKENS, request.logprobs, "logprobs", None)


def for_response(request: ResponseRequest, info: ModelInfo, guidance: Guidance | None) -> Sampling:
    """Of a responses request.

    Raises:
        ApiError: 400 naming the parameter that the model does not have.
    """
    top = response_logprobs(request)
    asked = SamplingFields(temperature=request.temperature, top_p=request.top_p)
    return _sampling(asked, info, request.max_output_tokens or info.context, top, "include", guidance)


def response_logprobs(request: ResponseRequest) -> int | None:
    """Return how many alternatives of each token are asked for; None where no log probabilities are.

    Raises:
        ApiError: 400, a number is asked for of what is not included.
    """
    if "message.output_text.logprobs" in (request.include or ()):
        return request.top_logprobs or 0
    if request.top_logprobs:
        raise invalid("top_logprobs needs 'message.output_text.logprobs' in include", "top_logprobs")
    return None


def check_stream_options(request: ChatRequest | CompletionRequest | ResponseRequest) -> None:
    """Options of a stream are a mistake where no stream is asked for.

    Raises:
        ApiError: 400.
    """
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options is only allowed when stream is true", "stream_options")


def _sampling(
    asked: SamplingFields,
    info: ModelInfo,
    max_tokens: int,
    top_logprobs: int | None,
    logprobs_name: str,
    guidance: Guidance | None,
) -> Sampling:
    honoured = info.capabilities.parameters
    defaults = effective_defaults(info)
    values: dict[str, Any] = {
        name: defaults.get(name) if getattr(asked, name) is None else _supported(name, getattr(asked, name), honoured)
        for name in _OPTIONAL
    }
    if top_logprobs is not None and not honoured & {"logprobs", "top_logprobs"}:
        raise unsupported(logprobs_name, f"{info.name} on {info.runtime} cannot give logprobs")
    bias = _supported("logit_bias", asked.logit_bias, honoured) or {}
    seed = values.pop("seed")
    return Sampling(
        max_tokens=min(max_tokens, info.context),
        temperature=temperature_of(asked.temperature, info),
        # Runtimes take an unsigned 32-bit seed; OpenAI a signed 64-bit one.
        seed=None if seed is None else seed % 2**32,
        logit_bias={int(token): value for token, value in bias.items()},
        top_logprobs=top_logprobs,
        stop=_stops(asked.stop),
        guidance=guidance,
        **values,
    )


def effective_defaults(info: ModelInfo) -> dict[str, float | int]:
    """Return what holds for each parameter that a request leaves out.

    As signed, but for what the runtime does not have.

    ``temperature`` is always in it; a parameter that is not in it is off.
    """
    stated = {name: value for name, value in info.defaults.items() if name in info.capabilities.parameters}
    return {**stated, "temperature": info.defaults.get("temperature", 0.0)}


def temperature_of(asked: float | None, info: ModelInfo) -> float:
    """What the client sends wins; else what the manifest states, which is 0 (greedy) where it states nothing."""
    return info.defaults.get("temperature", 0.0) if asked is None else asked


def _supported(name: str, value: Any, honoured: frozenset[str]) -> Any:
    if value is None or value == _NEUTRAL.get(name):
        return None
    if name not in honoured:
        raise unsupported(name, f"the model that is loaded does not have {name!r}: leave it out")
    return value


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    return (stop,) if isinstance(stop, str) else tuple(stop)


def format_guidance(
    wanted: ResponseFormat | None,
    capabilities: Capabilities,
    param: str = "response_format",
    schema_at: str = "response_format.json_schema.schema",
) -> Guidance | None:
    """Return the constraint of a ``response_format``; ``param`` and ``schema_at`` are what the API calls them.

    Raises:
        ApiError: 400, the schema is none, or the runtime cannot constrain.
    """
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return _json_object(capabilities, param)
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        raise invalid(f"{schema_at} is missing", schema_at)
    return schema_guidance(wanted.json_schema.schema_, capabilities, schema_at, param)


def schema_guidance(schema: Mapping[str, Any], capabilities: Capabilities, where: str, param: str) -> Guidance:
    """Constrained to a schema.

    Raises:
        ApiError: 400, it is no schema, or the runtime cannot constrain.
    """
    check_schema(schema, where)
    if GuidanceKind.JSON_SCHEMA not in capabilities.guidance:
        raise unsupported(param, "the runtime that is loaded cannot constrain its output to a JSON schema")
    return Guidance(GuidanceKind.JSON_SCHEMA, json.dumps(schema, ensure_ascii=False))


def _json_object(capabilities: Capabilities, param: str) -> Guidance:
    if GuidanceKind.JSON_OBJECT in capabilities.guidance:
        return Guidance(GuidanceKind.JSON_OBJECT)
    if GuidanceKind.JSON_SCHEMA in capabilities.guidance:
        return Guidance(GuidanceKind.JSON_SCHEMA, _ANY_OBJECT)
    raise unsupported(param, "the runtime that is loaded cannot constrain its output to JSON")
