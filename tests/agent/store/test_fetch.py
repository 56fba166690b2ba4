"""Whole transfers over real brokers, with the faults of the field made for real."""

from __future__ import annotations

import asyncio
import gc
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from agent.contract import topics
from agent.contract.bandwidth import BURST_S
from agent.contract.failures import FailureCode
from agent.contract.manifest import MAX_CHUNK_BYTES, Chat, Manifest
from agent.contract.messages import Progress
from agent.core import ports
from agent.errors import MeteredError, StoreError, TransferError
from agent.link import MqttLink
from agent.store.artifacts import ArtifactStore
from agent.store.fetch import Fetcher, OwnLimits
from tests.disk import MIB, small_disk
from tests.simulators.artifacts import make_artifact, noise
from tests.simulators.broker import Broker, free_port, mosquitto
from tests.simulators.proxy import proxy
from tests.simulators.transfer import Worker, fetch, linked, only, serving, settings, worker
from tests.waiting import until

WINDOW = 1 * MIB


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "source"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "device"


def artifact(source: Path, mib: float = 6, seed: int | None = None) -> Manifest:
    seed = uuid.uuid4().int if seed is None else seed  # else the server would coalesce with another test's chunks
    size = int(mib * MIB)
    return make_artifact(
        source,
        {"model.bin": noise(size, seed), "folder/config.json": b"{}", "empty": b"", "again": noise(100_000, seed)},
    )


def check(home: Path, manifest: Manifest) -> None:
    ArtifactStore(home).verify(manifest.digest)


def open_files() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0


def test_is_the_port(home: Path) -> None:
    async def subscribe() -> None:
        link = MqttLink(settings("mqtt://127.0.0.1:1", "device"))
        _: ports.Transfer = Fetcher(link, ArtifactStore(home), "d1")

    asyncio.run(subscribe())


async def test_artifact_arrives_once_and_whole(broker: Broker, source: Path, home: Path) -> None:
    manifest = artifact(source, 12)
    seen: list[Progress] = []
    async with serving(broker.url, only(manifest, source)) as server, linked(broker.url) as link:
        started = time.monotonic()
        fetcher = Fetcher(link, ArtifactStore(home, reserve_bytes=0), "d1")
        progress = await fetcher.fetch(manifest, window_bytes=4 * MIB, stall_s=60, on_progress=seen.append)
        seconds = time.monotonic() - started
        assert server.stats().bytes == progress.bytes_received
    check(home, manifest)
    repeated = 100_000  # the file `again` is the head of the model
    assert manifest.size - repeated <= progress.bytes_received <= manifest.size
    assert progress.bytes_done == progress.bytes_total == manifest.size
    assert progress.chunks_done == progress.chunks_total == sum(len(file.chunks) for file in manifest.files)
    assert progress.chunks_rejected == 0
    assert len(seen) <= 3 + seconds / 0.4
    assert seen[-1] == progress


async def test_what_is_there_is_not_fetched(broker: Broker, source: Path, home: Path) -> None:
    manifest = artifact(source, 1)
    async with serving(broker.url, only(manifest, source)) as server, linked(broker.url) as link:
        await fetch(link, home, manifest)
        before = server.stats().wants
        again = await fetch(link, home, manifest)
        assert server.stats().wants == before
    assert (again.bytes_done, again.bytes_received, again.bytes_reused) == (manifest.size, 0, manifest.size)


async def test_newer_manifest_of_the_same_files_replaces_the_old(
    embedded_broker: Broker, source: Path, home: Path
) -> None:
    manifest = artifact(source, 1)
    async with serving(embedded_broker.url, only(manifest, source)), linked(embedded_broker.url) as link:
        await fetch(link, home, manifest)
        newer = manifest.model_copy(update={"chat": Chat(template="another")})
        await fetch(link, home, newer)
    assert ArtifactStore(home).manifest(manifest.digest) == newer


async def test_same_artifact_is_not_fetched_twice_at_once(embedded_broker: Broker, source: Path, home: Path) -> None:
    manifest = artifact(source, 4)
    async with serving(embedded_broker.url, only(manifest, source)), linked(embedded_broker.url) as link:
        fetcher = Fetcher(link, ArtifactStore(home, reserve_bytes=0), "d1")

        async def once() -> Progress:
            return await fetcher.fetch(manifest, window_bytes=WINDOW, stall_s=9, on_progress=lambda progress: None)

        first, second = await asyncio.gather(once(), once(), return_exceptions=True)
    assert isinstance(first, Progress)
    assert isinstance(second, StoreError)
    assert "already" in str(second)
    check(home, manifest)


async def test_controllers_share_the_wants(broker: Broker, source: Path, home: Path) -> None:
    manifest = artifact(source, 12)
    known = only(manifest, source)
    async with serving(broker.url, known) as one, serving(broker.url, known) as other, linked(broker.url) as link:
        progress = await fetch(link, home, manifest)
        assert one.stats().chunks > 0
        assert other.stats().chunks > 0
    check(home, manifest)
    assert progress.bytes_received <= 1.1 * manifest.size


async def test_update_fetches_only_what_changed(broker: Broker, source: Path, home: Path, tmp_path: Path) -> None:
    weights = noise(8 * MIB, uuid.uuid4().int)
    old = make_artifact(source, {"model.gguf": b"short template" + weights})
    new = make_artifact(tmp_path / "new", {"model.gguf": b"a longer chat template " * 40 + weights})
    async with (
        serving(broker.url, only(old, source) | only(new, tmp_path / "new")) as server,
        linked(broker.url) as link,
    ):
        await fetch(link, home, old)
        before = server.stats().bytes
        progress = await fetch(link, home, new)
        assert server.stats().bytes - before == progress.bytes_received
    check(home, new)
    assert progress.bytes_received < 0.05 * new.size
    assert progress.bytes_reused > 0.95 * new.size


async def test_devices_side_by_side_share_the_chunks(broker: Broker, source: Path, tmp_path: Path) -> None:
    manifest = artifact(source, 16)
    async with serving(broker.url, only(manifest, source)) as server:

        async def device(n: int) -> Progress:
            await asyncio.sleep(0.05 * n)
            async with linked(broker.url) as link:
                return await fetch(link, tmp_path / f"device-{n}", manifest, device=f"d{n}")

        await asyncio.gather(*(device(n) for n in range(4)))
        sent = server.stats().bytes
    for n in range(4):
        check(tmp_path / f"device-{n}", manifest)
    assert sent < 2.5 * manifest.size, f"four devices cost {sent / manifest.size:.2f} artifacts"


async def test_connection_is_cut_again_and_again(broker: Broker, source: Path, home: Path) -> None:
    manifest = artifact(source, 8)
    with proxy(broker.host, broker.port, bytes_per_s=8 * MIB) as between:
        async with serving(broker.url, only(manifest, source)), linked(between.url) as link:
            transfer = asyncio.create_task(fetch(link, home, manifest, window=WINDOW))
            for _ in range(4):
                await asyncio.sleep(0.3)
                between.cut()
            progress = await transfer
            assert link.reconnects >= 3
    check(home, manifest)
    assert progress.bytes_received <= manifest.size + 4 * WINDOW


async def test_servers_connection_is_cut(mosquitto_broker: Broker, source: Path, home: Path) -> None:
    manifest = artifact(source, 8)
    with proxy(mosquitto_broker.host, mosquitto_broker.port, bytes_per_s=8 * MIB) as between:
        async with serving(between.url, only(manifest, source)), linked(mosquitto_broker.url) as link:
            transfer = asyncio.create_task(fetch(link, home, manifest, window=WINDOW))
            await asyncio.sleep(0.4)
            between.cut()
            await transfer
    check(home, manifest)


async def test_broker_is_killed_and_comes_back(source: Path, home: Path, tmp_path: Path) -> None:
    manifest, port = artifact(source, 8), free_port()
    with mosquitto(tmp_path / "one", port=port) as first, proxy("127.0.0.1", port, bytes_per_s=8 * MIB) as between:
        async with serving(first.url, only(manifest, source)), linked(between.url) as link:
            transfer = asyncio.create_task(fetch(link, home, manifest, window=WINDOW))
            await asyncio.sleep(0.4)
            assert first.process is not None
            first.process.kill()
            first.process.wait()
            await until(lambda: not link.connected)
            await asyncio.sleep(0.3)
            assert not transfer.done()
            with mosquitto(tmp_path / "two", port=port):
                await transfer
    check(home, manifest)


async def test_agent_is_killed_and_goes_on_from_what_is_on_disk(
    broker: Broker, source: Path, home: Path, tmp_path: Path
) -> None:
    manifest = artifact(source, 8)
    listed = tmp_path / "manifest.json"
    listed.write_bytes(manifest.to_json())
    with proxy(broker.host, broker.port, bytes_per_s=4 * MIB) as between:
        async with serving(broker.url, only(manifest, source)) as server:
            for _ in range(2):
                agent = Worker("fetch", between.url, listed, home, WINDOW)
                for _ in range(3):  # it is ready, the plan, and the first progress
                    await asyncio.to_thread(agent.line)
                agent.kill()
            await asyncio.sleep(0.3)
            with worker("fetch", broker.url, listed, home, WINDOW) as agent:
                while not (said := await asyncio.to_thread(agent.line)).get("done"):
                    pass
            await until(lambda: server.stats().waiting == 0)
            sent = server.stats().bytes
    check(home, manifest)
    assert int(str(said["bytes_reused"])) > 1 * MIB
    assert sent <= manifest.size + 2 * WINDOW, "more than the window in flight was sent again"


async def test_controller_is_killed_and_goes_on(
    embedded_broker: Broker, source: Path, home: Path, tmp_path: Path
) -> None:
    manifest = artifact(source, 8)
    listed = tmp_path / "manifest.json"
    listed.write_bytes(manifest.to_json())
    with proxy(embedded_broker.host, embedded_broker.port, bytes_per_s=6 * MIB) as between:
        first = Worker("serve", between.url, listed, source)
        await asyncio.to_thread(first.line)
        async with linked(embedded_broker.url) as link:
            transfer = asyncio.create_task(fetch(link, home, manifest, window=WINDOW))
            await asyncio.sleep(0.5)
            first.kill()
            assert not transfer.done()
            with worker("serve", embedded_broker.url, listed, source) as second:
                await asyncio.to_thread(second.line)
                progress = await transfer
    check(home, manifest)
    assert progress.bytes_received <= manifest.size + WINDOW


async def test_wrong_bytes_are_dropped_wanted_again_and_counted(
    mosquitto_broker: Broker, source: Path, home: Path
) -> None:
    manifest = artifact(source, 4)
    path = source / "model.bin"
    right = path.read_bytes()
    path.write_bytes(right[:MIB] + bytes(10) + right[MIB + 10 :])
    async with serving(mosquitto_broker.url, only(manifest, source)), linked(mosquitto_broker.url) as link:
        transfer = asyncio.create_task(fetch(link, home, manifest, window=4 * MIB))
        await asyncio.sleep(1.0)
        assert not transfer.done()
        path.write_bytes(right)
        progress = await transfer
    check(home, manifest)
    assert progress.chunks_rejected >= 1


async def test_strangers_chunks_never_reach_the_disk(broker: Broker, source: Path, home: Path) -> None:
    manifest = artifact(source, 4)
    total = sum(len(file.chunks) for file in manifest.files)
    async with (
        serving(broker.url, only(manifest, source)),
        linked(broker.url) as link,
        linked(broker.url, "stranger") as stranger,
    ):

        async def attack() -> None:
            while True:
                for index in range(total + 2):
                    for topic in (topics.shared_chunk, lambda digest, n: topics.own_chunk("d1", digest, n)):
                        await stranger.publish(topic(manifest.digest, index), noise(40_000, index), qos=0)
                await stranger.publish(topics.shared_chunks(manifest.digest).replace("+", "999999999"), b"")

        attacking = asyncio.create_task(attack())
        await asyncio.sleep(0.1)
        await fetch(link, home, manifest, window=WINDOW)
        attacking.cancel()
    check(home, manifest)


async def test_unknown_artifact_stalls_with_a_reason(embedded_broker: Broker, source: Path, home: Path) -> None:
    manifest = artifact(source, 1)
    async with serving(embedded_broker.url, {}) as server, linked(embedded_broker.url) as link:
        with pytest.raises(TransferError, match="no chunk came for 1 s") as caught:
            await fetch(link, home, manifest, stall_s=1.0)
        assert server.stats().wants_unknown >= 1
    assert caught.value.code is FailureCode.TRANSFER_STALLED
    assert manifest.id in str(caught.value)


async def test_without_a_broker_it_stalls_and_says_so(source: Path, home: Path) -> None:
    manifest = artifact(source, 1)
    async with MqttLink(settings(f"mqtt://127.0.0.1:{free_port()}", "device")) as link:
        with pytest.raises(TransferError, match="the broker is not connected"):
            await fetch(link, home, manifest, stall_s=0.6)


async def test_chunk_that_stays_wrong_ends_in_a_stall_that_says_so(
    mosquitto_broker: Broker, source: Path, home: Path
) -> None:
    manifest = artifact(source, 1)
    (source / "model.bin").write_bytes(bytes(MIB))
    async with serving(mosquitto_broker.url, only(manifest, source)), linked(mosquitto_broker.url) as link:
        with pytest.raises(TransferError, match="with wrong bytes"):
            await fetch(link, home, manifest, stall_s=1.5)
    assert ArtifactStore(home).path(manifest.digest) is None


async def test_broker_that_refuses_the_chunks_is_named(source: Path, home: Path, tmp_path: Path) -> None:
    manifest = artifact(source, 1)
    rules = tmp_path / "acl"
    rules.write_text("topic write phifleet/#\n")
    rules.chmod(0o600)
    with mosquitto(tmp_path / "broker", general=f"acl_file {rules}") as running:
        async with linked(running.url) as link:
            # mosquitto grants the subscription and then delivers nothing: all that can be seen is the silence
            with pytest.raises(TransferError):
                await fetch(link, home, manifest, stall_s=1.0)


async def test_too_small_a_disk_is_told_before_anything_is_asked_for(
    embedded_broker: Broker, source: Path, home: Path
) -> None:
    manifest = artifact(source, 1)
    async with serving(embedded_broker.url, only(manifest, source)) as server, linked(embedded_broker.url) as link:
        store = ArtifactStore(home, reserve_bytes=1 << 60)
        with pytest.raises(StoreError, match="needs") as caught:
            await Fetcher(link, store, "d1").fetch(
                manifest, window_bytes=WINDOW, stall_s=5, on_progress=lambda progress: None
            )
        assert server.stats().wants == 0
    assert caught.value.code is FailureCode.STORE_DISK_FULL


async def test_disk_that_fails_in_the_middle_ends_the_transfer(
    embedded_broker: Broker, source: Path, home: Path, tmp_path: Path
) -> None:
    manifest = artifact(source, 6)
    with (
        small_disk(tmp_path / "disk", 10 * MIB) as disk,
        proxy(embedded_broker.host, embedded_broker.port, bytes_per_s=4 * MIB) as between,
    ):
        sparse = disk / "partial" / manifest.digest / "files" / "model.bin"
        sparse.parent.mkdir(parents=True)
        with sparse.open("wb") as file:
            file.truncate(manifest.files[0].size)
        async with serving(embedded_broker.url, only(manifest, source)), linked(between.url) as link:
            transfer = asyncio.create_task(fetch(link, disk, manifest))
            await asyncio.sleep(0.5)
            (disk / "log").write_bytes(bytes(7 * MIB))
            with pytest.raises(StoreError, match="free space") as caught:
                await transfer
            assert caught.value.code is FailureCode.STORE_DISK_FULL
            (disk / "log").unlink()
            progress = await fetch(link, disk, manifest)
        assert progress.bytes_reused > 0
        check(disk, manifest)


async def test_cancelled_it_lets_go_of_everything_and_resumes_later(broker: Broker, source: Path, home: Path) -> None:
    manifest = artifact(source, 8)
    with proxy(broker.host, broker.port, bytes_per_s=6 * MIB) as between:
        async with serving(broker.url, only(manifest, source)), linked(between.url) as link:
            before = open_files()
            transfer = asyncio.create_task(fetch(link, home, manifest))
            await asyncio.sleep(0.6)
            transfer.cancel()
            with pytest.raises(asyncio.CancelledError):
                await transfer
            assert open_files() <= before + 2  # the server, in this process, holds the source open
            assert link._subscriptions == {}
        async with serving(broker.url, only(manifest, source)), linked(broker.url) as link:
            await fetch(link, home, manifest)
    check(home, manifest)


@pytest.mark.parametrize("moment", [0.0, 0.001, 0.01, 0.05])
async def test_cancelled_at_any_moment_no_file_stays_open(
    embedded_broker: Broker, source: Path, home: Path, moment: float
) -> None:
    manifest = artifact(source, 3)
    async with linked(embedded_broker.url) as link:
        before = open_files()
        transfer = asyncio.create_task(fetch(link, home, manifest))
        await asyncio.sleep(moment)
        transfer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await transfer
        assert open_files() == before


async def test_slow_and_far_link_gets_each_chunk_once(mosquitto_broker: Broker, source: Path, home: Path) -> None:
    manifest = artifact(source, 3)
    between = proxy(mosquitto_broker.host, mosquitto_broker.port, delay_s=0.1, bytes_per_s=MIB)
    with between as far:
        async with serving(mosquitto_broker.url, only(manifest, source)), linked(far.url) as link:
            progress = await fetch(link, home, manifest, window=4 * MIB)
    check(home, manifest)
    assert progress.bytes_received <= manifest.size


async def test_slow_device_neither_slows_the_others_nor_is_flooded(
    mosquitto_broker: Broker, source: Path, tmp_path: Path
) -> None:
    manifest = artifact(source, 16)
    broker = mosquitto_broker

    async def device(url: str, name: str) -> Progress:
        async with linked(url) as link:
            return await fetch(link, tmp_path / name, manifest, device=name, window=4 * MIB)

    async with serving(broker.url, only(manifest, source)) as server:
        with proxy(broker.host, broker.port, bytes_per_s=3 * MIB, delay_s=0.02) as between:
            slow = asyncio.create_task(device(between.url, "slow"))
            await asyncio.sleep(0.3)
            await asyncio.gather(*(device(broker.url, f"fast-{n}") for n in range(2)))
            assert not slow.done(), "the fast ones did not wait for the slow one"
            late = await slow
        sent = server.stats().bytes
    for name in ("slow", "fast-0", "fast-1"):
        check(tmp_path / name, manifest)
    assert late.bytes_received < 1.5 * manifest.size
    assert sent < 3.5 * manifest.size


async def test_a_device_and_a_controller_keep_to_their_limits(
    embedded_broker: Broker, source: Path, home: Path, tmp_path: Path
) -> None:
    """Only what is too fast can be told from a test's time: how fast it goes at least depends on the machine."""
    manifest, rate = artifact(source, 2), MIB
    least_s = (manifest.size - 2 * MAX_CHUNK_BYTES) / rate - BURST_S
    async with serving(embedded_broker.url, only(manifest, source)), linked(embedded_broker.url) as link:
        began = time.monotonic()
        fetcher = Fetcher(link, ArtifactStore(home, reserve_bytes=0), "d1", own=OwnLimits(bytes_per_s=rate))
        said: list[Progress] = []
        await fetcher.fetch(manifest, window_bytes=WINDOW, stall_s=60, on_progress=said.append, bytes_per_s=2 * rate)
        assert time.monotonic() - began >= least_s
        assert (said[0].bytes_total, said[0].bytes_done) == (manifest.size, 0), "the plan comes before the bytes"
    check(home, manifest)
    other = tmp_path / "other"
    async with (
        serving(embedded_broker.url, only(manifest, source), bytes_per_s=rate) as server,
        linked(embedded_broker.url) as link,
    ):
        began = time.monotonic()
        await fetch(link, other, manifest)
        assert time.monotonic() - began >= least_s
        assert server.stats().bytes <= 1.2 * manifest.size, "a device that waits does not ask for all of it again"
    check(other, manifest)


async def test_a_metered_network_carries_no_more_than_it_may_and_says_what_is_wanted(
    embedded_broker: Broker, source: Path, home: Path
) -> None:
    """Nothing is asked for before somebody allows it; what the device has already does not count."""
    manifest = artifact(source, 4)
    store, told = ArtifactStore(home, reserve_bytes=0), list[Progress]()
    wanted: dict[str, Any] = {"window_bytes": WINDOW, "stall_s": 9, "on_progress": told.append}
    async with serving(embedded_broker.url, only(manifest, source)) as server, linked(embedded_broker.url) as link:
        for own, order in ((3 * MIB, None), (None, 3 * MIB), (99 * MIB, 3 * MIB), (0, None)):
            fetcher = Fetcher(link, store, "d1", own=OwnLimits(metered_bytes=own))
            with pytest.raises(MeteredError, match=rf"needs \d+ of its {manifest.size} bytes, and this"):
                await fetcher.fetch(manifest, **wanted, metered_bytes=order)
            assert told[-1].bytes_total == manifest.size, "the plan is reported all the same"
        assert server.stats().wants == 0
        at_hand = Fetcher(link, store, "d1", own=OwnLimits(1024, 0, ("http://127.0.0.1:1/{digest}/{path}",)))
        began = time.monotonic()
        await at_hand.fetch(manifest, **wanted, metered_bytes=0, bytes_per_s=1024, at_hand=True)
        assert time.monotonic() - began < 60, "no limit of a network holds for what is at the device"
        again = await Fetcher(link, store, "d1", own=OwnLimits(metered_bytes=0)).fetch(manifest, **wanted)
        assert again.bytes_received == 0, "what is there costs nothing"
