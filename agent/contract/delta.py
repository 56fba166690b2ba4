"""A new artifact told against one that the device has: for each chunk, what differs, compressed.

A chunk's piece is the Zstandard frame of its bytes XOR those of the base at the same place. Weights that were trained
on, and quantized alike, keep most bits of their codes and scales, though hardly a chunk stays the same. A piece is not
trusted: the chunk that comes out of it is compared with the signed list, as one that came whole.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from agent.contract.chunk_index import OneFile
from agent.contract.manifest import MAX_CHUNK_BYTES, ArtifactFile, Delta, Manifest

#: In place of a piece that would be no smaller than its chunk, and of the repeats of a chunk.
WHOLE = b"\0"
PIECES_FILE = "pieces"
_LEVEL = 12
#: A frame may ask its reader for so much memory, as a power of two: twice the largest chunk.
_WINDOW_LOG = (2 * MAX_CHUNK_BYTES).bit_length() - 1


def piece_of(chunk: bytes, base: bytes) -> bytes:
    """Return what tells ``chunk`` to whoever has ``base``, which is as long."""
    zstd = _zstd()
    piece: bytes = zstd.compress(_xor(chunk, base), level=_LEVEL)
    return piece if len(piece) < len(chunk) else WHOLE


def chunk_from(piece: bytes, base: bytes) -> bytes | None:
    """Return the chunk that a piece tells; None where it tells none. It may be any bytes of that length."""
    zstd = _zstd()
    reader = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _WINDOW_LOG})
    try:
        # No more comes out than was asked for, whatever the frame says of its size.
        difference: bytes = reader.decompress(piece, max_length=len(base) + 1)
    except (zstd.ZstdError, EOFError):
        return None
    if len(difference) != len(base) or not reader.eof or reader.unused_data:
        return None
    return _xor(difference, base)


def delta_content(manifest: Manifest, delta: Delta) -> OneFile:
    """Return the pieces as what a controller serves; where each begins is in an index beside them."""
    pieces = ArtifactFile(path=PIECES_FILE, size=delta.size, sha256=delta.digest, chunks=())
    return OneFile(f"{manifest.id} ({delta.name})", delta.digest, delta.size, (pieces,))


def _xor(one: bytes, other: bytes) -> bytes:
    return (int.from_bytes(one, "little") ^ int.from_bytes(other, "little")).to_bytes(len(one), "little")


def _zstd() -> Any:  # a module of the standard library, or its backport
    """Imported when a delta is made or applied: an idle agent has no use for it."""
    return import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
