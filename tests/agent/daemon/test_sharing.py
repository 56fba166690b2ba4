"""Artifacts from a neighbour: read as from any mirror, and nothing of the disk but what a manifest lists."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from agent.contract.manifest import Manifest
from agent.daemon import sharing as module
from agent.daemon.sharing import AT_ONCE, Sharing
from agent.errors import ConfigError
from agent.link import MqttLink
from agent.store.artifacts import ArtifactStore
from agent.store.fetch import Fetcher, OwnLimits
from tests.disk import MIB
from tests.simulators.artifacts import make_artifact, noise
from tests.simulators.broker import Broker, free_port
from tests.simulators.transfer import linked, only, serving, settings
from tests.waiting import until

FILES = {"model.bin": noise(3 * MIB), "deep/config.json": b"{}", "a b#c?.txt": b"odd name", "empty": b""}


def complete(home: Path) -> Manifest:
    made = make_artifact(home / "made", FILES)
    folder = home / "artifacts" / made.digest
    folder.parent.mkdir(parents=True)
    folder.mkdir()
    (home / "made").rename(folder / "files")
    (folder / "manifest.json").write_bytes(made.to_json())
    return made


@contextlib.asynccontextmanager
async def shared(home: Path) -> AsyncIterator[str]:
    sharing = Sharing(ArtifactStore(home), "127.0.0.1", 0)
    task = asyncio.create_task(sharing.run())
    try:
        await until(lambda: sharing.port != 0)
        yield f"http://127.0.0.1:{sharing.port}"
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_a_neighbour_reads_the_whole_artifact_and_nothing_from_the_broker(tmp_path: Path) -> None:
    manifest = complete(tmp_path / "neighbour")
    async with shared(tmp_path / "neighbour") as url:
        nobody = MqttLink(settings("mqtt://127.0.0.1:1", "d1"))
        fetcher = Fetcher(nobody, ArtifactStore(tmp_path / "device", reserve_bytes=0), "d1")
        progress = await fetcher.fetch(
            manifest,
            window_bytes=MIB,
            stall_s=5,
            on_progress=lambda progress: None,
            mirrors=[f"{url}/{{digest}}/{{path}}"],
        )
    assert progress.bytes_mirrored == progress.bytes_done == manifest.size
    ArtifactStore(tmp_path / "device").verify(manifest.digest)


async def test_devices_that_come_at_different_hours_bring_one_artifact_over_the_sites_line(
    embedded_broker: Broker, tmp_path: Path
) -> None:
    manifest = make_artifact(tmp_path / "source", {"model.bin": noise(2 * MIB, 77)})
    async with (
        serving(embedded_broker.url, only(manifest, tmp_path / "source")) as server,
        shared(tmp_path / "d0") as url,
        linked(embedded_broker.url) as link,
    ):
        for number in range(6):  # the first asks itself, which has nothing yet
            store = ArtifactStore(tmp_path / f"d{number}", reserve_bytes=0)
            own = OwnLimits(mirrors=(f"{url}/{{digest}}/{{path}}",))
            await Fetcher(link, store, f"d{number}", own=own).fetch(
                manifest, window_bytes=MIB, stall_s=9, on_progress=lambda progress: None
            )
            store.verify(manifest.digest)
        assert server.stats().bytes == manifest.size


@pytest.mark.parametrize(
    "path",
    [
        "{digest}/../manifest.json", "{digest}/..%2Fmanifest.json", "{digest}/%2e%2e/manifest.json",
        "{digest}/manifest.json", "{digest}/deep", "{digest}/deep/", "{digest}/", "{digest}", "",
        "..%2f..%2f..%2fetc/passwd", "{digest}//etc/passwd", "{digest}/model.bin%00", "{other}/model.bin",
        "../partial/{digest}/files/model.bin", "{upper}/model.bin", "{digest}/deep%5Cconfig.json",
    ],
)  # fmt: skip
async def test_what_no_manifest_lists_is_not_there(tmp_path: Path, path: str) -> None:
    manifest = complete(tmp_path)
    asked = path.format(digest=manifest.digest, other="0" * 64, upper=manifest.digest.upper())
    async with shared(tmp_path) as url, aiohttp.ClientSession() as http:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        writer.write(
            f"GET /{asked} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
        )  # as it is, unlike a client
        answer = await asyncio.wait_for(reader.read(), 5)
        writer.close()
        assert answer.split(b" ")[1] in (b"404", b"400"), answer[:200]
        async with http.get(f"{url}/{manifest.digest}/model.bin") as good:
            assert await good.read() == FILES["model.bin"]


async def test_ranges_heads_and_odd_names_are_answered_and_nothing_is_written(tmp_path: Path) -> None:
    manifest = complete(tmp_path)
    async with shared(tmp_path) as url, aiohttp.ClientSession() as http:
        at = f"{url}/{manifest.digest}"
        async with http.get(f"{at}/model.bin", headers={"Range": "bytes=100-199"}) as part:
            assert (part.status, await part.read()) == (206, FILES["model.bin"][100:200])
            assert part.headers["Content-Range"] == f"bytes 100-199/{3 * MIB}"
            assert part.headers["Content-Type"] == "application/octet-stream"
        async with http.get(f"{at}/model.bin", headers={"Range": f"bytes={4 * MIB}-"}) as beyond:
            assert beyond.status == 416
        async with http.head(f"{at}/model.bin") as head:
            assert (head.status, head.content_length) == (200, 3 * MIB)
        async with http.get(f"{at}/a%20b%23c%3F.txt") as odd:
            assert await odd.read() == b"odd name"
        for method in ("POST", "PUT", "DELETE"):
            async with http.request(method, f"{at}/model.bin") as refused:
                assert refused.status == 405


async def test_an_artifact_that_is_not_complete_or_gone_is_not_there(tmp_path: Path) -> None:
    manifest = complete(tmp_path)
    folder = tmp_path / "artifacts" / manifest.digest
    async with shared(tmp_path) as url, aiohttp.ClientSession() as http:
        (folder / "files" / "model.bin").unlink()
        for spoil in (lambda: None, (folder / "manifest.json").unlink):
            spoil()
            async with http.get(f"{url}/{manifest.digest}/model.bin") as answer:
                assert answer.status == 404


async def test_more_neighbours_than_there_is_room_for_are_told_to_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = complete(tmp_path)
    waiting = asyncio.Event()
    prepare = module.web.FileResponse.prepare

    async def slow(self: Any, request: Any) -> Any:
        await waiting.wait()
        return await prepare(self, request)

    monkeypatch.setattr(module.web.FileResponse, "prepare", slow)
    async with shared(tmp_path) as url, aiohttp.ClientSession() as http:
        tasks = [asyncio.create_task(http.get(f"{url}/{manifest.digest}/model.bin")) for _ in range(AT_ONCE)]
        await asyncio.sleep(0.3)
        async with http.get(f"{url}/{manifest.digest}/model.bin") as refused:
            assert (refused.status, refused.headers["Retry-After"]) == (503, "5")
        waiting.set()
        for task in tasks:
            async with await task as answer:
                assert await answer.read() == FILES["model.bin"]
        async with http.get(f"{url}/{manifest.digest}/model.bin") as answer:
            assert answer.status == 200


async def test_who_does_not_read_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = complete(tmp_path)
    monkeypatch.setattr(module, "GRACE_S", 0.3)
    monkeypatch.setattr(module, "LEAST_BYTES_PER_S", 64 * MIB)
    folder = tmp_path / "artifacts" / manifest.digest / "files"
    large = make_artifact(folder, {"model.bin": noise(40 * MIB)})
    (tmp_path / "artifacts" / manifest.digest).rename(tmp_path / "artifacts" / large.digest)
    (tmp_path / "artifacts" / large.digest / "manifest.json").write_bytes(large.to_json())
    async with shared(tmp_path) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]), limit=1024)
        writer.write(f"GET /{large.digest}/model.bin HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await asyncio.sleep(2.0)
        came = 0
        with contextlib.suppress(ConnectionError):
            while data := await asyncio.wait_for(reader.read(1 << 20), 5):
                came += len(data)
        assert came < large.size
        writer.close()


async def test_who_sends_no_request_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LIMITS", module.Limits(header_timeout_s=0.3))
    async with shared(tmp_path) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()


async def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    port = free_port()
    taken = await asyncio.start_server(lambda *_: None, "127.0.0.1", port)
    with pytest.raises(ConfigError, match=rf"artifacts cannot be shared on 127\.0\.0\.1:{port}: .*'share_port'"):
        await Sharing(ArtifactStore(tmp_path), "127.0.0.1", port).run()
    taken.close()


async def test_a_disk_that_does_not_answer_is_our_fault(tmp_path: Path) -> None:
    manifest = complete(tmp_path)
    folder = tmp_path / "artifacts" / manifest.digest / "manifest.json"
    folder.unlink()
    folder.symlink_to(folder)  # a loop: the system refuses to look
    async with (
        shared(tmp_path) as url,
        aiohttp.ClientSession() as http,
        http.get(f"{url}/{manifest.digest}/model.bin") as answer,
    ):
        assert answer.status == 500
