"""Whether something is a JSON schema that constrained decoding can work with: checked before a worker sees it. Pure.

Draft 2020-12's keywords where they hold schemas; only local references, bounded depth and size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from agent.core.subschemas import MANY, NAMED, ONE, at
from agent.endpoint.openai.errors import invalid

MAX_DEPTH = 32
MAX_NODES = 4096

_TYPES = frozenset({"object", "array", "string", "number", "integer", "boolean", "null"})
_COUNTS = ("maxItems", "maxLength", "maxProperties", "minItems", "minLength", "minProperties")
_NUMBERS = ("exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum", "multipleOf")


def check_schema(schema: Any, where: str) -> None:
    """Nothing, if ``schema`` is one.

    Raises:
        ApiError: 400, naming the place, e.g. ``response_format.json_schema.schema.properties.age.type``.
    """
    _Check(schema, where).run()


class _Check:
    def __init__(self, root: Any, where: str) -> None:
        self.root = root
        self.where = where
        self.nodes = 0
        self.places: dict[str, str] = {}

    def run(self) -> None:
        try:
            json.dumps(self.root, allow_nan=False)
        except ValueError:
            raise invalid(f"{self.where} holds a number that JSON does not have", self.where) from None
        self._schema(self.root, self.where, 0)
        checked: set[str] = set()
        while unchecked := self.places.keys() - checked:
            for reference in unchecked:
                checked.add(reference)
                self._schema(self._resolve(reference), f"{self.where}.{reference}"[:200], 0)

    def _schema(self, schema: Any, where: str, depth: int) -> None:
        self.nodes += 1
        if depth > MAX_DEPTH or self.nodes > MAX_NODES:
            raise invalid(f"the schema is too large: at most {MAX_DEPTH} levels and {MAX_NODES} subschemas", self.where)
        if isinstance(schema, bool):
            return
        if not isinstance(schema, Mapping):
            raise invalid(f"{where} is no JSON schema: expected an object or a boolean", where)
        _keywords(schema, where)
        if "$ref" in schema:
            self._reference(schema["$ref"], f"{where}.$ref")
        for below, name in _children(schema, where):
            self._schema(below, name, depth + 1)

    def _reference(self, reference: Any, where: str) -> None:
        if not isinstance(reference, str) or not reference.startswith("#"):
            raise invalid(f"{where} must be a local reference like '#/$defs/name'", where)
        # Where it leads is looked at once, and later: a schema may hold itself.
        if reference != "#":
            self.places.setdefault(reference, where)

    def _resolve(self, reference: str) -> Any:
        try:
            return at(self.root, reference)
        except KeyError:
            where = self.places[reference]
            raise invalid(f"{where}: {reference[:128]!r} is not in the schema", where) from None


def _keywords(schema: Mapping[str, Any], where: str) -> None:
    kinds = schema.get("type", [])
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if not isinstance(kind, str) or kind not in _TYPES:
            raise invalid(f"{where}.type: {str(kind)[:64]!r} is none of {', '.join(sorted(_TYPES))}", f"{where}.type")
    if "enum" in schema and not (isinstance(schema["enum"], list) and schema["enum"]):
        raise invalid(f"{where}.enum must be a list with something in it", f"{where}.enum")
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise invalid(f"{where}.required must be a list of property names", f"{where}.required")
    if not isinstance(schema.get("pattern", ""), str):
        raise invalid(f"{where}.pattern must be a string", f"{where}.pattern")
    for name in (*_COUNTS, *_NUMBERS):
        value = schema.get(name, 0)
        whole = isinstance(value, int) and value >= 0
        if isinstance(value, bool) or not (whole if name in _COUNTS else isinstance(value, int | float)):
            raise invalid(f"{where}.{name} must be a number", f"{where}.{name}")


def _children(schema: Mapping[str, Any], where: str) -> Iterator[tuple[Any, str]]:
    for name in ONE:
        if name in schema:
            yield schema[name], f"{where}.{name}"
    for name in MANY:
        if name in schema:
            listed = schema[name]
            if not isinstance(listed, list) or not listed:
                raise invalid(f"{where}.{name} must be a list of schemas", f"{where}.{name}")
            for index, below in enumerate(listed):
                yield below, f"{where}.{name}[{index}]"
    for name in NAMED:
        if name in schema:
            if not isinstance(schema[name], Mapping):
                raise invalid(f"{where}.{name} must be an object of schemas", f"{where}.{name}")
            for key, below in schema[name].items():
                yield below, f"{where}.{name}.{key[:64]}"
