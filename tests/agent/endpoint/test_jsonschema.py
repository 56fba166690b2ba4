from __future__ import annotations

from typing import Any

import pytest

from agent.endpoint.openai.errors import ApiError
from agent.endpoint.openai.jsonschema import check_schema, inlined


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
    ({"$ref": "#"}, "refers to itself"),
    ({"properties": {"next": {"$ref": "#/$defs/n"}}, "$defs": {"n": {"items": {"$ref": "#/$defs/n"}}}}, "itself"),
    (nested(200), "too large"),
    (laughs(30), "too large"),
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
    ],
)
def test_taken(schema: Any):
    check_schema(schema, "s")


def test_references_are_written_out():
    schema = {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/unit", "description": "of a"}, "b": {"items": {"$ref": "#/$defs/unit"}}},
        "$defs": {"unit": {"enum": ["c", "f"]}},
        "default": {"$ref": "left alone"},
    }
    assert inlined(schema) == {
        "type": "object",
        "properties": {"a": {"enum": ["c", "f"], "description": "of a"}, "b": {"items": {"enum": ["c", "f"]}}},
        "default": {"$ref": "left alone"},
    }
