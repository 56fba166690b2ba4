"""The controller: starts its parts, and ends with the first of them that ends.

It decides nothing itself: what a report or a deadline means is in ``fleet/core/deployments.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import structlog

from agent.link import LinkError
from agent.platform import systemd
from fleet.daemon.barring import BarredDevices, Barring, Evict
from fleet.daemon.heartbeat import Heart
from fleet.daemon.ingest import Ingest
from fleet.daemon.link import ControlLink
from fleet.daemon.publisher import POLL_S, Publisher
from fleet.daemon.refresh import Refresh
from fleet.daemon.sweep import Sweep
from fleet.errors import RegistryError
from fleet.registry import Registry
from fleet.trust.ca import DeviceCA
from fleet.trust.repository import Repository

_log = structlog.get_logger(component="controller")


class Server(Protocol):
    """Answers wants: the chunk server and the metadata server."""

    async def start(self) -> None:
        """Subscribe."""
        ...

    async def stop(self) -> None:
        """Unsubscribe."""
        ...


class Part(Protocol):
    """Something that runs as long as the controller does."""

    async def run(self) -> None:
        """For ever, until cancelled."""
        ...


class Controller:
    """One controller. ``run`` ends when ``stop`` is set, or raises what it cannot live without."""

    def __init__(  # noqa: PLR0913 - keyword-only parts, each named where it is passed
        self,
        link: ControlLink,
        registry: Registry,
        repository: Repository,
        servers: tuple[Server, ...] = (),
        *,
        ca: DeviceCA | None = None,
        barred: BarredDevices | None = None,
        evict: Evict | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        notify: Callable[[str], bool] = systemd.notify,
        poll_s: float = POLL_S,
        parts: Sequence[Part] = (),
        certificates: Mapping[str, Path] | None = None,
    ) -> None:
        self._servers, self._notify, self._registry, self.link = servers, notify, registry, link
        self.barred = barred = BarredDevices() if barred is None else barred
        self._barring = Barring(registry, barred, evict, clock=clock)
        self._parts = parts
        self._heart = Heart(link, registry, clock)
        self.ingest = Ingest(link, registry, clock, self._barring.received, barred)
        self._sweep = Sweep(link, registry, self.ingest.receive, clock, self.ingest.recorder.take_missing)
        self._publisher = Publisher(link, registry, clock, notify, poll_s, owner=self._heart.id)
        self._refresh = Refresh(repository, ca, clock, certificates)

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until ``stop``.

        Raises:
            RegistryError: the database was away for too long.
            RepositoryError: the TUF repository cannot be used at start.
            LinkError: the broker refuses a subscription.
        """
        await self._refresh.start()
        await self._barring.start()
        await self._heart.beat()
        await self.ingest.start()
        for server in self._servers:
            await server.start()
        self._notify("READY=1")
        _log.info("controller ready")
        own = (self.ingest, self._sweep, self._publisher, self._refresh, self._barring, self._heart)
        parts: tuple[Part, ...] = (*own, *self._parts)
        tasks = [asyncio.create_task(part) for part in (*(part.run() for part in parts), _until(stop))]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await self._end(tasks)

    async def _end(self, tasks: list[asyncio.Task[None]]) -> None:
        self._notify("STOPPING=1")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for server in self._servers:
            with contextlib.suppress(LinkError):
                await server.stop()
        await self.ingest.finish()
        if not self._publisher.busy:  # else the claims end by themselves: something may be on its way to the broker
            with contextlib.suppress(RegistryError):
                await asyncio.to_thread(self._registry.outbox.release, self._heart.id)
        await self._heart.stop()
        malformed = self.ingest.recorder.malformed.total()
        _log.info("controller stopped", dropped=self.ingest.dropped, malformed=malformed)


async def _until(stop: asyncio.Event) -> None:
    await stop.wait()
