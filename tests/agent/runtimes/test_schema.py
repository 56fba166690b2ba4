from __future__ import annotations

import contextlib
import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.inference import InferenceError
from agent.core.subschemas import without_exclusive_one_of
from agent.runtimes.engines.schema import read, vet

GOOD = [
    "true",
    "{}",
    '{"type": ["string", "null"], "description": "x"}',
    '{"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 3}, "minItems": 1, "maxItems": 2}',
    '{"$defs": {"tree": {"type": "object", "properties": {"next": {"$ref": "#/$defs/tree"}}}}, "$ref": "#/$defs/tree"}',
    '{"anyOf": [{"const": 1}, {"enum": ["a", null]}]}',
]
BAD = {
    "{": "no JSON",
    "[]": "must be an object",
    "5": "must be an object",
    '{"type": "strin"}': "type",
    '{"properties": {"a": {"pattern": "("}}}': "properties.a uses 'pattern'",
    '{"minItems": 3, "maxItems": 2}': "nothing fits",
    '{"minLength": -1}': "whole number",
    '{"minimum": "x"}': "number",
    '{"$ref": "https://example.org/schema"}': "names no definition",
    '{"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/b"}]}, "b": {"$ref": "#/$defs/a"}}}': "refers to itself",
    '{"$ref": "#"}': "definition #/.defs/whole refers to itself with nothing in between",
    '{"anyOf": [{"$ref": "#"}, {"type": "null"}]}': "definition #/.defs/whole refers to itself",
    '{"properties": {"a": {"$ref": "#/properties/a"}}}': "definition #/.defs/properties-a refers to itself",
    '{"properties": {"a": {"$ref": "#/properties/b"}, "b": {"$ref": "#/properties/a"}}}': "refers to itself",
    '{"$defs": {"a": {"$anchor": "x", "anyOf": [{"$ref": "#x"}]}}, "$ref": "#x"}': "refers to itself",
    '{"$ref": "#/properties/none"}': "names no definition",
    '{"$ref": "#none"}': "names no definition",
    '{"anyOf": []}': "list of schemas",
    '{"required": [1]}': "list of names",
    '{"$defs": 5, "anyOf": 3}': "must be",
}


@pytest.mark.parametrize("schema", GOOD)
def test_good_ones_pass(schema: str) -> None:
    vet(schema)


@pytest.mark.parametrize("schema", list(BAD))
def test_bad_ones_are_refused_by_name(schema: str) -> None:
    with pytest.raises(InferenceError, match=BAD[schema]) as caught:
        vet(schema)
    assert caught.value.param == "response_format"


def test_depth_and_size_are_bounded() -> None:
    deep = '{"items":' * 100 + "{}" + "}" * 100
    with pytest.raises(InferenceError, match="too deep"):
        vet(deep)
    with pytest.raises(InferenceError, match=r"no JSON|too deep"):
        vet('{"items":' * 100_000 + "{}" + "}" * 100_000)
    with pytest.raises(InferenceError, match="too large"):
        vet(json.dumps({"properties": {f"p{number}": {} for number in range(3000)}}))


_words = st.sampled_from(["type", "items", "anyOf", "$ref", "$defs", "properties", "required", "enum", "minimum", "x"])
_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(["string", "#/$defs/x", "#", "#/properties/x", "#/anyOf/0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_words, inner, max_size=4),
    max_leaves=12,
)


@given(_json)
def test_anything_is_passed_or_refused(value: object) -> None:
    for check in (read, vet):
        with contextlib.suppress(InferenceError):
            check(json.dumps(value))


INTEGER = {"type": "integer"}
LIST = {"type": "object", "properties": {"v": INTEGER, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
        "required": ["v", "next"], "additionalProperties": False}  # fmt: skip
#: A schema that refers into itself otherwise than to a definition, what fits it, and what does not.
REFERRING: dict[str, tuple[dict[str, Any], list[Any], list[Any]]] = {
    "to the whole": (LIST, [{"v": 1, "next": {"v": 2, "next": None}}], [{"v": 1, "next": {"v": "x", "next": None}}]),
    "to a place": (
        {"type": "object", "properties": {"a": INTEGER, "b": {"$ref": "#/properties/a"}}},
        [{"a": 1, "b": 2}], [{"b": "x"}],
    ),
    "to one of several": (
        {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#/anyOf/0"}}]}, [None, [None]], [[1], 1],
    ),
    "to a name with other characters": (
        {"$defs": {"a/b c~%": INTEGER}, "items": {"$ref": "#/$defs/a~1b%20c~0%25"}, "type": "array"}, [[1]], [["x"]],
    ),
    "by an anchor": ({"$defs": {"n": {"$anchor": "n", **INTEGER}}, "$ref": "#n"}, [1], ["x"]),
    "by its own address": (
        {"$id": "https://e.example/list", **json.loads(json.dumps(LIST).replace('"#"', '"https://e.example/list#"'))},
        [{"v": 1, "next": {"v": 2, "next": None}}], [{"v": 1, "next": {"v": 2}}],
    ),
    "to names that are taken": (
        {"$defs": {"whole": {"type": "string"}}, "type": "array",
         "items": {"anyOf": [{"$ref": "#"}, {"$ref": "#/$defs/whole"}]}},
        [["x", ["y"]]], [[1]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFERRING)
def test_what_refers_into_itself_means_the_same_to_every_engine(name: str) -> None:
    schema, fits, others = REFERRING[name]
    before = json.dumps(schema)
    given = json.loads(vet(before))
    assert json.dumps(schema) == before
    for one in (schema, given):
        check = jsonschema.Draft202012Validator(one)
        assert [check.is_valid(value) for value in fits] == [True] * len(fits)
        assert [check.is_valid(value) for value in others] == [False] * len(others)


def test_places_are_bounded() -> None:
    many = {f"p{number}": {"$ref": f"#/properties/p{number + 1}"} for number in range(40)}
    with pytest.raises(InferenceError, match="refers to more than 32 places"):
        read(json.dumps({"properties": many | {"p40": INTEGER}}))


def tagged(kind: str) -> dict[str, object]:
    return {"type": "object", "properties": {"kind": {"const": kind}}, "required": ["kind"]}


@pytest.mark.parametrize(
    ("branches", "exclusive"),
    [
        ([{"type": "string"}, {"type": "null"}], True),
        ([{"type": "integer"}, {"type": "number"}], False),
        ([{"type": ["integer", "null"]}, {"type": "string"}], True),
        ([{"const": 1}, {"const": True}], True),
        ([{"const": 1}, {"const": 1.0}], False),
        ([{"enum": ["a", "b"]}, {"enum": ["b", "c"]}], False),
        ([tagged("cat"), tagged("dog")], True),
        ([tagged("cat"), tagged("dog"), tagged("cat")], False),
        ([tagged("cat"), {**tagged("dog"), "required": []}], False),
        ([{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}], True),
        ([{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/none"}], False),
        ([{"$ref": "#/$defs/loop"}, {"type": "null"}], False),
        ([True, {"type": "null"}], False),
        ([{"type": "object"}], True),
    ],
)
def test_one_of_becomes_any_of_only_where_no_value_fits_two_branches(branches: list[object], exclusive: bool) -> None:
    loop = {"$ref": "#/$defs/other"}
    definitions = {"cat": tagged("cat"), "dog": tagged("dog"), "loop": loop, "other": {"$ref": "#/$defs/loop"}}
    schema = {"$defs": definitions, "type": "array", "items": {"oneOf": branches}}
    before = json.dumps(schema)
    changed = without_exclusive_one_of(schema)
    assert set(changed["items"]) == {"anyOf" if exclusive else "oneOf"}
    assert json.dumps(schema) == before
    assert changed["$defs"] == definitions
