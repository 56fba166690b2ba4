"""Each keyword of JSON Schema on each runtime: enforced, or refused by name; never ignored.

The model is random, so what its answers keep to is the engine's work alone.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import jsonschema
import pytest
import pytest_asyncio

from agent.core.inference import DoneEvent, FinishReason, Guidance, GuidanceKind, InferenceError
from agent.endpoint.openai.tools import calls_schema
from agent.runtimes.engines.schema import CONSTRAINING, ENFORCED
from tests.agent.runtimes.conftest import installed
from tests.agent.runtimes.test_engines import Run, running

pytestmark = pytest.mark.asyncio(loop_scope="module")

#: Whose draws go through the same ``Guides`` as those of ``onnx_genai``: one simulated answer takes seconds, and all of
#: these minutes. test_engines.py has it write JSON by a schema.
LEFT_OUT = {"onnx_qnn"}


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=installed(without=LEFT_OUT))
async def run(request: pytest.FixtureRequest) -> AsyncIterator[Run]:
    async with running(request.param) as found:
        yield found


DATE = {"type": "string", "format": "date"}
WORD = {"type": "string", "maxLength": 4}
#: For each keyword that constrains, a schema that a random answer would not keep to by accident.
SCHEMAS: dict[str, dict[str, Any]] = {
    "type": {"type": "boolean"},
    "enum": {"enum": ["red", 7, None]},
    "const": {"const": {"a": 1}},
    "properties": {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"],
                   "additionalProperties": False},
    "required": {"type": "object", "properties": {"a": {"type": "null"}, "b": {"type": "null"}},
                 "required": ["b", "a"], "additionalProperties": False},
    "additionalProperties": {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"],
                             "additionalProperties": False},
    "patternProperties": {"type": "object", "patternProperties": {"^x[0-9]$": {"type": "boolean"}},
                          "additionalProperties": False, "maxProperties": 2},
    "propertyNames": {"type": "object", "propertyNames": {"pattern": "^a$"}},
    "minProperties": {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"type": "boolean"}},
                      "required": ["a", "b"], "additionalProperties": False, "minProperties": 2},
    "maxProperties": {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 0},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "dependentSchemas": {"type": "object", "dependentSchemas": {"a": {"required": ["b"]}}},
    "items": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    "prefixItems": {"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "null"}], "items": False,
                    "minItems": 2},
    "minItems": {"type": "array", "items": {"type": "null"}, "minItems": 2, "maxItems": 3},
    "maxItems": {"type": "array", "items": {"type": "null"}, "maxItems": 1},
    "uniqueItems": {"type": "array", "items": {"type": "boolean"}, "uniqueItems": True, "minItems": 2},
    "contains": {"type": "array", "contains": {"const": 1}},
    "unevaluatedItems": {"type": "array", "unevaluatedItems": False},
    "unevaluatedProperties": {"type": "object", "unevaluatedProperties": False},
    "minLength": {"type": "string", "minLength": 2, "maxLength": 5},
    "maxLength": {"type": "string", "maxLength": 3},
    "pattern": {"type": "string", "pattern": "^[ab]{2,3}$"},
    "format": DATE,
    "minimum": {"type": "integer", "minimum": 3, "maximum": 12},
    "maximum": {"type": "integer", "minimum": -2, "maximum": 1},
    "exclusiveMinimum": {"type": "integer", "exclusiveMinimum": 3, "maximum": 5},
    "exclusiveMaximum": {"type": "integer", "minimum": 3, "exclusiveMaximum": 5},
    "multipleOf": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 100},
    "anyOf": {"anyOf": [{"const": 1}, {"type": "null"}]},
    "allOf": {"allOf": [{"type": "integer"}, {"minimum": 3, "maximum": 4}]},
    "not": {"not": {"type": "string"}},
    "if": {"if": {"const": 1}, "then": {"const": 1}, "else": {"const": 2}},
    "$ref": {"$defs": {"a": {"type": "boolean"}}, "type": "array", "items": {"$ref": "#/$defs/a"}, "minItems": 1,
             "maxItems": 2},
    "definitions": {"definitions": {"a": {"const": 1}}, "$ref": "#/definitions/a"},
    "$dynamicRef": {"$dynamicRef": "#a"},
    "$recursiveRef": {"type": "array", "items": {"$recursiveRef": "#"}},
    "additionalItems": {"type": "array", "additionalItems": False},
    "dependencies": {"type": "object", "dependencies": {"a": ["b"]}},
    "oneOf": {"oneOf": [{"type": "integer", "minimum": 0, "maximum": 5}, {"type": "number"}]},
}  # fmt: skip
CAT = {
    "type": "object",
    "properties": {"kind": {"const": "cat"}, "lives": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["kind", "lives"],
    "additionalProperties": False,
}
DOG = {
    "type": "object",
    "properties": {"kind": {"const": "dog"}, "good": {"type": "boolean"}},
    "required": ["kind", "good"],
    "additionalProperties": False,
}
ARGUMENTS = {
    "type": "object",
    "properties": {
        "speed": {"type": "integer", "minimum": 0, "maximum": 3},
        "mode": {"enum": ["eco", "turbo"]},
        "note": {"anyOf": [WORD, {"type": "null"}]},
    },
    "required": ["speed", "mode", "note"],
    "additionalProperties": False,
}
TEXT = {
    "type": "object",
    "properties": {"text": {"type": "string", "minLength": 20, "maxLength": 60}},
    "required": ["text"],
    "additionalProperties": False,
}
NODE = {
    "type": "object",
    "properties": {
        "v": {"type": "integer", "minimum": 0, "maximum": 9},
        "next": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]},
    },
    "required": ["v", "next"],
    "additionalProperties": False,
}
#: What programs really send, and what has broken engines: with text inside, beside numbers, in unions and depths.
REAL: dict[str, dict[str, Any]] = {
    "a union that names its kind": {
        "$defs": {"Cat": CAT, "Dog": DOG},
        "discriminator": {"propertyName": "kind"},
        "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
    },
    "the arguments of a tool": ARGUMENTS,
    "text with every character": TEXT,
    "numbers of a range": {
        "type": "array",
        "items": {"type": "number", "minimum": -1, "maximum": 1},
        "minItems": 2,
        "maxItems": 3,
    },
    "a tree": {"$defs": {"n": NODE}, "$ref": "#/$defs/n"},
    "a list that holds itself, as zod writes it": json.loads(json.dumps(NODE).replace("#/$defs/n", "#")),
    "calls of tools whose arguments hold themselves": calls_schema(
        [{"name": "one", "parameters": {"$defs": {"n": NODE}, "$ref": "#/$defs/n"}},
         {"name": "other", "parameters": json.loads(json.dumps(NODE).replace("#/$defs/n", "#"))}], several=False,
    ),
    "remarks, and words of other tools": {
        "title": "T", "description": "D", "type": "boolean", "default": True, "examples": [True], "x-order": 3,
    },
}  # fmt: skip


#: A random model does not come to the end of it where there is room for any white space: that it compiles is shown.
ENDLESS = {"calls of tools whose arguments hold themselves"}


async def answered(run: Run, schema: dict[str, Any], seed: int) -> tuple[str, DoneEvent]:
    guidance = Guidance(GuidanceKind.JSON_SCHEMA, json.dumps(schema))
    text, done, _ = await run.generate("JSON", max_tokens=250, temperature=1.0, seed=seed, guidance=guidance)
    return text, done


async def holds(run: Run, schema: dict[str, Any], name: str) -> None:
    finished = 0
    for seed in range(4):
        text, done = await answered(run, schema, seed)
        assert done.reason in (FinishReason.STOP, FinishReason.LENGTH), (done, text)
        if done.reason is FinishReason.STOP:
            finished += 1
            jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())
    endless = run.runtime == "openvino_genai" and name in ENDLESS
    assert finished or endless, f"no answer to {name} came to its end: nothing was shown"


@pytest.mark.parametrize("keyword", SCHEMAS)
async def test_each_keyword_is_enforced_or_refused_by_name(run: Run, keyword: str) -> None:
    if not run.guides():
        pytest.skip(f"{run.runtime} has no guidance here")
    if keyword in ENFORCED[run.runtime]:
        await holds(run, SCHEMAS[keyword], keyword)
        return
    with pytest.raises(InferenceError, match=keyword.replace("$", r"\$")) as caught:
        await answered(run, SCHEMAS[keyword], 0)
    assert caught.value.kind in ("invalid", "unsupported")


async def test_no_keyword_is_left_out() -> None:
    """Those aside that only stand beside others."""
    beside = {"then", "else", "minContains", "maxContains", "$defs"}
    assert set(SCHEMAS) >= CONSTRAINING - beside


@pytest.mark.parametrize("name", REAL)
async def test_what_programs_send_is_kept_to(run: Run, name: str) -> None:
    if not run.guides():
        pytest.skip("no guidance here")
    await holds(run, REAL[name], name)


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}, "x-guidance"),
        # The same name twice would make up the number.
        ({"type": "object", "patternProperties": {"^a$": {"type": "null"}}, "minProperties": 2}, "Properties"),
        ({"oneOf": [{"type": "string"}, {"enum": ["a", 1]}]}, "oneOf"),
        ({"type": "string", "format": "colour"}, "format"),
    ],
)
async def test_what_cannot_be_kept_is_refused_by_name(run: Run, schema: dict[str, Any], named: str) -> None:
    if not run.guides():
        pytest.skip("no guidance here")
    with pytest.raises(InferenceError, match=named):
        await answered(run, schema, 0)
