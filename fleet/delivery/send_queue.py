"""Which chunk goes out next. Pure: no IO, no clock.

Wants of many devices for the same chunk become one publication; devices that are served alone take turns, so that
the credit of one does not keep the others waiting.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

#: A chunk on the shared topic is not repeated within this time: whoever follows the topic has it, or has lost it.
COALESCE_S = 1.0
#: Entries waiting in all; a want past that is dropped, and its device asks again.
MAX_WAITING = 1_000_000

Destination = tuple[str, str | None]
"""Digest of an artifact, and the device that is served alone, or None for the shared topic."""


@dataclass(slots=True)
class QueueCounts:
    """``coalesced``: chunks asked for that another's want had already brought onto the way."""

    coalesced: int = 0
    dropped: int = 0


class SendQueue:
    """Chunks waiting to be published, round robin over destinations. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[Destination, deque[int]] = OrderedDict()
        self._members: set[tuple[Destination, int]] = set()
        self._published: OrderedDict[tuple[str, int], float] = OrderedDict()
        self.counts = QueueCounts()

    def __len__(self) -> int:
        return len(self._members)

    def want(self, destination: Destination, indices: Iterable[int], now: float) -> None:
        """Queue what is not queued already, nor, on the shared topic, just published."""
        self._forget_old(now)
        for index in indices:
            if self._on_the_way(destination, index):
                self.counts.coalesced += 1
            elif len(self._members) >= MAX_WAITING:
                self.counts.dropped += 1
            else:
                self._members.add((destination, index))
                self._waiting.setdefault(destination, deque()).append(index)

    def next(self, now: float) -> tuple[Destination, int] | None:
        """Take the next chunk to publish, or None."""
        if not self._waiting:
            return None
        destination, indices = next(iter(self._waiting.items()))
        index = indices.popleft()
        if indices:
            self._waiting.move_to_end(destination)
        else:
            del self._waiting[destination]
        self._members.discard((destination, index))
        if destination[1] is None:
            self._published.pop((destination[0], index), None)
            self._published[destination[0], index] = now
        return destination, index

    def forget(self, unless: Callable[[str], bool] | None = None) -> None:
        """Drop what waits, or that part of it whose artifact ``unless`` denies: after a lost connection, say."""
        for destination in list(self._waiting):
            if unless is None or not unless(destination[0]):
                for index in self._waiting.pop(destination):
                    self._members.discard((destination, index))

    def _on_the_way(self, destination: Destination, index: int) -> bool:
        shared = destination[1] is None
        return (destination, index) in self._members or (shared and (destination[0], index) in self._published)

    def _forget_old(self, now: float) -> None:
        while self._published:
            key, at = next(iter(self._published.items()))
            if now - at < COALESCE_S:
                return
            del self._published[key]
