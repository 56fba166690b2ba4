"""Files below a folder, each opened when it is first read. Shared with fleet/."""

from __future__ import annotations

import os
from pathlib import Path

from agent.contract.chunk_index import Content


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


class BaseFiles:
    """Reads the base at the places of a new artifact's chunks. One caller at a time.

    Files are compared from their ends, as formats keep their headers, whose lengths change, at the beginning. Where
    the base has no such file, or ends, or is None, its bytes are zeros: the pieces are then the compressed chunks.
    """

    def __init__(self, folder: Path, base: Content | None, new: Content) -> None:
        self._open = OpenFiles(folder)
        sizes = {file.path: file.size for file in base.files} if base is not None else {}
        #: For each file of the new artifact: its path, and how much further its bytes are in the base.
        self._files = [(file.path, sizes[file.path] - file.size if file.path in sizes else None) for file in new.files]

    def read(self, file: int, offset: int, size: int) -> bytes:
        """Return the base's bytes for ``size`` bytes from ``offset`` of the new artifact's file number ``file``.

        Raises:
            OSError: the disk does not read.
        """
        path, shift = self._files[file]
        if shift is None:
            return bytes(size)
        begin = offset + shift
        before = min(max(0, -begin), size)
        data = self._open.read(path, size - before, begin + before) if before < size else b""
        return bytes(before) + data + bytes(size - before - len(data))

    def close(self) -> None:
        """Close what was opened; may be called twice."""
        self._open.close()


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """Return ``size`` bytes from ``offset`` of an open file, or what there is of them.

    Raises:
        OSError: it cannot be read.
    """
    if hasattr(os, "pread"):
        return os.pread(descriptor, size, offset)
    os.lseek(descriptor, offset, os.SEEK_SET)  # Windows; only ever one thread reads
    return os.read(descriptor, size)
