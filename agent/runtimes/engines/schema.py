"""Which JSON schemas may go to a runtime's grammar engine: each keyword is enforced, or refused by name.

``read`` refuses what no engine should see. llguidance refuses by itself what it does not enforce (``LLGUIDANCE``).
``vet`` is for an engine that does not survive a schema it cannot compile: only what is known to compile passes
(``XGRAMMAR``). Keywords that JSON Schema says are remarks (``title``, or unknown ones) constrain nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from agent.core.inference import GuidanceKind, InferenceError
from agent.core.subschemas import mapped, with_definitions, without_exclusive_one_of

_TYPES = frozenset({"object", "array", "string", "number", "integer", "boolean", "null"})
_OF_OLDER_DRAFTS = frozenset({"additionalItems", "dependencies", "$recursiveRef"})
#: What else JSON Schema (draft 2020-12, and what came before it) has that says what fits; the rest are remarks.
_CONSTRAIN = frozenset(
    {
        *("allOf", "oneOf", "not", "if", "then", "else", "dependentSchemas", "dependentRequired", "dependencies"),
        *("prefixItems", "contains", "minContains", "maxContains", "uniqueItems", "additionalItems"),
        *("unevaluatedItems", "unevaluatedProperties", "patternProperties", "propertyNames"),
        *("minProperties", "maxProperties", "pattern", "format", "multipleOf"),
        *("exclusiveMinimum", "exclusiveMaximum", "$dynamicRef", "$recursiveRef"),
    }
)
_MAX_DEPTH, _MAX_NODES = 32, 2000
#: Options of llguidance inside of a schema; one of them makes it ignore keywords that it does not know.
_ENGINES_OWN = "x-guidance"


def text_of(kind: GuidanceKind, data: str) -> str:
    """Return the schema that guidance by JSON stands for; guidance of another kind is left as it is."""
    return '{"type":"object"}' if kind is GuidanceKind.JSON_OBJECT else data


def read(text: str) -> Any:
    """Return the schema in a text, as engines are given it.

    Raises:
        InferenceError: it is no JSON object or boolean, has a definition that is nothing but itself, or speaks to the
            engine and not about the answer.
    """
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _refusal("the schema", f"is no JSON: {error}") from None
    if not isinstance(schema, dict | bool):
        raise _refusal("the schema", "must be an object")
    if isinstance(schema, dict) and _ENGINES_OWN in schema:
        raise _refusal("the schema", f"holds {_ENGINES_OWN!r}, which could lift what it demands")
    if isinstance(schema, dict):
        try:
            schema = with_definitions(schema)
        except ValueError as error:
            raise _refusal("the schema", str(error)) from None
    _no_empty_circle(schema)
    return mapped(without_exclusive_one_of(schema), _checked)


def vet(text: str) -> str:
    """Check a schema against what is known to compile; returns its text, as the engine is given it.

    Raises:
        InferenceError: ``unsupported``, naming the place and the keyword.
    """
    schema = read(text)
    _Vetting(schema).schema(schema, "the schema", 0)
    # Remarks go: not every engine knows that they are none of its business.
    return json.dumps(mapped(schema, lambda one: {name: value for name, value in one.items() if name in _KEYWORDS}))


def _refusal(where: str, why: str) -> InferenceError:
    return InferenceError("unsupported", f"{where} {why}", param="response_format")


class _Vetting:
    def __init__(self, root: Any) -> None:
        definitions = root.get("$defs", root.get("definitions", {})) if isinstance(root, dict) else {}
        self._names = set(definitions) if isinstance(definitions, dict) else set()
        self._nodes = 0

    def schema(self, schema: Any, where: str, depth: int) -> None:
        self._nodes += 1
        if depth > _MAX_DEPTH or self._nodes > _MAX_NODES:
            raise _refusal(where, f"is too deep or too large: at most {_MAX_DEPTH} levels and {_MAX_NODES} parts")
        if schema is True:
            return
        if not isinstance(schema, dict):
            raise _refusal(where, f"must be an object, not {schema!r}"[:200])
        for keyword, value in schema.items():
            check = _KEYWORDS.get(keyword)
            if check is not None:
                check(self, value, f"{where}, {keyword}", depth + 1)
            elif keyword in _CONSTRAIN:
                raise _refusal(where, f"uses {keyword!r}, which the runtime that is loaded does not have")
        _ranges(schema, where)

    def types(self, value: Any, where: str, _depth: int) -> None:
        names = value if isinstance(value, list) else [value]
        if not names or any(not isinstance(name, str) or name not in _TYPES for name in names):
            raise _refusal(where, f"must be one of {', '.join(sorted(_TYPES))}, or a list of them")

    def properties(self, value: Any, where: str, depth: int) -> None:
        if not isinstance(value, dict):
            raise _refusal(where, "must be an object")
        for name, schema in value.items():
            self.schema(schema, f"{where}.{name}"[:200], depth)

    def required(self, value: Any, where: str, _depth: int) -> None:
        if not isinstance(value, list) or any(not isinstance(name, str) for name in value):
            raise _refusal(where, "must be a list of names")

    def additional(self, value: Any, where: str, depth: int) -> None:
        if not isinstance(value, bool):
            self.schema(value, where, depth)

    def several(self, value: Any, where: str, depth: int) -> None:
        if not isinstance(value, list) or not value:
            raise _refusal(where, "must be a list of schemas")
        for number, schema in enumerate(value):
            self.schema(schema, f"{where}[{number}]", depth)

    def values(self, value: Any, where: str, _depth: int) -> None:
        if not isinstance(value, list) or not value:
            raise _refusal(where, "must be a list of values")

    def anything(self, _value: Any, _where: str, _depth: int) -> None:
        return

    def reference(self, value: Any, where: str, _depth: int) -> None:
        kinds = ("#/$defs/", "#/definitions/")
        name = next(
            (value.removeprefix(kind) for kind in kinds if isinstance(value, str) and value.startswith(kind)), ""
        )
        if name not in self._names:
            raise _refusal(where, f"{value!r} names no definition of this schema"[:200])

    def count(self, value: Any, where: str, _depth: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 10_000:
            raise _refusal(where, "must be a whole number from 0 to 10000")

    def bound(self, value: Any, where: str, _depth: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 2**53:
            raise _refusal(where, "must be a number below 2 to the power of 53")


def _checked(schema: dict[str, Any]) -> dict[str, Any]:
    """Refuse what would be passed over: keywords of older drafts, and a count that a name which comes twice makes up.

    No grammar can tell that a name came before.
    """
    for keyword in _OF_OLDER_DRAFTS & schema.keys():
        raise _refusal("the schema", f"uses {keyword!r}, which draft 2020-12 has no more")
    required = schema.get("required", [])
    least = schema.get("minProperties", 0)
    if isinstance(least, int) and isinstance(required, list) and least > len(set(map(str, required))):
        raise _refusal("the schema", "has 'minProperties' above the number of properties that it requires by name")
    return schema


def _no_empty_circle(root: Any) -> None:
    """A definition that leads back to itself with nothing in between describes nothing, and never ends."""
    definitions = {
        f"#/{group}/{name}": body
        for group in ("$defs", "definitions")
        if isinstance(root, dict) and isinstance(root.get(group), dict)
        for name, body in root[group].items()
    }
    for name, schema in definitions.items():
        seen: set[str] = set()
        ahead = _direct(schema)
        while ahead:
            step = ahead.pop()
            if step == name:
                raise _refusal(f"the definition {name}"[:200], "refers to itself with nothing in between")
            if step not in seen:
                seen.add(step)
                ahead.extend(_direct(definitions.get(step)))


def _direct(schema: Any) -> list[str]:
    """References that are reached without a value in between."""
    if not isinstance(schema, dict):
        return []
    own = [schema["$ref"]] if isinstance(schema.get("$ref"), str) else []
    several = [schema[name] for name in ("allOf", "anyOf", "oneOf") if isinstance(schema.get(name), list)]
    return own + [name for parts in several for part in parts for name in _direct(part)]


def _ranges(schema: Mapping[str, Any], where: str) -> None:
    for low, high in (("minItems", "maxItems"), ("minLength", "maxLength"), ("minimum", "maximum")):
        if low in schema and high in schema and schema[low] > schema[high]:
            raise _refusal(where, f"has {low} above {high}: nothing fits it")


_Check = Callable[[_Vetting, Any, str, int], None]
_KEYWORDS: Mapping[str, _Check] = {
    "type": _Vetting.types,
    "properties": _Vetting.properties,
    "$defs": _Vetting.properties,
    "definitions": _Vetting.properties,
    "required": _Vetting.required,
    "additionalProperties": _Vetting.additional,
    "items": _Vetting.schema,
    "anyOf": _Vetting.several,
    "enum": _Vetting.values,
    "const": _Vetting.anything,
    "$ref": _Vetting.reference,
    "minItems": _Vetting.count,
    "maxItems": _Vetting.count,
    "minLength": _Vetting.count,
    "maxLength": _Vetting.count,
    "minimum": _Vetting.bound,
    "maximum": _Vetting.bound,
}

#: Keywords that constrain, and that each engine enforces; every other one that constrains is refused by name.
XGRAMMAR = frozenset(_KEYWORDS)
LLGUIDANCE = XGRAMMAR | {
    "allOf",
    "exclusiveMaximum",
    "exclusiveMinimum",
    "format",
    "maxProperties",
    "minProperties",
    "multipleOf",
    "pattern",
    "patternProperties",
    "prefixItems",
}
#: By runtime. ``oneOf`` is taken by all where its branches exclude each other.
ENFORCED: Mapping[str, frozenset[str]] = {
    "onnx_genai": LLGUIDANCE,
    "openvino_genai": XGRAMMAR,
    "llamacpp": LLGUIDANCE,
    "mlx": LLGUIDANCE,
    "onnx_qnn": LLGUIDANCE,
}
#: Every keyword that constrains.
CONSTRAINING = _CONSTRAIN | XGRAMMAR
