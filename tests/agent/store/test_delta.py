"""Updates that come as what differs from an artifact that the device has; and what spoils that, which costs bytes."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.contract.chunk_index import INDEX_FILE, index_content, with_index
from agent.contract.delta import PIECES_FILE, delta_content, piece_of
from agent.contract.manifest import Manifest
from agent.contract.messages import Progress
from agent.core.transfer import Outcome
from agent.errors import MeteredError, TransferError
from agent.link import MqttLink
from agent.platform.open_files import BaseFiles
from agent.store import fetch as fetching
from agent.store.artifacts import ArtifactStore
from agent.store.fetch import Fetcher, OwnLimits
from agent.store.intake import DeltaIntake
from fleet.store import FolderStore
from fleet.store.deltas import make_delta
from tests.disk import MIB
from tests.simulators.artifacts import make_artifact, noise
from tests.simulators.broker import Broker, free_port, mosquitto
from tests.simulators.transfer import fetch, linked, serving
from tests.waiting import until


def trained(weights: bytes, seed: int, share: float = 0.01) -> bytes:
    """The weights after training on: bits change everywhere, so that no chunk stays the same."""
    draw, changed = random.Random(seed), bytearray(weights)
    for _ in range(int(len(weights) * share)):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def put(store: FolderStore, files: dict[str, bytes], name: str, *, indexed: bool = False) -> Manifest:
    whole = make_artifact(store.root.parent / f"made-{uuid.uuid4().hex}", files, name)
    manifest, index = with_index(whole, 0) if indexed else (whole, None)
    folder = store.folder(manifest.id)
    for path, data in files.items():
        (folder / "files" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "files" / path).write_bytes(data)
    if index is not None:
        (folder / INDEX_FILE).write_bytes(index)
    (folder / "manifest.json").write_bytes(manifest.to_json())
    return manifest


def kill(broker: Broker) -> None:
    assert broker.process is not None
    broker.process.kill()
    broker.process.wait()


@dataclass
class Scene:
    """A controller's store with a model and its update, and a device."""

    store: FolderStore
    home: Path
    old: Manifest
    new: Manifest

    def serving(self, url: str):  # type: ignore[no-untyped-def]
        known = {}
        for manifest in (self.old, self.new):
            known[manifest.digest] = (manifest, self.store.files(manifest.id))
            if (index := index_content(manifest)) is not None:
                known[index.digest] = (index, self.store.folder(manifest.id))
            for delta in manifest.deltas:
                known[delta.digest] = (
                    delta_content(manifest, delta), self.store.delta(manifest, delta.base_digest) / "files",
                )  # fmt: skip
        return serving(url, known)

    async def updated(self, link: MqttLink) -> Progress:
        await fetch(link, self.home, self.old)
        return await self.fetched(link)

    async def fetched(self, link: MqttLink, stall_s: float = 60) -> Progress:
        progress = await fetch(link, self.home, self.new, stall_s=stall_s)
        ArtifactStore(self.home).verify(self.new.digest)
        assert progress.bytes_done == progress.bytes_total == self.new.size
        assert progress.chunks_done == progress.chunks_total
        return progress

    @property
    def pieces(self) -> Path:
        return self.store.delta(self.new, self.old.digest) / "files" / PIECES_FILE

    def weights_on_device(self) -> Path:
        return self.home / "artifacts" / self.old.digest / "files" / "weights"


def scene_in(folder: Path, *, indexed: bool = False) -> Scene:
    store, seed = FolderStore(folder / "artifacts"), uuid.uuid4().int
    weights = noise(3 * MIB, seed)
    old = put(store, {"weights": b"head" + weights, "config.json": b"{}"}, "old", indexed=indexed)
    files = {"weights": b"a longer head" + trained(weights, seed), "config.json": b"{}", "new.txt": b"new " * 9000}
    new = put(store, files, "new", indexed=indexed)
    return Scene(store, folder / "device", old, make_delta(store, new, old, threads=2))


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return scene_in(tmp_path)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "DELTA_PATIENCE_S", 1.5)


@pytest.mark.parametrize("indexed", [True, False])
async def test_an_update_takes_what_differs(broker: Broker, tmp_path: Path, indexed: bool) -> None:
    scene = scene_in(tmp_path, indexed=indexed)
    [delta] = scene.new.deltas
    assert delta.size < 0.15 * scene.new.size
    async with scene.serving(broker.url), linked(broker.url) as link:
        progress = await scene.updated(link)
    extra = scene.new.index.size if scene.new.index else 0
    assert progress.bytes_received <= delta.size + extra
    assert progress.bytes_reused < 100, "no chunk was on the device as it is"
    assert progress.chunks_rejected == 0


async def test_without_the_base_it_comes_whole(embedded_broker: Broker, scene: Scene) -> None:
    async with scene.serving(embedded_broker.url), linked(embedded_broker.url) as link:
        progress = await scene.fetched(link)
    assert progress.bytes_received == scene.new.size


async def test_without_any_base_the_chunks_come_compressed(embedded_broker: Broker, scene: Scene) -> None:
    """And of two deltas that would do, the smaller is fetched."""
    rows = b"".join(n.to_bytes(4) * 16 for n in range(60_000))
    scene.old = put(scene.store, {"weights": rows}, "tidy")
    scene.old = make_delta(scene.store, scene.old, None)
    assert scene.old.deltas[0].wire_bytes < 0.3 * scene.old.size
    async with scene.serving(embedded_broker.url), linked(embedded_broker.url) as link:
        progress = await fetch(link, scene.home, scene.old)
    assert progress.bytes_received <= scene.old.deltas[0].wire_bytes
    assert progress.bytes_reused == 0
    ArtifactStore(scene.home).verify(scene.old.digest)
    scene.new = put(scene.store, {"weights": trained(rows, 1, 1e-5)}, "tidier")
    scene.new = make_delta(scene.store, make_delta(scene.store, scene.new, None), scene.old)
    compressed, small = scene.new.deltas
    assert small.wire_bytes < 0.2 * compressed.wire_bytes
    async with scene.serving(embedded_broker.url), linked(embedded_broker.url) as link:
        assert (await scene.fetched(link)).bytes_received <= small.wire_bytes


async def test_who_names_mirrors_takes_what_is_compressed_from_no_broker(embedded_broker: Broker, scene: Scene) -> None:
    manifest = make_delta(scene.store, put(scene.store, {"weights": bytes(200_000) + noise(100_000)}, "half"), None)
    scene.new = manifest
    async with scene.serving(embedded_broker.url) as server, linked(embedded_broker.url) as link:
        mirrors = ("http://127.0.0.1:1/{digest}/{path}",)
        fetcher = Fetcher(link, ArtifactStore(scene.home, reserve_bytes=0), "d1", own=OwnLimits(mirrors=mirrors))
        await fetcher.fetch(manifest, window_bytes=MIB, stall_s=9, on_progress=lambda progress: None)
        distinct = len({digest for _, digest in manifest.files[0].chunks})
        assert server.stats().chunks == distinct
        assert server.stats().bytes > 2 * 100_000, "chunks, after the mirror was given up, and no pieces"


@pytest.mark.parametrize(
    ("spoil", "at_most"),
    [
        (lambda file: file.write_bytes(noise(file.stat().st_size, 7)), 1.2),
        (lambda file: file.write_bytes(trained(file.read_bytes(), 7, 2e-6)), 0.6),
        (lambda file: file.write_bytes(file.read_bytes()[:-100_000]), 0.3),
        (lambda file: file.unlink(), 1.2),
    ],
    ids=["other bytes", "a few bits", "cut short", "gone"],
)
async def test_a_base_that_is_not_what_it_was_costs_bytes_alone(
    embedded_broker: Broker, scene: Scene, spoil: Callable[[Path], object], at_most: float
) -> None:
    async with scene.serving(embedded_broker.url), linked(embedded_broker.url) as link:
        await fetch(link, scene.home, scene.old)
        spoil(scene.weights_on_device())
        progress = await scene.fetched(link)
    assert progress.bytes_received < at_most * scene.new.size


async def test_pieces_that_were_damaged_at_the_controller_cost_bytes_alone(
    embedded_broker: Broker, scene: Scene
) -> None:
    scene.pieces.write_bytes(trained(scene.pieces.read_bytes(), 3, 0.0001))
    async with scene.serving(embedded_broker.url), linked(embedded_broker.url) as link:
        progress = await scene.updated(link)
    assert scene.new.deltas[0].size < progress.bytes_received < scene.new.size


@pytest.mark.usefixtures("impatient")
async def test_a_delta_that_nobody_serves_is_given_up(embedded_broker: Broker, scene: Scene) -> None:
    """A controller that was restored without it, or one of the release before."""
    signed, scene.new = scene.new, scene.new.model_copy(update={"deltas": ()})
    async with scene.serving(embedded_broker.url), linked(embedded_broker.url) as link:
        scene.new = signed
        progress = await scene.updated(link)
    assert progress.bytes_received == scene.new.size - 2, "config.json alone is the same"


async def test_a_connection_that_breaks_goes_on_with_the_delta(scene: Scene, tmp_path: Path) -> None:
    port = free_port()
    partial = scene.home / "partial" / scene.new.digest
    with mosquitto(tmp_path / "one", port=port) as first:
        async with scene.serving(first.url), linked(first.url) as link:
            await fetch(link, scene.home, scene.old)
            task = asyncio.create_task(scene.fetched(link))
            await until(partial.exists, 10)
            kill(first)
            await asyncio.sleep(0.5)
            with mosquitto(tmp_path / "two", port=port):
                progress = await task
    assert progress.bytes_received < 0.3 * scene.new.size


async def test_what_came_by_the_delta_is_kept(embedded_broker: Broker, scene: Scene) -> None:
    """A kill in the midst of it; what is on the disk are chunks, wherever they came from."""
    async with scene.serving(embedded_broker.url), linked(embedded_broker.url) as link:
        await fetch(link, scene.home, scene.old)
        store = ArtifactStore(scene.home, reserve_bytes=0)
        partial, found = store.begin(scene.new), store.base(scene.new)
        assert found is not None
        first = next(iter(partial.table.unique()))
        place = partial.table.places(first)[0]
        data = (scene.store.files(scene.new.id) / scene.new.files[place.file].path).read_bytes()
        partial.write(first, data[place.offset : place.offset + partial.table.sizes[first]])
        store.abandon(partial)
        progress = await scene.fetched(link)
    assert progress.bytes_reused >= partial.table.sizes[first]


def test_a_piece_that_comes_when_all_is_over_touches_nothing(scene: Scene, tmp_path: Path) -> None:
    store = ArtifactStore(scene.home, reserve_bytes=0)
    base = BaseFiles(scene.store.files(scene.old.id), scene.old, scene.new)
    partial = store.begin(scene.new)
    intake = DeltaIntake(partial, (), base)
    first = next(iter(partial.table.unique()))
    place = partial.table.places(first)[0]
    files = scene.store.files(scene.new.id) / scene.new.files[place.file].path
    chunk = files.read_bytes()[place.offset : place.offset + partial.table.sizes[first]]
    piece = piece_of(chunk, base.read(place.file, place.offset, len(chunk)))
    intake.close()
    intake.close()
    assert intake.accept(first, piece) is Outcome.DUPLICATE
    assert not intake.has(first) and intake.useless == 0
    store.abandon(partial)


async def test_on_a_metered_network_the_delta_is_what_counts(embedded_broker: Broker, scene: Scene) -> None:
    [delta] = scene.new.deltas
    async with scene.serving(embedded_broker.url) as server, linked(embedded_broker.url) as link:
        await fetch(link, scene.home, scene.old)
        before = server.stats().bytes

        async def at_most(allowed: int) -> Progress:
            store = ArtifactStore(scene.home, reserve_bytes=0)
            fetcher = Fetcher(link, store, "d1", own=OwnLimits(metered_bytes=allowed))
            return await fetcher.fetch(scene.new, window_bytes=MIB, stall_s=9, on_progress=lambda progress: None)

        with pytest.raises(MeteredError, match="this device's network is metered"):
            await at_most(delta.size // 2)
        assert server.stats().bytes == before
        assert (await at_most(delta.size * 2)).bytes_received <= delta.size


async def test_a_metered_network_does_not_carry_what_the_delta_left_out(embedded_broker: Broker, scene: Scene) -> None:
    async with scene.serving(embedded_broker.url), linked(embedded_broker.url) as link:
        await fetch(link, scene.home, scene.old)
        scene.weights_on_device().unlink()
        store = ArtifactStore(scene.home, reserve_bytes=0)
        fetcher = Fetcher(link, store, "d1", own=OwnLimits(metered_bytes=scene.new.size // 2))
        with pytest.raises(MeteredError, match="needs"):
            await fetcher.fetch(scene.new, window_bytes=MIB, stall_s=9, on_progress=lambda progress: None)


async def test_devices_side_by_side_share_the_pieces(embedded_broker: Broker, scene: Scene, tmp_path: Path) -> None:
    [delta] = scene.new.deltas
    async with scene.serving(embedded_broker.url) as server:

        async def device(number: int) -> None:
            async with linked(embedded_broker.url, f"d{number}") as link:
                home = tmp_path / f"d{number}"
                await fetch(link, home, scene.old, device=f"d{number}")
                ready.append(number)
                await until(lambda: len(ready) == 4, 20)
                await fetch(link, home, scene.new, device=f"d{number}")

        ready: list[int] = []
        await asyncio.gather(*(device(number) for number in range(4)))
        assert server.stats().bytes < 3 * scene.old.size + 3 * delta.size
    for number in range(4):
        ArtifactStore(tmp_path / f"d{number}").verify(scene.new.digest)


async def test_from_a_stick_everything_is_at_hand(embedded_broker: Broker, scene: Scene) -> None:
    async with scene.serving(embedded_broker.url), linked(embedded_broker.url) as link:
        await fetch(link, scene.home, scene.old)
        fetcher = Fetcher(link, ArtifactStore(scene.home, reserve_bytes=0), "d1")
        progress = await fetcher.fetch(
            scene.new, window_bytes=MIB, stall_s=9, on_progress=lambda progress: None, at_hand=True
        )
    assert progress.bytes_received == scene.new.size - 2, "config.json alone is the same"


async def test_without_a_broker_the_delta_is_no_reason_to_go_on(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(fetching, "LINK_PATIENCE_S", 0.5)
    with mosquitto(tmp_path / "broker") as broker:
        async with scene.serving(broker.url), linked(broker.url) as link:
            await fetch(link, scene.home, scene.old)
            kill(broker)
            await until(lambda: not link.connected, 10)
            with pytest.raises(TransferError, match="the broker is not connected"):
                await scene.fetched(link)
