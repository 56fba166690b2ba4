"""The folder of artifacts: what is found, what is damaged, and a disk that refuses each call in turn."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.contract.base import sha256_hex
from agent.contract.chunk_index import INDEX_FILE, with_index
from agent.contract.manifest import ArtifactFile, Manifest
from fleet.errors import StoreError, UsageError
from fleet.store import FolderStore
from fleet.store.protocol import find
from tests.simulators.faulty_disk import each_fault, open_files
from tests.simulators.repository import make_manifest


def put(folder: Path, content: bytes = b"weights", **changes: object) -> Manifest:
    manifest = make_manifest(content, **changes)
    files = folder / manifest.id / "files"
    files.mkdir(parents=True)
    (files / "model.bin").write_bytes(content)
    (folder / manifest.id / "manifest.json").write_bytes(manifest.to_json())
    return manifest


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "artifacts")


def test_what_is_there_is_listed_by_id_and_what_is_damaged_is_told(store: FolderStore):
    assert store.list().manifests == () == store.list().damaged
    second, first = put(store.root, id="b-second"), put(store.root, b"other", id="a-first")
    (store.root / ".building-x").mkdir()
    (store.root / "a-file").write_text("no folder")
    (store.root / "c-damaged").mkdir()
    (store.root / "c-damaged" / "manifest.json").write_text("{")
    (store.root / "d-empty").mkdir()
    listing = store.list()
    assert listing.manifests == (first, second)
    assert len(listing.damaged) == 2
    assert all("remove its folder and build it again" in line for line in listing.damaged)


def test_an_artifact_is_found_by_id_by_digest_and_by_their_beginnings(store: FolderStore):
    one, other = put(store.root, id="phi-one"), put(store.root, b"other", id="phi-other")
    assert find(store, "phi-one") == one
    assert find(store, other.digest) == other
    assert find(store, other.digest[:6]) == other
    assert find(store, "phi-ot") == other
    for text, words in (("phi-", "phi-one"), ("phi-noe", "phi-one"), ("x", ""), ("nothing-like-it", "")):
        with pytest.raises(UsageError) as caught:
            find(store, text)
        assert words in str(caught.value)


def test_a_manifest_is_replaced_and_the_digest_finds_it(store: FolderStore):
    manifest = put(store.root)
    assert store.get(manifest.id) == manifest
    assert store.get("no-such") is None
    measured = manifest.model_copy(update={"versions": {"a": "2"}})
    store.save_manifest(measured)
    assert store.get(manifest.id) == measured
    reader = store.open(manifest.digest)
    assert reader is not None and reader.read(0, 2, 3) == b"igh"
    assert store.open("0" * 64) is None
    reader.close()
    reader.close()


def test_a_reader_sees_an_artifact_that_came_later(store: FolderStore):
    assert store.open("0" * 64) is None
    manifest = put(store.root)
    os.utime(store.root, ns=(1, 1))
    assert store.open(manifest.digest) is not None


def test_bytes_that_are_not_there_are_an_error_and_no_short_answer(store: FolderStore):
    manifest = put(store.root)
    (store.files(manifest.id) / "model.bin").write_bytes(b"wei")
    reader = store.open(manifest.digest)
    assert reader is not None
    with pytest.raises(OSError, match="ends before byte 7: it is not what was published"):
        reader.read(0, 0, 7)
    reader.close()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda file: file.unlink(), "model.bin is missing; remove .* and build it again"),
        (lambda file: file.write_bytes(b"weight"), "has 6 bytes, its manifest says 7"),
        (lambda file: file.write_bytes(b"weighty"), "is not what was built"),
    ],
)
def test_files_that_are_not_what_was_built_are_named(store: FolderStore, spoil: Callable[[Path], object], words: str):
    manifest = put(store.root)
    store.verify(manifest)
    spoil(store.files(manifest.id) / "model.bin")
    with pytest.raises(StoreError, match=words):
        store.verify(manifest)


def put_indexed(store: FolderStore) -> tuple[Manifest, Path]:
    manifest, index = with_index(put(store.root), 0)
    (store.folder(manifest.id) / "manifest.json").write_bytes(manifest.to_json())
    path = store.folder(manifest.id) / INDEX_FILE
    path.write_bytes(index or b"")
    return manifest, path


def test_an_index_is_found_by_its_own_digest(store: FolderStore):
    manifest, path = put_indexed(store)
    store.verify(manifest)
    assert store.get(manifest.id) == manifest
    assert manifest.index is not None and store.index(manifest) == path.read_bytes()
    assert store.index(make_manifest()) is None
    reader = store.open(manifest.index.sha256)
    assert reader is not None and reader.read(0, 0, 36) == path.read_bytes() and len(reader.layout()) == 1
    reader.close()
    artifact = store.open(manifest.digest)
    assert artifact is not None and artifact.layout().digest(0).hex() == sha256_hex(b"weights")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda file: file.unlink(), "index is missing; remove .* and build it again"),
        (lambda file: file.write_bytes(b"x" * 35), "has 35 bytes, its manifest says 36"),
        (lambda file: file.write_bytes(b"x" * 36), "index is not what was built"),
    ],
)
def test_an_index_that_is_not_what_was_built_is_named(store: FolderStore, spoil: Callable[[Path], object], words: str):
    manifest, path = put_indexed(store)
    spoil(path)
    with pytest.raises(StoreError, match=words):
        store.verify(manifest)
    with pytest.raises(StoreError, match="index"):
        store.index(manifest)
    artifact = store.open(manifest.digest)
    assert artifact is not None
    with pytest.raises(OSError, match="index"):
        artifact.layout()


def test_a_folder_that_is_a_file_is_told(tmp_path: Path):
    (tmp_path / "artifacts").write_text("no folder")
    store = FolderStore(tmp_path / "artifacts")
    with pytest.raises(StoreError, match=r"the artifacts in .* cannot be read: Not a directory"):
        store.list()


OPERATIONS: dict[str, Callable[[FolderStore, Manifest], object]] = {
    "list": lambda store, manifest: store.list(),
    "get": lambda store, manifest: store.get(manifest.id),
    "verify": lambda store, manifest: store.verify(manifest),
    "open": lambda store, manifest: FolderStore(store.root).open(manifest.digest),
    "save": lambda store, manifest: store.save_manifest(manifest.model_copy(update={"versions": {"a": "2"}})),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_whichever_call_the_disk_refuses_it_is_told_and_nothing_is_half_written(tmp_path: Path, name: str):
    files = (
        ArtifactFile(path="model.bin", size=7, sha256=sha256_hex(b"weights"), chunks=((7, sha256_hex(b"weights")),)),
    )
    manifest = put(tmp_path / "artifacts", files=files)
    before, opened = manifest.to_json(), open_files()
    path = tmp_path / "artifacts" / manifest.id / "manifest.json"

    def prepare() -> Callable[[], object]:
        path.write_bytes(before)
        store = FolderStore(tmp_path / "artifacts")
        return lambda: OPERATIONS[name](store, manifest)

    refused = 0
    for call, code, raised in each_fault(tmp_path, prepare):
        assert raised is None or isinstance(raised, StoreError), (call, code, raised)
        if raised is not None:
            refused += 1
            assert str(tmp_path) in str(raised)
        now = Manifest.from_json(path.read_bytes())
        assert now in (manifest, manifest.model_copy(update={"versions": {"a": "2"}}))
        left = [one.name for one in path.parent.iterdir() if one.name not in ("files", "manifest.json")]
        assert left == [], f"left after {call}"
    assert refused or name == "list", "each call that the disk refuses is told"
    assert open_files() == opened
    FolderStore(tmp_path / "artifacts").verify(manifest)


def test_an_artifact_whose_manifest_could_not_be_read_once_is_found_at_the_next_look(tmp_path: Path):
    manifest = put(tmp_path / "artifacts")
    found: list[object] = []

    def prepare() -> Callable[[], object]:
        store = FolderStore(tmp_path / "artifacts")
        found.append(store)
        return lambda: store.open(manifest.digest)

    for call, _, _ in each_fault(tmp_path, prepare):
        store = found[-1]
        assert isinstance(store, FolderStore)
        assert store.open(manifest.digest) is not None, f"it stays away after {call}"


def test_a_damaged_manifest_is_not_read_again_for_every_digest_that_somebody_makes_up(store: FolderStore):
    put(store.root)
    (store.root / "damaged").mkdir()
    (store.root / "damaged" / "manifest.json").write_text("{")
    assert store.open("0" * 64) is None
    (store.root / "damaged" / "manifest.json").chmod(0)
    (store.root / "damaged" / "manifest.json").unlink()  # whoever looks into it now would tell another error
    assert store.open("1" * 64) is None
    assert store._all_readable


def test_without_pread_bytes_are_read_from_where_they_are(store: FolderStore, monkeypatch: pytest.MonkeyPatch):
    """Windows has none."""
    manifest = put(store.root, b"0123456789")
    monkeypatch.delattr("os.pread")
    artifact = store.open(manifest.digest)
    assert artifact is not None
    with contextlib.closing(artifact):
        assert [artifact.read(0, offset, 3) for offset in (4, 0, 7)] == [b"456", b"012", b"789"]
        with pytest.raises(OSError, match="ends before byte 12"):
            artifact.read(0, 9, 3)


def test_too_few_characters_name_no_artifact(store: FolderStore):
    manifest = put(store.root)
    assert find(store, manifest.digest[:8]) == manifest
    with pytest.raises(UsageError, match="is too short to name an artifact"):
        find(store, manifest.digest[:1])
