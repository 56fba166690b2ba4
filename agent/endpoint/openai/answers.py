"""The pieces of an answer, in OpenAI's shapes. Pure."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from agent.core.inference import DoneEvent, FinishReason, TokenEvent, TokenLogprob
from agent.endpoint.openai.reading import AnswerReader, Piece, ThoughtDelta
from agent.endpoint.openai.tools import CallDelta, TextDelta


def new_id(prefix: str) -> str:
    """Return an identifier like OpenAI's: ``chatcmpl-...``."""
    return f"{prefix}{secrets.token_hex(12)}"


def usage(done: Sequence[DoneEvent], each: int = 1, thoughts: int = 0) -> dict[str, Any]:
    """Counts over the sequences; a prompt counts once, however many choices (``each``) were made of it.

    ``thoughts``: so many of the tokens were thoughts.
    """
    prompts = done[::each]
    prompt = sum(one.prompt_tokens for one in prompts)
    completion = sum(one.completion_tokens for one in done)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in prompts)},
        **({"completion_tokens_details": {"reasoning_tokens": thoughts}} if thoughts else {}),
    }


def finish_reason(done: DoneEvent, calls: int) -> str:
    """``stop``, ``length`` or ``tool_calls``."""
    if calls and done.reason is FinishReason.STOP:
        return "tool_calls"
    return "length" if done.reason is FinishReason.LENGTH else "stop"


def chat_logprobs(event: TokenEvent, top: int) -> dict[str, Any] | None:
    """Of one token, in the chat API's shape."""
    if event.logprob is None:
        return None
    entry = _candidate(event.logprob)
    entry["top_logprobs"] = [_candidate(one) for one in event.top_logprobs[:top]]
    return entry


def _candidate(one: TokenLogprob) -> dict[str, Any]:
    return {"token": one.token, "logprob": max(one.logprob, -9999.0), "bytes": _bytes(one)}


def _bytes(one: TokenLogprob) -> list[int] | None:
    """Return the token's own bytes, so that those of several tokens make the text.

    None where the runtime does not tell.
    """
    if one.raw is not None:
        return list(one.raw)
    return None if "\ufffd" in one.token else list(one.token.encode())


@dataclass(slots=True)
class CompletionLogprobs:
    """Of a completion's tokens, in the older API's shape."""

    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[str, float]] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def add(self, event: TokenEvent, offset: int, top: int) -> None:
        """One more token, which begins at character ``offset`` of the text."""
        if event.logprob is None:
            return
        self.tokens.append(event.logprob.token)
        self.token_logprobs.append(max(event.logprob.logprob, -9999.0))
        self.top_logprobs.append({one.token: max(one.logprob, -9999.0) for one in event.top_logprobs[:top]})
        self.text_offset.append(offset)

    def to_dict(self) -> dict[str, Any]:
        """As it goes out."""
        return {
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        }


class ChatChoice:
    """One choice while it grows."""

    def __init__(self, index: int, reader: AnswerReader, top_logprobs: int | None) -> None:
        self.index = index
        self.text: list[str] = []
        self.thoughts: list[str] = []
        self.calls: list[dict[str, Any]] = []
        self.logprobs: list[dict[str, Any]] = []
        self.done: DoneEvent | None = None
        self.reader = reader
        self._top = top_logprobs

    def token(self, event: TokenEvent) -> tuple[list[Piece], list[dict[str, Any]]]:
        """Take one in; what it adds to the answer, and its logprobs, which thoughts have none of."""
        entries: list[dict[str, Any]] = []
        pieces = self.reader.token(event)
        if self._top is not None and not self.reader.thinking and (entry := chat_logprobs(event, self._top)):
            entries = [entry]
            self.logprobs.append(entry)
        self._take(pieces)
        return pieces, entries

    def end(self, done: DoneEvent) -> list[Piece]:
        """Nothing more comes; what was held back."""
        self.done = done
        pieces = self.reader.finish()
        self._take(pieces)
        return pieces

    def _take(self, pieces: list[Piece]) -> None:
        for delta in pieces:
            if isinstance(delta, ThoughtDelta):
                self.thoughts.append(delta.text)
            elif isinstance(delta, TextDelta):
                self.text.append(delta.text)
            elif delta.name is not None:
                self.calls.append(
                    {"id": new_id("call_"), "type": "function", "function": {"name": delta.name, "arguments": ""}}
                )
            else:
                self.calls[delta.index]["function"]["arguments"] += delta.arguments

    def delta(self, delta: Piece) -> dict[str, Any]:
        """As a stream's ``delta`` object."""
        if isinstance(delta, ThoughtDelta):
            return {"reasoning_content": delta.text}
        if isinstance(delta, TextDelta):
            return {"content": delta.text}
        return {"tool_calls": [self._call_delta(delta)]}

    def _call_delta(self, delta: CallDelta) -> dict[str, Any]:
        if delta.name is None:
            return {"index": delta.index, "function": {"arguments": delta.arguments}}
        call = self.calls[delta.index]
        return {
            "index": delta.index,
            "id": call["id"],
            "type": "function",
            "function": {"name": delta.name, "arguments": ""},
        }

    @property
    def finish_reason(self) -> str:
        """Once ``end`` was called."""
        return finish_reason(self.done, len(self.calls)) if self.done else "stop"

    def to_dict(self) -> dict[str, Any]:
        """Return the whole choice."""
        text = "".join(self.text)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": text or (None if self.calls else ""),
            "refusal": None,
        }
        if self.thoughts:
            message["reasoning_content"] = "".join(self.thoughts)
        if self.calls:
            message["tool_calls"] = self.calls
        return {
            "index": self.index,
            "message": message,
            "logprobs": None if self._top is None else {"content": self.logprobs, "refusal": None},
            "finish_reason": self.finish_reason,
        }
