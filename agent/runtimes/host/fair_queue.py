"""The bounded queue in front of a model: by priority, and fair between clients of one priority."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Round-robin over clients, first in first out for each; a lower ``priority`` goes first."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._levels: dict[int, OrderedDict[str, deque[T]]] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    @property
    def full(self) -> bool:
        """No more is taken."""
        return self._size >= self._limit

    def push(self, item: T, *, priority: int = 0, client: str = "") -> bool:
        """Whether it was taken."""
        if self.full:
            return False
        self._levels.setdefault(priority, OrderedDict()).setdefault(client, deque()).append(item)
        self._size += 1
        return True

    def pop(self) -> T | None:
        """The next one: of the lowest priority number, of the client whose turn it is."""
        for priority in sorted(self._levels):
            clients = self._levels[priority]
            client, items = next(iter(clients.items()))
            item = items.popleft()
            self._size -= 1
            clients.move_to_end(client)
            self._tidy(priority, client)
            return item
        return None

    def remove(self, item: T) -> bool:
        """Take one out; whether it was in."""
        for priority, clients in self._levels.items():
            for client, items in clients.items():
                if item in items:
                    items.remove(item)
                    self._size -= 1
                    self._tidy(priority, client)
                    return True
        return False

    def drain(self) -> list[T]:
        """Take all out, in order."""
        taken = []
        while (item := self.pop()) is not None:
            taken.append(item)
        return taken

    def _tidy(self, priority: int, client: str) -> None:
        clients = self._levels[priority]
        if not clients[client]:
            del clients[client]
        if not clients:
            del self._levels[priority]
