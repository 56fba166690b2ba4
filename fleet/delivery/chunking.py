"""Content-defined chunks, so that an update re-uses what a device has: FastCDC (Xia et al., USENIX ATC 2016).

Boundaries depend on the bytes alone, not on their offset: inserting a line near the start of a GGUF moves every
byte after it, and still changes only the chunks around that line.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastcdc import fastcdc

from agent.contract.manifest import MAX_CHUNK_BYTES

#: These three are part of the format: other figures cut elsewhere, and devices would re-use nothing.
MIN_CHUNK_BYTES = 16 * 1024
AVERAGE_CHUNK_BYTES = 64 * 1024

Chunks = tuple[tuple[int, str], ...]


def chunk_file(path: Path) -> tuple[str, int, Chunks]:
    """Digest, size in bytes, and chunks as ``(size, sha256)`` in file order; an empty file has none.

    The file is mapped, not read: memory stays flat whatever its size.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        if size == 0:  # an empty file cannot be mapped
            return hashlib.sha256().hexdigest(), 0, ()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            whole = hashlib.sha256()
            chunks = tuple(_hash_chunks(mapped, whole))
            return whole.hexdigest(), len(mapped), chunks


def _hash_chunks(mapped: mmap.mmap, whole: Any) -> Iterator[tuple[int, str]]:
    # The view must be released before the map closes, also when hashing is interrupted.
    with memoryview(mapped) as view:
        for offset, length in boundaries(view):
            with view[offset : offset + length] as chunk:
                whole.update(chunk)
                yield length, hashlib.sha256(chunk).hexdigest()


def boundaries(data: bytes | memoryview) -> Iterator[tuple[int, int]]:
    """``(offset, length)`` of each chunk of ``data``, in order, without gaps."""
    cuts = fastcdc(data, min_size=MIN_CHUNK_BYTES, avg_size=AVERAGE_CHUNK_BYTES, max_size=MAX_CHUNK_BYTES)
    for cut in cuts:
        yield cut.offset, cut.length
