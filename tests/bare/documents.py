"""The shell commands of the documents, as blocks that a test runs or that say why it cannot.

A block is fenced with ``sh``. An HTML comment in the line before it may say more: ``<!-- as: USER -->`` names who runs
it, and ``<!-- not run: REASON -->`` why nobody does here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: In the order in which a reader meets them. ``operator`` works in a clone of the repository.
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "operations.md")
OPERATOR = "operator"

_FENCE = re.compile(r"^```(\S*)\s*$")
_AS = re.compile(r"^<!-- as: (\w+) -->$")
_NOT_RUN = re.compile(r"^<!-- not run: (.+) -->$")


@dataclass(frozen=True)
class Block:
    """One fenced block. ``line`` is that of the fence, ``not_run`` the reason or nothing."""

    document: Path
    line: int
    language: str
    text: str
    user: str = OPERATOR
    not_run: str = ""

    def __str__(self) -> str:
        return f"{self.document.name}:{self.line}"


def fenced(document: Path) -> Iterator[Block]:
    """Every fenced block of a document, whatever its language."""
    before, opened = "", None
    lines: list[str] = []
    for number, line in enumerate(document.read_text(encoding="utf-8").splitlines(), start=1):
        fence = _FENCE.match(line)
        if fence and opened is None:
            opened, lines = (number, fence[1], before), []
        elif fence and opened is not None:
            yield _block(document, *opened, "\n".join(lines))
            opened = None
        elif opened is not None:
            lines.append(line)
        before = line


def shell_blocks(document: Path) -> list[Block]:
    return [block for block in fenced(document) if block.language == "sh"]


def _block(document: Path, line: int, language: str, before: str, text: str) -> Block:
    user, reason = _AS.match(before), _NOT_RUN.match(before)
    return Block(document, line, language, text, user[1] if user else OPERATOR, reason[1] if reason else "")
