"""Chunks onto the disk, each after its own SHA-256 was checked, wherever they come from."""

from __future__ import annotations

from collections.abc import Iterable

from agent.core.transfer import Outcome
from agent.errors import StoreError
from agent.store.partial import Partial

#: Brought to the disk while more comes: a power cut then costs little, and the end does not wait for all of it.
FLUSH_BYTES = 32 * 1024 * 1024


class Intake:
    """Of one transfer. ``present`` are the first occurrences that the disk holds; ``error`` is what the disk said."""

    def __init__(self, partial: Partial, present: Iterable[int]) -> None:
        self.error: StoreError | None = None
        self.partial = partial
        self._received = bytearray(len(partial.table))
        for first in present:
            self._received[first] = 1

    def has(self, first: int) -> bool:
        """Return whether these bytes are on the disk."""
        return bool(self._received[first])

    def accept(self, first: int, data: bytes) -> Outcome:
        """Write them if they are the right ones and not there yet. From any thread, by one at a time."""
        if self._received[first] or self.error is not None:
            return Outcome.DUPLICATE
        if not self.partial.table.holds(first, data):
            return Outcome.BAD
        try:
            if not self.partial.write(first, data):
                return Outcome.DUPLICATE
        except StoreError as error:
            self.error = error
            return Outcome.DUPLICATE
        self._received[first] = 1
        return Outcome.GOOD

    def flush(self) -> None:
        """Bring to the disk what is there, beside further writes; blocking."""
        try:
            self.partial.flush()
        except StoreError as error:
            self.error = error
