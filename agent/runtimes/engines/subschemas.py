"""Schemas inside of schemas; and ``oneOf`` as ``anyOf``, where that is the same. Pure.

``oneOf`` whose branches exclude each other is ``anyOf``, which every grammar engine has.
Unions that name their kind in a field, as pydantic and OpenAPI write them, are of this sort. A ``oneOf`` of which two
branches may fit at once is left, for the engine to refuse.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any

_ONE = ("additionalProperties", "contains", "else", "if", "items", "not", "propertyNames", "then")
_MANY = ("allOf", "anyOf", "oneOf", "prefixItems")
_NAMED = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")
_DEPTH = 8


def mapped(schema: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """Return the schema with ``change`` made to it and to every schema inside, the innermost first."""
    if not isinstance(schema, Mapping):
        return schema
    out: dict[str, Any] = {}
    for name, value in schema.items():
        if name in _ONE:
            out[name] = mapped(value, change)
        elif name in _MANY and isinstance(value, list):
            out[name] = [mapped(one, change) for one in value]
        elif name in _NAMED and isinstance(value, Mapping):
            out[name] = {key: mapped(one, change) for key, one in value.items()}
        else:
            out[name] = value
    return change(out)


def without_exclusive_one_of(schema: Any) -> Any:
    """Return the schema with each ``oneOf`` as ``anyOf`` where its branches exclude each other."""

    def as_any_of(one: dict[str, Any]) -> dict[str, Any]:
        branches = one.get("oneOf")
        if not isinstance(branches, list) or "anyOf" in one or not _exclusive(branches, schema):
            return one
        return {("anyOf" if name == "oneOf" else name): value for name, value in one.items()}

    return mapped(schema, as_any_of)


def _exclusive(branches: list[Any], root: Any) -> bool:
    return all(_disjoint(one, other, root, _DEPTH) for one, other in itertools.combinations(branches, 2))


def _disjoint(one: Any, other: Any, root: Any, depth: int) -> bool:
    """Return whether plainly no value fits both."""
    one, other = _resolved(one, root), _resolved(other, root)
    if depth == 0 or not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return False
    types, values = (_types(one), _types(other)), (_values(one), _values(other))
    if types[0] and types[1] and not types[0] & types[1]:
        return True
    if values[0] is not None and values[1] is not None:
        return not values[0] & values[1]
    if types != ({"object"}, {"object"}):
        return False
    shared = set(one.get("required", [])) & set(other.get("required", []))
    fields = one.get("properties", {}), other.get("properties", {})
    return any(
        name in fields[0] and name in fields[1] and _disjoint(fields[0][name], fields[1][name], root, depth - 1)
        for name in shared
    )


def _resolved(schema: Any, root: Any) -> Any:
    for _ in range(_DEPTH):
        reference = schema.get("$ref") if isinstance(schema, Mapping) else None
        if not isinstance(reference, str):
            return schema
        group, _, name = reference.removeprefix("#/").partition("/")
        definitions = root.get(group) if reference.startswith("#/") and isinstance(root, Mapping) else None
        schema = definitions.get(name) if isinstance(definitions, Mapping) else None
    return None


def _types(schema: Mapping[str, Any]) -> set[str]:
    kinds = schema.get("type", [])
    names = {kind for kind in (kinds if isinstance(kinds, list) else [kinds]) if isinstance(kind, str)}
    return {"number" if name == "integer" else name for name in names}


def _values(schema: Mapping[str, Any]) -> set[str] | None:
    if "const" in schema:
        return {_key(schema["const"])}
    return {_key(value) for value in schema["enum"]} if isinstance(schema.get("enum"), list) else None


def _key(value: Any) -> str:
    # 1 and 1.0 are one value; true is another.
    plain = float(value) if isinstance(value, int) and not isinstance(value, bool) else value
    return json.dumps(plain, sort_keys=True)
