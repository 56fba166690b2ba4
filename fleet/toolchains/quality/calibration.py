"""Text that calibrated recipes look at. Evaluation never scores it: the two sets have no prompt in common.

The bundled text is half conversations and half plain text: a recovery that has seen nothing but chats makes good little
of what others write. The conversations were written for phifleet and answered by SmolLM2-135M-Instruct (Apache-2.0);
they are put through the chat template of the model at hand, so that activations are those of its use. The plain text is
prose in eight languages, technical English and code, and goes in as it is. An operator's file is plain text.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.contract.base import sha256_hex
from agent.contract.manifest import Chat
from fleet.errors import UsageError
from fleet.toolchains.checkpoint.chat import conversation

BUNDLED = "bundled"
DATA = Path(__file__).resolve().parents[2] / "data" / "calibration"
_CONVERSATIONS, _PLAIN = DATA / "conversations.jsonl", DATA / "plain.toml"
#: Characters of one piece of an operator's text: some 500 tokens.
_PIECE_CHARACTERS = 2000
_MAX_PIECES = 64


@dataclass(frozen=True, slots=True)
class Calibration:
    """Pieces of text, ready to be tokenized; special tokens in them are to be parsed."""

    label: str
    texts: tuple[str, ...]


def load(source: str, chat: Chat) -> Calibration:
    """``bundled``, or the path of a text file.

    Raises:
        UsageError: the file is missing, empty, or no UTF-8 text.
        ModelError: the chat template is wrong.
    """
    if source == BUNDLED:
        data, plain = _CONVERSATIONS.read_bytes(), _PLAIN.read_bytes()
        turns = [json.loads(line) for line in data.decode().splitlines()]
        chats = [conversation(chat, turn["user"], turn["assistant"]) for turn in turns]
        passages = [str(one["text"]) for one in tomllib.loads(plain.decode())["passages"]]
        return Calibration(f"phifleet-calibration:{sha256_hex(data + plain)[:16]}", _mixed(chats, passages))
    path = Path(source)
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"calibration text {path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UsageError(f"calibration text {path}: is not UTF-8; pass plain text") from None
    if len(text.strip()) < _PIECE_CHARACTERS or "\0" in text:
        raise UsageError(f"calibration text {path}: pass at least {_PIECE_CHARACTERS} characters of plain text")
    pieces = [text[at : at + _PIECE_CHARACTERS] for at in range(0, len(text), _PIECE_CHARACTERS)]
    step = max(1, len(pieces) // _MAX_PIECES)
    return Calibration(f"{path.name}:{sha256_hex(data)[:16]}", tuple(pieces[::step][:_MAX_PIECES]))


def _mixed(chats: Sequence[str], passages: Sequence[str]) -> tuple[str, ...]:
    """Spread the passages among the chats: whoever reads some of the texts, evenly, reads of both kinds."""
    found, taken = [], 0
    for number, chat in enumerate(chats, 1):
        found.append(chat)
        upto = number * len(passages) // len(chats)
        found += passages[taken:upto]
        taken = upto
    return tuple(found)
