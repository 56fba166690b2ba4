"""Serves the complete artifacts on this device to its neighbours, who read them as from any mirror (ADR 29).

Neighbours believe nothing of it: they compare each chunk with the signed manifest. What is given out are the files that
a manifest lists, and nothing else of the disk.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog
from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from agent.contract.manifest import ArtifactFile
from agent.core.ports import ArtifactStore
from agent.endpoint.http.config import Limits
from agent.endpoint.http.connections import ConnectionGuard, GuardedConnection, guarded
from agent.errors import ConfigError, StoreError
from agent.platform.concurrency import in_thread
from agent.store.mirrors import RANGE_BYTES

#: Answers at once; a neighbour that is told to wait tries again, or asks the next mirror.
AT_ONCE = 8
#: A neighbour that reads more slowly makes room for others; it keeps what it has, and goes on from there.
LEAST_BYTES_PER_S, GRACE_S = 16 * 1024, 60.0
LIMITS = Limits(connections=64, keepalive_timeout_s=15.0)
_DIGEST = re.compile(r"[0-9a-f]{64}")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

log = structlog.get_logger(component=__name__)


@web.middleware
async def _began(request: web.Request, handler: Handler) -> web.StreamResponse:
    if isinstance(request.protocol, GuardedConnection):
        request.protocol.began()
    return await handler(request)


class Sharing:
    """``run`` lasts until it is cancelled. ``port`` 0 takes a free one, which ``port`` holds once it listens."""

    def __init__(self, store: ArtifactStore, host: str, port: int) -> None:
        self._store = store
        self._host = host
        self.port = port
        self._sending = asyncio.Semaphore(AT_ONCE)

    async def run(self) -> None:
        """Listen, and answer.

        Raises:
            ConfigError: the address or port cannot be had.
        """
        app = web.Application(middlewares=[_began])
        app.router.add_get("/{digest}/{path:.+}", self._answer)  # and HEAD
        runner = web.AppRunner(app, shutdown_timeout=1.0)
        await runner.setup()
        assert runner.server is not None  # noqa: S101 - for the type checker
        try:
            loop = asyncio.get_running_loop()
            factory = guarded(runner.server, ConnectionGuard(LIMITS))
            try:
                listening = await loop.create_server(factory, self._host, self.port)
            except OSError as error:
                raise ConfigError(
                    f"artifacts cannot be shared on {self._host}:{self.port}: {error.strerror or error}; "
                    "check 'share_host' and 'share_port'"
                ) from None
            self.port = listening.sockets[0].getsockname()[1]
            log.info("artifacts shared with neighbours", host=self._host, port=self.port)
            try:
                await asyncio.Event().wait()
            finally:
                listening.close()
        finally:
            await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        digest, path = request.match_info["digest"], request.match_info["path"]
        try:
            file = await in_thread(lambda _stop: self._listed(digest, path))
            folder = await in_thread(lambda _stop: self._store.path(digest)) if file is not None else None
        except StoreError as error:
            log.warning("artifact not shared", digest=digest, error=str(error))
            raise web.HTTPInternalServerError from None
        if file is None or folder is None:
            raise web.HTTPNotFound
        if self._sending.locked():
            raise web.HTTPServiceUnavailable(headers={"Retry-After": "5"})
        most_s = GRACE_S + min(file.size, RANGE_BYTES) / LEAST_BYTES_PER_S
        return _Sent(folder / file.path, self._sending, most_s)

    def _listed(self, digest: str, path: str) -> ArtifactFile | None:
        """Only what a manifest lists: a path that leads elsewhere is in none."""
        manifest = self._store.manifest(digest) if _DIGEST.fullmatch(digest) else None
        return next((file for file in manifest.files if file.path == path), None) if manifest is not None else None


class _Sent(web.FileResponse):
    """A file, or a range of it, as its bytes are, within a time."""

    def __init__(self, path: Path, sending: asyncio.Semaphore, most_s: float) -> None:
        super().__init__(path)
        self.content_type = "application/octet-stream"
        self._sending = sending
        self._most_s = most_s

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Send it."""
        try:
            async with self._sending, asyncio.timeout(self._most_s):
                return await super().prepare(request)
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
            raise ConnectionResetError("the neighbour reads too slowly") from None
