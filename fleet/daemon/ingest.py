"""Writes down what devices report, in batches, and acknowledges a message once it is written.

Live messages come through a shared subscription: each goes to one of the controllers, and none that the broker has
retained comes that way. What was said while nobody listened, ``sweep`` reads. A message that is not acknowledged when
the controller is killed was not written; the device's retained word is read again by the next one.

Health is sent at QoS 0 and newest wins: where the database is slower than the devices, reports that a newer one of
the same device has replaced are not written, and their number is logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Container
from datetime import datetime

import structlog

from agent.contract import topics
from agent.link import Link, Message
from fleet.daemon.retry import DatabaseRetry
from fleet.errors import RegistryError
from fleet.registry import Received, Recorder, Registry

#: No control message is near it. What is longer is cut, and so is malformed: memory stays bounded.
MAX_MESSAGE_BYTES = 32 * 1024
#: Messages in one transaction, and what the broker may send without an acknowledgement.
BATCH = 500
#: Devices whose newest health report waits; beyond it reports are dropped.
MAX_HEALTH = 200_000
#: How often what was dropped or replaced is logged.
COUNTS_S = 60.0

_LEAVES = ("presence", "facts", "reported", "health")

_log = structlog.get_logger(component="controller")


class Ingest:
    """Subscribes to what devices report, and writes it. ``receive`` may be called from any thread."""

    def __init__(
        self,
        link: Link,
        registry: Registry,
        clock: Callable[[], datetime],
        on_barred: Callable[[str, Message], None],
        barred: Container[str] = (),
    ) -> None:
        self._link, self._registry, self._clock = link, registry, clock
        self._barred, self._on_barred = barred, on_barred
        self.recorder = Recorder(registry)
        #: Health reports that were not written, as there were too many devices or a newer one came first.
        self.dropped = self.replaced = 0
        self._counted = (0, 0)
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Received, Callable[[], None] | None]] = deque()
        self._health: dict[str, Received] = {}
        self._wake, self._woken = asyncio.Event(), False
        self._loop: asyncio.AbstractEventLoop | None = None

    async def start(self) -> None:
        """Subscribe.

        Raises:
            LinkError: the broker refuses.
            RegistryError: the database cannot be used.
        """
        self._loop = asyncio.get_running_loop()
        group = await asyncio.to_thread(self._registry.shared, "group")
        for leaf in _LEAVES:
            topic = topics.for_one_of(group, leaf, f"{topics.PREFIX}/devices/+/{leaf}")
            await self._link.subscribe(
                topic, self.receive, qos=0 if leaf == "health" else 1, bulk=True, manual_ack=True
            )

    async def run(self) -> None:
        """Write what comes, for ever.

        Raises:
            RegistryError: the database was away for too long.
        """
        retry = DatabaseRetry()
        next_counts = asyncio.get_running_loop().time() + COUNTS_S
        while True:
            # Not wait_for: until Python 3.12 it swallows a cancellation that comes together with the event.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(COUNTS_S):
                    await self._wake.wait()
            batch, owed = self._take(BATCH)
            while batch and not await self._written(batch, retry):
                await retry.wait()
            for acknowledge in owed:
                acknowledge()
            if asyncio.get_running_loop().time() >= next_counts:
                next_counts = asyncio.get_running_loop().time() + COUNTS_S
                self._log_counts()

    async def finish(self) -> None:
        """Write what still waits, if the database lets one."""
        with contextlib.suppress(RegistryError):
            while True:
                batch, owed = self._take(BATCH)
                if not batch:
                    return
                await asyncio.to_thread(self.recorder.record, batch)
                for acknowledge in owed:
                    acknowledge()

    def receive(self, message: Message) -> None:
        """Keep a message until it is written."""
        found = topics.parse_device(message.topic)
        if found is not None and found[0] in self._barred:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._on_barred, found[0], message)
            if message.acknowledge is not None:
                message.acknowledge()
            return
        received = Received(message.topic, message.payload[:MAX_MESSAGE_BYTES], self._clock(), message.retained)
        with self._lock:
            if message.acknowledge is None and found is not None and found[1] == "health":
                self._keep_health(found[0], received)
            else:
                self._waiting.append((received, message.acknowledge))
            wake, self._woken = not self._woken, True
        if wake and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to write
                self._loop.call_soon_threadsafe(self._wake.set)

    def _keep_health(self, device: str, received: Received) -> None:
        if device in self._health:
            self.replaced += 1
        elif len(self._health) >= MAX_HEALTH:
            self.dropped += 1
            return
        self._health[device] = received

    def _take(self, most: int) -> tuple[list[Received], list[Callable[[], None]]]:
        """Return what is to be written next, in the order in which it came, and whom to tell when it was."""
        with self._lock:
            taken = [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]
            devices = [device for device, _ in zip(self._health, range(most - len(taken)), strict=False)]
            health = [self._health.pop(device) for device in devices]
            if not self._waiting and not self._health:
                self._woken = False
                self._wake.clear()
        return [one for one, _ in taken] + health, [owed for _, owed in taken if owed is not None]

    async def _written(self, batch: list[Received], retry: DatabaseRetry) -> bool:
        with retry.attempt(waiting=len(self._waiting) + len(self._health)) as attempt:
            await asyncio.to_thread(self.recorder.record, batch)
        return attempt.succeeded

    def _log_counts(self) -> None:
        counts = (self.dropped, self.replaced)
        if counts != self._counted:
            dropped, replaced = (now - before for now, before in zip(counts, self._counted, strict=True))
            _log.warning(
                "health reports not written", dropped=dropped, replaced_by_newer=replaced, seconds=COUNTS_S,
                hint="the database is slower than the devices report; raise their health interval, or use PostgreSQL",
            )  # fmt: skip
        self._counted = counts
