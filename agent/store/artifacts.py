"""Artifacts on disk, by the digest of their content.

artifacts/<digest>/manifest.json, files/...     complete: appears by one rename
partial/<digest>/manifest.json, files/...       on its way
"""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import structlog

from agent.contract.base import MalformedMessageError
from agent.contract.failures import FailureCode
from agent.contract.manifest import ArtifactFile, Manifest
from agent.errors import StoreError
from agent.platform.files import free_bytes, mebibytes, sync_folder
from agent.store.files import store_errors, write_atomically
from agent.store.partial import FILES, MANIFEST, Donor, Partial

#: Never filled by a transfer: the journal, logs and the system need it.
RESERVE_BYTES = 16 * 1024 * 1024
_BLOCK = 1024 * 1024

_log = structlog.get_logger(__name__)


class ArtifactStore:
    """Implements ``agent.core.ports.ArtifactStore``; ``root`` holds ``artifacts`` and ``partial``, on one disk.

    Raises:
        agent.errors.StoreError: the folders cannot be made.
    """

    def __init__(self, root: Path, reserve_bytes: int = RESERVE_BYTES) -> None:
        self._complete = root / "artifacts"
        self._partial = root / "partial"
        self._reserve_bytes = reserve_bytes
        self._transferring: set[str] = set()
        self._lock = threading.Lock()
        for folder in (self._complete, self._partial):
            with store_errors("create", folder):
                folder.mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path | None:
        """Folder of the files of a complete artifact, or None."""
        folder = self._complete / digest
        return folder / FILES if (folder / MANIFEST).is_file() else None

    def manifest(self, digest: str) -> Manifest | None:
        """Of a complete artifact, or None when there is none or its manifest is damaged."""
        return _load_manifest(self._complete / digest)

    def digests(self) -> list[str]:
        """Of the complete artifacts."""
        return sorted(folder.name for folder in self._complete.iterdir() if (folder / MANIFEST).is_file())

    def renew(self, manifest: Manifest) -> None:
        """Replace a complete artifact's manifest by one for the same files: measured again, or another chat template.

        Raises:
            agent.errors.StoreError: the disk refuses; the old one is still there.
        """
        path = self._complete / manifest.digest / MANIFEST
        with store_errors("read", path):
            same = path.read_bytes() == manifest.to_json()
        if not same:
            write_atomically(path, manifest.to_json())

    def verify(self, digest: str) -> None:
        """Read every file again and compare with the manifest; blocking.

        Raises:
            agent.errors.StoreError: a file is missing or has other bytes (STORE_CORRUPT).
        """
        manifest = self.manifest(digest)
        if manifest is None:
            raise StoreError(f"{self._complete / digest}: no artifact, or its manifest is damaged", _CORRUPT)
        for file in manifest.files:
            _verify_file(self._complete / digest / FILES / file.path, file)

    def discard(self, digest: str) -> None:
        """Forget an artifact, complete or not; the way out when ``verify`` fails.

        Raises:
            agent.errors.StoreError: it cannot be deleted.
        """
        for folder in (self._complete / digest, self._partial / digest):
            _delete(folder)

    def collect(self, keep: Sequence[str]) -> int:
        """Delete what is neither in ``keep`` nor being transferred; returns bytes freed.

        Raises:
            agent.errors.StoreError: something cannot be deleted.
        """
        freed = 0
        for folder in [*self._complete.iterdir(), *self._partial.iterdir()]:
            if folder.name not in keep and folder.name not in self._transferring:
                freed += _size(folder)
                _delete(folder)
                _log.info("artifact_deleted", digest=folder.name)
        return freed

    def begin(self, manifest: Manifest) -> Partial:
        """Open an artifact for writing, after a look at the disk; blocking. End with ``commit`` or ``abandon``.

        Raises:
            agent.errors.StoreError: not enough room, with the figures (STORE_DISK_FULL), or the disk refuses.
        """
        folder = self._partial / manifest.digest
        self._claim(manifest)
        try:
            self._check_room(manifest, folder)
            with store_errors("create", folder):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / MANIFEST).write_bytes(manifest.to_json())  # synced with the rest, before it counts
            return Partial(folder, manifest)
        except StoreError:
            self._transferring.discard(manifest.digest)
            raise

    def _claim(self, manifest: Manifest) -> None:
        with self._lock:
            if manifest.digest in self._transferring:
                raise StoreError(f"artifact {manifest.id} is being transferred already; wait for it, or cancel it")
            self._transferring.add(manifest.digest)

    def commit(self, partial: Partial) -> None:
        """Every chunk is there: make it durable, then complete by one rename; blocking.

        Raises:
            agent.errors.StoreError: the disk refuses; the artifact stays partial.
        """
        digest = partial.manifest.digest
        partial.sync()
        partial.close()
        complete = self._complete / digest
        with store_errors("complete", complete):
            if complete.exists():  # without a manifest, or damaged: or else nobody had fetched it again
                shutil.rmtree(complete)
            partial.folder.rename(complete)
            sync_folder(self._complete)
            sync_folder(self._partial)
        self._transferring.discard(digest)

    def abandon(self, partial: Partial) -> None:
        """Stop writing; what came stays for the next attempt."""
        partial.close()
        self._transferring.discard(partial.manifest.digest)

    def donors(self, digest: str) -> Iterator[Donor]:
        """Other artifacts on disk, complete ones first."""
        for folder in [*sorted(self._complete.iterdir()), *sorted(self._partial.iterdir())]:
            if folder.name != digest and (manifest := _load_manifest(folder)) is not None:
                yield Donor(folder, manifest)

    def _check_room(self, manifest: Manifest, folder: Path) -> None:
        there = _allocated(folder)
        needed = max(manifest.size - there, 0)
        free = free_bytes(self._partial)
        if needed + self._reserve_bytes > free:
            raise StoreError(
                f"artifact {manifest.id} needs {mebibytes(needed)} more in {self._partial}"
                f" ({mebibytes(manifest.size)} in all, and {mebibytes(self._reserve_bytes)} are kept free),"
                f" and {mebibytes(free)} are free; free {mebibytes(needed + self._reserve_bytes - free)} or more",
                FailureCode.STORE_DISK_FULL,
            )


_CORRUPT = FailureCode.STORE_CORRUPT


def _load_manifest(folder: Path) -> Manifest | None:
    try:
        manifest = Manifest.from_json((folder / MANIFEST).read_bytes())
    except (OSError, MalformedMessageError):
        return None
    return manifest if manifest.digest == folder.name else None


def _verify_file(path: Path, file: ArtifactFile) -> None:
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as source:
            while block := source.read(_BLOCK):
                digest.update(block)
    except FileNotFoundError:
        raise StoreError(f"{path} is missing; the artifact must be fetched again", _CORRUPT) from None
    except OSError as error:
        raise StoreError(f"{path} does not read: {error.strerror}; the disk may be failing", _CORRUPT) from error
    if digest.hexdigest() != file.sha256:
        raise StoreError(
            f"{path} has SHA-256 {digest.hexdigest()[:12]}..., and the signed manifest says {file.sha256[:12]}...;"
            " the artifact must be fetched again",
            _CORRUPT,
        )


def _allocated(folder: Path) -> int:
    """Bytes that the disk has given to the files below ``folder``, or promised them."""
    total = 0
    for path in folder.rglob("*") if folder.exists() else ():
        if path.is_file():
            stat = path.stat()
            total += min(stat.st_size, stat.st_blocks * 512) if hasattr(stat, "st_blocks") else stat.st_size
    return total


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _delete(folder: Path) -> None:
    # The manifest first: a deletion that is cut short must not leave what looks complete.
    with store_errors("delete", folder):
        (folder / MANIFEST).unlink(missing_ok=True)
        if folder.is_dir():
            shutil.rmtree(folder)
        else:
            folder.unlink(missing_ok=True)
