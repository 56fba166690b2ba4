"""The bounded queue in front of a model: by priority, short requests first, and fair between clients.

Within a priority, clients take turns, each first in first out. A short request goes before a long one, unless the long
one has waited so long that it is its turn: nobody starves. Pure: callers pass the time in.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Entry(Generic[T]):
    item: T
    since: float


class _Turns(Generic[T]):
    """Round-robin over clients, first in first out for each."""

    def __init__(self) -> None:
        self._clients: OrderedDict[str, deque[_Entry[T]]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._clients)

    def push(self, client: str, entry: _Entry[T]) -> None:
        self._clients.setdefault(client, deque()).append(entry)

    def next(self) -> _Entry[T]:
        return next(iter(self._clients.values()))[0]

    def pop(self) -> T:
        client, entries = next(iter(self._clients.items()))
        entry = entries.popleft()
        self._clients.move_to_end(client)
        if not entries:
            del self._clients[client]
        return entry.item

    def remove(self, item: T) -> bool:
        for client, entries in self._clients.items():
            for entry in entries:
                if entry.item is item or entry.item == item:
                    entries.remove(entry)
                    if not entries:
                        del self._clients[client]
                    return True
        return False


class FairQueue(Generic[T]):
    """At most ``limit`` items; a lower ``priority`` goes first.

    A long one that has waited ``age_s`` seconds goes before the short ones of its priority.
    """

    def __init__(self, limit: int, age_s: float = 10.0) -> None:
        self._limit = limit
        self._age_s = age_s
        #: By priority: the short ones and the long ones.
        self._levels: dict[int, tuple[_Turns[T], _Turns[T]]] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    @property
    def full(self) -> bool:
        """No more is taken."""
        return self._size >= self._limit

    def push(self, item: T, *, priority: int = 0, client: str = "", short: bool = False, now: float = 0.0) -> bool:
        """Return whether it was taken. ``now`` in seconds, of the clock that ``pop`` is called with."""
        if self.full:
            return False
        level = self._levels.setdefault(priority, (_Turns(), _Turns()))
        level[0 if short else 1].push(client, _Entry(item, now))
        self._size += 1
        return True

    def pop(self, now: float = 0.0, *, short_only: bool = False) -> T | None:
        """Return the next one, or None where there is none.

        With ``short_only`` the next short one, whatever was before it.
        """
        for priority in sorted(self._levels):
            short, long = self._levels[priority]
            aged = bool(long) and now - long.next().since >= self._age_s and not short_only
            if short and not aged:
                turns = short
            elif long and not short_only:
                turns = long
            else:
                continue
            item = turns.pop()
            self._removed(priority)
            return item
        return None

    def remove(self, item: T) -> bool:
        """Take one out; whether it was in."""
        for priority, level in self._levels.items():
            if any(turns.remove(item) for turns in level):
                self._removed(priority)
                return True
        return False

    def drain(self) -> list[T]:
        """Take all out, in order."""
        taken = []
        while (item := self.pop()) is not None:
            taken.append(item)
        return taken

    def _removed(self, priority: int) -> None:
        self._size -= 1
        if not any(self._levels[priority]):
            del self._levels[priority]
