"""An artifact that is on its way: files of the final size, filled chunk by chunk in any order.

What is there is never remembered beside the files, only read out of them: a map could say more than the disk holds
after a power cut, the SHA-256 of the bytes cannot.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from agent.contract.manifest import Manifest
from agent.core.chunks import ChunkTable, Place
from agent.errors import StoreError
from agent.platform.concurrency import Stop
from agent.platform.files import is_hole, reserve, sync_file, sync_folder, write_at
from agent.store.files import explained, store_errors

FILES = "files"
MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Donor:
    """An artifact on disk, complete or not, whose chunks may be the ones wanted; each is checked when read."""

    folder: Path
    manifest: Manifest


class Partial:
    """Writes one artifact. ``write`` may be called from another thread than the rest.

    Raises:
        agent.errors.StoreError: the files cannot be made, for want of room (STORE_DISK_FULL) or otherwise.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.table = ChunkTable(manifest)
        self._lock = threading.Lock()
        self._descriptors: list[int] = []
        self._empty: list[bool] = []
        try:
            for file in manifest.files:
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
        wanted = {self.table.digests[first]: first for first in missing}
        for donor in donors:
            if stop() or not wanted:
                return
            yield from self._reuse_from(donor, wanted, stop)

    def _reuse_from(self, donor: Donor, wanted: dict[str, int], stop: Stop) -> Iterator[int]:
        for file in donor.manifest.files:
            if not any(digest in wanted for _, digest in file.chunks):
                continue
            try:
                with (donor.folder / FILES / file.path).open("rb") as source:
                    offset = 0
                    for size, digest in file.chunks:
                        if stop():
                            return
                        first = wanted.get(digest)
                        if first is not None:
                            data = _read_at(source.fileno(), size, offset)
                            if hashlib.sha256(data).hexdigest() == digest and self.write(first, data):
                                del wanted[digest]
                                yield first
                        offset += size
            except OSError:
                continue  # a donor that does not read is none; the chunks come over the link

    def flush(self) -> None:
        """Bring what was written so far to the disk, beside further writes; blocking.

        Raises:
            agent.errors.StoreError: the disk refuses.
        """
        sync = getattr(os, "fdatasync", os.fsync)
        for descriptor, file in zip(self._descriptors, self.manifest.files, strict=False):
            with store_errors("write", self.folder / FILES / file.path):
                sync(descriptor)

    def sync(self) -> None:
        """Make all bytes and names durable; blocking.

        Raises:
            agent.errors.StoreError: the disk refuses.
        """
        for descriptor, file in zip(self._descriptors, self.manifest.files, strict=True):
            with store_errors("sync", self.folder / FILES / file.path):
                os.fsync(descriptor)
        with store_errors("sync", self.folder):
            sync_file(self.folder / MANIFEST)
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
        return hashlib.sha256(data).hexdigest() == self.table.digests[first]

    def _read(self, place: Place, size: int) -> bytes:
        try:
            return _read_at(self._descriptors[place.file], size, place.offset)
        except OSError as error:
            raise explained(error, "read", self._path(place)) from error

    def _path(self, place: Place) -> Path:
        return self.folder / FILES / self.manifest.files[place.file].path


def _read_at(descriptor: int, size: int, offset: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(descriptor, size, offset)
    os.lseek(descriptor, offset, os.SEEK_SET)  # Windows; only ever one thread reads
    return os.read(descriptor, size)
