"""Listening: one socket, its connections guarded against those who send slowly, too much, or nothing at all."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from aiohttp import web

from agent.core.names import Names
from agent.core.ports import Inference
from agent.endpoint.app import create_app
from agent.endpoint.http.config import EndpointConfig
from agent.endpoint.http.connections import ConnectionGuard, guarded
from agent.endpoint.http.context import CONTEXT
from agent.endpoint.http.generation import OnFinished
from agent.endpoint.http.metrics import StatsSource
from agent.errors import ConfigError, UnavailableError

_BACKLOG = 1024


class EndpointServer:
    """Serves a model host to applications.

    ``async with`` it, or call ``start`` and ``stop``. ``url`` holds once started.
    """

    def __init__(
        self,
        inference: Inference,
        config: EndpointConfig,
        *,
        stats: StatsSource,
        on_finished: OnFinished | None = None,
        names: Callable[[], Names] = Names,
    ) -> None:
        self.config = config
        self.app = create_app(inference, config, stats=stats, on_finished=on_finished, names=names)
        self._runner: web.AppRunner | None = None
        self._server: asyncio.Server | None = None
        self._port = config.port

    @property
    def url(self) -> str:
        """``http://127.0.0.1:8600``, or ``unix:/path``."""
        if self.config.unix_socket is not None:
            return f"unix:{self.config.unix_socket}"
        host = "127.0.0.1" if self.config.host in ("0.0.0.0", "localhost") else self.config.host  # noqa: S104 - compared
        scheme = "https" if self.config.tls_cert else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self._port}"

    async def start(self) -> None:
        """Listen.

        Raises:
            ConfigError: the port is in use, the address is not this machine's, or a TLS file is broken.
        """
        context = self._tls()
        listening = self._listen()
        self._port = listening.getsockname()[1] if self.config.unix_socket is None else 0
        limits = self.config.limits
        runner = web.AppRunner(self.app, handler_cancellation=True, shutdown_timeout=self.config.drain_s)
        await runner.setup()
        assert runner.server is not None  # noqa: S101 - for the type checker
        guard = ConnectionGuard(limits, self.app[CONTEXT].metrics)
        self._runner = runner
        self._server = await asyncio.get_running_loop().create_server(
            guarded(runner.server, guard), sock=listening, ssl=context, backlog=_BACKLOG
        )

    async def stop(self) -> None:
        """No new connections; requests in flight get ``drain_s`` seconds; then everything is closed."""
        if self._server is not None:
            self._server.close()
        if self._runner is not None:
            await self._runner.cleanup()
        if self.config.unix_socket is not None and self._server is not None:
            self.config.unix_socket.unlink(missing_ok=True)
        self._server = self._runner = None

    async def __aenter__(self) -> EndpointServer:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def _tls(self) -> ssl.SSLContext | None:
        if self.config.tls_cert is None:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.config.tls_cert, self.config.tls_key)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"TLS: {self.config.tls_cert} with {self.config.tls_key} is unusable: {error}") from None
        return context

    def _listen(self) -> socket.socket:
        if self.config.unix_socket is not None:
            return _listen_unix(self.config.unix_socket)
        return _listen_tcp(self.config.host, self.config.port)


def _listen_tcp(host: str, port: int) -> socket.socket:
    where = f"{host}:{port}"
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, proto)
    except OSError as error:
        raise UnavailableError(
            f"the endpoint cannot listen on {where}: {error.strerror or error}; check 'host'"
        ) from None
    try:
        # On Windows the option would let two servers share a port; elsewhere it only skips TIME_WAIT.
        if hasattr(socket, "AF_UNIX") and not hasattr(socket, "SO_EXCLUSIVEADDRUSE"):
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)
        listening.setblocking(False)
    except OSError as error:
        listening.close()
        raise _refused(where, port, error) from None
    return listening


def _refused(where: str, port: int, error: OSError) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return UnavailableError(
            f"port {port} is in use ({where}): stop the program that has it, or give another 'port' (0: a free one)"
        )
    if error.errno == errno.EACCES:
        return ConfigError(f"the endpoint may not listen on {where}: ports below 1024 need a privilege; give another")
    return UnavailableError(f"the endpoint cannot listen on {where}: {error.strerror or error}")


def _listen_unix(path: Path) -> socket.socket:
    _remove_stale(path)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.bind(str(path))
        # Whoever may reach the folder may connect; the folder's mode is the gate, as with other daemons.
        path.chmod(0o660)
        listening.listen(_BACKLOG)
        listening.setblocking(False)
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"the endpoint cannot listen on {path}: {error.strerror or error}; check 'unix_socket' and its folder"
        ) from None
    return listening


def _remove_stale(path: Path) -> None:
    """A socket that nobody answers is left over from a crash; one that answers is another agent."""
    try:
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise ConfigError(f"{path} exists and is no socket: give another 'unix_socket'")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        with suppress(ConnectionRefusedError, FileNotFoundError):
            probe.connect(str(path))
            raise UnavailableError(
                f"{path} is in use: stop the endpoint that listens there, or give another 'unix_socket'"
            )
    path.unlink(missing_ok=True)
