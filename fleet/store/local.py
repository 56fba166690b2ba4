"""Reads the files of one artifact that lie in a folder; each file is opened when it is first read."""

from __future__ import annotations

import os
from pathlib import Path

from agent.contract.chunk_index import INDEX_FILE, Content, Layout
from agent.contract.manifest import Manifest


class LocalArtifact:
    """An ``ArtifactReader`` over a folder; the content's paths are relative to it, and its index lies beside it."""

    def __init__(self, content: Content, folder: Path) -> None:
        self._content = content
        self._folder = folder
        self._paths = [folder / file.path for file in content.files]
        self._descriptors: dict[int, int] = {}

    @property
    def content(self) -> Content:
        """What the bytes are."""
        return self._content

    def layout(self) -> Layout:
        """Where its chunks are.

        Raises:
            OSError: the index cannot be read, or is none of these files.
        """
        content = self._content
        if not isinstance(content, Manifest) or content.index is None:
            return Layout(content.files)
        path = self._folder.parent / INDEX_FILE
        try:
            return Layout(content.files, path.read_bytes())
        except ValueError as error:
            raise OSError(f"{path} is not the index of {content.id}: {error}") from None

    def read(self, file: int, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset`` of the manifest's file number ``file``.

        Raises:
            OSError: the file cannot be read, or ends before.
        """
        descriptor = self._descriptor(file)
        if hasattr(os, "pread"):
            data = os.pread(descriptor, size, offset)
        else:  # Windows; one caller at a time, so nobody else moves the position
            os.lseek(descriptor, offset, os.SEEK_SET)
            data = os.read(descriptor, size)
        if len(data) != size:
            raise OSError(f"{self._paths[file]} ends before byte {offset + size}: it is not what was published")
        return data

    def close(self) -> None:
        """Close the files."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _descriptor(self, file: int) -> int:
        if file not in self._descriptors:
            flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
            self._descriptors[file] = os.open(self._paths[file], flags)
        return self._descriptors[file]
