"""Who is next: clients take turns, whatever each of them has queued. Pure."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """One line a client, served in turn. Bounded over all lines together.

    A smaller ``priority`` goes first; within it, clients take turns.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lines: OrderedDict[tuple[int, str], deque[Item]] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    @property
    def full(self) -> bool:
        """Whether one more is refused."""
        return self._size >= self.limit

    def push(self, client: str, item: Item, priority: int = 0) -> None:
        """To the end of that client's line.

        Raises:
            OverflowError: the queue is full.
        """
        if self.full:
            raise OverflowError(f"{self._size} are waiting, and {self.limit} is the limit")
        self._lines.setdefault((priority, client), deque()).append(item)
        self._size += 1

    def pop(self) -> Item:
        """The head of the line whose turn it is; that client then goes to the back.

        Raises:
            IndexError: nobody waits.
        """
        if not self._lines:
            raise IndexError("nobody waits")
        urgent = min(priority for priority, _ in self._lines)
        key = next(key for key in self._lines if key[0] == urgent)
        line = self._lines[key]
        item = line.popleft()
        self._size -= 1
        if line:
            self._lines.move_to_end(key)
        else:
            del self._lines[key]
        return item

    def remove(self, client: str, item: Item, priority: int = 0) -> bool:
        """Take someone out who does not wait any more; False if it was not in line."""
        line = self._lines.get((priority, client))
        if line is None or item not in line:
            return False
        line.remove(item)
        self._size -= 1
        if not line:
            del self._lines[priority, client]
        return True
