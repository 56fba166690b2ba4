"""Chunks onto the disk, each after its own SHA-256 was checked, wherever they come from."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from agent.contract.delta import WHOLE, chunk_from
from agent.core.transfer import Outcome
from agent.errors import StoreError
from agent.platform.open_files import BaseFiles
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


class DeltaIntake(Intake):
    """Takes the pieces of a delta, and writes the chunks that they and the base tell."""

    def __init__(self, partial: Partial, present: Iterable[int], base: BaseFiles) -> None:
        super().__init__(partial, present)
        self._base = base
        self._lock = threading.Lock()
        self._closed = False
        #: Chunks that come whole: what differs is no smaller, or the base on the disk is not what it was.
        self.useless = 0

    def accept(self, first: int, data: bytes) -> Outcome:
        """Write the chunk that the piece ``data`` tells, if it is the right one and not there yet."""
        with self._lock:  # a piece may still come when the transfer has ended, and a descriptor be another file's then
            if self._closed or self.has(first) or self.error is not None:
                return Outcome.DUPLICATE
            base = self._read(first)
        chunk = chunk_from(data, base) if base is not None and data != WHOLE else None
        outcome = Outcome.BAD if chunk is None else super().accept(first, chunk)
        if outcome is Outcome.BAD:
            self.useless += 1
            return Outcome.USELESS
        return outcome

    def close(self) -> None:
        """Take nothing more, and close the base; may be called twice."""
        with self._lock:
            self._closed = True
            self._base.close()

    def _read(self, first: int) -> bytes | None:
        place = self.partial.table.places(first)[0]
        try:
            return self._base.read(place.file, place.offset, self.partial.table.sizes[first])
        except OSError:  # what does not read tells nothing; what of that artifact is in use is verified elsewhere
            return None
