"""The controller: publishes the orders that were recorded, writes down what devices say, keeps the metadata fresh.

It decides nothing itself: what a report or a deadline means is in ``fleet/core/deployments.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Protocol

import structlog

from agent.contract import topics
from agent.link import Link, LinkError, Message
from agent.platform import systemd
from fleet.errors import RegistryError, RepositoryError
from fleet.registry import Received, Recorder, Registry
from fleet.registry.models import DeploymentRow
from fleet.trust.ca import DeviceCA
from fleet.trust.repository import Repository

_log = structlog.get_logger("controller")

POLL_S = 0.5
#: Deadlines are hours long; looking for passed ones more often would only cost reads.
TICK_S = 5.0
REFRESH_S = 3600.0
REFRESH_RETRY_S = 60.0
PUBLISH_TIMEOUT_S = 30.0
#: Orders whose acknowledgements are awaited together: a fleet's worth must not take a round trip each.
AT_ONCE = 64
#: Messages of devices that wait to be written; beyond it the oldest are dropped, as newer ones say more.
MAX_WAITING = 10_000
#: No control message is near it. What is longer is cut, and so is malformed: memory stays bounded.
MAX_MESSAGE_BYTES = 32 * 1024
BATCH = 500
#: The database may be away for a minute; then the process ends, says why, and is started again.
DATABASE_TRIES = 30
DATABASE_RETRY_S = 2.0
#: Metadata that only the operator can renew, since its keys are offline, is warned of this long before.
EXPIRY_WARNING = timedelta(days=30)


class Server(Protocol):
    """Answers wants: the chunk server and the metadata server."""

    async def start(self) -> None:
        """Subscribe."""
        ...

    async def stop(self) -> None:
        """Unsubscribe."""
        ...


class Controller:
    """One controller. ``run`` ends when ``stop`` is set, or raises what it cannot live without."""

    def __init__(
        self,
        link: Link,
        registry: Registry,
        repository: Repository,
        servers: tuple[Server, ...] = (),
        *,
        ca: DeviceCA | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        notify: Callable[[str], bool] = systemd.notify,
        poll_s: float = POLL_S,
    ) -> None:
        self._link, self._registry, self._repository, self._servers = link, registry, repository, servers
        self._clock, self._notify, self._poll_s = clock, notify, poll_s
        self._ca = ca
        self.recorder = Recorder(registry)
        self._waiting: asyncio.Queue[Received] = asyncio.Queue(MAX_WAITING)
        self._dropped = 0
        self._restarted = True
        self._unreachable = False

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until ``stop``.

        Raises:
            RegistryError: the database was away for too long.
            RepositoryError: the TUF repository cannot be used at start.
        """
        await asyncio.to_thread(self._repository.refresh_online)
        for topic in (topics.ALL_PRESENCE, topics.ALL_FACTS, topics.ALL_REPORTED, topics.ALL_HEALTH):
            await self._link.subscribe(topic, self._receive)
        for server in self._servers:
            await server.start()
        self._notify("READY=1")
        _log.info("controller ready")
        works = (self._write(), self._publish(), self._refresh(), _until(stop))
        tasks = [asyncio.create_task(work) for work in works]
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
        with contextlib.suppress(RegistryError):
            await asyncio.to_thread(self.recorder.record, self._drain())
        _log.info("controller stopped", dropped=self._dropped, malformed=self.recorder.malformed.total())

    # What devices say

    def _receive(self, message: Message) -> None:
        if self._waiting.full():
            self._waiting.get_nowait()
            self._dropped += 1
        payload = message.payload[:MAX_MESSAGE_BYTES]
        self._waiting.put_nowait(Received(message.topic, payload, self._clock(), message.retained))

    async def _write(self) -> None:
        while True:
            batch = [await self._waiting.get(), *self._drain(BATCH - 1)]
            for attempt in range(1, DATABASE_TRIES + 1):
                try:
                    await asyncio.to_thread(self.recorder.record, batch)
                    break
                except RegistryError as error:
                    if attempt == DATABASE_TRIES:
                        raise
                    if attempt == 1:
                        _log.error("database unusable, trying again", reason=str(error), waiting=self._waiting.qsize())
                    await asyncio.sleep(DATABASE_RETRY_S)

    def _drain(self, most: int = MAX_WAITING) -> list[Received]:
        return [self._waiting.get_nowait() for _ in range(min(most, self._waiting.qsize()))]

    # What devices are told

    async def _publish(self) -> None:
        failures, next_tick = 0, 0.0
        loop = asyncio.get_running_loop()
        while True:
            try:
                await self._publish_orders()
                await self._clear_removed()
                if loop.time() >= next_tick:
                    next_tick = loop.time() + TICK_S
                    await self._tick()
                failures = 0
            except RegistryError as error:
                failures += 1
                if failures == DATABASE_TRIES:
                    raise
                if failures == 1:
                    _log.error("database unusable, trying again", reason=str(error))
            self._notify("WATCHDOG=1")
            await asyncio.sleep(DATABASE_RETRY_S if failures else self._poll_s)

    async def _publish_orders(self) -> None:
        orders = await asyncio.to_thread(self._registry.to_publish, self._restarted, self._clock())
        for start in range(0, len(orders), AT_ONCE):
            some = orders[start : start + AT_ONCE]
            sent = await asyncio.gather(*(self._send_order(order) for order in some))
            done = [order for order, acknowledged in zip(some, sent, strict=True) if acknowledged]
            if done:
                ids = [order.id for order in done]
                await asyncio.to_thread(self._registry.mark_published, ids, self._clock())
            for order in done:
                _log_published(order)
            if len(done) < len(some):
                return
            self._notify("WATCHDOG=1")
        self._restarted = False

    async def _send_order(self, order: DeploymentRow) -> bool:
        return await self._send(topics.desired(order.device), order.envelope, deployment=order.id)

    async def _clear_removed(self) -> None:
        for device in await asyncio.to_thread(self._registry.to_clear):
            for topic in (topics.desired, topics.presence, topics.facts, topics.reported):
                if not await self._send(topic(device), b"", device=device):
                    return
            await asyncio.to_thread(self._registry.cleared, device)
            _log.info("device cleared", device=device)

    async def _send(self, topic: str, payload: bytes, **context: str) -> bool:
        try:
            async with asyncio.timeout(PUBLISH_TIMEOUT_S):
                await self._link.publish(topic, payload, retain=True)
        except (LinkError, TimeoutError) as error:
            if not self._unreachable:
                _log.warning("not published, trying again", reason=str(error) or "no acknowledgement", **context)
            self._unreachable = True
            return False
        self._unreachable = False
        return True

    async def _tick(self) -> None:
        for late in await asyncio.to_thread(self._registry.tick, self._clock()):
            _log.warning(
                "deployment given up",
                deployment=late.id,
                device=late.device,
                failure=late.failure_code,
                reason=late.failure_message,
            )

    # What must not expire

    async def _refresh(self) -> None:
        while True:
            try:
                if await asyncio.to_thread(self._repository.refresh_online):
                    _log.info("metadata signed again", roles="snapshot, timestamp")
                if self._ca is not None and self._ca.exists and await asyncio.to_thread(self._ca.refresh_crl):
                    _log.info("revocation list signed again; the broker must read it again")
                await self._warn_of_expiry()
                await asyncio.sleep(REFRESH_S)
            except RepositoryError as error:
                _log.error("not signed again, trying again", reason=str(error))
                await asyncio.sleep(REFRESH_RETRY_S)

    async def _warn_of_expiry(self) -> None:
        for role in await asyncio.to_thread(self._repository.status):
            if role.role in ("root", "targets") and role.expires and role.expires - self._clock() < EXPIRY_WARNING:
                _log.warning("metadata expires soon", role=role.role, expires=role.expires.isoformat())


def _log_published(order: DeploymentRow) -> None:
    again = order.published_at is not None
    _log.info(
        "order published again" if again else "order published",
        deployment=order.id,
        device=order.device,
        artifact=order.artifact,
        sequence=order.sequence,
    )


async def _until(stop: asyncio.Event) -> None:
    await stop.wait()
