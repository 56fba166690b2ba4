"""Phi-4-mini's way of calling functions, parsed back into OpenAI's ``tool_calls``, while it is being written. Pure.

The model writes ``<|tool_call|>[{"name": ..., "arguments": {...}}]<|/tool_call|>``. Where its special tokens are not
printed only the list is left, and its documented prompt makes it write ``functools[...]``: all three are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agent.core.subschemas import moved
from agent.endpoint.openai.toolscan import CallArguments, CallEvent, CallScanner, CallStart, ScanError

_OPEN = ("<|tool_call|>", "<|tool_calls|>", "functools")
_CLOSE = ("<|/tool_call|>", "<|/tool_calls|>", "</|tool_call|>", "</|tool_calls|>")
_MARKS = _OPEN + _CLOSE


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Words for the person."""

    text: str


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A new call when ``name`` is set, else more of its arguments."""

    index: int
    name: str | None = None
    arguments: str = ""


Delta = TextDelta | CallDelta


class ToolParser:
    """Turns the text of one answer into deltas. ``limit`` calls are let through, the rest is dropped.

    What turns out to be no call is text again, to the letter. How the text is cut into pieces changes nothing.
    """

    def __init__(self, names: frozenset[str], limit: int = 128) -> None:
        self._names = names
        self._limit = limit
        self._held = ""
        self._scanner: CallScanner | None = None
        self._mark = ""
        self._raw = ""
        self._fresh = True
        self._trim = False
        self._sure = False
        self._offset = 0
        self.calls = 0

    def feed(self, text: str) -> list[Delta]:
        """Return what is certain now."""
        deltas: list[Delta] = []
        while text:
            text = self._text(text, deltas) if self._scanner is None else self._scan(text, deltas)
        return deltas

    def finish(self) -> list[Delta]:
        """The answer is over: what was held back is what it looks like."""
        deltas: list[Delta] = []
        self._plain(self._held if self._scanner is None else self._raw, deltas)
        return deltas

    def _text(self, text: str, deltas: list[Delta]) -> str:
        text, self._held = self._held + text, ""
        if self._fresh:
            if not text.strip():
                self._held = text
                return ""
            if text.lstrip()[0] in "[{":
                return self._begin("", text)
        found = [(position, mark) for mark in _MARKS if (position := text.find(mark)) >= 0]
        if not found:
            keep = partial_mark(text, _MARKS)
            self._held = text[len(text) - keep :]
            self._plain(text[: len(text) - keep], deltas)
            return ""
        position, mark = min(found)
        self._plain(text[:position], deltas)
        self._fresh = False
        after = text[position + len(mark) :]
        return after if mark in _CLOSE else self._begin(mark, after)

    def _begin(self, mark: str, after: str) -> str:
        self._scanner = CallScanner()
        self._mark = mark
        self._raw = mark
        self._sure = False
        self._fresh = False
        self._offset = self.calls
        return after

    def _scan(self, text: str, deltas: list[Delta]) -> str:
        scanner = self._scanner
        assert scanner is not None  # noqa: S101 - for the type checker
        self._raw += "" if self._sure else text
        try:
            for event in scanner.feed(text):
                self._event(event, deltas)
        except ScanError:
            return self._failed(scanner, deltas)
        if scanner.done:
            self._scanner = None
            self._trim = True
        return scanner.rest

    def _failed(self, scanner: CallScanner, deltas: list[Delta]) -> str:
        self._scanner = None
        if self._sure:
            # The client has a broken call already; what follows is text.
            return scanner.rest
        self._plain(self._mark or self._raw[:1], deltas)
        return self._raw[len(self._mark) or 1 :]

    def _event(self, event: CallEvent, deltas: list[Delta]) -> None:
        if isinstance(event, CallStart) and not self._mark and event.name not in self._names:
            raise ScanError("no function of the request")
        self._sure, self._raw = True, ""
        index = self._offset + event.index
        if index >= self._limit:
            return
        if isinstance(event, CallArguments):
            deltas.append(CallDelta(index, arguments=event.text))
        else:
            self.calls = index + 1
            deltas.append(CallDelta(index, name=event.name))

    def _plain(self, text: str, deltas: list[Delta]) -> None:
        if self._trim:
            text = text.lstrip()
        if text:
            self._trim = False
            self._fresh = False
            deltas.append(TextDelta(text))


def partial_mark(text: str, marks: Sequence[str]) -> int:
    """Return the length of the longest end of ``text`` that one of ``marks`` begins with."""
    longest = max(len(mark) for mark in marks) - 1
    for length in range(min(longest, len(text)), 0, -1):
        tail = text[-length:]
        if any(mark.startswith(tail) for mark in marks):
            return length
    return 0


def calls_schema(functions: Sequence[Mapping[str, Any]], *, several: bool) -> dict[str, Any]:
    """Return the JSON schema of a list of calls of these functions, for constrained decoding.

    Raises:
        ValueError: a function's schema cannot stand inside of another one.
    """
    schemas: list[dict[str, Any]] = []
    definitions: dict[str, Any] = {}
    for number, function in enumerate(functions):
        arguments, its = moved(function.get("parameters") or {"type": "object"}, f"{number}-")
        definitions |= its
        schemas.append(
            {
                "type": "object",
                "properties": {"name": {"const": function["name"]}, "arguments": arguments},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    items = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    whole = {"type": "array", "items": items, "minItems": 1, "maxItems": 8 if several else 1}
    return whole | ({"$defs": definitions} if definitions else {})


def calls_guidance(functions: Sequence[Mapping[str, Any]], *, several: bool) -> str:
    """Return the same as JSON text; raises the same."""
    return json.dumps(calls_schema(functions, several=several), ensure_ascii=False)
