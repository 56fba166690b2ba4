"""Schemas inside of schemas; references into a schema, and ``oneOf`` as ``anyOf``, where that is the same. Pure.

``oneOf`` whose branches exclude each other is ``anyOf``, which every grammar engine has.
Unions that name their kind in a field, as pydantic and OpenAPI write them, are of this sort. A ``oneOf`` of which two
branches may fit at once is left, for the engine to refuse.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote

#: Keywords that hold a schema, several, and several by name.
ONE = ("additionalProperties", "contains", "else", "if", "items", "not", "propertyNames", "then")
MANY = ("allOf", "anyOf", "oneOf", "prefixItems")
NAMED = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")
_GROUPS = ("$defs", "definitions")
_DEFINITION = re.compile(r"#/(\$defs|definitions)/[^/~%]+")
_MOST_PLACES = 32
_DEPTH = 8


def mapped(schema: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """Return the schema with ``change`` made to it and to every schema inside, the innermost first."""
    if not isinstance(schema, Mapping):
        return schema
    out: dict[str, Any] = {}
    for name, value in schema.items():
        if name in ONE:
            out[name] = mapped(value, change)
        elif name in MANY and isinstance(value, list):
            out[name] = [mapped(one, change) for one in value]
        elif name in NAMED and isinstance(value, Mapping):
            out[name] = {key: mapped(one, change) for key, one in value.items()}
        else:
            out[name] = value
    return change(out)


def with_definitions(root: dict[str, Any]) -> dict[str, Any]:
    """Return the schema with each reference into itself as one to a definition, which is how all engines know them.

    ``#`` (as zod writes a schema that holds itself), JSON pointers, anchors, and these behind the schema's own ``$id``.
    What refers to nothing in the schema is left.

    Raises:
        ValueError: there are more of them than anybody writes.
    """
    references: list[str] = []
    anchors: dict[str, Any] = {}

    def note(one: dict[str, Any]) -> dict[str, Any]:
        if isinstance(one.get("$ref"), str):
            references.append(one["$ref"])
        if isinstance(one.get("$anchor"), str):
            anchors[f"#{one['$anchor']}"] = one
        return one

    mapped(root, note)
    own, taken = str(root.get("$id", "")).rstrip("#"), root.get("$defs", {})
    if not isinstance(taken, Mapping):
        return root
    names: dict[str, str] = {}
    found: dict[str, Any] = {}
    for reference in dict.fromkeys(references):
        place = reference.removeprefix(own) if own else reference
        place = place or "#"
        if _DEFINITION.fullmatch(reference):
            continue
        target = anchors.get(place)
        if target is None:
            with contextlib.suppress(KeyError):
                target = at(root, place)
        if not isinstance(target, dict):
            continue
        if len(found) == _MOST_PLACES:
            raise ValueError(f"refers to more than {_MOST_PLACES} places that are no definitions")
        name = re.sub(r"[^A-Za-z0-9]+", "-", unquote(place)).strip("-") or "whole"
        while name in taken or name in found:
            name += "-"
        names[reference] = f"#/$defs/{name}"
        found[name] = {key: value for key, value in target.items() if key not in _GROUPS} if target is root else target
    if not found:
        return root

    def rename(one: dict[str, Any]) -> dict[str, Any]:
        reference = one.get("$ref")
        return one | {"$ref": names[reference]} if isinstance(reference, str) and reference in names else one

    whole = {**root, "$defs": {**taken, **found}}
    return dict(mapped(whole, rename))


def moved(schema: dict[str, Any], prefix: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a schema that may stand inside of another, and the definitions that the other must have for it.

    The names of these begin with ``prefix``.

    Raises:
        ValueError: as ``with_definitions`` does.
    """
    whole = with_definitions(schema)
    names = {
        f"#/{group}/{name}": f"{prefix}{group.lstrip('$')}-{name}"
        for group in _GROUPS
        for name in whole.get(group) or {}
    }

    def rename(one: dict[str, Any]) -> dict[str, Any]:
        reference = one.get("$ref")
        kept = {key: value for key, value in one.items() if key not in {"$id", "$anchor"}}  # of another document now
        if isinstance(reference, str) and reference in names:
            kept["$ref"] = f"#/$defs/{names[reference]}"
        return kept

    renamed = mapped(whole, rename)
    definitions = {
        names[f"#/{group}/{name}"]: body for group in _GROUPS for name, body in (renamed.get(group) or {}).items()
    }
    return {key: value for key, value in renamed.items() if key not in _GROUPS}, definitions


def at(root: Any, place: str) -> Any:
    """Return what is at a JSON pointer in a fragment (RFC 6901).

    Raises:
        KeyError: there is nothing, or it is no pointer.
    """
    if place != "#" and not place.startswith("#/"):
        raise KeyError(place)
    here = root
    for step in place.split("/")[1:]:
        key = unquote(step).replace("~1", "/").replace("~0", "~")
        if isinstance(here, Mapping):
            here = here[key]
        elif isinstance(here, list) and key.isascii() and key.isdigit() and len(key) < 10 and int(key) < len(here):
            here = here[int(key)]
        else:
            raise KeyError(place)
    return here


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
