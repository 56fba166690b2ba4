"""How JSON may be laid out: as programs lay it out, and without room to fill an answer with white space."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agent.core.inference import Guidance, GuidanceKind
from agent.runtimes.engines.guidance import Guides, from_file
from tests.models import sample_checkpoint

llguidance = pytest.importorskip("llguidance", reason="needs llguidance")

VALUE = {"a": 1, "b": ["x", "y"], "c": {"d": [{"e": True}]}}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "a": {"type": "integer"},
        "b": {"type": "array", "items": {"type": "string"}},
        "c": {"type": "object", "properties": {"d": {"type": "array"}}, "required": ["d"]},
    },
    "required": ["a", "b", "c"],
    "additionalProperties": False,
}
COMPACT = json.dumps(VALUE, separators=(",", ":"))


@pytest.fixture(scope="module")
def tokenizer() -> Path:
    return sample_checkpoint() / "tokenizer.json"


def allows(tokenizer: Path, guidance: Guidance, text: str) -> bool:
    make = from_file(tokenizer, 49152, frozenset({2}))
    assert make is not None
    read = make()
    guide = Guides(lambda: read).guide(guidance)
    return all(guide._accepts(token) for token in read.tokenize_str(text)) and guide._matcher.is_accepting()


GUIDANCE = {
    "json_schema": Guidance(GuidanceKind.JSON_SCHEMA, json.dumps(SCHEMA)),
    "json_object": Guidance(GuidanceKind.JSON_OBJECT, ""),
}


@pytest.mark.parametrize("kind", GUIDANCE)
@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        (COMPACT, True),
        (json.dumps(VALUE), True),
        *((json.dumps(VALUE, indent=spaces), True) for spaces in (1, 2, 4)),
        (COMPACT.replace("{", "{\n\n", 1), False),
        (COMPACT.replace(":", ":  ", 1), False),
        (COMPACT.replace(",", " \n,", 1), False),
        (COMPACT.replace(",", ",\n" + 25 * " ", 1), False),
        (COMPACT + "\n\n", False),
    ],
)
def test_json_is_laid_out_as_programs_do_it(tokenizer: Path, kind: str, text: str, allowed: bool) -> None:
    assert allows(tokenizer, GUIDANCE[kind], text) is allowed
