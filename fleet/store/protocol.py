"""What the controller needs of the place that holds its artifacts, and how an artifact is found by what a person types.

A folder on this machine implements it today (``folder.FolderStore``). An object store needs no more than this.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Protocol

from agent.contract.chunk_index import Content, Layout
from agent.contract.manifest import Manifest
from fleet.errors import MissingError, UsageError

#: The beginning of an id or a digest must be at least this long to name an artifact.
MIN_PREFIX = 4


@dataclass(frozen=True, slots=True)
class Listing:
    """The artifacts that the store holds, by id; ``damaged`` has a sentence for each that cannot be read."""

    manifests: tuple[Manifest, ...]
    damaged: tuple[str, ...] = ()


class ArtifactReader(Protocol):
    """The bytes of one artifact, or of the index of one. One caller at a time."""

    @property
    def content(self) -> Content:
        """What the bytes are."""
        ...

    def layout(self) -> Layout:
        """Where its chunks are.

        Raises:
            OSError: the index cannot be read, or is none of these files.
        """
        ...

    def read(self, file: int, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset`` of the content's file number ``file``.

        Raises:
            OSError: the bytes cannot be read, or there are fewer.
        """
        ...

    def close(self) -> None:
        """Release what reading has opened."""
        ...


class ArtifactStore(Protocol):
    """Holds artifacts: a manifest, and the files that it describes."""

    def list(self) -> Listing:
        """Return every artifact, sorted by id.

        Raises:
            StoreError: the store itself cannot be read.
        """
        ...

    def get(self, artifact: str) -> Manifest | None:
        """Return the manifest of the artifact with this id, or None.

        Raises:
            StoreError: it cannot be read, or a file is missing or has another length than was built.
        """
        ...

    def save_manifest(self, manifest: Manifest) -> None:
        """Replace the manifest of an artifact that is there, for example by one with its measured quality.

        Raises:
            StoreError: it cannot be written; the one before is still there.
        """
        ...

    def verify(self, manifest: Manifest) -> None:
        """Compare the stored files with the manifest, byte for byte.

        Raises:
            StoreError: a file is missing, cannot be read, or has other bytes than were built.
        """
        ...

    def index(self, manifest: Manifest) -> bytes | None:
        """Return the artifact's index, None where its manifest lists the chunks itself.

        Raises:
            StoreError: it cannot be read, or is not the one that was built.
        """
        ...

    def open(self, digest: str) -> ArtifactReader | None:
        """Return a reader of the artifact with this digest, or of the index with this digest, or None.

        Cheap when called often for a digest that is not there.

        Raises:
            StoreError: the store itself cannot be read.
        """
        ...


def find(store: ArtifactStore, text: str) -> Manifest:
    """Return the artifact whose id or digest is ``text``, or begins with it, if only one does.

    Raises:
        UsageError: there is none, or there are several; names near matches.
        StoreError: the store cannot be read.
    """
    manifests = store.list().manifests
    for manifest in manifests:
        if text in (manifest.id, manifest.digest):
            return manifest
    begin = [one for one in manifests if one.id.startswith(text) or one.digest.startswith(text)]
    if len(text) >= MIN_PREFIX and len(begin) == 1:
        return begin[0]
    if len(text) >= MIN_PREFIX and begin:
        raise UsageError(f"several artifacts begin with {text}: {', '.join(one.id for one in begin)}")
    raise MissingError(_not_found(text, [one.id for one in manifests], short=bool(begin)))


def _not_found(text: str, ids: list[str], *, short: bool) -> str:
    if short:
        return f"{text} is too short to name an artifact: write at least {MIN_PREFIX} characters of its id or digest"
    near = difflib.get_close_matches(text, ids, n=3, cutoff=0.4)
    if near:
        return f"no artifact is named {text}; did you mean {' or '.join(near)}?"
    return f"no artifact is named {text}; there are: {', '.join(ids) or 'none yet; `phifleet build` makes one'}"
