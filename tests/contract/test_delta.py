"""Pieces of a delta: each tells its chunk to whoever has the base, and nothing that is sent does harm."""

from __future__ import annotations

import random
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.contract.delta import WHOLE, chunk_from, piece_of
from agent.contract.manifest import MAX_CHUNK_BYTES
from agent.platform.open_files import BaseFiles
from tests.simulators.artifacts import make_artifact, noise

zstd = pytest.importorskip("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")


@given(st.binary(min_size=1, max_size=5000), st.integers(0, 1 << 32), st.integers(0, 50))
def test_a_piece_tells_its_chunk(base: bytes, seed: int, changes: int) -> None:
    draw = random.Random(seed)
    chunk = bytearray(base)
    for _ in range(changes):
        chunk[draw.randrange(len(chunk))] = draw.randrange(256)
    piece = piece_of(bytes(chunk), base)
    assert piece == WHOLE or (len(piece) < len(chunk) and chunk_from(piece, base) == bytes(chunk))


@given(st.binary(max_size=200), st.integers(0, 300))
def test_no_bytes_are_an_error(piece: bytes, size: int) -> None:
    told = chunk_from(piece, bytes(size))
    assert told is None or len(told) == size


def test_what_differs_in_every_bit_is_sent_whole() -> None:
    assert piece_of(noise(MAX_CHUNK_BYTES, 1), noise(MAX_CHUNK_BYTES, 2)) == WHOLE
    assert chunk_from(WHOLE, bytes(100)) is None


def test_a_few_bits_of_a_chunk_are_a_few_bytes() -> None:
    base = noise(MAX_CHUNK_BYTES, 1)
    chunk = bytearray(base)
    chunk[70_000] ^= 1
    assert len(piece_of(bytes(chunk), base)) < 64


def frames() -> dict[str, bytes]:
    long_window = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 27})
    return {
        "a gibibyte of zeros": zstd.compress(bytes(1 << 28)) * 4,
        "a window of 128 MiB": long_window.compress(bytes(1 << 28)) + long_window.flush(),
        "one byte too many": zstd.compress(bytes(1001)),
        "one byte too few": zstd.compress(bytes(999)),
        "cut short": zstd.compress(noise(1000))[:-1],
        "something behind it": zstd.compress(bytes(1000)) + b"x",
        "a second frame": zstd.compress(bytes(1000)) + zstd.compress(bytes(10)),
        "no frame": noise(1000),
        "nothing": b"",
    }


@pytest.mark.parametrize("name", frames())
def test_a_frame_that_is_no_piece_tells_nothing_and_takes_no_memory(name: str) -> None:
    frame = frames()[name]
    tracemalloc.start()
    try:
        assert chunk_from(frame, bytes(1000)) is None
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_files_are_compared_from_their_ends(tmp_path: Path) -> None:
    """A header that grew moves every byte after it, and no weight has changed by that."""
    weights = noise(50_000)
    old = make_artifact(tmp_path / "old", {"m": b"short" + weights, "gone": b"x" * 100})
    new = make_artifact(tmp_path / "new", {"m": b"a longer header" + weights, "fresh": b"y" * 100}, "new")
    base = BaseFiles(tmp_path / "old", old, new)
    number = [file.path for file in new.files].index("m")
    assert base.read(number, 15, 50_000) == weights
    assert base.read(number, 0, 15) == bytes(10) + b"short"
    assert base.read(number, 0, 5) == bytes(5)
    assert base.read(1 - number, 0, 100) == bytes(100), "a file that the base has not"
    base.close()
    shorter = BaseFiles(tmp_path / "new", new, old)
    assert shorter.read(0, 0, 5) == b"eader"[-5:] or shorter.read(0, 5, 50_000) == weights
    assert shorter.read(0, 50_000, 100) == weights[-5:] + bytes(95), "what lies behind the end is zeros"
    shorter.close()
    shorter.close()
