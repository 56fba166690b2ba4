"""Listening for the API: on loopback, or anywhere with TLS. A part that runs beside the controller."""

from __future__ import annotations

import asyncio
import ssl

import structlog
from aiohttp import web

from agent.platform.addresses import is_loopback
from fleet.api.app import create_app
from fleet.errors import UsageError
from fleet.operations.fleet import Fleet
from fleet.settings import FleetSettings

#: Of a request: the longest selector, each of its characters as four bytes in percent signs.
MAX_LINE_BYTES = 64 * 1024
DEFAULT = "127.0.0.1:8700"

_log = structlog.get_logger(component="api")


class ApiServer:
    """Serves the API of a fleet at the address in its settings.

    Raises:
        UsageError: the address is not loopback, and no certificate is set (from the constructor).
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        host, _, port = (fleet.settings.api or DEFAULT).rpartition(":")
        self.host, self.port = host.removeprefix("[").removesuffix("]"), int(port)
        self._tls = _tls(fleet.settings)
        if self._tls is None and not is_loopback(self.host):
            raise UsageError(
                f"api {self.host}:{self.port} can be reached from other machines: set api_cert and api_key, so that "
                "tokens are not sent in the clear, or listen on 127.0.0.1"
            )
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        """Where clients connect."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self._tls else 'http'}://{host}:{self.port}"

    async def start(self) -> None:
        """Listen.

        Raises:
            UsageError: the address is in use, or cannot be listened on.
        """
        self._runner = web.AppRunner(
            create_app(self._fleet), access_log=None, shutdown_timeout=1.0, max_line_size=MAX_LINE_BYTES
        )
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self.host, self.port, ssl_context=self._tls).start()
        except OSError as error:
            await self._runner.cleanup()
            raise UsageError(f"api {self.host}:{self.port} cannot be listened on: {error.strerror or error}") from None
        if self.port == 0:
            self.port = self._runner.addresses[0][1]
        _log.info("API listens", url=self.url)

    async def stop(self) -> None:
        """End every connection, and listen no more."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def run(self) -> None:
        """Serve, for ever."""
        await self.start()
        try:
            await asyncio.Event().wait()
        finally:
            await self.stop()


def _tls(settings: FleetSettings) -> ssl.SSLContext | None:
    if settings.api_cert is None or settings.api_key is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(settings.api_cert, settings.api_key)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"api_cert {settings.api_cert}, api_key {settings.api_key}: cannot be used: {error}") from None
    return context
