"""The audit as server-sent events: a client that comes back goes on where it was."""

from __future__ import annotations

import asyncio
import json

from aiohttp import web

from fleet.api.problems import ProblemError
from fleet.errors import RegistryError
from fleet.operations.fleet import Fleet
from fleet.operations.views import describe_audit

POLL_S = 0.5
#: Proxies close connections on which nothing comes.
KEEPALIVE_S = 15.0
MANY = 200


async def stream_events(request: web.Request, fleet: Fleet) -> web.StreamResponse:
    """Send each entry of the audit from now on, or from the one after ``Last-Event-ID`` on.

    Raises:
        ProblemError: that is not an entry's number.
    """
    seen = await asyncio.to_thread(_begin, request.headers.get("Last-Event-ID"), fleet)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
    await response.prepare(request)
    await response.write(b": phifleet\n\n")
    loop = asyncio.get_running_loop()
    sent = loop.time()
    while True:
        try:
            entries = await asyncio.to_thread(fleet.registry.audit.after, seen, MANY)
        except RegistryError:  # the client keeps its place, and so does this
            entries = []
        for entry in entries:
            data = json.dumps(describe_audit(entry))
            await response.write(f"id: {entry.id}\nevent: {entry.action}\ndata: {data}\n\n".encode())
            seen, sent = entry.id, loop.time()
        if loop.time() - sent >= KEEPALIVE_S:
            await response.write(b": still here\n\n")
            sent = loop.time()
        if len(entries) < MANY:
            await asyncio.sleep(POLL_S)


def _begin(last: str | None, fleet: Fleet) -> int:
    if last is None:
        newest = fleet.registry.audit.trail(1)
        return newest[0].id if newest else 0
    if not last.isdecimal() or len(last) > 18:
        raise ProblemError("request.invalid", f"Last-Event-ID: {last!r} is not an entry's number")
    return int(last)
