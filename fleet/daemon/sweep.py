"""Reads what the broker has retained of the known devices: all that was said while no controller listened.

All of it at once would overflow the broker's queue for one client (10,000 devices have 40,000 retained messages, and
mosquitto queues 1,000), which it does in silence. So the topics are read by their names, a few hundred at a time.

The orders that are retained are compared with the table on the way: where the broker has lost one, as an embedded
broker does, or has another, the device goes into the outbox.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from datetime import datetime

import structlog

from agent.contract import topics
from agent.link import LinkError, Message
from fleet.daemon.link import ControlLink
from fleet.errors import RegistryError
from fleet.registry import Registry

#: Devices that are read at a time, four topics each: well below the queue that a broker keeps for one client.
AT_ONCE = 50
#: A topic at which nothing is retained is silent. So long after the last message the others are taken to be.
QUIET_S = 1.0
RETRY_S = 5.0
MISSING_S = 5.0

_REPORTS = (topics.presence, topics.facts, topics.reported)

_log = structlog.get_logger(component="controller")


class Sweep:
    """Runs after each connect. ``receive`` gets every report; it is called on the link's thread.

    ``missing`` names devices of which a message did not come: theirs are read every few seconds.
    """

    def __init__(
        self,
        link: ControlLink,
        registry: Registry,
        receive: Callable[[Message], None],
        clock: Callable[[], datetime],
        missing: Callable[[], Sequence[str]] = tuple,
        quiet_s: float = QUIET_S,
    ) -> None:
        self._link, self._registry, self._receive = link, registry, receive
        self._clock, self._missing, self._quiet_s = clock, missing, quiet_s
        self._due = asyncio.Event()
        self._due.set()
        link.on_connected(self._due.set)

    async def run(self) -> None:
        """Sweep after each connect, for ever."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(MISSING_S):
                    await self._due.wait()
            try:
                if self._due.is_set():
                    self._due.clear()
                    await self._sweep()
                elif self._link.connected:
                    await self._read_missing()
            except (LinkError, RegistryError) as error:
                _log.warning("retained messages not read, trying again", error=str(error))
                await asyncio.sleep(RETRY_S)
                self._due.set()

    async def _read_missing(self) -> None:
        missing = self._missing()
        for start in range(0, len(missing), AT_ONCE):
            await self._read(missing[start : start + AT_ONCE])
        if missing:
            _log.info("read again what did not come", devices=len(missing))

    async def _sweep(self) -> None:
        began = asyncio.get_running_loop().time()
        devices = await asyncio.to_thread(self._registry.devices.ids)
        found = wrong = 0
        for start in range(0, len(devices), AT_ONCE):
            read = await self._read(devices[start : start + AT_ONCE])
            found += read[0]
            wrong += read[1]
        if devices:
            seconds = round(asyncio.get_running_loop().time() - began, 1)
            _log.info("retained messages read", devices=len(devices), messages=found, seconds=seconds)
        if wrong:
            _log.warning("orders at the broker differ from the table, publishing again", devices=wrong)

    async def _read(self, devices: Sequence[str]) -> tuple[int, int]:
        """Return how many messages there were, and how many devices whose retained order is not the table's."""
        expected = await asyncio.to_thread(self._registry.outbox.expected, devices, self._clock())
        ordered = [device for device, order in expected.items() if order is not None]
        names = [topic(device) for device in devices for topic in _REPORTS]
        names += [topics.desired(device) for device in ordered]
        reading = _Reading(names, self._receive, asyncio.get_running_loop())
        await self._link.subscribe_exact(names, reading.received, manual_ack=True)
        try:
            await reading.wait(self._quiet_s)
        finally:
            await self._link.unsubscribe_exact(names)
        differ = [device for device in ordered if reading.orders.get(device) != expected[device]]
        if differ:
            await asyncio.to_thread(self._put, differ)
        return reading.found, len(differ)

    def _put(self, devices: Sequence[str]) -> None:
        # Once more: what was ordered since is on its way already.
        self._registry.outbox.put(list(self._registry.outbox.expected(devices, self._clock())), self._clock())


class _Reading:
    """Of some topics. ``received`` is called on the link's thread, the rest on the event loop."""

    def __init__(
        self, names: Sequence[str], receive: Callable[[Message], None], loop: asyncio.AbstractEventLoop
    ) -> None:
        self._missing, self._receive, self._loop = set(names), receive, loop
        self.orders: dict[str, bytes] = {}
        self.found = 0
        self._last = loop.time()
        self._complete = asyncio.Event()

    def received(self, message: Message) -> None:
        """One message of these topics; an order is looked at and not recorded."""
        device = topics.parse_device(message.topic)
        if device is not None and device[1] == "desired":
            self.orders[device[0]] = message.payload
            if message.acknowledge is not None:
                message.acknowledge()
        else:
            self._receive(message)
        self._loop.call_soon_threadsafe(self._count, message.topic)

    def _count(self, topic: str) -> None:
        self.found += 1
        self._last = self._loop.time()
        self._missing.discard(topic)
        if not self._missing:
            self._complete.set()

    async def wait(self, quiet_s: float) -> None:
        """Until each topic has had its message, or nothing has come for ``quiet_s``."""
        self._last = self._loop.time()
        while not self._complete.is_set():
            left = self._last + quiet_s - self._loop.time()
            if left <= 0:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._complete.wait()
