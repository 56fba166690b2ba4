"""Reads function calls out of JSON that is still being written, character by character. Pure.

Takes ``[{"name": ..., "arguments": {...}}, ...]``, one such object without the list, ``parameters`` in place of
``arguments``, arguments that are JSON in a string, and OpenAI's own nesting under ``function``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto

_SPACE = " \t\r\n"
_ARGUMENTS = frozenset({"arguments", "parameters"})


class ScanError(ValueError):
    """It is no list of calls."""


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins; its place in the list, and the function's name."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments, JSON text."""

    index: int
    text: str


CallEvent = CallStart | CallArguments


class _At(Enum):
    LIST = auto()
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    INSIDE = auto()
    AFTER = auto()


class CallScanner:
    """Feed it text; ``done`` is set at the end of the list. ``rest`` is what it did not take of the last text."""

    def __init__(self) -> None:
        self.done = False
        self.rest = ""
        self._at = _At.LIST
        self._listed = False
        self._levels = 0
        self._index = -1
        self._key = ""
        self._raw: list[str] = []
        self._depth = 0
        self._string = False
        self._escaped = False
        self._name: str | None = None
        self._held: list[str] = []
        self._argued = False
        self._consumed = 0

    def feed(self, text: str) -> Iterator[CallEvent]:
        """Yield what ``text`` completes.

        Raises:
            ScanError: this is no list of calls.
        """
        position = 0
        while position < len(text) and not self.done:
            self._consumed = 0
            try:
                consumed, events = self._step(text, position)
            except ScanError:
                self.rest = text[position + self._consumed :]
                raise
            yield from events
            position += consumed
        self.rest = text[position:]

    def _step(self, text: str, position: int) -> tuple[int, list[CallEvent]]:
        if self._at is _At.INSIDE:
            return self._inside(text, position)
        char = text[position]
        if char in _SPACE:
            return 1, []
        if self._at is _At.LIST:
            self._list(char)
            return 1, []
        if self._at is _At.COLON:
            self._expect(char == ":")
            self._at = _At.VALUE
            return 1, []
        if self._at is _At.VALUE:
            return self._value(char)
        return 1, self._member(char)

    def _list(self, char: str) -> None:
        if char == "{":
            self._index += 1
            self._levels = 1
            self._name, self._held, self._argued = None, [], False
            self._at = _At.KEY
        elif char == "[" and self._index < 0 and not self._listed:
            self._listed = True
        elif char == "]" and self._listed:
            self.done = True
        else:
            self._expect(char == "," and self._listed and self._index >= 0)

    def _member(self, char: str) -> list[CallEvent]:
        if char == "}":
            return self._close()
        if self._at is _At.AFTER:
            self._expect(char == ",")
            self._at = _At.KEY
            return []
        self._expect(char == '"')
        self._key = ""
        self._begin(char)
        self._at = _At.INSIDE
        return []

    def _value(self, char: str) -> tuple[int, list[CallEvent]]:
        if self._key == "function" and char == "{" and self._levels == 1:
            self._levels = 2
            self._at = _At.KEY
            return 1, []
        self._begin("")
        self._at = _At.INSIDE
        return 0, []

    def _begin(self, first: str) -> None:
        self._raw = [first] if first else []
        self._depth = 0
        self._string = bool(first)
        self._escaped = False

    def _inside(self, text: str, position: int) -> tuple[int, list[CallEvent]]:
        """Read one value, or one key: to its end or to the end of the text."""
        start = position
        while position < len(text):
            char = text[position]
            if self._string:
                position += 1
                if self._ends_string(char) and self._depth == 0:
                    return position - start, self._taken(text[start:position], ended=True)
                continue
            if self._depth == 0 and char in ",}]" + _SPACE:
                return position - start, self._taken(text[start:position], ended=True)
            position += 1
            self._string = char == '"'
            self._depth += (char in "{[") - (char in "}]")
            if self._depth == 0 and char in "}]":
                return position - start, self._taken(text[start:position], ended=True)
        return position - start, self._taken(text[start:position], ended=False)

    def _ends_string(self, char: str) -> bool:
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == '"':
            self._string = False
        return not self._string

    def _taken(self, piece: str, *, ended: bool) -> list[CallEvent]:
        self._consumed = len(piece)
        if not self._key:
            self._raw.append(piece)
            if ended:
                self._key = self._decoded()
                self._at = _At.COLON
            return []
        if ended:
            self._at = _At.AFTER
        if self._key in _ARGUMENTS:
            return self._arguments(piece, ended=ended)
        self._raw.append(piece)
        if ended and self._key in ("name", "function"):
            return self._named(self._decoded())
        return []

    def _arguments(self, piece: str, *, ended: bool) -> list[CallEvent]:
        first = self._raw[0] if self._raw else piece
        if not first:
            raise ScanError("arguments without a value")
        if first.startswith('"'):
            self._raw.append(piece)
            if not ended:
                return []
            piece = self._decoded()
        elif not self._raw:
            self._raw = [piece[:1]]
        self._argued = True
        if self._name is None:
            self._held.append(piece)
            return []
        return [CallArguments(self._index, piece)] if piece else []

    def _named(self, name: str) -> list[CallEvent]:
        if self._name is not None:
            return []
        self._name = name
        events: list[CallEvent] = [CallStart(self._index, name)]
        if self._held:
            events.append(CallArguments(self._index, "".join(self._held)))
        return events

    def _close(self) -> list[CallEvent]:
        self._levels -= 1
        if self._levels:
            self._at = _At.AFTER
            return []
        if self._name is None:
            raise ScanError("a call without a name")
        self._at = _At.LIST
        self.done = not self._listed
        return [] if self._argued else [CallArguments(self._index, "{}")]

    def _decoded(self) -> str:
        try:
            value = json.loads("".join(self._raw))
        except (ValueError, RecursionError):
            raise ScanError("broken JSON") from None
        self._expect(isinstance(value, str) and bool(value))
        return str(value)

    def _expect(self, held: bool) -> None:
        if not held:
            raise ScanError("no list of calls")
