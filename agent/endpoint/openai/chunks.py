"""Server-sent events as bytes: what never changes in a stream is serialised once. Pure."""

from __future__ import annotations

import json
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

from agent.endpoint.openai.errors import ApiError

DONE = b"data: [DONE]\n\n"


def event(data: Any) -> bytes:
    """Return an unnamed event."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


def named_event(name: str, data: Any) -> bytes:
    """Return an event with a name, as the responses API has them."""
    return b"event: " + name.encode() + b"\n" + event(data)


def error_event(error: ApiError) -> bytes:
    """Return a failure as the last event of a stream; no ``[DONE]`` follows."""
    return b"data: " + error.to_json() + b"\n\n"


class ChunkEncoder:
    """The chunks of one stream; ``object`` is ``chat.completion.chunk`` or ``text_completion``."""

    def __init__(self, identifier: str, kind: str, created: int, model: str, *, usage: bool) -> None:
        head = json.dumps({"id": identifier, "object": kind, "created": created, "model": model}, separators=(",", ":"))
        self._head = f"data: {head[:-1]},"
        self._tail = ',"usage":null}\n\n' if usage else "}\n\n"

    def text(self, index: int, text: str) -> bytes:
        """More of a chat answer's text: the one that is sent for each token."""
        return (
            f'{self._head}"choices":[{{"index":{index},"delta":{{"content":{quoted(text)}}},'
            f'"logprobs":null,"finish_reason":null}}]{self._tail}'
        ).encode()

    def completion(self, index: int, text: str) -> bytes:
        """More of a completion's text."""
        return (
            f'{self._head}"choices":[{{"index":{index},"text":{quoted(text)},'
            f'"logprobs":null,"finish_reason":null}}]{self._tail}'
        ).encode()

    def choice(self, choice: dict[str, Any]) -> bytes:
        """Anything else about one choice."""
        return f'{self._head}"choices":[{json.dumps(choice, separators=(",", ":"))}]{self._tail}'.encode()

    def usage(self, usage: dict[str, Any]) -> bytes:
        """Return the last chunk: no choices, and the counts."""
        return f'{self._head}"choices":[],"usage":{json.dumps(usage, separators=(",", ":"))}}}\n\n'.encode()
