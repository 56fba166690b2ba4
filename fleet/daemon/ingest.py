"""Writes down what devices report: messages wait in a bounded queue, and go to the database in batches."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Container
from datetime import datetime

import structlog

from agent.contract import topics
from agent.link import Link, Message
from fleet.daemon.retry import DatabaseRetry
from fleet.errors import RegistryError
from fleet.registry import Received, Recorder, Registry

#: Messages of devices that wait to be written; beyond it the oldest are dropped, as newer ones say more.
MAX_WAITING = 10_000
#: No control message is near it. What is longer is cut, and so is malformed: memory stays bounded.
MAX_MESSAGE_BYTES = 32 * 1024
BATCH = 500

_log = structlog.get_logger("controller")


class Ingest:
    """Subscribes to what devices report, and writes it."""

    def __init__(
        self,
        link: Link,
        registry: Registry,
        clock: Callable[[], datetime],
        on_barred: Callable[[str, Message], None],
        barred: Container[str] = (),
    ) -> None:
        self._link, self._clock, self._barred, self._on_barred = link, clock, barred, on_barred
        self.recorder = Recorder(registry)
        self.dropped = 0
        self._waiting: asyncio.Queue[Received] = asyncio.Queue(MAX_WAITING)

    async def start(self) -> None:
        """Subscribe.

        Raises:
            LinkError: the broker refuses.
        """
        for topic in (topics.ALL_PRESENCE, topics.ALL_FACTS, topics.ALL_REPORTED, topics.ALL_HEALTH):
            await self._link.subscribe(topic, self._receive)

    async def run(self) -> None:
        """Write what comes, for ever.

        Raises:
            RegistryError: the database was away for too long.
        """
        retry = DatabaseRetry()
        while True:
            batch = [await self._waiting.get(), *self._drain(BATCH - 1)]
            while not await self._written(batch, retry):
                await retry.wait()

    async def finish(self) -> None:
        """Write what still waits, if the database lets one."""
        with contextlib.suppress(RegistryError):
            await asyncio.to_thread(self.recorder.record, self._drain())

    async def _written(self, batch: list[Received], retry: DatabaseRetry) -> bool:
        with retry.attempt(waiting=self._waiting.qsize()) as attempt:
            await asyncio.to_thread(self.recorder.record, batch)
        return attempt.succeeded

    def _receive(self, message: Message) -> None:
        found = topics.parse_device(message.topic)
        if found is not None and found[0] in self._barred:
            self._on_barred(found[0], message)
            return
        if self._waiting.full():
            self._waiting.get_nowait()
            self.dropped += 1
        payload = message.payload[:MAX_MESSAGE_BYTES]
        self._waiting.put_nowait(Received(message.topic, payload, self._clock(), message.retained))

    def _drain(self, most: int = MAX_WAITING) -> list[Received]:
        return [self._waiting.get_nowait() for _ in range(min(most, self._waiting.qsize()))]
