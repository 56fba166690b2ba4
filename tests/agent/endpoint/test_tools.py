from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.endpoint.openai.tools import CallDelta, TextDelta, ToolParser

NAMES = frozenset({"f", "g"})
Read = tuple[str, dict[int, tuple[str, str]]]


def read(text: str, cuts: list[int] | int = 10_000, **options: Any) -> Read:
    """Text and calls, fed in pieces."""
    parser = ToolParser(NAMES, **options)
    ends = list(range(cuts, len(text), cuts)) if isinstance(cuts, int) else sorted(cuts)
    deltas = []
    for start, end in zip([0, *ends], [*ends, len(text)], strict=True):
        deltas += parser.feed(text[start:end])
    deltas += parser.finish()
    words = "".join(delta.text for delta in deltas if isinstance(delta, TextDelta))
    calls: dict[int, tuple[str, str]] = {}
    for delta in deltas:
        if isinstance(delta, CallDelta):
            name, arguments = calls.get(delta.index, ("", ""))
            assert (delta.name is None) == (delta.index in calls), "a name comes first, and once"
            calls[delta.index] = (delta.name or name, arguments + delta.arguments)
    return words, calls


READINGS: list[tuple[str, Read]] = [
    ('<|tool_call|>[{"name": "f", "arguments": {"a": [1, "]}"]}}]<|/tool_call|>', ("", {0: ("f", '{"a": [1, "]}"]}')})),
    ('[{"name":"f","arguments":{}},{"name":"g","arguments":{"x":1}}]', ("", {0: ("f", "{}"), 1: ("g", '{"x":1}')})),
    ('functools[{"name": "g", "arguments": {"x": 1}}]', ("", {0: ("g", '{"x": 1}')})),
    ('{"name": "f", "parameters": {"q": "ł\\n"}}', ("", {0: ("f", '{"q": "ł\\n"}')})),
    (
        'Sure.\n<|tool_call|>{"arguments": "{\\"x\\": 1}", "name": "f"}<|/tool_call|> Done.',
        ("Sure.\nDone.", {0: ("f", '{"x": 1}')}),
    ),
    ('[{"type":"function","function":{"name":"f","arguments":{"b":null}}}]', ("", {0: ("f", '{"b":null}')})),
    ('<|tool_call|>[{"name":"f"}]<|/tool_call|><|tool_call|>[{"name":"g"}]', ("", {0: ("f", "{}"), 1: ("g", "{}")})),
    ('<|tool_call|>[{"name":"unknown","arguments":{}}]', ("", {0: ("unknown", "{}")})),
    ("use functools.partial for this", ("use functools.partial for this", {})),
    ("[1, 2, 3] are numbers", ("[1, 2, 3] are numbers", {})),
    ('{"name": "other", "arguments": {}} is JSON', ('{"name": "other", "arguments": {}} is JSON', {})),
    ("a <|tool_", ("a <|tool_", {})),
    ("  \n plain", ("  \n plain", {})),
    ('[1] then <|tool_call|>[{"name":"f"}]', ("[1] then ", {0: ("f", "{}")})),
    ('[{"name":"f","arguments":{"cut": "of', ("", {0: ("f", '{"cut": "of')})),
    ('<|tool_call|>[{"na', ('<|tool_call|>[{"na', {})),
    ('[{"name":"f","arguments":{}} trailing', ("trailing", {0: ("f", "{}")})),
    ("", ("", {})),
]


@pytest.mark.parametrize("step", [1, 2, 3, 5, 10_000])
@pytest.mark.parametrize(("text", "expected"), READINGS)
def test_reads(text: str, expected: Read, step: int):
    assert read(text, step) == expected


def test_one_call_only_where_they_may_not_be_parallel():
    text = '[{"name":"f","arguments":{}},{"name":"g","arguments":{"x":1}}]'
    assert read(text, 4, limit=1) == ("", {0: ("f", "{}")})


MARKS = ["<|tool_call|>", "<|/tool_call|>", "functools", "<|", "word", " ", "\n"]
SYMBOLS = ["[", "]", "{", "}", ",", ":", '"', "\\", "1", "null"]
PARTS = ['"name"', '"arguments"', '"f"', '{"name":"f","arguments":{}}', '"function"', '{"a":[1]}']
SOUP = st.lists(st.sampled_from(MARKS + SYMBOLS + PARTS), max_size=20).map("".join)


@given(SOUP, st.data())
def test_how_it_is_cut_changes_nothing(text: str, data: st.DataObject):
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    assert read(text, cuts) == read(text)


@given(st.text())
def test_what_is_no_call_is_the_same_text(text: str):
    words, calls = read(text, 3)
    if not calls and "<|" not in text and "functools" not in text:
        assert words == text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=4), below, max_size=3),
    max_leaves=8,
)
CALLS = st.lists(
    st.tuples(st.sampled_from(sorted(NAMES)), st.dictionaries(st.text(max_size=4), JSON, max_size=3)), min_size=1
)


@given(CALLS, st.integers(1, 9), st.sampled_from([None, 2]), st.sampled_from(["", "<|tool_call|>", "functools"]))
def test_every_list_of_calls_comes_back(calls: list[Any], step: int, indent: int | None, mark: str):
    written = json.dumps([{"name": name, "arguments": arguments} for name, arguments in calls], indent=indent)
    words, found = read(mark + written, step)
    assert words == ""
    assert [(name, json.loads(arguments)) for name, arguments in found.values()] == calls
