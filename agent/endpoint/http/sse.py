"""Server-sent events: what never changes in a stream is serialised once, so that a token costs one small join."""

from __future__ import annotations

import asyncio
import json
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

from aiohttp import web

DONE = b"data: [DONE]\n\n"
#: Bytes that may wait for a slow reader before its generation is held back; asyncio's own low-water mark, below which a
#: transport never pauses its writer.
_HIGH_WATER = 16 * 1024


def event(data: Any) -> bytes:
    """An unnamed event."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


def named_event(name: str, data: Any) -> bytes:
    """An event with a name, as the responses API has them."""
    return b"event: " + name.encode() + b"\n" + event(data)


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
        """The last chunk: no choices, and the counts."""
        return f'{self._head}"choices":[],"usage":{json.dumps(usage, separators=(",", ":"))}}}\n\n'.encode()


class EventStream:
    """A response that is sent as it is made. Nothing goes out before the first event, so an early error has its status.

    A client that stops reading for ``timeout_s`` is dropped; one that reads slowly holds its own generation back.
    """

    def __init__(self, request: web.Request, timeout_s: float) -> None:
        self._request = request
        self._timeout_s = timeout_s
        self._response: web.StreamResponse | None = None

    @property
    def started(self) -> bool:
        """Whether the status line is out."""
        return self._response is not None

    async def send(self, data: bytes) -> None:
        """Now.

        Raises:
            ConnectionError: the client is gone, or does not read.
        """
        response = self._response or await self._start()
        transport = self._request.transport
        if transport is None:
            raise ConnectionResetError("the client is gone")
        if transport.get_write_buffer_size() < _HIGH_WATER:
            await response.write(data)
            return
        try:
            async with asyncio.timeout(self._timeout_s):
                await response.write(data)
                await self._request.writer.drain()
        except TimeoutError:
            transport.abort()
            raise ConnectionResetError(f"the client has not read for {self._timeout_s} s") from None

    async def finish(self) -> web.StreamResponse:
        """End the stream."""
        response = self._response or await self._start()
        await response.write_eof()
        return response

    async def _start(self) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        response.content_type = "text/event-stream"
        response.charset = "utf-8"
        await response.prepare(self._request)
        self._response = response
        return response
