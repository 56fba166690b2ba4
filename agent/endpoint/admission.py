"""How many sequences the model host gets at once, and who waits: so that one busy client does not starve the others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from agent.core.inference import InferenceError
from agent.endpoint.fairness import FairQueue

#: Weight of the newest request in the moving average of how long one holds its place.
_SMOOTHING = 0.2


class Admission:
    """Places for sequences. ``capacity`` is asked anew each time, as it changes with the model."""

    def __init__(self, capacity: Callable[[], int], queued: int) -> None:
        self._capacity = capacity
        self._queue: FairQueue[asyncio.Future[None]] = FairQueue(queued)
        self._held = 0
        self._seconds = 1.0

    @property
    def waiting(self) -> int:
        """Sequences in the queue."""
        return len(self._queue)

    @property
    def active(self) -> int:
        """Sequences handed to the model host."""
        return self._held

    def room_for(self, sequences: int) -> None:
        """Refuse a request before any of it starts.

        Raises:
            InferenceError: busy, with the time after which a place is likely.
        """
        free = max(0, self._capacity() - self._held) if not self._queue else 0
        if sequences - free > self._queue.limit - len(self._queue):
            raise self._busy()

    @asynccontextmanager
    async def place(self, client: str) -> AsyncIterator[None]:
        """Hold a place; waits for one in turn.

        Raises:
            InferenceError: busy: the queue is full.
        """
        await self._enter(client)
        loop = asyncio.get_running_loop()
        since = loop.time()
        try:
            yield
        finally:
            self._seconds += _SMOOTHING * (loop.time() - since - self._seconds)
            self._leave()

    async def _enter(self, client: str) -> None:
        if self._held < self._capacity() and not self._queue:
            self._held += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            self._queue.push(client, turn)
        except OverflowError:
            raise self._busy() from None
        try:
            await turn
        except asyncio.CancelledError:
            # The place may have been given in the very step in which the client went away.
            if not self._queue.remove(client, turn):
                self._leave()
            raise

    def _leave(self) -> None:
        self._held -= 1
        self.admit()

    def admit(self) -> None:
        """Give free places to those waiting; call it when the capacity may have grown."""
        while self._queue and self._held < self._capacity():
            turn = self._queue.pop()
            if not turn.done():
                self._held += 1
                turn.set_result(None)

    def _busy(self) -> InferenceError:
        rounds = 1 + len(self._queue) / max(1, self._capacity())
        message = f"{len(self._queue)} requests are waiting, and {self._queue.limit} is the limit: try again later"
        return InferenceError("busy", message, retry_after_s=min(60.0, max(1.0, rounds * self._seconds)))
