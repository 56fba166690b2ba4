"""The bytes of tokens, for runtimes that give only their text: a token may be part of a character, which is no text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

_REPLACEMENT = "�"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


class TokenBytes:
    """Reads ``tokenizer.json`` in ``folder`` when the first token is asked for whose text does not say its bytes."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "tokenizer.json"
        self._known: dict[int, bytes] | None = None

    def of(self, token: int, text: str) -> bytes | None:
        """Return the bytes of a token whose text, decoded alone, is ``text``.

        None where they are just that text's, or unknown.
        """
        if _REPLACEMENT not in text:
            return None
        if self._known is None:
            self._known = read_pieces(self._file)
        return self._known.get(token)


def read_pieces(file: Path) -> dict[int, bytes]:
    """Return the bytes of each token in a ``tokenizer.json``; none where that cannot be read."""
    try:
        tokenizer = json.loads(file.read_text("utf-8"))
        words = tokenizer["model"]["vocab"]
        pairs = words.items() if isinstance(words, dict) else ((word, at) for at, (word, _) in enumerate(words))
        added = {int(one["id"]): str(one["content"]).encode() for one in tokenizer.get("added_tokens") or ()}
        decode = _byte_level if _is_byte_level(tokenizer.get("decoder")) else _sentence_piece
        return {int(token): decode(str(word)) for word, token in pairs} | added
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _is_byte_level(decoder: Any) -> bool:
    kinds = [decoder, *(decoder.get("decoders") or ())] if isinstance(decoder, dict) else []
    return any(one.get("type") == "ByteLevel" for one in kinds)


def _byte_level(word: str) -> bytes:
    return b"".join(bytes([_BYTES[char]]) if char in _BYTES else char.encode() for char in word)


def _sentence_piece(word: str) -> bytes:
    found = _BYTE.match(word)
    return bytes([int(found[1], 16)]) if found else word.replace("\u2581", " ").encode()


def _alphabet() -> dict[str, int]:
    """Byte-level BPE writes each byte as a visible character: itself where it is one, else the next from U+0100."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + at): byte for at, byte in enumerate(hidden)}


_BYTES = _alphabet()
