"""The index of a large artifact: the same chunks as a manifest that lists them, and nothing else is taken for one."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from agent.contract.base import MalformedMessageError
from agent.contract.chunk_index import Layout, Place, index_content, packed_chunks, with_index, without_index
from agent.contract.manifest import (
    INDEX_PIECE_BYTES,
    INDEX_RECORD_BYTES,
    MAX_CHUNK_BYTES,
    MAX_INDEX_BYTES,
    ArtifactFile,
    Delta,
    Manifest,
)
from agent.core.chunks import ChunkTable
from tests.simulators.artifacts import manifest_of

chunks = st.tuples(st.integers(1, MAX_CHUNK_BYTES), st.integers(0, 5).map(lambda n: f"{n:064x}"))
files = st.lists(st.lists(chunks, max_size=5), min_size=1, max_size=5).map(
    lambda listed: tuple(
        ArtifactFile(path=f"f{number}", size=sum(size for size, _ in part), sha256="0" * 64, chunks=tuple(part))
        for number, part in enumerate(listed)
    )
)
SOME = (
    ArtifactFile(path="empty", size=0, sha256="0" * 64, chunks=()),
    ArtifactFile(path="a", size=7, sha256="0" * 64, chunks=((3, "a" * 64), (4, "b" * 64))),
    ArtifactFile(path="b", size=3, sha256="0" * 64, chunks=((3, "a" * 64),)),
)


@given(files)
def test_a_layout_is_the_list_of_the_manifest(listed: tuple[ArtifactFile, ...]) -> None:
    layout = Layout(listed)
    expected, digests = [], []
    for number, file in enumerate(listed):
        offset = 0
        for size, digest in file.chunks:
            expected.append((Place(number, offset), size))
            digests.append(bytes.fromhex(digest))
            offset += size
    assert [(layout.place(n), layout.sizes[n]) for n in range(len(layout))] == expected
    assert [layout.digest(n) for n in range(len(layout))] == digests
    assert [n for number in range(len(listed)) for n in layout.of_file(number)] == list(range(len(expected)))


@given(files)
def test_a_table_wants_equal_bytes_once_and_finds_each(listed: tuple[ArtifactFile, ...]) -> None:
    table = ChunkTable(manifest_of(listed))
    digests = [bytes.fromhex(digest) for file in listed for _, digest in file.chunks]
    assert list(table.first) == [digests.index(digest) for digest in digests]
    assert [table.find(digest) for digest in digests] == list(table.first)
    assert table.find(b"\xff" * 32) is None
    assert sum(table.occurrences(first) for first in table.unique()) == len(table)
    assert sum(len(table.places(first)) for first in table.unique()) == len(table)


@given(files)
def test_a_manifest_with_an_index_lists_the_same_when_it_is_written_out(listed: tuple[ArtifactFile, ...]) -> None:
    whole = manifest_of(listed)
    manifest, packed = with_index(whole, 0)
    if whole.chunk_count == 0:
        assert (manifest, packed) == (whole, None)
        return
    assert packed is not None and manifest.index is not None
    again = Manifest.from_json(manifest.to_json())
    assert again == manifest and again.digest == whole.digest and again.chunk_count == whole.chunk_count
    assert without_index(again, packed) == whole
    assert with_index(manifest, 0) == (manifest, None)
    content = index_content(manifest)
    assert content is not None
    assert ChunkTable(content).holds(0, packed[:INDEX_PIECE_BYTES])


def test_few_chunks_stay_in_the_manifest() -> None:
    whole = manifest_of(SOME)
    assert with_index(whole) == (whole, None)
    assert without_index(whole, b"") is whole
    assert index_content(whole) is None


def test_ten_gibibytes_take_kilobytes_of_manifest() -> None:
    count = 160_000
    listed = tuple((65536, hashlib.sha256(b"%d" % n).hexdigest()) for n in range(count))
    file = ArtifactFile(path="weights", size=count * 65536, sha256="0" * 64, chunks=listed)
    manifest, packed = with_index(manifest_of((file,)))
    assert packed is not None and len(packed) == count * INDEX_RECORD_BYTES
    assert len(manifest.to_json()) < 8192
    assert manifest.size > 2**33


@pytest.mark.parametrize(
    ("packed", "words"),
    [
        (packed_chunks(SOME)[:-1], "no multiple of 36"),
        (packed_chunks(SOME)[:-INDEX_RECORD_BYTES], "chunk 2 has 0 bytes at byte 0 of b"),
        (
            packed_chunks(SOME) + packed_chunks(SOME)[:INDEX_RECORD_BYTES],
            "lists 4 chunks, and the files end with chunk 3",
        ),
        (b"", "chunk 0 has 0 bytes"),
        (bytes(INDEX_RECORD_BYTES) + packed_chunks(SOME), "chunk 0 has 0 bytes"),
        ((2**32 - 1).to_bytes(4) + packed_chunks(SOME)[4:], "chunk 0 has 4294967295 bytes"),
        ((MAX_CHUNK_BYTES + 1).to_bytes(4) + packed_chunks(SOME)[4:], "chunk 0 has 131073 bytes"),
        ((5).to_bytes(4) + packed_chunks(SOME)[4:], r"chunk 1 has 4 bytes at byte 5 of a \(7 bytes\)"),
    ],
)
def test_what_does_not_list_exactly_the_files_is_no_index(packed: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Layout(SOME, packed)


@given(st.binary(max_size=400))
def test_no_bytes_make_a_layout_of_other_files(packed: bytes) -> None:
    try:
        layout = Layout(SOME, packed)
    except ValueError:
        return
    assert sum(layout.sizes) == sum(file.size for file in SOME)


def test_another_artifacts_index_is_not_taken() -> None:
    manifest, packed = with_index(manifest_of(SOME), 0)
    assert packed is not None
    with pytest.raises(ValueError, match="is not the one that its manifest names"):
        without_index(manifest, packed[::-1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"files": [file.model_dump() for file in SOME]}, "a lists chunks, and so does the index"),
        ({"index": None}, "a has 7 bytes and lists no chunks, nor is there an index"),
        ({"index": {"sha256": "0" * 64, "size": 37, "pieces": ["0" * 64]}}, "multiple of 36"),
        ({"index": {"sha256": "0" * 64, "size": 0, "pieces": []}}, "greater than 0"),
        ({"index": {"sha256": "0" * 64, "size": 36, "pieces": []}}, "0 pieces of 131040 bytes are not 36 bytes"),
        ({"index": {"sha256": "0" * 64, "size": INDEX_PIECE_BYTES + 36, "pieces": ["0" * 64]}}, "1 pieces of"),
        ({"index": {"sha256": "0" * 64, "size": 36 * MAX_INDEX_BYTES, "pieces": []}}, "less than or equal"),
        ({"index": {"sha256": "x", "size": 36, "pieces": ["0" * 64]}}, "sha256"),
    ],
)
def test_a_manifest_whose_index_contradicts_it_is_refused(change: dict[str, object], words: str) -> None:
    manifest, _ = with_index(manifest_of(SOME), 0)
    with pytest.raises(ValidationError, match=words):
        Manifest.model_validate(manifest.model_dump() | change)


@pytest.mark.parametrize("given", [{"base": "phi-old"}, {"base_digest": "1" * 64}])
def test_a_delta_names_its_base_by_id_and_digest_or_has_none(given: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="base and base_digest belong together"):
        Delta.model_validate({"digest": "0" * 64, "size": 1, **given})
    assert Delta(digest="0" * 64, size=3, whole_bytes=4).wire_bytes == 7


def test_an_agent_that_knows_no_index_takes_no_such_manifest_for_one_without_bytes() -> None:
    """What agents 0.1 do with the field that they do not know: they look at the files, and refuse."""
    manifest, _ = with_index(manifest_of(SOME), 0)
    fields = manifest.model_dump(mode="json")
    del fields["index"]
    with pytest.raises((ValidationError, MalformedMessageError), match="lists no chunks"):
        Manifest.model_validate(fields)
