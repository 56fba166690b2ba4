"""A conversation with the endpoint over HTTP, for `phifleet-agent chat`."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from agent.errors import AgentError

_PATIENCE_S = 600.0


class Conversation:
    """Keeps what was said, so that the model does too."""

    def __init__(self, endpoint: str, model: str, key: str | None, max_tokens: int, temperature: float | None) -> None:
        self._endpoint = endpoint
        self._model = model
        self._key = key
        self._max_tokens = max_tokens
        self._temperature = temperature
        self._messages: list[dict[str, str]] = []
        #: Of the last answer: tokens, tokens a second, milliseconds to the first token.
        self.figures = ""
        #: The last answer ended at the limit of tokens, not where the model would have ended it.
        self.cut = False

    def clear(self) -> None:
        """Forget what was said."""
        self._messages.clear()

    def forget_last(self) -> None:
        """Forget a question whose answer was not finished: the model is not to be held to half of one."""
        if self._messages and self._messages[-1]["role"] == "user":
            self._messages.pop()

    def say(self, text: str) -> Iterator[str]:
        """Yield the answer, piece by piece.

        Raises:
            AgentError: the endpoint refuses or goes away; with its own words.
        """
        self._messages.append({"role": "user", "content": text})
        began = time.monotonic()
        first: float | None = None
        answer: list[str] = []
        tokens, self.cut = 0, False
        for event in self._events():
            self.cut |= any(choice.get("finish_reason") == "length" for choice in event.get("choices", ()))
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
            piece = "".join(choice["delta"].get("content") or "" for choice in event.get("choices", ()))
            if piece:
                first = first or time.monotonic()
                answer.append(piece)
                yield piece
        self._messages.append({"role": "assistant", "content": "".join(answer)})
        self._measure(began, first or time.monotonic(), tokens)

    def _measure(self, began: float, first: float, tokens: int) -> None:
        seconds = max(time.monotonic() - first, 1e-9)
        speed = (tokens - 1) / seconds if tokens > 1 else 0.0
        self.figures = f"[{tokens} tokens, {speed:.1f} tokens/s, first after {1000 * (first - began):.0f} ms]"

    def _events(self) -> Iterator[dict[str, Any]]:
        connection = _connection(self._endpoint)
        body: dict[str, Any] = {
            "model": self._model,
            "messages": self._messages,
            "max_tokens": self._max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._temperature is not None:  # else the model's own setting holds
            body["temperature"] = self._temperature
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            response = connection.getresponse()
            if response.status != http.client.OK:
                raise AgentError(f"the endpoint refuses: {_reason(response.read())}")
            yield from _stream(response)
        except TimeoutError as error:
            raise AgentError(f"{self._endpoint} has sent nothing for {_PATIENCE_S:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise AgentError(f"the exchange with {self._endpoint} failed: {error or type(error).__name__}") from error
        finally:
            connection.close()


def _stream(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """Yield the events of an answer.

    Raises:
        AgentError: the stream ended before the answer did, or has an error or no JSON in it.
    """
    whole = False
    for line in response:
        if line.startswith(b"data: {"):
            try:
                event = json.loads(line[6:])
            except ValueError as error:
                raise AgentError("the answer broke off: an event of its stream is not JSON") from error
            if "error" in event:
                raise AgentError(f"the answer broke off: {_reason(line[6:])}")
            whole |= any(choice.get("finish_reason") for choice in event.get("choices", ()))
            yield event
    if not whole:
        raise AgentError("the answer broke off: the connection was closed before its end")


def _reason(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_PATIENCE_S)
        self._path = path

    def connect(self) -> None:
        """Open the socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_PATIENCE_S)
        self.sock.connect(self._path)


def _connection(endpoint: str) -> http.client.HTTPConnection:
    if endpoint.startswith("unix:"):
        return _UnixConnection(endpoint.removeprefix("unix:"))
    parts = urlsplit(endpoint)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return kind(parts.netloc, timeout=_PATIENCE_S)
