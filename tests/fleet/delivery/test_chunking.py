from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest
from fastcdc.fastcdc_cy import fastcdc_cy
from fastcdc.fastcdc_py import fastcdc_py
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.contract.manifest import MAX_CHUNK_BYTES
from fleet.delivery.chunking import AVERAGE_CHUNK_BYTES, MIN_CHUNK_BYTES, boundaries, chunk_file

GOLDEN = (60, [(0, 53939), (53939, 68691), (122630, 87924)], "d8f19517cdc31be2")
SIZES = {"min_size": MIN_CHUNK_BYTES, "avg_size": AVERAGE_CHUNK_BYTES, "max_size": MAX_CHUNK_BYTES}


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def write(folder: Path, data: bytes) -> Path:
    path = folder / "weights.bin"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("size", [0, 1, MIN_CHUNK_BYTES, MAX_CHUNK_BYTES, MAX_CHUNK_BYTES + 1, 3_000_001])
def test_chunks_cover_the_file_and_hash_to_it(tmp_path: Path, size: int) -> None:
    data = noise(size)
    digest, length, chunks = chunk_file(write(tmp_path, data))
    assert (digest, length) == (hashlib.sha256(data).hexdigest(), size)
    offset = 0
    for chunk_size, sha in chunks:
        assert hashlib.sha256(data[offset : offset + chunk_size]).hexdigest() == sha
        offset += chunk_size
    assert offset == size
    assert all(MIN_CHUNK_BYTES <= chunk_size <= MAX_CHUNK_BYTES for chunk_size, _ in chunks[:-1])


def test_average_is_near_64_KiB(tmp_path: Path) -> None:
    _, size, chunks = chunk_file(write(tmp_path, noise(16 << 20)))
    assert 0.8 < size / len(chunks) / AVERAGE_CHUNK_BYTES < 1.25


def test_bytes_without_any_cut_point_become_chunks_of_the_largest_size(tmp_path: Path) -> None:
    _, _, chunks = chunk_file(write(tmp_path, bytes(3 * MAX_CHUNK_BYTES)))
    assert [size for size, _ in chunks] == [MAX_CHUNK_BYTES] * 3
    assert len({sha for _, sha in chunks}) == 1


@settings(max_examples=12)
@given(
    data=st.one_of(
        st.builds(noise, st.integers(0, 400_000), st.integers(0, 1 << 32)),
        st.builds(lambda part, n: part * (n // len(part)), st.binary(min_size=1, max_size=64), st.integers(0, 400_000)),
    )
)
def test_compiled_and_pure_python_code_cut_at_the_same_bytes(data: bytes) -> None:
    compiled = [(cut.offset, cut.length) for cut in fastcdc_cy(data, **SIZES)]
    assert compiled == [(cut.offset, cut.length) for cut in fastcdc_py(data, **SIZES)]
    assert compiled == list(boundaries(data))


def test_boundaries_are_those_of_every_release() -> None:
    # A changed figure here means that devices in the field would re-use nothing: a new format, not a new constant.
    cuts = list(boundaries(noise(4 << 20, seed=1)))
    figures = hashlib.sha256(repr(cuts).encode()).hexdigest()
    assert (len(cuts), cuts[:3], figures[:16]) == GOLDEN


@settings(max_examples=15)
@given(
    seed=st.integers(0, 1000),
    where=st.floats(0, 1),
    inserted=st.binary(min_size=1, max_size=5000),
    removed=st.integers(0, 5000),
)
def test_an_edit_in_the_middle_keeps_nearly_all_chunks(seed: int, where: float, inserted: bytes, removed: int) -> None:
    old = noise(2 << 20, seed)
    at = int(where * len(old))
    new = old[:at] + inserted + old[at + removed :]
    known = {old[offset : offset + length] for offset, length in boundaries(old)}
    missing = sum(length for offset, length in boundaries(new) if new[offset : offset + length] not in known)
    assert missing <= 8 * MAX_CHUNK_BYTES
