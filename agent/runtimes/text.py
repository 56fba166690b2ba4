"""Tokens to text, one at a time: never half a character, never the beginning of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence

_REPLACEMENT = "�"


class Utf8Stream:
    """Bytes of tokens to text; an incomplete character waits for the rest of its bytes."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, piece: bytes) -> str:
        """The text that is complete now."""
        return self._decoder.decode(piece)

    def flush(self) -> str:
        """What is left; bytes that never became a character turn into U+FFFD."""
        return self._decoder.decode(b"", True)


class WindowDetokenizer:
    """For runtimes that only decode lists of tokens: decodes a short window, and emits what the new token added.

    A byte-level token may be half a character and a word-level one may carry its leading space only in context, so
    the window keeps the tokens of the piece before. The approach is that of text-generation-inference.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._prefix = 0
        self._read = 0

    def feed(self, token: int) -> str:
        """The text that is complete now."""
        self._tokens.append(token)
        before, after = self._texts()
        if len(after) <= len(before) or after.endswith(_REPLACEMENT):
            return ""
        self._prefix, self._read = self._read, len(self._tokens)
        self._trim()
        return after[len(before) :]

    def flush(self) -> str:
        """What is left, replacement characters included."""
        before, after = self._texts()
        self._prefix = self._read = len(self._tokens)
        return after[len(before) :]

    def _texts(self) -> tuple[str, str]:
        return self._decode(self._tokens[self._prefix : self._read]), self._decode(self._tokens[self._prefix :])

    def _trim(self) -> None:
        if self._prefix > 64:
            del self._tokens[: self._prefix]
            self._read -= self._prefix
            self._prefix = 0


class StopStrings:
    """Ends a text before the first stop string, and holds back what may be the beginning of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(text for text in stop if text)
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """What may be shown now. After a match, ``matched`` is set and nothing more comes."""
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
        """What was held back and turned out to be no stop string."""
        shown, self._held = ("", "") if self.matched is not None else (self._held, "")
        return shown

    def _beginning(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        longest = min(len(self._held), max(len(word) for word in self._stop) - 1)
        for size in range(longest, 0, -1):
            tail = self._held[-size:]
            if any(word.startswith(tail) for word in self._stop):
                return size
        return 0
