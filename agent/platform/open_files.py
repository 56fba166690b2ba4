"""Files below a folder, each opened when it is first read. Shared with fleet/."""

from __future__ import annotations

import os
from pathlib import Path


class OpenFiles:
    """One caller at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptors: dict[str, int] = {}

    def read(self, path: str, size: int, offset: int) -> bytes:
        """Return ``size`` bytes from ``offset``, or what there is of them.

        Raises:
            OSError: the file cannot be opened or read.
        """
        if path not in self._descriptors:
            flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
            self._descriptors[path] = os.open(self.folder / path, flags)
        return read_at(self._descriptors[path], size, offset)

    def close(self) -> None:
        """Close what was opened; may be called twice."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """Return ``size`` bytes from ``offset`` of an open file, or what there is of them.

    Raises:
        OSError: it cannot be read.
    """
    if hasattr(os, "pread"):
        return os.pread(descriptor, size, offset)
    os.lseek(descriptor, offset, os.SEEK_SET)  # Windows; only ever one thread reads
    return os.read(descriptor, size)
