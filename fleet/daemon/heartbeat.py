"""Says in the database that this controller is alive, and whether the broker answers it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import secrets
from collections.abc import Callable
from datetime import datetime

import structlog

from agent.platform.versions import product_version
from fleet.daemon.link import ControlLink
from fleet.errors import RegistryError
from fleet.registry import Registry
from fleet.registry.controllers import Heartbeat

HEARTBEAT_S = 5.0

_log = structlog.get_logger(component="controller")


class Heart:
    """Beats once an interval. A database that is away ends the controller by other parts, not by this one."""

    def __init__(
        self, link: ControlLink, registry: Registry, clock: Callable[[], datetime], interval_s: float = HEARTBEAT_S
    ) -> None:
        self._link, self._registry, self._clock, self._interval_s = link, registry, clock, interval_s
        self._host, self._started_at = platform.node() or "unknown", clock()
        self.id = f"{self._host[:80]}-{os.getpid()}-{secrets.token_hex(4)}"
        self._connected_since: datetime | None = self._started_at if link.connected else None
        link.on_connected(self._connected)

    async def beat(self) -> None:
        """One beat.

        Raises:
            RegistryError: the database cannot be used.
        """
        if not self._link.connected:
            self._connected_since = None
        elif self._connected_since is None:
            self._connected_since = self._clock()
        heartbeat = Heartbeat(
            id=self.id,
            host=self._host,
            pid=os.getpid(),
            version=product_version(),
            started_at=self._started_at,
            interval_s=self._interval_s,
            broker=self._link.address,
            connected_since=self._connected_since,
            broker_error=None if self._connected_since else self._link.reason or None,
        )
        await asyncio.to_thread(self._registry.controllers.beat, heartbeat, self._clock())

    async def run(self) -> None:
        """Beat, for ever."""
        failing = False
        while True:
            try:
                await self.beat()
                failing = False
            except RegistryError as error:
                if not failing:
                    _log.warning("heartbeat not written", error=str(error))
                failing = True
            await asyncio.sleep(self._interval_s)

    async def stop(self) -> None:
        """The last beat."""
        with contextlib.suppress(RegistryError):
            await asyncio.to_thread(self._registry.controllers.stopped, self.id, self._clock())

    def _connected(self) -> None:
        self._connected_since = self._clock()
