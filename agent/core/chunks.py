"""The chunks of an artifact, numbered as on the wire, and where their bytes go."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from hashlib import sha256

from agent.contract.chunk_index import Content, Layout, Place


class ChunkTable:
    """Chunk ``n`` counts over the content's files, in order.

    Bytes that occur twice are wanted once, under the number of their first occurrence: ``first[n]``. ``packed`` are
    the records of an index (``agent.contract.chunk_index``); None: the files list their chunks. At 160,000 chunks, as
    10 GiB have, the table takes 10 MiB beside ``packed``: it must fit on a small device.

    Raises:
        ValueError: the index does not list exactly the files' bytes.
    """

    def __init__(self, content: Content, packed: bytes | None = None) -> None:
        self.layout = Layout(content.files, packed)
        self.sizes = self.layout.sizes
        self.first = array("I", range(len(self.sizes)))
        self._repeats: dict[int, list[int]] = {}
        # Open addressing in an array: a dict of so many digests would take as much again as all of the rest.
        self._mask = (1 << (len(self.sizes).bit_length() + 1)) - 1
        self._slots = array("I", bytes(4 * (self._mask + 1)))
        for index in range(len(self.sizes)):
            slot = self._slot(self.digest(index))
            if self._slots[slot]:
                first = self.first[index] = self._slots[slot] - 1
                self._repeats.setdefault(first, []).append(index)
            else:
                self._slots[slot] = index + 1

    def __len__(self) -> int:
        return len(self.sizes)

    def digest(self, number: int) -> bytes:
        """Return the SHA-256 of a chunk."""
        return self.layout.digest(number)

    def holds(self, number: int, data: bytes) -> bool:
        """Return whether these are the bytes of a chunk, by its SHA-256."""
        return sha256(data).digest() == self.digest(number)

    def find(self, digest: bytes) -> int | None:
        """Return the first occurrence of the chunk with this SHA-256, None where there is none."""
        return self._slots[self._slot(digest)] - 1 if self._slots[self._slot(digest)] else None

    def _slot(self, digest: bytes) -> int:
        """Return the slot of the chunk with this digest, or the free one where it would be; slots hold number + 1."""
        slot = int.from_bytes(digest[:8]) & self._mask
        while self._slots[slot] and self.digest(self._slots[slot] - 1) != digest:
            slot = (slot + 1) & self._mask
        return slot

    def unique(self) -> Iterator[int]:
        """Yield each number that is a first occurrence."""
        return (index for index, first in enumerate(self.first) if first == index)

    def of_file(self, number: int) -> Iterator[tuple[int, int]]:
        """Yield the chunks of file number ``number`` in order: first occurrence, and size in bytes."""
        return ((self.first[index], self.sizes[index]) for index in self.layout.of_file(number))

    def places(self, first: int) -> list[Place]:
        """Everywhere the bytes of the first occurrence ``first`` belong."""
        return [self.layout.place(index) for index in (first, *self._repeats.get(first, ()))]

    def occurrences(self, first: int) -> int:
        """Return how many chunks of the artifact have these bytes."""
        return 1 + len(self._repeats.get(first, ()))
