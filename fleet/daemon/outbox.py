"""Publishes what the broker should have retained: each item on its own, and those that fail again later.

One topic that the broker refuses, or that it never acknowledges, holds up nothing else. An item is forgotten once it
was taken, so nothing that was sent is sent again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

import structlog

from agent.link import Link, LinkError
from fleet.core.retry import RetryPolicy

PUBLISH_TIMEOUT_S = 30.0
#: Publications whose acknowledgements are awaited together: a fleet's worth must not take a round trip each.
AT_ONCE = 64

_log = structlog.get_logger("controller")


@dataclass(frozen=True, slots=True)
class Item:
    """Retained publications to one device's topics, in order; an empty payload clears its topic.

    ``key`` names the item: what is offered again under the same key is the same.
    """

    key: str
    device: str
    publications: tuple[tuple[str, bytes], ...] = field(repr=False)


@dataclass(slots=True)
class _Failures:
    count: int
    due: float
    error: str


@dataclass(slots=True)
class _Settled:
    """What has ended since it was last asked."""

    sent: list[Item] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


class Outbox:
    """Used by one task. ``monotonic`` are seconds, as ``loop.time``."""

    def __init__(self, link: Link, monotonic: Callable[[], float], policy: RetryPolicy | None = None) -> None:
        self._link, self._monotonic, self._policy = link, monotonic, policy or RetryPolicy()
        self._failures: dict[str, _Failures] = {}
        self._in_flight: dict[str, asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._settled = _Settled()

    @property
    def errors(self) -> Mapping[str, str]:
        """By key, why each item that has failed was not taken."""
        return {key: failures.error for key, failures in self._failures.items()}

    @property
    def busy(self) -> bool:
        """Something is on its way."""
        return bool(self._in_flight)

    def due(self, devices: Mapping[str, str]) -> list[str]:
        """Which of these keys may be offered now; each is mapped to its device.

        Not an item that failed a moment ago, nor a second one to a device: an older order must not overtake it.
        """
        now, found = self._monotonic(), []
        for key, device in devices.items():
            failures = self._failures.get(key)
            if device not in self._in_flight and (failures is None or failures.due <= now):
                found.append(key)
        return found

    def keep_only(self, keys: Collection[str]) -> None:
        """Forget the failures of items that nobody wants to send any more."""
        self._failures = {key: failures for key, failures in self._failures.items() if key in keys}

    def offer(self, items: Iterable[Item]) -> None:
        """Send these; what became of them, ``settled`` says."""
        for item in items:
            if item.device not in self._in_flight:
                task = asyncio.create_task(self._send(item))
                self._in_flight[item.device] = task

    async def wait(self, timeout_s: float) -> None:
        """Until all that is on its way has ended, or the time is up."""
        if self._in_flight:
            await asyncio.wait(list(self._in_flight.values()), timeout=timeout_s)
        else:
            await asyncio.sleep(timeout_s)

    def settled(self) -> tuple[list[Item], dict[str, str]]:
        """What was taken, and by key why the others were not; the same again until ``forget``."""
        return list(self._settled.sent), dict(self._settled.refused)

    def forget(self) -> None:
        """What ``settled`` told was written down."""
        self._settled = _Settled()

    async def close(self) -> None:
        """Give up what is on its way."""
        tasks = list(self._in_flight.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _send(self, item: Item) -> None:
        try:
            async with self._slots:
                for topic, payload in item.publications:
                    async with asyncio.timeout(PUBLISH_TIMEOUT_S):
                        await self._link.publish(topic, payload, retain=True)
        except (LinkError, TimeoutError) as error:
            self._failed(item, str(error) or f"no acknowledgement within {PUBLISH_TIMEOUT_S:g} s")
        else:
            self._failures.pop(item.key, None)
            self._settled.refused.pop(item.key, None)
            self._settled.sent.append(item)
        finally:
            del self._in_flight[item.device]

    def _failed(self, item: Item, error: str) -> None:
        if not self._link.connected:  # no word on this item: all wait for the broker, and none for longer
            return
        before = self._failures.get(item.key)
        count = before.count + 1 if before else 1
        wait_s = self._policy.wait_s(count)
        self._failures[item.key] = _Failures(count, self._monotonic() + wait_s, error)
        self._settled.refused[item.key] = error
        if before is None or before.error != error:
            _log.warning("publication refused", device=item.device, item=item.key, error=error, next_try_s=wait_s)
