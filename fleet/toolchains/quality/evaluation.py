"""What artifacts are scored on: prompts that the reference continues or an operator's text, and foreign plain text."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.contract.base import canonical_json, sha256_hex
from fleet.errors import UsageError

_DATA = Path(__file__).resolve().parents[2] / "data" / "evaluation"
PROMPTS, FOREIGN = _DATA / "prompts.toml", _DATA / "foreign.toml"
#: Tokens that the reference model adds to each prompt, at most; it may end its answer earlier.
CONTINUATION_TOKENS = 96
#: A text is cut into pieces of so many tokens; the first half of each is context, the second half is scored.
PIECE_TOKENS = 512
#: Of an operator's text: enough for a standard error of a few percent, in less than a minute of a small model.
MAX_PIECES = 12
#: A standard error is of pieces, for tokens of one are not independent: a short text is cut into smaller ones.
MIN_PIECES = 4
#: Under this a percentile means nothing, and a piece is no context.
MIN_TEXT_TOKENS = 256
#: Of a passage of foreign text, from its beginning; of which the first part is context.
PASSAGE_TOKENS, PASSAGE_CONTEXT = 256, 16
_MAX_TEXT_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One of ``prompts`` (put through the chat template and continued), ``text`` (scored in pieces), ``passages``."""

    name: str
    digest: str
    prompts: tuple[str, ...] = ()
    text: str = ""
    passages: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Name and digest, as manifests have it."""
        return f"{self.name}:{self.digest[:16]}"


def bundled() -> Evaluation:
    """Return the prompts that come with phifleet: chat, code, mathematics and several languages."""
    document = tomllib.loads(PROMPTS.read_text(encoding="utf-8"))
    prompts = tuple(prompt for part in document.values() if isinstance(part, dict) for prompt in part["prompts"])
    digest = sha256_hex(canonical_json([CONTINUATION_TOKENS, *prompts]))
    return Evaluation(f"phifleet-eval-{document['version']}", digest, prompts=prompts)


def foreign() -> Evaluation:
    """Return passages of plain text that no model wrote: prose in five languages, code and data, without a template."""
    document = tomllib.loads(FOREIGN.read_text(encoding="utf-8"))
    passages = tuple(str(one["text"]).lstrip("\n") for one in document["passages"])
    digest = sha256_hex(canonical_json([PASSAGE_TOKENS, PASSAGE_CONTEXT, *passages]))
    return Evaluation(f"phifleet-foreign-{document['version']}", digest, passages=passages)


def from_text(path: Path) -> Evaluation:
    """Return a text file of the operator's.

    Raises:
        UsageError: missing, empty, binary, not UTF-8, or far too large.
    """
    try:
        size = path.stat().st_size
        data = path.read_bytes() if size <= _MAX_TEXT_BYTES else b""
    except OSError as error:
        raise UsageError(f"evaluation text {path}: cannot be read: {error.strerror or error}") from None
    if size > _MAX_TEXT_BYTES:
        raise UsageError(f"evaluation text {path}: {size} bytes; at most {_MAX_TEXT_BYTES}, and far less is enough")
    if b"\0" in data:
        raise UsageError(f"evaluation text {path}: is a binary file; pass plain text in UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"evaluation text {path}: not UTF-8 at byte {error.start}; pass plain text in UTF-8") from None
    if not text.strip():
        raise UsageError(f"evaluation text {path}: is empty; pass some pages of plain text")
    digest = sha256_hex(canonical_json([PIECE_TOKENS, MAX_PIECES, MIN_PIECES, sha256_hex(data)]))
    return Evaluation(f"text-{path.name}", digest, text=text)


def pieces(tokens: Sequence[int]) -> list[tuple[list[int], int]]:
    """Cut a text's tokens: ``(ids, start)``, where the tokens from ``start`` on are scored.

    At least ``MIN_PIECES`` and at most ``MAX_PIECES``, all of one length, spread evenly over the text.

    Raises:
        UsageError: fewer than ``MIN_TEXT_TOKENS`` tokens.
    """
    if len(tokens) < MIN_TEXT_TOKENS:
        raise UsageError(
            f"the evaluation text has {len(tokens)} tokens; at least {MIN_TEXT_TOKENS} are needed, 6000 are better"
        )
    size = min(PIECE_TOKENS, len(tokens) // MIN_PIECES)
    whole = [list(tokens[at : at + size]) for at in range(0, len(tokens) - size + 1, size)]
    count = min(MAX_PIECES, len(whole))
    chosen = [whole[i * len(whole) // count] for i in range(count)]
    return [(ids, len(ids) // 2) for ids in chosen]
