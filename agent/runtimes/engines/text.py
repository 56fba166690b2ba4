"""Tokens to text, one at a time: never half a character, never the beginning of a stop string."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Sequence
from typing import Protocol

_REPLACEMENT = "�"


class Utf8Stream:
    """Bytes of tokens to text; an incomplete character waits for the rest of its bytes."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, piece: bytes) -> str:
        """Return the text that is complete now."""
        return self._decoder.decode(piece)

    def flush(self) -> str:
        """Return what is left; bytes that never became a character turn into U+FFFD."""
        return self._decoder.decode(b"", True)


class Pieces:
    """The text of each token of a vocabulary, asked for once; shared by all sequences of a model.

    A byte-level token may be half a character, and a word-level one has its leading space only after another token:
    so pieces are what a token adds after a neutral one.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], neutral: int) -> None:
        self._decode = decode
        self._neutral = neutral
        self._before = len(decode([neutral]))
        self._known: dict[int, str] = {}

    def alone(self, token: int) -> str:
        """Return what a token is at the very beginning."""
        return self._decode([token])

    def after(self, token: int) -> str:
        """Return what a token adds to a text."""
        known = self._known.get(token)
        if known is None:
            known = self._known[token] = self.all_after([token])
        return known

    def all_after(self, tokens: Sequence[int]) -> str:
        """Return what several tokens add."""
        return self._decode([self._neutral, *tokens])[self._before :]


class _Stream(Protocol):
    def feed(self, token: int, /) -> str: ...

    def flush(self) -> str: ...


class JsonStream:
    """JSON as it comes from another stream, with control characters inside of strings written as JSON has them.

    For a grammar engine that lets them pass as they are, which no JSON parser takes.
    """

    def __init__(self, stream: _Stream) -> None:
        self._stream = stream
        self._in_string = self._escaped = False

    def feed(self, token: int, /) -> str:
        """Return the text that is complete now."""
        return "".join(map(self._written, self._stream.feed(token)))

    def flush(self) -> str:
        """Return what is left."""
        return "".join(map(self._written, self._stream.flush()))

    def _written(self, char: str) -> str:
        if not self._in_string:
            self._in_string = char == '"'
            return char
        if char < " ":
            return json.dumps(char)[1:-1]
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == '"':
            self._in_string = False
        return char


class PieceStream:
    """For runtimes that only decode lists of tokens; tokens that end within a character wait for the rest of it."""

    #: A character has at most four bytes; with more than that waiting, they are no character.
    _LONGEST = 4

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self._pending: list[int] = []
        self._begun = False

    def feed(self, token: int, /) -> str:
        """Return the text that is complete now."""
        if not self._pending:
            text = self._pieces.after(token) if self._begun else self._pieces.alone(token)
            if not text.endswith(_REPLACEMENT):
                self._begun = True
                return text
        self._pending.append(token)
        text = self._pieces.all_after(self._pending)
        if text.endswith(_REPLACEMENT) and len(self._pending) < self._LONGEST:
            return ""
        self._begun, self._pending = True, []
        return text

    def flush(self) -> str:
        """Return what is left, replacement characters included."""
        text = self._pieces.all_after(self._pending) if self._pending else ""
        self._pending = []
        return text


class StopStrings:
    """Ends a text before the first stop string, and holds back what may be the beginning of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(text for text in stop if text)
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """Return what may be shown now. After a match, ``matched`` is set and nothing more comes."""
        if self.matched is not None:
            return ""
        if not self._stop:
            return text
        self._held += text
        found = [(at + len(word), at, word) for word in self._stop if (at := self._held.find(word)) >= 0]
        if found:
            # The one complete first, so that it does not matter how the text was cut into pieces.
            _, at, self.matched = min(found)
            shown, self._held = self._held[:at], ""
            return shown
        keep = self._beginning()
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        """Return what was held back and turned out to be no stop string."""
        shown, self._held = ("", "") if self.matched is not None else (self._held, "")
        return shown

    def _beginning(self) -> int:
        """Return the length of the longest end of the held text that a stop string begins with."""
        longest = min(len(self._held), max(len(word) for word in self._stop) - 1)
        for size in range(longest, 0, -1):
            tail = self._held[-size:]
            if any(word.startswith(tail) for word in self._stop):
                return size
        return 0
