"""Deltas from the controller's side: what is made, what is kept, and what is refused."""

from __future__ import annotations

import errno
from pathlib import Path
from unittest.mock import patch

import pytest

from agent.contract.delta import WHOLE, chunk_from
from agent.contract.manifest import Manifest
from agent.core.chunks import ChunkTable
from agent.platform.open_files import BaseFiles
from fleet.errors import StoreError, UsageError
from fleet.store import FolderStore
from fleet.store.deltas import KEPT_DELTAS, make_delta
from fleet.store.half_made import HALF_MADE
from tests.agent.store.test_delta import put, trained
from tests.simulators.artifacts import noise

WEIGHTS = noise(600_000, 5)


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "artifacts")


def artifact(store: FolderStore, seed: int, **more: bool) -> Manifest:
    files = {"weights": trained(WEIGHTS, seed) + trained(WEIGHTS, seed), "config.json": b"{}"}
    return put(store, files, f"v{seed}", **more)


@pytest.mark.parametrize("indexed", [True, False])
def test_every_chunk_comes_out_of_its_piece(store: FolderStore, indexed: bool) -> None:
    old, new = (artifact(store, seed, indexed=indexed) for seed in (1, 2))
    seen: list[float] = []
    made = make_delta(store, new, old, threads=2, progress=seen.append)
    assert store.get(new.id) == made and seen[-1] == 1.0
    [delta] = made.deltas
    assert (delta.base, delta.base_digest) == (old.id, old.digest)
    assert delta.size < 0.3 * new.size
    reader, artifact_reader = store.open(delta.digest), store.open(new.digest)
    assert reader is not None and artifact_reader is not None
    pieces, table = reader.layout(), ChunkTable(new, store.index(new))
    base = BaseFiles(store.files(old.id), old, new)
    assert len(pieces) == len(table) == new.chunk_count
    for number in range(len(table)):
        piece = reader.read(0, pieces.place(number).offset, pieces.sizes[number])
        place = table.layout.place(number)
        if table.first[number] != number:
            assert piece == WHOLE, "nobody asks for a repeat"
        else:
            chunk = chunk_from(piece, base.read(place.file, place.offset, table.sizes[number]))
            assert chunk is not None or (piece == WHOLE and table.sizes[number] == delta.whole_bytes == 2)
            assert chunk is None or table.holds(number, chunk)
    for one in (reader, artifact_reader, base):
        one.close()


def test_it_is_the_same_bytes_however_many_threads_made_it(store: FolderStore) -> None:
    old, new = artifact(store, 1), artifact(store, 2)
    assert make_delta(store, new, old, threads=1).deltas == make_delta(store, new, old, threads=4).deltas


def test_the_newest_are_kept_and_one_from_the_same_base_is_replaced(store: FolderStore) -> None:
    new = artifact(store, 0)
    bases = [artifact(store, seed) for seed in range(1, KEPT_DELTAS + 3)]
    made = new
    for base in [*bases, bases[-1]]:
        made = make_delta(store, made, base)
    assert [delta.base for delta in made.deltas] == [base.id for base in bases[-KEPT_DELTAS:]]
    assert sorted(path.name for path in store.delta(new, "x").parent.iterdir()) == sorted(
        base.digest for base in bases[-KEPT_DELTAS:]
    )


def nothing_left(store: FolderStore, manifest: Manifest) -> bool:
    halves = [path for path in store.root.iterdir() if path.name.startswith(HALF_MADE)]
    return not halves and store.get(manifest.id) == manifest and not store.delta(manifest, "x").parent.exists()


def test_what_saves_nothing_is_refused_with_the_figures(store: FolderStore) -> None:
    old, new = put(store, {"weights": noise(200_000, 1)}, "a"), put(store, {"weights": noise(200_000, 2)}, "b")
    with pytest.raises(UsageError, match=r"takes .* of 0\.2 MB \(.*\): devices may as well fetch it whole"):
        make_delta(store, new, old)
    with pytest.raises(UsageError, match="is the same artifact; name the one that devices have now"):
        make_delta(store, new, new)
    assert nothing_left(store, new)


def test_bytes_that_were_not_built_make_no_delta(store: FolderStore) -> None:
    old, new = artifact(store, 1), artifact(store, 2)
    weights = store.files(old.id) / "weights"
    right = weights.read_bytes()
    weights.write_bytes(right[::-1])
    with pytest.raises(StoreError, match="weights is not what was built"):
        make_delta(store, new, old)
    weights.write_bytes(right)
    full = OSError(errno.ENOSPC, "No space left on device")
    with (
        patch("fleet.store.deltas.piece_of", side_effect=full),
        pytest.raises(StoreError, match=r"the delta cannot be written in .*: the disk of .* is full"),
    ):
        make_delta(store, new, old)
    assert nothing_left(store, new)
