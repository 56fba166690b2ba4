"""An artifact that is on its way: files of the final size, filled chunk by chunk in any order.

What is there is never remembered beside the files, only read out of them: a map could say more than the disk holds
after a power cut, the SHA-256 of the bytes cannot.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from agent.contract.chunk_index import INDEX_FILE, Content, Layout, Place
from agent.core.chunks import ChunkTable
from agent.errors import StoreError
from agent.platform.concurrency import Stop
from agent.platform.files import is_hole, reserve, sync_file, sync_folder, write_at
from agent.platform.open_files import read_at
from agent.store.files import explained, store_errors

FILES = "files"
MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Donor:
    """An artifact on disk, complete or not, whose chunks may be the ones wanted; each is checked when read."""

    folder: Path
    content: Content
    layout: Layout


class Partial:
    """Writes one artifact, or its index; ``artifact`` is the artifact's digest in either case.

    ``write`` may be called from another thread than the rest.

    Raises:
        agent.errors.StoreError: the files cannot be made, for want of room (STORE_DISK_FULL) or otherwise.
    """

    def __init__(self, folder: Path, content: Content, table: ChunkTable, *, artifact: str) -> None:
        self.artifact = artifact
        self.folder = folder
        self.content = content
        self.table = table
        self._lock = threading.Lock()
        self._descriptors: list[int] = []
        self._empty: list[bool] = []
        try:
            for file in content.files:
                path = folder / FILES / file.path
                with store_errors("make room for", path):
                    self._open(path, file.size)
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path, size: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        descriptor = os.open(path, flags, 0o644)
        self._descriptors.append(descriptor)
        self._empty.append(os.fstat(descriptor).st_size != size)
        if self._empty[-1]:
            os.ftruncate(descriptor, 0)
            reserve(descriptor, size)

    def write(self, first: int, data: bytes) -> bool:
        """Checked bytes of the chunk ``first``, wherever it occurs. False: too late, it was closed meanwhile.

        Raises:
            agent.errors.StoreError: the disk refuses.
        """
        with self._lock:  # a descriptor closed meanwhile may be another file's by now
            if not self._descriptors:
                return False
            for place in self.table.places(first):
                self._empty[place.file] = False
                try:
                    write_at(self._descriptors[place.file], data, place.offset)
                except OSError as error:
                    raise explained(error, "write", self._path(place)) from error
            return True

    def present(self, stop: Stop) -> Iterator[int]:
        """First occurrences whose bytes the files hold already, as their SHA-256 proves.

        A repeat that is missing is filled in. What the disk does not read is not there, so it is fetched and written
        again. Blocking; ends early when ``stop()`` turns true.

        Raises:
            agent.errors.StoreError: the disk refuses a repeat.
        """
        for first in self.table.unique():
            if stop():
                return
            places = self.table.places(first)
            good = [place for place in places if self._holds(place, first)]
            if not good:
                continue
            if len(good) < len(places):
                self.write(first, self._read(good[0], self.table.sizes[first]))
            yield first

    def reuse(self, donors: Iterable[Donor], missing: Iterable[int], stop: Stop) -> Iterator[int]:
        """Copy chunks from other artifacts; yields the first occurrences that are here by that.

        Raises:
            agent.errors.StoreError: the disk refuses.
        """
        wanted = bytearray(len(self.table))
        for first in missing:
            wanted[first] = 1
        for donor in donors:
            if stop() or not any(wanted):
                return
            yield from self._reuse_from(donor, wanted, stop)

    def _reuse_from(self, donor: Donor, wanted: bytearray, stop: Stop) -> Iterator[int]:
        for file in range(len(donor.content.files)):
            matches = [(number, self.table.find(donor.layout.digest(number))) for number in donor.layout.of_file(file)]
            offered = [(number, first) for number, first in matches if first is not None and wanted[first]]
            if not offered:
                continue
            try:
                with (donor.folder / FILES / donor.content.files[file].path).open("rb") as source:
                    for number, first in offered:
                        if stop():
                            return
                        data = read_at(source.fileno(), self.table.sizes[first], donor.layout.place(number).offset)
                        if wanted[first] and self.table.holds(first, data) and self.write(first, data):
                            wanted[first] = 0
                            yield first
            except OSError:
                continue  # a donor that does not read is none; the chunks come over the link

    def flush(self) -> None:
        """Bring what was written so far to the disk, beside further writes; blocking.

        Raises:
            agent.errors.StoreError: the disk refuses.
        """
        sync = getattr(os, "fdatasync", os.fsync)
        for descriptor, file in zip(self._descriptors, self.content.files, strict=False):
            with store_errors("write", self.folder / FILES / file.path):
                sync(descriptor)

    def sync(self) -> None:
        """Make all bytes and names durable; blocking.

        Raises:
            agent.errors.StoreError: the disk refuses.
        """
        for descriptor, file in zip(self._descriptors, self.content.files, strict=True):
            with store_errors("sync", self.folder / FILES / file.path):
                os.fsync(descriptor)
        with store_errors("sync", self.folder):
            for name in (MANIFEST, INDEX_FILE):
                if (self.folder / name).exists():
                    sync_file(self.folder / name)
            for folder in sorted(path for path in self.folder.rglob("*") if path.is_dir()):
                sync_folder(folder)
            sync_folder(self.folder)

    def close(self) -> None:
        """No more writes; may be called twice.

        Raises:
            OSError: the disk refuses what was written before; everything is closed even so.
        """
        with self._lock:
            descriptors, self._descriptors = self._descriptors, []
        failed: OSError | None = None
        for descriptor in descriptors:
            try:
                os.close(descriptor)
            except OSError as error:  # a network's or a failing disk's last word; the others must be closed even so
                failed = error
        if failed is not None:
            raise failed

    def _holds(self, place: Place, first: int) -> bool:
        size = self.table.sizes[first]
        try:
            if self._empty[place.file] or is_hole(self._descriptors[place.file], place.offset, size):
                return False
            data = self._read(place, size)
        except (OSError, StoreError):
            return False
        return self.table.holds(first, data)

    def _read(self, place: Place, size: int) -> bytes:
        try:
            return read_at(self._descriptors[place.file], size, place.offset)
        except OSError as error:
            raise explained(error, "read", self._path(place)) from error

    def _path(self, place: Place) -> Path:
        return self.folder / FILES / self.content.files[place.file].path
