"""Reads the files of one artifact that lie in a folder; each file is opened when it is first read."""

from __future__ import annotations

from pathlib import Path

from agent.contract.chunk_index import INDEX_FILE, Content, Layout
from agent.platform.open_files import OpenFiles


class LocalArtifact:
    """An ``ArtifactReader`` over a folder; the content's paths are relative to it, and its index lies beside it."""

    def __init__(self, content: Content, folder: Path) -> None:
        self._content = content
        self._open = OpenFiles(folder)

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
        if any(file.chunks for file in content.files) or not content.size:
            return Layout(content.files)
        path = self._open.folder.parent / INDEX_FILE
        try:
            return Layout(content.files, path.read_bytes())
        except ValueError as error:
            raise OSError(f"{path} is not the index of {content.id}: {error}") from None

    def read(self, file: int, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset`` of the manifest's file number ``file``.

        Raises:
            OSError: the file cannot be read, or ends before.
        """
        path = self._content.files[file].path
        data = self._open.read(path, size, offset)
        if len(data) != size:
            raise OSError(f"{self._open.folder / path} ends before byte {offset + size}: it is not what was published")
        return data

    def close(self) -> None:
        """Close the files."""
        self._open.close()
