"""What happens to parameters that this API does not have. Pure.

Clients send parameters of other servers, and OpenAI's newest, that do no harm when nothing is done with them. By
default the answer comes and says what was not used. A parameter without which the answer would be another one is
always refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import from_json

from agent.endpoint.openai.errors import ApiError, from_validation, location, unsupported

Model = TypeVar("Model", bound=BaseModel)


class Strictness(StrEnum):
    """The setting ``unknown_parameters``."""

    REFUSE = "refuse"
    WARN = "warn"
    IGNORE = "ignore"


#: The response header that names what was not used, and how much of it is named.
UNUSED_HEADER = "X-Phifleet-Unused-Parameters"
_MOST_NAMES = 16
_MOST_CHARACTERS = 64
#: Each repair may bring to light what lay behind it, in a union's other branch or a level deeper.
_MOST_REPAIRS = 8

#: Parameters of other servers and older APIs that change what an answer is, and what to use instead.
_MEANINGFUL: Mapping[str, str] = {
    "context_management": "the whole conversation is put to the model",
    "add_generation_prompt": "an answer is always begun",
    "allowed_token_ids": "use logit_bias",
    "audio": "only text is made here",
    "bad_words": "use logit_bias",
    "continue_final_message": "use /v1/completions",
    "documents": "put them into a message",
    "function_call": "use tool_choice",
    "functions": "use tools",
    "grammar": "use response_format",
    "guided_choice": "use response_format with a schema that has an enum",
    "guided_grammar": "use response_format",
    "guided_json": "use response_format with a json_schema",
    "guided_regex": "use response_format with a schema that has a pattern",
    "json_schema": "use response_format with a json_schema",
    "length_penalty": "candidates are not ranked here",
    "prompt": "stored prompts are not had here; send instructions and input",
    "prompt_logprobs": "a prompt is not scored here",
    "stop_token_ids": "use stop",
    "structured_outputs": "use response_format with a json_schema",
    "use_beam_search": "candidates are not ranked here",
    "web_search_options": "nothing is searched here",
}
#: The values with which those change nothing; beside null, false and what is empty.
_NEUTRAL: Mapping[str, Any] = {"add_generation_prompt": True, "length_penalty": 1}
#: OpenAI's own parameters that the shapes here do not have: clients send null for those that they do not use.
_OPENAI = frozenset(
    {
        "audio",
        "context_management",
        "function_call",
        "functions",
        "max_tool_calls",
        "moderation",
        "prediction",
        "prompt",
        "prompt_cache_options",
        "prompt_cache_retention",
        "web_search_options",
    }
)
#: What other servers call parameters that are had here.
_ALIASES: Mapping[str, str] = {
    "max_length": "max_tokens",
    "n_predict": "max_tokens",
    "repeat_penalty": "repetition_penalty",
}
_LIMITS = frozenset({"max_completion_tokens", "max_output_tokens", "max_tokens", *_ALIASES})


def understand(model: type[Model], body: bytes, strictness: Strictness) -> tuple[Model, tuple[str, ...]]:
    """Return a request body as its shape, and the names of the parameters in it that change nothing here.

    Raises:
        ApiError: 400, naming the parameter.
    """
    try:
        parsed, unused = _parse(model, body, strictness)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    return parsed, (*unused, *_ignored(parsed))


def header_value(unused: tuple[str, ...]) -> str:
    """Return the names for a header: printable ASCII, and not more than a client would read."""
    names = ["".join(char if " " < char <= "~" and char != "," else "?" for char in name) for name in unused]
    shown = [name[:_MOST_CHARACTERS] for name in names[:_MOST_NAMES]]
    return ", ".join([*shown, "..."] if len(names) > _MOST_NAMES else shown)


def _parse(model: type[Model], body: bytes, strictness: Strictness) -> tuple[Model, list[str]]:
    unused: list[str] = []
    for _ in range(_MOST_REPAIRS):
        try:
            return model.model_validate_json(body), unused
        except ValidationError as error:
            repaired = _repaired(model, body, error, strictness, unused)
            if repaired is None:
                raise _refusal(error) from None
            body = repaired
    raise ApiError(400, "the request has too many unknown parameters, nested too deeply", code="unknown_parameter")


def _refusal(error: ValidationError) -> ApiError:
    for problem in error.errors(include_url=False):
        name = problem["loc"][-1] if problem["loc"] else None
        if problem["type"] == "extra_forbidden" and len(problem["loc"]) == 1 and name in _MEANINGFUL:
            return unsupported(
                str(name), f"{name!r} would change the answer, and is not had here: {_MEANINGFUL[str(name)]}"
            )
    return from_validation(error)


def _repaired(
    model: type[Model], body: bytes, error: ValidationError, strictness: Strictness, unused: list[str]
) -> bytes | None:
    """Return the body without what may be left out; None when nothing may."""
    problems = error.errors(include_url=False)
    if any(problem["type"] == "json_invalid" for problem in problems):
        return None
    data = from_json(body)
    changed = False
    for problem in problems:
        holder, key = _place(data, problem["loc"])
        if holder is None:
            continue
        if problem["type"] == "extra_forbidden":
            changed |= _drop(model, holder, key, location(problem["loc"]) or key, strictness, unused)
        elif key in _LIMITS and holder[key] == -1 and holder is data and strictness is not Strictness.REFUSE:
            del holder[key]  # elsewhere it is "as much as there is room for", which is the default here
            changed = True
    return json.dumps(data).encode() if changed else None


def _place(data: Any, loc: tuple[Any, ...]) -> tuple[dict[str, Any] | None, str]:
    """Return the object and key at a location, whose steps may also be names of a union's branches."""
    node, holder, key = data, None, ""
    for step in loc:
        if isinstance(node, dict) and step in node:
            holder, key, node = node, step, node[step]
        elif isinstance(node, list) and isinstance(step, int) and step < len(node):
            holder, key, node = None, "", node[step]
    return (holder, key) if loc and key == loc[-1] else (None, "")


def _drop(
    model: type[Model], holder: dict[str, Any], key: str, name: str, strictness: Strictness, unused: list[str]
) -> bool:
    value = holder[key]
    alias = _ALIASES.get(key)
    if strictness is Strictness.REFUSE:
        if value is not None or name not in _OPENAI:
            return False
    elif alias in model.model_fields and name == key:
        holder.setdefault(alias, value)
    elif name in _MEANINGFUL:
        if not (value is None or value in (False, "", [], {}) or value == _NEUTRAL.get(name)):
            return False
    elif value is not None:
        unused.append(name)
    del holder[key]
    return True


def _ignored(parsed: BaseModel, above: str = "") -> list[str]:
    """Parameters that the shape has only so that clients may send them."""
    names = []
    for name, field in type(parsed).model_fields.items():
        value = getattr(parsed, name)
        if isinstance(value, BaseModel):
            names += _ignored(value, f"{above}{name}.")
        elif value is not None and name in parsed.model_fields_set and _says_ignored(field):
            names.append(f"{above}{name}")
    return names


def _says_ignored(field: FieldInfo) -> bool:
    """Return whether the shape's own description says so: the field's, or that of a branch of its union."""
    branches = [meta for branch in get_args(field.annotation) for meta in getattr(branch, "__metadata__", ())]
    described = [field, *(meta for meta in branches if isinstance(meta, FieldInfo))]
    return any((one.description or "").startswith("ignored") for one in described)
