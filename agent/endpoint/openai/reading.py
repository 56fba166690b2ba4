"""An answer while it is written: what the model thinks, says and calls. Pure.

Reasoning Phis begin an answer with ``<think>`` and what they think, in the text itself; some templates write the mark
for them, at the end of the prompt. Applications get thoughts apart from words, as those of other servers are.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from agent.core.inference import TokenEvent
from agent.endpoint.openai.tools import Delta, TextDelta, ToolParser, partial_mark

_OPEN, _CLOSE = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class ThoughtDelta:
    """More of what the model thinks before it speaks."""

    text: str


Piece = ThoughtDelta | Delta


class _Stage(Enum):
    UNDECIDED = auto()
    THINKING = auto()
    SPEAKING = auto()


def thought_begun(prompt: str) -> bool:
    """Return whether the template has opened the model's thoughts."""
    return prompt.rstrip().endswith(_OPEN)


class AnswerReader:
    """Turns the tokens of one answer into pieces. How the text is cut into tokens changes nothing.

    Thoughts come first or not at all: a mark later on is text like any other. Around them white space is dropped.
    ``tools`` reads calls out of what is said; ``begun``: the prompt ends within thoughts.
    """

    def __init__(self, tools: ToolParser | None = None, *, begun: bool = False) -> None:
        self._tools = tools
        self._stage = _Stage.THINKING if begun else _Stage.UNDECIDED
        self._held = ""
        #: White space is dropped before the first thought, and before the first word after thoughts.
        self._trim = self._has_thought = begun
        self._before = 0

    @property
    def thinking(self) -> bool:
        """Whether what comes next is a thought."""
        return self._stage is _Stage.THINKING

    @property
    def thought_tokens(self) -> int:
        """How many tokens were thoughts, their marks among them."""
        return self._before if self._has_thought else 0

    def token(self, event: TokenEvent) -> list[Piece]:
        """Return what is certain now."""
        if self._stage is _Stage.SPEAKING:
            return self._said(event.text)
        self._before += event.tokens
        return self._undecided(event.text) if self._stage is _Stage.UNDECIDED else self._thought(event.text)

    def finish(self) -> list[Piece]:
        """The answer is over: what was held back is what it looks like."""
        held, self._held = self._held, ""
        if self._stage is _Stage.THINKING:
            thought = held.strip() if self._trim else held.rstrip()
            return [ThoughtDelta(thought)] if thought else []
        return [*(self._said(held) if held else []), *(self._tools.finish() if self._tools else [])]

    def _undecided(self, text: str) -> list[Piece]:
        self._held += text
        begun = self._held.lstrip()
        if begun.startswith(_OPEN):
            self._held, self._stage = "", _Stage.THINKING
            self._trim = self._has_thought = True
            return self._thought(begun[len(_OPEN) :])
        if _OPEN.startswith(begun):  # of nothing, too
            return []
        held, self._held, self._stage = self._held, "", _Stage.SPEAKING
        return self._said(held)

    def _thought(self, text: str) -> list[Piece]:
        text, self._held = self._held + text, ""
        before, mark, after = text.partition(_CLOSE)
        certain = before if mark else text[: len(text) - partial_mark(text, (_CLOSE,))]
        thought = certain.rstrip()  # before the mark, white space is dropped
        self._held = "" if mark else text[len(thought) :]
        if self._trim:
            thought = thought.lstrip()
            self._trim = not thought
        pieces: list[Piece] = [ThoughtDelta(thought)] if thought else []
        if mark:
            self._stage, self._trim = _Stage.SPEAKING, True
            pieces += self._said(after)
        return pieces

    def _said(self, text: str) -> list[Piece]:
        if self._trim:
            text = text.lstrip()
            self._trim = not text
        if self._tools is not None:
            return list(self._tools.feed(text))
        return [TextDelta(text)] if text else []
