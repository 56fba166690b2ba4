"""Sending server-sent events: with a bound on what a slow reader may hold up."""

from __future__ import annotations

import asyncio

from aiohttp import web

#: Bytes that may wait for a slow reader before its generation is held back; asyncio's own low-water mark, below which a
#: transport never pauses its writer.
_HIGH_WATER = 16 * 1024


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
