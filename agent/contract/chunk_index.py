"""Where each chunk of an artifact is, and its SHA-256: 36 bytes a chunk, never parsed into objects.

An artifact of 10 GiB has about 160,000 chunks. Listed as JSON in its manifest they take 12 MB for each device, and
100 MB of its memory. So the manifest of a large artifact lists only the pieces of an index, and the index is fetched as
the artifact's bytes are: once for all devices, each piece compared with the signed manifest.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from struct import Struct
from typing import Protocol

from agent.contract.manifest import (
    INDEX_PIECE_BYTES,
    INDEX_RECORD_BYTES,
    MAX_CHUNK_BYTES,
    ArtifactFile,
    ArtifactIndex,
    Manifest,
)

#: With more chunks, an artifact's manifest refers to an index; at this many it has 150 kB.
MAX_LISTED_CHUNKS = 2048
#: Of the index, where it is kept: beside the manifest, and as the one file of what is fetched.
INDEX_FILE = "index"
_SIZE_BYTES = INDEX_RECORD_BYTES - 32
_SIZES = Struct(">I32x")


class Content(Protocol):
    """Files that travel in chunks: an artifact, or the index of one."""

    @property
    def id(self) -> str:
        """For people."""
        ...

    @property
    def digest(self) -> str:
        """What it is called on the wire."""
        ...

    @property
    def size(self) -> int:
        """In bytes, all files together."""
        ...

    @property
    def files(self) -> tuple[ArtifactFile, ...]:
        """In the order in which their chunks are numbered."""
        ...


@dataclass(frozen=True, slots=True)
class OneFile:
    """What is fetched beside an artifact, such as its index."""

    id: str
    digest: str
    size: int
    files: tuple[ArtifactFile, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """``offset`` in bytes within the content's file number ``file``."""

    file: int
    offset: int


class Layout:
    """Where the chunks of some files are; chunk ``n`` counts over all files, in order.

    ``packed`` has a record for each: the chunk's size as 4 bytes, big-endian, and its SHA-256. None: the files list
    their chunks.

    Raises:
        ValueError: it does not list exactly the files' bytes.
    """

    def __init__(self, files: Sequence[ArtifactFile], packed: bytes | None = None) -> None:
        self._packed = packed = packed_chunks(files) if packed is None else packed
        count, rest = divmod(len(packed), INDEX_RECORD_BYTES)
        if rest:
            raise ValueError(f"it has {len(packed)} bytes, which is no multiple of {INDEX_RECORD_BYTES}")
        self.sizes: array[int] = array("I", (size for (size,) in _SIZES.iter_unpack(packed)))
        self._offsets = array("Q", bytes(8 * count))
        self._begins: list[int] = []
        index = 0
        for file in files:
            self._begins.append(index)
            offset = 0
            while offset < file.size:
                size = self.sizes[index] if index < count else 0
                if not 0 < size <= MAX_CHUNK_BYTES or offset + size > file.size:
                    raise ValueError(
                        f"chunk {index} has {size} bytes at byte {offset} of {file.path} ({file.size} bytes)"
                    )
                self._offsets[index] = offset
                offset += size
                index += 1
        if index != count:
            raise ValueError(f"it lists {count} chunks, and the files end with chunk {index}")

    def __len__(self) -> int:
        return len(self.sizes)

    def digest(self, number: int) -> bytes:
        """Return the SHA-256 of a chunk."""
        begin = number * INDEX_RECORD_BYTES + _SIZE_BYTES
        return self._packed[begin : begin + 32]

    def place(self, number: int) -> Place:
        """Where the bytes of a chunk are."""
        # The last of several files that begin with this chunk: those before it are empty.
        return Place(bisect_right(self._begins, number) - 1, self._offsets[number])

    def of_file(self, number: int) -> range:
        """Return the chunks of file number ``number``."""
        return range(self._begins[number], [*self._begins, len(self)][number + 1])


def packed_chunks(files: Sequence[ArtifactFile]) -> bytes:
    """Return the records of the chunks that the files list."""
    return b"".join(_record(size, bytes.fromhex(digest)) for file in files for size, digest in file.chunks)


def packed_record(chunk: bytes) -> bytes:
    """Return the record of one chunk."""
    return _record(len(chunk), sha256(chunk).digest())


def _record(size: int, digest: bytes) -> bytes:
    return size.to_bytes(_SIZE_BYTES) + digest


def index_content(manifest: Manifest) -> OneFile | None:
    """Return the artifact's index as what is fetched; None: the manifest lists the chunks itself."""
    index = manifest.index
    if index is None:
        return None
    last = index.size - INDEX_PIECE_BYTES * (len(index.pieces) - 1)
    sizes = [*([INDEX_PIECE_BYTES] * (len(index.pieces) - 1)), last]
    chunks = tuple(zip(sizes, index.pieces, strict=True))
    file = ArtifactFile(path=INDEX_FILE, size=index.size, sha256=index.sha256, chunks=chunks)
    return OneFile(f"{manifest.id} (its index)", index.sha256, index.size, (file,))


def with_index(manifest: Manifest, listed: int = MAX_LISTED_CHUNKS) -> tuple[Manifest, bytes | None]:
    """Return the manifest as it is published, and its index; None where it lists at most ``listed`` chunks itself."""
    if manifest.index is not None or manifest.chunk_count <= listed:
        return manifest, None
    packed = packed_chunks(manifest.files)
    pieces = (packed[at : at + INDEX_PIECE_BYTES] for at in range(0, len(packed), INDEX_PIECE_BYTES))
    index = ArtifactIndex(
        sha256=sha256(packed).hexdigest(),
        size=len(packed),
        pieces=tuple(sha256(piece).hexdigest() for piece in pieces),
    )
    files = tuple(file.model_copy(update={"chunks": ()}) for file in manifest.files)
    return manifest.model_copy(update={"files": files, "index": index}), packed


def without_index(manifest: Manifest, packed: bytes) -> Manifest:
    """Return the manifest that lists every chunk itself, as agents 0.1 read it.

    Raises:
        ValueError: the index is not the one that the manifest names.
    """
    if manifest.index is None:
        return manifest
    if sha256(packed).hexdigest() != manifest.index.sha256:
        raise ValueError(f"the index of {manifest.id} is not the one that its manifest names")
    layout = Layout(manifest.files, packed)
    files = []
    for number, file in enumerate(manifest.files):
        chunks = tuple((layout.sizes[index], layout.digest(index).hex()) for index in layout.of_file(number))
        files.append(file.model_copy(update={"chunks": chunks}))
    return manifest.model_copy(update={"files": tuple(files), "index": None})
