"""One connection each: deadlines for headers, a bound on how many, and error objects where even HTTP is broken."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

from aiohttp import web
from aiohttp.http_exceptions import LineTooLong

from agent.endpoint.http.config import Limits
from agent.endpoint.http.metrics import Metrics
from agent.endpoint.http.replies import error_reply
from agent.endpoint.openai.errors import ApiError

#: Nobody needs to know which versions of Python and aiohttp are behind it.
SERVER = "phifleet"


class ConnectionGuard:
    """Counts connections. Past the limit the one idle longest makes room; if none is idle, the new one goes."""

    def __init__(self, limits: Limits, metrics: Metrics | None = None) -> None:
        self.limits = limits
        self._metrics = metrics
        #: In the order in which they became idle.
        self._idle: dict[GuardedConnection, None] = {}
        self._open: set[GuardedConnection] = set()

    def opened(self, connection: GuardedConnection) -> bool:
        """Return whether it may stay."""
        if len(self._open) >= self.limits.connections and not self._evict():
            self._refused("limit")
            return False
        self._open.add(connection)
        self._idle[connection] = None
        self._count()
        return True

    def closed(self, connection: GuardedConnection) -> None:
        """It is gone."""
        self._open.discard(connection)
        self._idle.pop(connection, None)
        self._count()

    def busy(self, connection: GuardedConnection) -> None:
        """A whole request arrived on it."""
        self._idle.pop(connection, None)

    def idle(self, connection: GuardedConnection) -> None:
        """Its request is answered."""
        if connection in self._open:
            self._idle[connection] = None

    def slow(self) -> None:
        """One was closed for sending its headers too slowly."""
        self._refused("slow_headers")

    def _count(self) -> None:
        if self._metrics is not None:
            self._metrics.connections.set(len(self._open))

    def _refused(self, reason: str) -> None:
        if self._metrics is not None:
            self._metrics.refused(reason)

    def _evict(self) -> bool:
        oldest = next(iter(self._idle), None)
        if oldest is None:
            return False
        self._refused("evicted")
        self.closed(oldest)
        oldest.abort()
        return True


class GuardedConnection(web.RequestHandler):
    """aiohttp's connection, with a deadline on headers and JSON for errors below the application."""

    __slots__ = ("_busy", "_deadline", "_guard", "_refused", "program")

    def __init__(self, server: web.Server, guard: ConnectionGuard, *, loop: asyncio.AbstractEventLoop, **options: Any):
        super().__init__(server, loop=loop, **options)
        self._guard = guard
        self._deadline: asyncio.TimerHandle | None = None
        self._refused = False
        self._busy = False
        #: Who is at the other end, once somebody wanted to know.
        self.program = ""

    def abort(self) -> None:
        """Close at once."""
        if self.transport is not None:
            self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Stay, or be refused by the guard."""
        if not self._guard.opened(self):
            self._refused = True
            cast("asyncio.Transport", transport).abort()
            return
        super().connection_made(transport)
        self._await_headers()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Gone; aiohttp cancels what ran for it."""
        if self._refused:
            return
        self._guard.closed(self)
        self._headers_arrived()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """The first bytes of a request start its deadline."""
        if self._refused:
            return
        super().data_received(data)
        if self._deadline is None and not self._busy:
            self._await_headers()

    def began(self) -> None:
        """The application has a whole request head."""
        self._busy = True
        self._headers_arrived()
        self._guard.busy(self)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Answered: the connection is idle until more comes."""
        try:
            return await super().finish_response(request, resp, start_time)
        finally:
            self._busy = False
            self._headers_arrived()
            self._guard.idle(self)

    def log_exception(self, *_: Any, **__: Any) -> None:
        """What is ours was logged where it happened; broken requests are the client's."""

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Below the application: what is no HTTP, or too long to be read."""
        if request.writer.output_size > 0:
            raise ConnectionError("the answer is under way")
        if isinstance(exc, LineTooLong):
            error = ApiError(431, "the request line or a header is too long", code="headers_too_large")
        elif status < 500:
            why = (message or "malformed").strip().partition("\n")[0][:200].rstrip(": ")
            error = ApiError(status, f"this is no HTTP request: {why}", code="invalid_http")
        else:
            error = ApiError(500, "the endpoint failed: see the agent's log", code="internal_error")
        response = error_reply(error)
        response.headers["Server"] = SERVER
        response.force_close()
        return response

    def _await_headers(self) -> None:
        self._headers_arrived()
        self._deadline = self._loop.call_later(self._guard.limits.header_timeout_s, self._too_slow)

    def _headers_arrived(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self._deadline = None
        self._guard.slow()
        self.abort()


def guarded(server: web.Server, guard: ConnectionGuard) -> Callable[[], asyncio.Protocol]:
    """Return what makes the connections of a server, each of which ``guard`` watches."""
    loop = asyncio.get_running_loop()
    limits = guard.limits
    options: dict[str, Any] = {
        "keepalive_timeout": limits.keepalive_timeout_s,
        "max_line_size": limits.header_bytes,
        "max_field_size": limits.header_bytes,
        "max_headers": limits.headers,
        "lingering_time": 0.5,
        "access_log": None,
        # A body is taken as it comes: unpacking one could make gigabytes of kilobytes.
        "auto_decompress": False,
    }
    return lambda: GuardedConnection(server, guard, loop=loop, **options)
