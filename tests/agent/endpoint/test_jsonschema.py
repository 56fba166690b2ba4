from __future__ import annotations

from typing import Any

import jsonschema
import pytest

from agent.endpoint.openai.errors import ApiError
from agent.endpoint.openai.jsonschema import check_schema
from agent.endpoint.openai.tools import calls_schema


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


def laughs(levels: int) -> dict[str, Any]:
    """Each definition refers twice to the next: small to send, huge to unfold."""
    definitions: dict[str, Any] = {
        f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}, {"$ref": f"#/$defs/d{n + 1}"}]} for n in range(levels)
    }
    definitions[f"d{levels}"] = {"type": "null"}
    return {"$ref": "#/$defs/d0", "$defs": definitions}


BROKEN: list[tuple[Any, str]] = [
    ("text", "no JSON schema"),
    ([], "no JSON schema"),
    ({"type": "strin"}, "s.type"),
    ({"type": ["string", 3]}, "s.type"),
    ({"type": {"a": 1}}, "s.type"),
    ({"properties": ["a"]}, "s.properties"),
    ({"properties": {"a": 1}}, "s.properties.a"),
    ({"required": "a"}, "s.required"),
    ({"required": [1]}, "s.required"),
    ({"enum": []}, "s.enum"),
    ({"enum": "a"}, "s.enum"),
    ({"anyOf": []}, "s.anyOf"),
    ({"anyOf": [{"type": "bad"}]}, "s.anyOf"),
    ({"items": [{"type": "string"}]}, "s.items"),
    ({"minLength": -1}, "s.minLength"),
    ({"maximum": "9"}, "s.maximum"),
    ({"maximum": True}, "s.maximum"),
    ({"pattern": 1}, "s.pattern"),
    ({"$ref": "http://elsewhere/schema"}, "local reference"),
    ({"$ref": 1}, "local reference"),
    ({"$ref": "#/$defs/missing"}, "not in the schema"),
    ({"$ref": "#/enum/0", "enum": ["no schema"]}, "s.#/enum/0 is no JSON schema"),
    ({"$ref": "#/x-mine", "x-mine": {"type": "strin"}}, "s.#/x-mine.type"),
    (nested(200), "too large"),
    ({"properties": {f"p{n}": {} for n in range(5000)}}, "too large"),
]


@pytest.mark.parametrize(("schema", "says"), BROKEN, ids=[str(number) for number in range(len(BROKEN))])
def test_refused(schema: Any, says: str):
    with pytest.raises(ApiError) as caught:
        check_schema(schema, "s")
    assert caught.value.status == 400
    assert caught.value.param
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "schema",
    [
        {},
        True,
        {"type": "object", "properties": {"a": {"type": ["string", "null"]}}, "required": ["a"]},
        {"$ref": "#/$defs/a", "$defs": {"a": {"enum": [1, None]}}},
        {"properties": {"$ref": {"type": "string"}, "type": {"type": "string"}}},
        {"type": "object", "additionalProperties": False, "minProperties": 1},
        nested(20),
        laughs(30),
        {"$ref": "#"},
        {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}},
        {"properties": {"next": {"$ref": "#/$defs/n"}}, "$defs": {"n": {"items": {"$ref": "#/$defs/n"}}}},
        {"anyOf": [{"type": "null"}, {"items": {"$ref": "#/anyOf/0"}}]},
        {"$defs": {f"d{n}": {"items": {"$ref": f"#/$defs/d{n + 1}"}} for n in range(900)} | {"d900": True}},
    ],
)
def test_taken(schema: Any):
    check_schema(schema, "s")


def test_the_schemas_of_several_tools_stand_in_one_whatever_they_refer_to():
    """Each with definitions of the same names, with one that refers to the whole, and with names that need escapes."""
    unit = {"unit": {"$ref": "#/$defs/a~1b"}}
    tools = [
        {"name": "c", "parameters": {"type": "object", "properties": unit, "$defs": {"a/b": {"enum": ["c", "f"]}}}},
        {"name": "k", "parameters": {"type": "object", "properties": unit, "$defs": {"a/b": {"enum": ["k"]}}}},
        {"name": "old", "parameters": {"$ref": "#/definitions/x", "$defs": {"x": False},
                                       "definitions": {"x": {"properties": {"n": {"type": "integer"}}}}}},
        {"name": "tree", "parameters": {"type": "object", "properties": {"below": {"items": {"$ref": "#"}}}}},
        {"name": "free", "parameters": None},
    ]  # fmt: skip
    schema = calls_schema(tools, several=False)
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema)

    def fits(name: str, arguments: dict[str, Any]) -> bool:
        return check.is_valid([{"name": name, "arguments": arguments}])

    assert fits("c", {"unit": "f"}) and fits("k", {"unit": "k"}) and not fits("c", {"unit": "k"})
    assert fits("old", {"n": 1}) and not fits("old", {"n": "x"})
    assert fits("tree", {"below": [{"below": []}]}) and not fits("tree", {"below": [{"below": [1]}]})
    assert fits("free", {"any": "thing"}) and not fits("none", {})


def test_a_tool_that_refers_to_too_many_places_is_refused_by_name():
    places = {f"p{number}": {"$ref": f"#/properties/p{number + 1}"} for number in range(40)}
    with pytest.raises(ValueError, match="refers to more than 32 places"):
        calls_schema([{"name": "x", "parameters": {"properties": places | {"p40": True}}}], several=False)
