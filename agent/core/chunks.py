"""The chunks of an artifact, numbered as on the wire, and where their bytes go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from agent.contract.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Place:
    """``offset`` in bytes within the manifest's file number ``file``."""

    file: int
    offset: int


class ChunkTable:
    """Chunk ``n`` counts over the concatenation of ``files[].chunks`` in manifest order.

    Bytes that occur twice are wanted once, under the number of their first occurrence: ``first[n]``.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.sizes: list[int] = []
        self.digests: list[str] = []
        self.first: list[int] = []
        self._places: list[Place] = []
        self._repeats: dict[int, list[int]] = {}
        self._begins: list[int] = []
        seen: dict[str, int] = {}
        for number, file in enumerate(manifest.files):
            self._begins.append(len(self.sizes))
            offset = 0
            for size, digest in file.chunks:
                index = len(self.sizes)
                first = seen.setdefault(digest, index)
                self.sizes.append(size)
                self.digests.append(digest)
                self.first.append(first)
                self._places.append(Place(number, offset))
                if first != index:
                    self._repeats.setdefault(first, []).append(index)
                offset += size

    def __len__(self) -> int:
        return len(self.sizes)

    def unique(self) -> Iterator[int]:
        """Yield each number that is a first occurrence."""
        return (index for index, first in enumerate(self.first) if first == index)

    def of_file(self, number: int) -> Iterator[tuple[int, int]]:
        """Yield the chunks of the manifest's file number ``number`` in order: first occurrence, and size in bytes."""
        end = self._begins[number + 1] if number + 1 < len(self._begins) else len(self)
        return ((self.first[index], self.sizes[index]) for index in range(self._begins[number], end))

    def places(self, first: int) -> list[Place]:
        """Everywhere the bytes of the first occurrence ``first`` belong."""
        return [self._places[first], *(self._places[index] for index in self._repeats.get(first, ()))]

    def occurrences(self, first: int) -> int:
        """Return how many chunks of the artifact have these bytes."""
        return 1 + len(self._repeats.get(first, ()))
