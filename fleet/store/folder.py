"""Artifacts in a folder of this machine: ``<folder>/<id>/manifest.json``, and ``files/`` beside it.

Where the manifest refers to an index, that is the file ``index`` beside it.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterable, Iterator
from pathlib import Path

from agent.contract.base import MalformedMessageError, sha256_hex
from agent.contract.chunk_index import INDEX_FILE, Content, index_content
from agent.contract.delta import delta_content
from agent.contract.manifest import ArtifactFile, Manifest
from agent.platform.files import reason, sha256_of, write_atomic
from fleet.errors import StoreError
from fleet.store.half_made import HALF_MADE
from fleet.store.local import LocalArtifact
from fleet.store.protocol import Listing

#: Folder beside an artifact's files: what is measured in their place where a device's files do not run here.
BESIDE = "measured"


class _UnreadableError(StoreError):
    """The disk did not answer, which says nothing about the bytes; the next attempt may read them."""


class FolderStore:
    """An ``ArtifactStore`` over a folder. Builds go on while it is read: a new artifact appears in one rename."""

    def __init__(self, folder: Path) -> None:
        self.root = folder
        self._by_digest: dict[str, tuple[Content, Path]] = {}
        self._changed_ns = -1
        self._all_readable = True

    def folder(self, artifact: str) -> Path:
        """Where an artifact is, whether or not it is there."""
        return self.root / artifact

    def files(self, artifact: str) -> Path:
        """Return the folder that a manifest's paths are relative to."""
        return self.root / artifact / "files"

    def list(self) -> Listing:
        """Return every artifact, sorted by id.

        Raises:
            StoreError: the folder cannot be read.
        """
        return self._scan()[0]

    def _scan(self) -> tuple[Listing, bool]:
        """Return the listing, and whether the disk answered for each of them."""
        manifests, damaged, readable = [], [], True
        for folder in self._folders():
            try:
                manifests.append(_read(folder / "manifest.json"))
            except _UnreadableError as error:
                damaged.append(str(error))
                readable = False
            except StoreError as error:
                damaged.append(str(error))
        return Listing(tuple(manifests), tuple(damaged)), readable

    def get(self, artifact: str) -> Manifest | None:
        """Return the manifest of the artifact with this id, or None.

        Raises:
            StoreError: it cannot be read, or a file is missing or has another length than was built.
        """
        folder = self.folder(artifact)
        try:
            if not folder.exists():
                return None
        except OSError as error:
            raise _UnreadableError(_unreadable(folder, error)) from None
        manifest = _read(folder / "manifest.json")
        self._check_lengths(manifest)
        return manifest

    def save_manifest(self, manifest: Manifest) -> None:
        """Replace the manifest of an artifact that is there.

        Raises:
            StoreError: it cannot be written; the one before is still there.
        """
        folder = self.folder(manifest.id)
        try:
            write_atomic(folder / "manifest.json", manifest.to_json())
        except OSError as error:
            raise StoreError(f"{folder / 'manifest.json'}: cannot be written: {reason(error, folder)}") from None

    def verify(self, manifest: Manifest) -> None:
        """Compare the files with the manifest, byte for byte.

        Raises:
            StoreError: a file is missing, cannot be read, or has other bytes than were built.
        """
        self._check_lengths(manifest)
        for path, entry in self._entries(manifest):
            if _digest(path) != entry.sha256:
                raise StoreError(f"{path} is not what was built; {_again(path, manifest)}")

    def index(self, manifest: Manifest) -> bytes | None:
        """Return the artifact's index, None where its manifest lists the chunks itself.

        Raises:
            StoreError: it cannot be read, or is not the one that was built.
        """
        if manifest.index is None:
            return None
        path = self.folder(manifest.id) / INDEX_FILE
        try:
            packed = path.read_bytes()
        except OSError as error:
            raise _UnreadableError(_unreadable(path, error)) from None
        if sha256_hex(packed) != manifest.index.sha256:
            raise StoreError(f"{path} is not what was built; {_again(path, manifest)}")
        return packed

    def open(self, digest: str) -> LocalArtifact | None:
        """Return a reader of the artifact with this digest, or of the index with this digest, or None.

        The folder is listed when it has changed, and again for what is not found while the disk has not answered for
        every manifest.

        Raises:
            StoreError: the folder cannot be read.
        """
        changed_ns = self._folder_changed_ns()
        if changed_ns != self._changed_ns or (digest not in self._by_digest and not self._all_readable):
            listing, self._all_readable = self._scan()
            self._by_digest = dict(self._contents(listing.manifests))
            self._changed_ns = changed_ns
        found = self._by_digest.get(digest)
        return LocalArtifact(*found) if found else None

    def _contents(self, manifests: Iterable[Manifest]) -> Iterator[tuple[str, tuple[Content, Path]]]:
        for manifest in manifests:
            yield manifest.digest, (manifest, self.files(manifest.id))
            if (content := index_content(manifest)) is not None:
                yield content.digest, (content, self.folder(manifest.id))
            for delta in manifest.deltas:
                yield delta.digest, (delta_content(manifest, delta), self.delta(manifest, delta.base_digest) / "files")

    def delta(self, manifest: Manifest, base_digest: str | None) -> Path:
        """Where the artifact's delta from a base, or from none, is, whether or not it is there."""
        return self.folder(manifest.id) / "deltas" / (base_digest or "compressed")

    def _folders(self) -> builtins.list[Path]:
        try:
            found = sorted(self.root.iterdir())
            return [folder for folder in found if not folder.name.startswith(HALF_MADE) and folder.is_dir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._unreadable(error) from None

    def _folder_changed_ns(self) -> int:
        try:
            return self.root.stat().st_mtime_ns
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: OSError) -> StoreError:
        return StoreError(f"the artifacts in {self.root} cannot be read: {error.strerror or error}")

    def _check_lengths(self, manifest: Manifest) -> None:
        for path, entry in self._entries(manifest):
            _check_length(manifest, path, entry)

    def _entries(self, manifest: Manifest) -> Iterator[tuple[Path, ArtifactFile]]:
        """Yield every file of the artifact, and its index, where it has one."""
        for entry in manifest.files:
            yield self.files(manifest.id) / entry.path, entry
        if (content := index_content(manifest)) is not None:
            yield self.folder(manifest.id) / INDEX_FILE, content.files[0]


def _check_length(manifest: Manifest, path: Path, entry: ArtifactFile) -> None:
    try:
        size = path.stat().st_size if path.is_file() else None
    except OSError as error:
        raise _UnreadableError(_unreadable(path, error)) from None
    if size is None:
        raise StoreError(f"{path} is missing; {_again(path, manifest)}")
    if size != entry.size:
        raise StoreError(f"{path} has {size} bytes, its manifest says {entry.size}; {_again(path, manifest)}")


def _unreadable(path: Path, error: OSError) -> str:
    return f"{path}: cannot be read: {error.strerror or error}"


def _digest(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise _UnreadableError(_unreadable(path, error)) from None


def _again(path: Path, manifest: Manifest) -> str:
    folder = next(parent for parent in path.parents if parent.name == manifest.id)
    return f"remove {folder} and build it again"


def _read(path: Path) -> Manifest:
    try:
        return Manifest.from_json(path.read_bytes())
    except FileNotFoundError:
        raise StoreError(f"{path} is missing; remove its folder and build it again") from None
    except OSError as error:
        raise _UnreadableError(_unreadable(path, error)) from None
    except MalformedMessageError as error:
        raise StoreError(f"{path}: {error}; remove its folder and build it again") from None
