"""Artifacts whose chunks are listed in an index: fetched first, as chunks are, and believed only as it was signed."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from pathlib import Path

import pytest

from agent.contract import topics
from agent.contract.chunk_index import INDEX_FILE, index_content, with_index
from agent.contract.failures import FailureCode
from agent.contract.manifest import INDEX_PIECE_BYTES, ArtifactFile, Manifest
from agent.contract.messages import Progress
from agent.errors import MeteredError, StoreError, TransferError, TrustError
from agent.platform.files import sha256_of
from agent.store import artifacts
from agent.store.artifacts import ArtifactStore
from agent.store.fetch import Fetcher, OwnLimits
from tests.disk import MIB, small_disk
from tests.simulators.artifacts import make_artifact, make_indexed, manifest_of, noise
from tests.simulators.broker import Broker
from tests.simulators.transfer import fetch, linked, only, serving, worker
from tests.waiting import until


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "controller" / "files"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "device"


def artifact(source: Path, mib: float = 4, seed: int | None = None) -> tuple[Manifest, Manifest]:
    seed = uuid.uuid4().int if seed is None else seed  # else the server would coalesce with another test's chunks
    return make_indexed(source, {"model.bin": noise(int(mib * MIB), seed), "empty": b"", "again": noise(90_000, seed)})


def many_small(source: Path, count: int = 12_000, size: int = 20) -> Manifest:
    """With an index of several pieces, though small itself."""
    run = uuid.uuid4().bytes
    chunks = [run + n.to_bytes(size - len(run)) for n in range(count)]
    source.mkdir(parents=True)
    (source / "weights").write_bytes(b"".join(chunks))
    listed = tuple((size, hashlib.sha256(chunk).hexdigest()) for chunk in chunks)
    file = ArtifactFile(path="weights", size=size * count, sha256=sha256_of(source / "weights"), chunks=listed)
    manifest, packed = with_index(manifest_of((file,)), 0)
    assert packed is not None and manifest.index is not None and len(manifest.index.pieces) > 3
    (source.parent / INDEX_FILE).write_bytes(packed)
    return manifest


async def test_it_arrives_with_its_index_and_is_whole(broker: Broker, source: Path, home: Path) -> None:
    manifest, _ = artifact(source)
    assert len(manifest.to_json()) < 2000
    seen: list[Progress] = []
    async with serving(broker.url, only(manifest, source)) as server, linked(broker.url) as link:
        fetcher = Fetcher(link, ArtifactStore(home, reserve_bytes=0), "d1")
        progress = await fetcher.fetch(manifest, window_bytes=MIB, stall_s=60, on_progress=seen.append)
        assert server.stats().bytes == progress.bytes_received
        before = server.stats().wants
        again = await fetch(link, home, manifest)
        assert server.stats().wants == before
    store = ArtifactStore(home)
    store.verify(manifest.digest)
    assert store.manifest(manifest.digest) == manifest
    assert progress.bytes_done == progress.bytes_total == manifest.size
    assert progress.chunks_done == progress.chunks_total == manifest.chunk_count == again.chunks_done
    assert all(one.bytes_total == manifest.size for one in seen)
    assert (home / "artifacts" / manifest.digest / INDEX_FILE).is_file()
    assert not (home / "artifacts" / manifest.digest / "index-part").exists()


async def test_many_devices_get_one_publication_of_the_index(broker: Broker, source: Path, tmp_path: Path) -> None:
    manifest = many_small(source)
    index = index_content(manifest)
    assert index is not None
    asked = only(manifest, source)
    del asked[manifest.digest]  # the index alone is what is counted here
    async with serving(broker.url, asked) as server:

        async def one(number: int) -> None:
            async with linked(broker.url, f"d{number}") as link:
                with pytest.raises(TransferError, match="no chunk came"):
                    await fetch(link, tmp_path / f"d{number}", manifest, device=f"d{number}", stall_s=2)

        async with asyncio.TaskGroup() as group:
            for number in range(16):
                group.create_task(one(number))
        assert index.size <= server.stats().bytes <= 1.1 * index.size
    for n in range(16):
        assert (tmp_path / f"d{n}" / "partial" / manifest.digest / INDEX_FILE).stat().st_size == index.size


async def test_pieces_of_the_index_outlive_a_kill(mosquitto_broker: Broker, source: Path, home: Path) -> None:
    manifest = many_small(source)
    path = source.parent / "manifest.json"
    path.write_bytes(manifest.to_json())
    part = home / "partial" / manifest.digest / "index-part" / "files" / INDEX_FILE
    index = index_content(manifest)
    assert index is not None
    # Of the index only the first pieces can be read, so that the device is in the midst of it when it is killed.
    whole = (source.parent / INDEX_FILE).read_bytes()
    (source.parent / INDEX_FILE).write_bytes(whole[: 2 * INDEX_PIECE_BYTES])
    async with serving(mosquitto_broker.url, only(manifest, source)):
        with worker("fetch", mosquitto_broker.url, path, home, MIB) as device:
            await until(lambda: part.exists() and part.read_bytes().startswith(whole[: 2 * INDEX_PIECE_BYTES]), 30)
            device.kill()
    (source.parent / INDEX_FILE).write_bytes(whole)
    async with serving(mosquitto_broker.url, only(manifest, source)), linked(mosquitto_broker.url) as link:
        progress = await fetch(link, home, manifest)
    ArtifactStore(home).verify(manifest.digest)
    assert progress.bytes_received == manifest.size + index.size - 2 * INDEX_PIECE_BYTES


async def test_wrong_pieces_never_become_the_index(broker: Broker, source: Path, home: Path) -> None:
    manifest, _ = artifact(source)
    index = source.parent / INDEX_FILE
    right = index.read_bytes()
    index.write_bytes(right[::-1])
    async with serving(broker.url, only(manifest, source)), linked(broker.url) as link:
        with pytest.raises(TransferError, match="chunks came with wrong bytes") as caught:
            await fetch(link, home, manifest, stall_s=2)
    assert caught.value.code is FailureCode.TRANSFER_UNAVAILABLE
    assert f"{manifest.id} (its index)" in str(caught.value)
    assert not (home / "partial" / manifest.digest / INDEX_FILE).exists()
    index.write_bytes(right)
    async with serving(broker.url, only(manifest, source)), linked(broker.url) as link:
        await fetch(link, home, manifest)
    ArtifactStore(home).verify(manifest.digest)


async def test_an_index_that_was_signed_and_lists_other_bytes_is_told_at_once(
    embedded_broker: Broker, source: Path, home: Path
) -> None:
    manifest, whole = artifact(source, 1)
    index = source.parent / INDEX_FILE
    right = index.read_bytes()
    wrong = (int.from_bytes(right[:4]) + 1).to_bytes(4) + right[4:]
    index.write_bytes(wrong)
    digest = hashlib.sha256(wrong).hexdigest()
    assert manifest.index is not None
    forged = manifest.model_copy(
        update={"index": manifest.index.model_copy(update={"sha256": digest, "pieces": (digest,)})}
    )
    known = only(forged, source) | only(whole, source)
    async with serving(embedded_broker.url, known), linked(embedded_broker.url) as link:
        for _ in range(2):  # the second time from the disk
            with pytest.raises(TrustError, match=r"the signed index of .* is none: chunk .* bytes at byte"):
                await fetch(link, home, forged)
        await fetch(link, home, whole)  # the claim on the artifact was given back
    ArtifactStore(home).verify(manifest.digest)


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("donor_indexed", [True, False])
async def test_an_update_fetches_only_what_changed(
    embedded_broker: Broker, source: Path, home: Path, tmp_path: Path, indexed: bool, donor_indexed: bool
) -> None:
    seed = uuid.uuid4().int
    old = artifact(source, 6, seed)[not donor_indexed]
    new_source = tmp_path / "new" / "files"
    new = make_indexed(new_source, {"model.bin": b"a new head" + noise(6 * MIB, seed)}, "new")[not indexed]
    known = only(old, source) | only(new, new_source)
    async with serving(embedded_broker.url, known), linked(embedded_broker.url) as link:
        await fetch(link, home, old)
        progress = await fetch(link, home, new)
    assert progress.bytes_received < 0.1 * new.size
    ArtifactStore(home).verify(new.digest)


@pytest.mark.parametrize("damage", ["gone", "wrong"])
async def test_a_donor_without_its_index_is_none(
    embedded_broker: Broker, source: Path, home: Path, tmp_path: Path, damage: str
) -> None:
    seed = uuid.uuid4().int
    old, _ = artifact(source, 2, seed)
    new_source = tmp_path / "new" / "files"
    new, _ = make_indexed(new_source, {"model.bin": noise(2 * MIB, seed)}, "new")
    known = only(old, source) | only(new, new_source)
    async with serving(embedded_broker.url, known), linked(embedded_broker.url) as link:
        await fetch(link, home, old)
        index = home / "artifacts" / old.digest / INDEX_FILE
        index.unlink() if damage == "gone" else index.write_bytes(b"\0" * 36)
        progress = await fetch(link, home, new)
    assert progress.bytes_reused == 0
    ArtifactStore(home).verify(new.digest)


async def test_what_came_with_a_long_manifest_is_still_a_donor_when_a_short_one_takes_its_place(
    embedded_broker: Broker, source: Path, home: Path, tmp_path: Path
) -> None:
    seed = uuid.uuid4().int
    indexed, whole = artifact(source, 4, seed)
    new_source = tmp_path / "new" / "files"
    new, _ = make_indexed(new_source, {"model.bin": noise(4 * MIB, seed)}, "new")
    known = only(whole, source) | only(new, new_source)
    async with serving(embedded_broker.url, known), linked(embedded_broker.url) as link:
        await fetch(link, home, whole)
        await fetch(link, home, indexed)  # the same files; nothing is asked for
        assert ArtifactStore(home).manifest(whole.digest) == indexed
        progress = await fetch(link, home, new)
    assert progress.bytes_received < 0.1 * new.size


def test_a_short_manifest_takes_the_place_of_one_with_other_chunks(source: Path, tmp_path: Path) -> None:
    """The chunks may be cut elsewhere by another release; then what is here is whole, but no donor."""
    indexed, whole = artifact(source, 1)
    [model, *rest] = whole.files
    cut = [(MIB // 32, "0" * 64)] * 32
    other = manifest_of((model.model_copy(update={"chunks": tuple(cut)}), *rest))
    store = ArtifactStore(tmp_path, reserve_bytes=0)
    folder = tmp_path / "artifacts" / indexed.digest
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_bytes(other.to_json())
    store.renew(indexed)
    assert store.manifest(indexed.digest) == indexed
    assert list(store.donors("")) == []


def test_a_disk_that_is_too_small_is_told_before_the_index_is_asked_for(source: Path, tmp_path: Path) -> None:
    manifest, _ = artifact(source, 12)
    with small_disk(tmp_path / "disk", 8) as disk, pytest.raises(StoreError, match="needs 12") as caught:
        ArtifactStore(disk, reserve_bytes=0).begin_index(manifest)
    assert caught.value.code is FailureCode.STORE_DISK_FULL


def test_without_its_index_no_transfer_begins(source: Path, tmp_path: Path) -> None:
    manifest, whole = artifact(source, 1)
    store = ArtifactStore(tmp_path, reserve_bytes=0)
    with pytest.raises(StoreError, match=r"is not in .*; it is fetched again"):
        store.begin(manifest)
    assert store.begin_index(whole) is None
    partial = store.begin_index(manifest)
    assert partial is not None
    with pytest.raises(StoreError, match="being transferred already"):
        store.begin_index(manifest)
    store.abandon(partial)


async def test_what_a_kill_leaves_of_the_index_is_tidied_up(
    embedded_broker: Broker, source: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the rename that makes it the index and the removal of the folder that it came in."""
    manifest, _ = artifact(source, 1)

    def killed(_folder: Path) -> None:
        raise KeyboardInterrupt

    index = index_content(manifest)
    assert index is not None
    known = only(manifest, source)
    del known[index.digest]  # it is here, so nobody asks for it
    async with serving(embedded_broker.url, known) as server, linked(embedded_broker.url) as link:
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(artifacts.shutil, "rmtree", killed)
            partial = ArtifactStore(home, reserve_bytes=0).begin_index(manifest)
            assert partial is not None
            partial.write(0, (source.parent / INDEX_FILE).read_bytes())
            ArtifactStore(home, reserve_bytes=0).commit_index(manifest, partial)
        folder = home / "partial" / manifest.digest
        assert (folder / INDEX_FILE).is_file() and (folder / "index-part").is_dir()
        await fetch(link, home, manifest, stall_s=5)
        assert server.stats().wants_unknown == 0
    assert sorted(path.name for path in (home / "artifacts" / manifest.digest).iterdir()) == [
        "files", "index", "manifest.json",
    ]  # fmt: skip


async def test_a_metered_network_carries_no_index_that_is_too_large(
    embedded_broker: Broker, source: Path, home: Path
) -> None:
    manifest, _ = artifact(source, 1)
    async with serving(embedded_broker.url, only(manifest, source)) as server, linked(embedded_broker.url) as link:
        store = ArtifactStore(home, reserve_bytes=0)
        for allowed in (10, 500_000):  # less than the index, and less than the artifact
            fetcher = Fetcher(link, store, "d1", own=OwnLimits(metered_bytes=allowed))
            with pytest.raises(MeteredError, match=f"at most {allowed} bytes are fetched unasked"):
                await fetcher.fetch(manifest, window_bytes=MIB, stall_s=5, on_progress=lambda progress: None)
            assert server.stats().bytes <= allowed


async def test_strangers_pieces_are_not_taken(embedded_broker: Broker, source: Path, home: Path) -> None:
    manifest, _ = artifact(source, 1)
    index = index_content(manifest)
    assert index is not None
    async with linked(embedded_broker.url) as link, linked(embedded_broker.url, "stranger") as stranger:
        task = asyncio.create_task(fetch(link, home, manifest, stall_s=2))
        for number in (0, 1, 999_999_999):
            await stranger.publish(topics.own_chunk("d1", index.digest, number), b"x" * 36)
            await stranger.publish(topics.shared_chunk(index.digest, number), b"x" * 36)
        with pytest.raises(TransferError):
            await task
    assert not (home / "partial" / manifest.digest / INDEX_FILE).exists()


def test_a_cancelled_index_leaves_the_artifact_to_others(source: Path, tmp_path: Path) -> None:
    made = make_artifact(source, {"f": noise(100_000)})
    store = ArtifactStore(tmp_path, reserve_bytes=0)
    store.abandon(store.begin(made))
    store.abandon(store.begin(made))
