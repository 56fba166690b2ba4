"""Artifacts on disk, by the digest of their content.

artifacts/<digest>/manifest.json, index, files/...     complete: appears by one rename
partial/<digest>/manifest.json, index, files/...       on its way, or left over
partial/<digest>/index-part/files/index                the index on its way, which is first

Where a manifest lists its chunks itself, there is no index.

What a transfer brought is thrown away for three reasons only: its artifact is complete, another artifact needs the
room, or there are more left-over folders than KEPT_PARTIALS. The oldest go first. A link that fails, a deadline, a new
order or a restart is none of these reasons.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import structlog

from agent.contract.base import MalformedMessageError
from agent.contract.chunk_index import INDEX_FILE, Layout, index_content, packed_chunks
from agent.contract.failures import FailureCode
from agent.contract.manifest import ArtifactFile, Delta, Manifest
from agent.core.chunks import ChunkTable
from agent.errors import StoreError, TrustError
from agent.platform.concurrency import Stop
from agent.platform.files import free_bytes, mebibytes, sync_folder
from agent.platform.open_files import BaseFiles
from agent.store.files import explained, store_errors, write_atomically
from agent.store.partial import FILES, MANIFEST, Donor, Partial

#: Never filled by a transfer: the journal, logs and the system need it.
RESERVE_BYTES = 16 * 1024 * 1024
#: Left-over folders that a collection leaves, beside those that are spared by name.
KEPT_PARTIALS = 4
_INDEX_PART = "index-part"
_BLOCK = 1024 * 1024

_log = structlog.get_logger(component=__name__)


class ArtifactStore:
    """Implements ``agent.core.ports.ArtifactStore``; ``root`` holds ``artifacts`` and ``partial``, on one disk.

    A disk that refuses new folders can still serve what is on it, so the folders are made when something is written.
    """

    def __init__(self, root: Path, reserve_bytes: int = RESERVE_BYTES) -> None:
        self._complete = root / "artifacts"
        self._partial = root / "partial"
        self._reserve_bytes = reserve_bytes
        self._transferring: set[str] = set()
        self._lock = threading.Lock()

    def path(self, digest: str) -> Path | None:
        """Return the folder of the files of a complete artifact, or None.

        Raises:
            agent.errors.StoreError: the disk does not say.
        """
        folder = self._complete / digest
        with store_errors("look into", folder):
            return folder / FILES if (folder / MANIFEST).is_file() else None

    def manifest(self, digest: str) -> Manifest | None:
        """Of a complete artifact, or None when there is none or its manifest is damaged.

        Raises:
            agent.errors.StoreError: the disk does not say.
        """
        folder = self._complete / digest
        with store_errors("read the manifest in", folder):
            return _load_manifest(folder)

    def digests(self) -> list[str]:
        """Of the complete artifacts.

        Raises:
            agent.errors.StoreError: the disk does not say.
        """
        with store_errors("look into", self._complete):
            return sorted(folder.name for folder in _folders(self._complete) if (folder / MANIFEST).is_file())

    def renew(self, manifest: Manifest) -> None:
        """Replace a complete artifact's manifest by one for the same files: measured again, or another chat template.

        Raises:
            agent.errors.StoreError: the disk refuses; the old one is still there.
        """
        folder = self._complete / manifest.digest
        path = folder / MANIFEST
        with store_errors("read", path):
            before = path.read_bytes()
        if before != manifest.to_json():
            with store_errors("read", path):
                self._keep_index(folder, manifest)
            write_atomically(path, manifest.to_json())

    def _keep_index(self, folder: Path, manifest: Manifest) -> None:
        """What the manifest before listed may be the index of this one: without it the artifact is no donor."""
        if manifest.index is None or _packed(folder, manifest) is not None or (old := _load_manifest(folder)) is None:
            return
        packed = packed_chunks(old.files) if old.index is None else b""
        if hashlib.sha256(packed).hexdigest() == manifest.index.sha256:
            write_atomically(folder / INDEX_FILE, packed)

    def verify(self, digest: str, stop: Stop = lambda: False) -> None:
        """Read every file again and compare with the manifest; blocking. Ends early when ``stop()`` turns true.

        Raises:
            agent.errors.StoreError: a file is missing or has other bytes (STORE_CORRUPT), or it was stopped
                (CANCELLED).
        """
        manifest = self.manifest(digest)
        if manifest is None:
            raise StoreError(f"{self._complete / digest}: no artifact, or its manifest is damaged", _CORRUPT)
        for file in manifest.files:
            _verify_file(self._complete / digest / FILES / file.path, file, stop)

    def discard(self, digest: str) -> None:
        """Forget an artifact, complete or not; the way out when ``verify`` fails.

        Raises:
            agent.errors.StoreError: it cannot be deleted.
        """
        for folder in (self._complete / digest, self._partial / digest):
            _delete(folder)

    def collect(self, keep: Sequence[str], spare: Sequence[str] = ()) -> int:
        """Delete the complete artifacts that are not in ``keep``; returns bytes freed.

        Those in ``spare`` are no longer complete, but their bytes stay for the next transfer. Of what unfinished
        transfers left over, the oldest beyond KEPT_PARTIALS go.

        Raises:
            agent.errors.StoreError: something cannot be deleted.
        """
        freed = 0
        with store_errors("collect", self._complete):
            for folder in _folders(self._complete):
                if folder.name in keep:
                    continue
                if folder.name in spare and not (self._partial / folder.name).exists():
                    self._set_apart(folder)
                else:
                    freed += _remove(folder)
        spared = {*keep, *spare}
        leftovers = [folder for folder in self._leftovers() if folder.name not in spared]
        for folder in leftovers[: max(0, len(leftovers) - KEPT_PARTIALS)]:
            freed += _remove(folder)
        return freed

    def _set_apart(self, folder: Path) -> None:
        self._partial.mkdir(parents=True, exist_ok=True)
        folder.rename(self._partial / folder.name)
        sync_folder(self._complete)
        sync_folder(self._partial)
        _log.info("artifact set apart", digest=folder.name)

    def _leftovers(self) -> list[Path]:
        """Return what unfinished transfers left over and no transfer fills now, the oldest first."""
        with store_errors("look into", self._partial):
            found = [folder for folder in _folders(self._partial) if folder.name not in self._transferring]
            return sorted(found, key=_last_begun)

    def begin_index(self, manifest: Manifest) -> Partial | None:
        """Open the artifact's index for writing, after a look at the disk for all of the artifact; blocking.

        None: it is here, or the artifact has none. End with ``commit_index`` or ``abandon``.

        Raises:
            agent.errors.StoreError: as ``begin``.
        """
        content = index_content(manifest)
        with store_errors("read the index in", self._partial / manifest.digest):
            here = content is None or _packed(self._partial / manifest.digest, manifest) is not None
        if content is None or here:
            return None
        with self._opening(manifest) as folder:
            part = folder / _INDEX_PART
            return Partial(part, content, ChunkTable(content), artifact=manifest.digest)

    def commit_index(self, manifest: Manifest, partial: Partial) -> None:
        """Every piece of the index is there: make it durable; blocking. ``abandon`` it then, and ``begin``.

        Raises:
            agent.errors.StoreError: the disk refuses.
        """
        partial.sync()
        with store_errors("close", partial.folder):
            partial.close()
        folder = self._partial / manifest.digest
        with store_errors("complete", folder / INDEX_FILE):
            (partial.folder / FILES / INDEX_FILE).replace(folder / INDEX_FILE)
            shutil.rmtree(partial.folder)
            sync_folder(folder)

    def begin(self, manifest: Manifest) -> Partial:
        """Open an artifact for writing, after a look at the disk; blocking. End with ``commit`` or ``abandon``.

        The index of one that has an index must be here: see ``begin_index``.

        Raises:
            agent.errors.StoreError: not enough room, with the figures (STORE_DISK_FULL), or the disk refuses.
            agent.errors.TrustError: what is signed is no index of the artifact.
        """
        with self._opening(manifest) as folder:
            table = _table(folder, manifest)
            # Of an index that was put in its place by a process that was killed before it could tidy up.
            shutil.rmtree(folder / _INDEX_PART, ignore_errors=True)
            return Partial(folder, manifest, table, artifact=manifest.digest)

    @contextlib.contextmanager
    def _opening(self, manifest: Manifest) -> Iterator[Path]:
        """The artifact's folder, which is this transfer's until it is abandoned, and has room and the manifest."""
        folder = self._partial / manifest.digest
        self._claim(manifest)
        try:
            with store_errors("create", folder):
                self._make_room(manifest, folder)
                self._complete.mkdir(parents=True, exist_ok=True)
                folder.mkdir(parents=True, exist_ok=True)
                (folder / MANIFEST).write_bytes(manifest.to_json())  # synced with the rest, before it counts
            yield folder
        except BaseException:
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
        digest = partial.artifact
        partial.sync()
        with store_errors("close", partial.folder):
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
        """Stop writing; what has arrived stays for the next attempt."""
        try:
            partial.close()
        except OSError as error:  # of what came last something may be lost; the next attempt reads it all again
            _log.warning("partial not closed", digest=partial.artifact, error=str(error))
        finally:
            self._transferring.discard(partial.artifact)

    def free_bytes(self) -> int:
        """Return how many bytes are free where artifacts are kept; blocking.

        Raises:
            agent.errors.StoreError: the disk does not say.
        """
        with store_errors("look at the free space of", self._partial):
            return free_bytes(self._partial)

    def donors(self, digest: str) -> Iterator[Donor]:
        """Other artifacts on disk, complete ones first. One that does not read is left out."""
        with store_errors("look into", self._complete.parent):
            folders = [*sorted(_folders(self._complete)), *sorted(_folders(self._partial))]
        for folder in folders:
            # An index that is not here, or is none, makes no donor either.
            with contextlib.suppress(OSError, ValueError):
                if folder.name != digest and (manifest := _load_manifest(folder)) is not None:
                    packed = _packed(folder, manifest)
                    if manifest.index is None or packed is not None:
                        yield Donor(folder, manifest, Layout(manifest.files, packed))

    def base(self, manifest: Manifest) -> tuple[Delta, BaseFiles] | None:
        """Return the smallest of the artifact's deltas whose base is complete here, or that needs none; and the base.

        None where there is no such delta.
        """
        for delta in sorted(manifest.deltas, key=lambda delta: delta.wire_bytes):
            if delta.base_digest is None:
                return delta, BaseFiles(self._complete, None, manifest)
            folder = self._complete / delta.base_digest
            with store_errors("read the manifest in", folder):
                base = _load_manifest(folder)
            if base is not None:
                return delta, BaseFiles(folder / FILES, base, manifest)
        return None

    def _make_room(self, manifest: Manifest, folder: Path) -> None:
        """Delete what was left over, the oldest first, until the artifact fits; nothing where that is not enough."""
        index_bytes = manifest.index.size if manifest.index else 0
        needed = max(manifest.size + index_bytes - _allocated(folder), 0)
        free = free_bytes(self._partial)
        leftovers = [(old, _allocated(old)) for old in self._leftovers()]
        most = free + sum(size for _, size in leftovers)
        if needed + self._reserve_bytes > most:
            raise StoreError(
                f"artifact {manifest.id} needs {mebibytes(needed)} more in {self._partial}"
                f" ({mebibytes(manifest.size)} in all, and {mebibytes(self._reserve_bytes)} are kept free),"
                f" and {mebibytes(most)} are free; free {mebibytes(needed + self._reserve_bytes - most)} or more",
                FailureCode.STORE_DISK_FULL,
                needs_bytes=needed + self._reserve_bytes - (most - free),
            )
        for old, _ in leftovers:
            if needed + self._reserve_bytes <= free_bytes(self._partial):
                return
            _remove(old)


_CORRUPT = FailureCode.STORE_CORRUPT
_EUCLEAN = {getattr(errno, "EUCLEAN", errno.EIO), errno.EBADMSG}


#: What a disk answers whose files are gone or whose sectors are bad. Anything else (no descriptors left, no rights, a
#: full disk) says nothing about the bytes, and must not cost a device its artifact.
_DAMAGE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO, *_EUCLEAN})


def _load_manifest(folder: Path) -> Manifest | None:
    """None where there is none, or it is damaged.

    Raises:
        OSError: the disk does not read for another reason.
    """
    try:
        manifest = Manifest.from_json((folder / MANIFEST).read_bytes())
    except MalformedMessageError:
        return None
    except OSError as error:
        if error.errno not in _DAMAGE:
            raise
        return None
    return manifest if manifest.digest == folder.name else None


def _packed(folder: Path, manifest: Manifest) -> bytes | None:
    """Return the artifact's index; None where it is not here, is damaged, or the artifact has none.

    Raises:
        OSError: the disk does not read for another reason.
    """
    if manifest.index is None:
        return None
    try:
        packed = (folder / INDEX_FILE).read_bytes()
    except OSError as error:
        if error.errno not in _DAMAGE:
            raise
        return None
    return packed if hashlib.sha256(packed).hexdigest() == manifest.index.sha256 else None


def _table(folder: Path, manifest: Manifest) -> ChunkTable:
    with store_errors("read the index in", folder):
        packed = _packed(folder, manifest)
    if manifest.index is not None and packed is None:
        raise StoreError(f"the index of {manifest.id} is not in {folder}; it is fetched again", _CORRUPT)
    try:
        return ChunkTable(manifest, packed)
    except ValueError as error:
        raise TrustError(f"the signed index of {manifest.id} is none: {error}; it must be published again") from error


def _verify_file(path: Path, file: ArtifactFile, stop: Stop) -> None:
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as source:
            while block := source.read(_BLOCK):
                if stop():
                    raise StoreError(f"the reading back of {path} was cancelled", FailureCode.CANCELLED)
                digest.update(block)
    except FileNotFoundError:
        raise StoreError(f"{path} is missing; the artifact must be fetched again", _CORRUPT) from None
    except OSError as error:
        if error.errno not in _DAMAGE:
            raise explained(error, "read", path) from error
        raise StoreError(f"{path} does not read: {error.strerror}; the disk may be failing", _CORRUPT) from error
    if digest.hexdigest() != file.sha256:
        raise StoreError(
            f"{path} has SHA-256 {digest.hexdigest()[:12]}..., and the signed manifest says {file.sha256[:12]}...;"
            " the artifact must be fetched again",
            _CORRUPT,
        )


def _allocated(folder: Path) -> int:
    """Return the bytes that the disk has given to the files below ``folder``, or promised them."""
    total = 0
    for path in folder.rglob("*") if folder.exists() else ():
        if path.is_file():
            stat = path.stat()
            total += min(stat.st_size, stat.st_blocks * 512) if hasattr(stat, "st_blocks") else stat.st_size
    return total


def _folders(parent: Path) -> list[Path]:
    try:
        return list(parent.iterdir())
    except FileNotFoundError:  # nothing was written yet
        return []


def _last_begun(folder: Path) -> float:
    try:
        return (folder / MANIFEST).stat().st_mtime  # written each time that a transfer begins
    except FileNotFoundError:
        return 0.0


def _remove(folder: Path) -> int:
    """Delete it; returns the bytes that the disk gets back.

    Raises:
        agent.errors.StoreError: it cannot be deleted.
    """
    with store_errors("delete", folder):
        freed = _allocated(folder)
    _delete(folder)
    _log.info("artifact deleted", digest=folder.name, bytes=freed)
    return freed


def _delete(folder: Path) -> None:
    # The manifest first: a deletion that is cut short must not leave what looks complete.
    with store_errors("delete", folder):
        (folder / MANIFEST).unlink(missing_ok=True)
        if folder.is_dir():
            shutil.rmtree(folder)
        else:
            folder.unlink(missing_ok=True)
