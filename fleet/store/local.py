"""Reads the files of one artifact that lie in a folder; each file is opened when it is first read."""

from __future__ import annotations

import os
from pathlib import Path

from agent.contract.manifest import Manifest


class LocalArtifact:
    """An ``ArtifactReader`` over a folder; the manifest's paths are relative to it."""

    def __init__(self, manifest: Manifest, folder: Path) -> None:
        self._manifest = manifest
        self._paths = [folder / file.path for file in manifest.files]
        self._descriptors: dict[int, int] = {}

    @property
    def manifest(self) -> Manifest:
        """What the bytes are."""
        return self._manifest

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
