"""Chunks from web servers: Debian's nginx as it is, and servers that fail in every way that one was seen to."""

from __future__ import annotations

import asyncio
import shutil
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web as http
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from agent.contract.failures import FailureCode
from agent.contract.manifest import MAX_CHUNK_BYTES, Manifest
from agent.contract.messages import Progress
from agent.core.chunks import ChunkTable
from agent.core.transfer import Outcome, TransferCore
from agent.errors import StoreError, TransferError
from agent.link import MqttLink
from agent.store import fetch as fetching
from agent.store import mirrors
from agent.store.artifacts import ArtifactStore
from agent.store.fetch import Fetcher
from fleet.home import Home
from fleet.trust.ca import DeviceCA
from tests.disk import MIB, small_disk
from tests.simulators.artifacts import make_artifact, noise
from tests.simulators.broker import Broker
from tests.simulators.transfer import linked, only, serving, settings
from tests.simulators.web import HAVE, nginx

TEMPLATE = "/{digest}/{path}"


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirrors, "PAUSE_S", 0.01)


def artifact(folder: Path, mib: float = 6, seed: int = 1) -> Manifest:
    model = noise(int(mib * MIB), seed)
    files = {"model.bin": model, "a folder/ä%20#?.json": b"{}", "empty": b"", "again": model[:100_000]}
    return make_artifact(folder, files)


def served(source: Path, root: Path, manifest: Manifest) -> None:
    shutil.copytree(source, root / manifest.digest)


async def fetched(
    home: Path, manifest: Manifest, *templates: str, url: str | None = None, rate: int | None = None
) -> Progress:
    """As a device does it whose broker is at ``url``, or is not there."""
    if url is None:  # never started, so never connected
        return await _fetched(MqttLink(settings("mqtt://127.0.0.1:1", "device")), home, manifest, templates, rate)
    async with linked(url) as link:
        return await _fetched(link, home, manifest, templates, rate)


async def _fetched(
    link: MqttLink, home: Path, manifest: Manifest, templates: Sequence[str], rate: int | None
) -> Progress:
    fetcher = Fetcher(link, ArtifactStore(home, reserve_bytes=0), "d1")
    return await fetcher.fetch(
        manifest, window_bytes=MIB, stall_s=5, on_progress=lambda _: None, mirrors=templates, bytes_per_s=rate
    )


def missing_of(manifest: Manifest) -> int:
    """Bytes that have to come, each once."""
    return sum({digest: size for file in manifest.files for size, digest in file.chunks}.values())


needs_nginx = pytest.mark.skipif(not HAVE, reason="needs nginx-light from Debian")


@needs_nginx
async def test_an_artifact_comes_from_a_web_server_while_no_broker_is_there(tmp_path: Path) -> None:
    manifest = artifact(tmp_path / "source")
    served(tmp_path / "source", tmp_path / "www", manifest)
    with nginx(tmp_path / "nginx", root=tmp_path / "www") as web:
        done = await fetched(tmp_path / "device", manifest, web.template)
    ArtifactStore(tmp_path / "device").verify(manifest.digest)
    assert (done.bytes_mirrored, done.bytes_received) == (missing_of(manifest), 0)
    assert (done.bytes_done, done.chunks_rejected) == (manifest.size, 0)
    assert sum(one.size for one in web.sent()) == missing_of(manifest), "not a byte twice"
    assert {one.status for one in web.sent()} == {206}


@needs_nginx
async def test_only_what_changed_is_read(tmp_path: Path) -> None:
    """Of 32 MiB, two chunks far apart and one near the second."""
    model = bytearray(noise(32 * MIB, 7))
    old = make_artifact(tmp_path / "old", {"model.bin": bytes(model)}, "old")
    for place in (5 * MIB, 20 * MIB, 20 * MIB + MAX_CHUNK_BYTES + 7):
        model[place : place + 10] = b"0123456789"
    new = make_artifact(tmp_path / "new", {"model.bin": bytes(model)}, "new")
    served(tmp_path / "old", tmp_path / "www", old)
    served(tmp_path / "new", tmp_path / "www", new)
    with nginx(tmp_path / "nginx", root=tmp_path / "www") as web:
        await fetched(tmp_path / "device", old, web.template)
        before = len(web.sent())
        done = await fetched(tmp_path / "device", new, web.template)
    ArtifactStore(tmp_path / "device").verify(new.digest)
    sent = web.sent()[before:]
    assert len(sent) == 2, "the two that are near come in one request"
    assert sum(one.size for one in sent) < 8 * MAX_CHUNK_BYTES
    assert done.bytes_mirrored <= 6 * MAX_CHUNK_BYTES < done.bytes_reused


@needs_nginx
async def test_a_sites_cache_brings_an_artifact_over_its_line_once(tmp_path: Path) -> None:
    """Sixteen devices that come one after the other, two by two, through an nginx before the mirror."""
    manifest = artifact(tmp_path / "source", 9)
    served(tmp_path / "source", tmp_path / "www", manifest)
    with nginx(tmp_path / "nginx", root=tmp_path / "www") as far, nginx(tmp_path / "site", before=far) as near:
        for pair in range(8):
            homes = [tmp_path / f"device-{2 * pair + one}" for one in range(2)]
            done = await asyncio.gather(*(fetched(home, manifest, near.template) for home in homes))
            assert [one.bytes_mirrored for one in done] == [missing_of(manifest)] * 2
    assert sum(one.size for one in near.sent()) == 16 * missing_of(manifest)
    assert sum(one.size for one in far.sent()) <= 1.05 * manifest.size


Answer = Callable[[http.Request, bytes], Awaitable[http.StreamResponse]]


@asynccontextmanager
async def server(source: Path, answer: Answer, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """A web server of the artifact's files, which answers as it is told."""

    async def handle(request: http.Request) -> http.StreamResponse:
        path = source / request.match_info["path"]
        if not path.is_file():
            raise http.HTTPNotFound
        return await answer(request, path.read_bytes())

    app = http.Application()
    app.router.add_get("/{digest}/{path:.*}", handle)
    runner = http.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = http.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
    await site.start()
    assert site._server is not None
    port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
    try:
        yield f"{'https' if tls else 'http'}://127.0.0.1:{port}{TEMPLATE}"
    finally:
        await runner.cleanup()


def piece(request: http.Request, data: bytes) -> tuple[int, bytes]:
    wanted = request.http_range
    start, stop = wanted.start or 0, wanted.stop or len(data)
    return start, data[start:stop]


def partial(start: int, data: bytes, whole: int, **headers: str) -> http.Response:
    said = {"Content-Range": f"bytes {start}-{start + len(data) - 1}/{whole}"} | headers
    return http.Response(body=data, status=206, headers=said)


async def good(request: http.Request, data: bytes) -> http.StreamResponse:
    return partial(*piece(request, data), len(data))


async def forbidden(_request: http.Request, _data: bytes) -> http.StreamResponse:
    raise http.HTTPForbidden


async def gone(_request: http.Request, _data: bytes) -> http.StreamResponse:
    raise http.HTTPNotFound


async def overloaded(_request: http.Request, _data: bytes) -> http.StreamResponse:
    raise http.HTTPServiceUnavailable


async def all_of_another(request: http.Request, data: bytes) -> http.StreamResponse:
    start, wanted = piece(request, data)
    return partial(start, noise(len(wanted), 99), len(data))


async def one_bit_flipped(request: http.Request, data: bytes) -> http.StreamResponse:
    start, wanted = piece(request, data)
    changed = bytearray(wanted)
    if start == 0 and len(changed) > 5:
        changed[5] ^= 1
    return partial(start, bytes(changed), len(data))


async def shorter_file(request: http.Request, data: bytes) -> http.StreamResponse:
    start, wanted = piece(request, data)
    return partial(start, wanted, len(data) - 1)


async def another_range(request: http.Request, data: bytes) -> http.StreamResponse:
    start, wanted = piece(request, data)
    return partial(start + 1, wanted, len(data))


async def a_range_in_words(request: http.Request, data: bytes) -> http.StreamResponse:
    start, wanted = piece(request, data)
    return partial(start, wanted, len(data), **{"Content-Range": "bytes some-of/it"})


async def compressed(request: http.Request, data: bytes) -> http.StreamResponse:
    return partial(*piece(request, data), len(data), **{"Content-Encoding": "br"})


async def a_login_page(_request: http.Request, _data: bytes) -> http.StreamResponse:
    return http.Response(text="<h1>Hotel WiFi: accept our terms</h1>", content_type="text/html")


async def round_and_round(request: http.Request, _data: bytes) -> http.StreamResponse:
    raise http.HTTPFound(request.url)


async def nothing_at_all(request: http.Request, _data: bytes) -> http.StreamResponse:
    assert request.transport is not None
    request.transport.close()
    return http.Response()


async def more_than_asked_for(request: http.Request, data: bytes) -> http.StreamResponse:
    """Endless: what was asked for, and then noise."""
    start, wanted = piece(request, data)
    response = http.StreamResponse(status=206)
    response.headers["Content-Range"] = f"bytes {start}-{start + len(wanted) - 1}/{len(data)}"
    await response.prepare(request)
    await response.write(wanted)
    while True:
        await response.write(noise(MIB))


#: What a mirror does, and what the log says of it; empty: nothing, as it brought everything.
FAULTY: dict[str, tuple[Answer, str]] = {
    "good": (good, ""),
    "endless": (more_than_asked_for, ""),
    "forbidden": (forbidden, "answers 403 Forbidden"),
    "gone": (gone, "answers 404 Not Found"),
    "overloaded": (overloaded, "it answers 503 Service Unavailable, 4 times in a row"),
    "another file": (all_of_another, "has other bytes than the artifact"),
    "one bit flipped": (one_bit_flipped, "has other bytes than the artifact"),
    "shorter file": (shorter_file, "bytes, and the artifact's file"),
    "another range": (another_range, "with Content-Range 'bytes 1-"),
    "a range in words": (a_range_in_words, "with Content-Range 'bytes some-of/it'"),
    "compressed": (compressed, "comes with Content-Encoding br"),
    "a login page": (a_login_page, "bytes, and the artifact's file"),
    "a circle": (round_and_round, "4 times in a row"),
    "no answer": (nothing_at_all, "4 times in a row"),
}


@pytest.mark.parametrize("name", FAULTY)
async def test_whatever_is_wrong_with_a_mirror_the_broker_has_the_rest(
    name: str, embedded_broker: Broker, tmp_path: Path
) -> None:
    answer, told = FAULTY[name]
    manifest = artifact(tmp_path / "source", 3, seed=list(FAULTY).index(name))
    with capture_logs() as logs:
        async with (
            serving(embedded_broker.url, only(manifest, tmp_path / "source")),
            server(tmp_path / "source", answer) as url,
        ):
            done = await fetched(tmp_path / "device", manifest, url, url=embedded_broker.url)
    ArtifactStore(tmp_path / "device").verify(manifest.digest)
    given_up = [line for line in logs if line["event"] == "mirror given up"]
    if not told:
        assert not given_up and (done.bytes_mirrored, done.bytes_received) == (missing_of(manifest), 0)
        return
    (line,) = given_up
    assert told in line["error"] and url.split("{", maxsplit=1)[0] in line["error"]
    assert done.bytes_mirrored + line["bytes_missing"] >= missing_of(manifest)
    assert done.bytes_mirrored + done.bytes_received == missing_of(manifest)


async def test_nothing_that_came_before_a_break_comes_again(tmp_path: Path) -> None:
    manifest = artifact(tmp_path / "source", 8)
    sent: list[int] = []

    async def breaks(request: http.Request, data: bytes) -> http.StreamResponse:
        """Says that all will come, and ends in the middle of the sixth chunk, but for the last pieces."""
        start, wanted = piece(request, data)
        response = http.StreamResponse(status=206)
        response.headers["Content-Range"] = f"bytes {start}-{start + len(wanted) - 1}/{len(data)}"
        response.content_length = len(wanted)
        await response.prepare(request)
        part = wanted[: 5 * MAX_CHUNK_BYTES + 1000]
        await response.write(part)
        sent.append(len(part))
        if len(part) < len(wanted):
            assert request.transport is not None
            request.transport.close()
        return response

    async with server(tmp_path / "source", breaks) as url:
        done = await fetched(tmp_path / "device", manifest, url)
    assert done.bytes_mirrored == missing_of(manifest) and len(sent) > 10
    assert sum(sent) <= missing_of(manifest) + len(sent) * MAX_CHUNK_BYTES  # the chunk that was cut, each time


async def test_one_mirror_has_what_another_lacks(tmp_path: Path) -> None:
    manifest = artifact(tmp_path / "source", 2)
    shutil.copytree(tmp_path / "source", tmp_path / "half")
    (tmp_path / "half" / "a folder/ä%20#?.json").unlink()
    with capture_logs() as logs:
        async with server(tmp_path / "half", good) as first, server(tmp_path / "source", good) as second:
            done = await fetched(tmp_path / "device", manifest, first, second)
    assert done.bytes_mirrored == missing_of(manifest)
    (line,) = (line for line in logs if line["event"] == "mirror given up")
    assert "answers 404" in line["error"] and "a%20folder/%C3%A4%2520%23%3F.json" in line["error"]


async def test_a_failure_names_the_mirrors_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "LINK_PATIENCE_S", 0.2)
    manifest = artifact(tmp_path / "source", 1)
    async with server(tmp_path / "source", forbidden) as url:
        with pytest.raises(
            TransferError, match=r"the broker is not connected; .*; mirror http://.* answers 403"
        ) as error:
            await fetched(tmp_path / "device", manifest, url)
    assert error.value.code is FailureCode.TRANSFER_STALLED


@pytest.mark.parametrize(
    ("host", "proxy"), [("a..b", ""), ("xn--a.example", ""), ("[::1]:1", ""), ("127.0.0.1:1", "junk://x y")]
)
async def test_no_name_and_no_proxy_fails_the_transfer(
    host: str, proxy: str, tmp_path: Path, embedded_broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of these make the libraries raise what is no network error at all."""
    monkeypatch.setenv("http_proxy", proxy)
    manifest = artifact(tmp_path / "source", 0.5, seed=sum(host.encode()))
    async with serving(embedded_broker.url, only(manifest, tmp_path / "source")):
        with capture_logs() as logs:
            await fetched(tmp_path / "device", manifest, f"http://{host}{TEMPLATE}", url=embedded_broker.url)
    ArtifactStore(tmp_path / "device").verify(manifest.digest)
    assert [line["event"] for line in logs].count("mirror given up") == 1


async def test_what_came_from_a_mirror_is_kept_when_the_transfer_is_stopped(tmp_path: Path) -> None:
    manifest = artifact(tmp_path / "source", 8)
    halfway = asyncio.Event()

    async def stops(request: http.Request, data: bytes) -> http.StreamResponse:
        start, wanted = piece(request, data)
        response = http.StreamResponse(status=206)
        response.headers["Content-Range"] = f"bytes {start}-{start + len(wanted) - 1}/{len(data)}"
        await response.prepare(request)
        await response.write(wanted[: 4 * MIB])
        await asyncio.sleep(1)
        halfway.set()
        await asyncio.sleep(60)
        return response

    async with server(tmp_path / "source", stops) as url:
        task = asyncio.create_task(fetched(tmp_path / "device", manifest, url))
        await halfway.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    async with server(tmp_path / "source", good) as url:
        done = await fetched(tmp_path / "device", manifest, url)
    assert done.bytes_reused >= 3 * MIB - 2 * MAX_CHUNK_BYTES
    assert done.bytes_reused + done.bytes_mirrored >= manifest.size - 100_000


async def test_a_mirror_keeps_to_the_devices_limit(tmp_path: Path) -> None:
    manifest = artifact(tmp_path / "source", 2)
    began = asyncio.get_running_loop().time()
    async with server(tmp_path / "source", good) as url:
        await fetched(tmp_path / "device", manifest, url, rate=MIB)
    assert asyncio.get_running_loop().time() - began >= 1.4


async def test_a_mirror_that_trickles_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirrors, "GRACE_S", 0.5)
    monkeypatch.setattr(mirrors, "LEAST_BYTES_PER_S", 10 * MIB)
    monkeypatch.setattr(fetching, "LINK_PATIENCE_S", 0.1)
    manifest = artifact(tmp_path / "source", 4)

    async def trickles(request: http.Request, data: bytes) -> http.StreamResponse:
        start, wanted = piece(request, data)
        response = http.StreamResponse(status=206)
        response.headers["Content-Range"] = f"bytes {start}-{start + len(wanted) - 1}/{len(data)}"
        await response.prepare(request)
        for place in range(0, len(wanted), 50_000):
            await response.write(wanted[place : place + 50_000])
            await asyncio.sleep(0.05)
        return response

    async with server(tmp_path / "source", trickles) as url:
        with pytest.raises(TransferError, match=r"bytes in \d+ s are too slow"):
            await fetched(tmp_path / "device", manifest, url)


async def test_a_full_disk_is_the_disks_failure_and_not_the_mirrors(tmp_path: Path) -> None:
    manifest = artifact(tmp_path / "source", 4)
    with small_disk(tmp_path / "device", 8 * MIB) as home, capture_logs() as logs:
        store = ArtifactStore(home, reserve_bytes=0)
        filler = home / "filler"

        async def fills(request: http.Request, data: bytes) -> http.StreamResponse:
            """Somebody else takes the room; files are sparse there, whatever was reserved."""
            if not filler.exists():
                for file in home.rglob("model.bin"):
                    size = file.stat().st_size
                    with file.open("r+b") as opened:
                        opened.truncate(0)
                        opened.truncate(size)
                filler.write_bytes(bytes(7 * MIB))
            return await good(request, data)

        async with server(tmp_path / "source", fills) as url:
            link = MqttLink(settings("mqtt://127.0.0.1:1", "device"))
            with pytest.raises(StoreError) as error:
                await Fetcher(link, store, "d1").fetch(
                    manifest, window_bytes=MIB, stall_s=5, on_progress=lambda _: None, mirrors=[url]
                )
    assert error.value.code is FailureCode.STORE_DISK_FULL
    assert not [line for line in logs if line["event"] == "mirror given up"]


async def test_with_tls_it_stays_with_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the system's certificates, or those that SSL_CERT_FILE names."""
    ca = DeviceCA(Home(tmp_path / "fleet"))
    ca.init()
    made = ca.server_certificate(["127.0.0.1"])
    for name, text in (("ca.pem", ca.ca_pem()), ("web.pem", made.certificate), ("key.pem", made.private_key)):
        (tmp_path / name).write_text(text)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(tmp_path / "web.pem", tmp_path / "key.pem")
    monkeypatch.setattr(fetching, "LINK_PATIENCE_S", 0.1)
    manifest = artifact(tmp_path / "source", 1)
    async with server(tmp_path / "source", good, tls) as secure, server(tmp_path / "source", good) as plain:

        async def elsewhere(request: http.Request, _data: bytes) -> http.StreamResponse:
            raise http.HTTPFound(plain.replace(TEMPLATE, request.path))

        with pytest.raises(TransferError, match=r"[Cc]ertificate|CERTIFICATE"):
            await fetched(tmp_path / "stranger", manifest, secure)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        done = await fetched(tmp_path / "device", manifest, secure)
        assert done.bytes_mirrored == missing_of(manifest)
        async with server(tmp_path / "source", elsewhere, tls) as leads_out:
            with pytest.raises(TransferError, match=r"redirects to http://127\.0\.0\.1:.* which is not encrypted"):
                await fetched(tmp_path / "led", manifest, leads_out)


pieces = st.lists(st.tuples(st.integers(0, 40), st.sampled_from([1000, 100_000, 131_072])), max_size=60)


@given(pieces, st.sets(st.integers(0, 40)), st.integers(0, 10**6))
def test_what_is_asked_for_is_what_is_missing(listed: list[tuple[int, int]], there: set[int], offset: int) -> None:
    sizes = dict(listed)
    whole = mirrors._Run(offset, tuple((first, sizes[first]) for first, _ in listed))
    runs = list(mirrors._missing(whole, there.__contains__))
    asked = [first for run in runs for first, _ in run.pieces if first not in there]
    assert set(asked) == {first for first, _ in listed} - there
    ends = offset
    for run in runs:
        assert run.offset >= ends and run.size <= mirrors.RANGE_BYTES + mirrors.GAP_BYTES + MAX_CHUNK_BYTES
        ends = run.offset + run.size
        place, expected = whole.offset, []
        for first, size in whole.pieces:
            if run.offset <= place < ends:
                expected.append((first, size))
            place += size
        assert list(run.pieces) == expected, "the bytes that follow one another there"
        assert run.pieces[0][0] not in there and run.pieces[-1][0] not in there
    assert ends <= offset + whole.size


def test_a_mirror_says_nothing_about_the_brokers_link(tmp_path: Path) -> None:
    manifest = artifact(tmp_path / "source", 2)
    core = TransferCore(ChunkTable(manifest), (), window_bytes=MIB, stall_s=10, now=0.0, jitter=lambda: 0.0)
    core.mirrored(0, Outcome.GOOD, 500.0)
    core.mirrored(1, Outcome.BAD, 900.0)
    assert core.stalled(1000.0)
    core.asks_the_broker(1000.0)
    assert not core.stalled(1009.0) and core.stalled(1011.0)
    (request,) = core.tick(1000.0)
    assert request.ranges[0][0] == 1, "the first that no mirror brought"
    assert core.progress(1000.0).chunks_rejected == 1
