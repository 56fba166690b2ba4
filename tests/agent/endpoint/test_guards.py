"""Keys, origins, hosts, TLS, sockets, and clients that mean ill."""

from __future__ import annotations

import asyncio
import resource
import ssl
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import openai
import pytest

from agent.endpoint import ApiKey, EndpointConfig, EndpointServer, create_app
from agent.errors import ConfigError
from tests.agent.endpoint.conftest import HELLO, MODEL, Endpoint, Serve
from tests.simulators.inference import SimulatedInference, SimulatedStats
from tests.waiting import until

CHAT = "/v1/chat/completions"
BODY = {"model": MODEL, "messages": HELLO}


def server_of(**config: Any) -> EndpointServer:
    return EndpointServer(SimulatedInference(), EndpointConfig(**config), stats=SimulatedStats)


# Where it listens


async def test_a_port_in_use_is_named(endpoint: Endpoint):
    port = endpoint.address[1]
    with pytest.raises(ConfigError, match=rf"port {port} is in use .* give another 'port'"):
        await server_of(port=port).start()


async def test_an_address_that_is_not_ours():
    with pytest.raises(ConfigError, match="cannot listen"):
        await server_of(host="192.0.2.1", port=0, allow_plain_http=True).start()


def test_off_loopback_needs_tls():
    with pytest.raises(ConfigError, match="without TLS"):
        create_app(SimulatedInference(), EndpointConfig(host="0.0.0.0"), stats=SimulatedStats)
    create_app(SimulatedInference(), EndpointConfig(host="0.0.0.0", allow_plain_http=True), stats=SimulatedStats)
    create_app(SimulatedInference(), EndpointConfig(host="::1"), stats=SimulatedStats)


def test_half_of_tls_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="go together"):
        EndpointConfig(tls_cert=tmp_path / "c.pem").check()
    with pytest.raises(ConfigError, match="does not exist"):
        EndpointConfig(tls_cert=tmp_path / "c.pem", tls_key=tmp_path / "k.pem").check()


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1"]
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*make, *name, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True)
    return cert, key


async def test_tls(serve: Serve, certificate: tuple[Path, Path]):
    cert, key = certificate
    endpoint = await serve(tls_cert=cert, tls_key=key)
    trusting = ssl.create_default_context(cafile=str(cert))
    assert endpoint.url.startswith("https://")
    async with endpoint.http.post(endpoint.url + CHAT, json=BODY, ssl=trusting) as response:
        assert response.status == 200


async def test_a_broken_certificate_is_named(tmp_path: Path):
    broken = tmp_path / "cert.pem"
    broken.write_text("no certificate")
    with pytest.raises(ConfigError, match=r"cert\.pem"):
        await server_of(port=0, tls_cert=broken, tls_key=broken).start()


async def test_a_unix_socket_with_the_official_client(serve: Serve, tmp_path: Path):
    path = tmp_path / "endpoint.sock"
    await serve(unix_socket=path)
    transport = httpx.AsyncHTTPTransport(uds=str(path))
    async with openai.AsyncOpenAI(
        base_url="http://localhost/v1", api_key="none", http_client=httpx.AsyncClient(transport=transport)
    ) as client:
        text = ""
        async for chunk in await client.chat.completions.create(model=MODEL, messages=HELLO, stream=True):
            text += chunk.choices[0].delta.content or ""
    assert text == "The capital of France is Paris."
    with pytest.raises(ConfigError, match="in use"):
        await server_of(unix_socket=path).start()


async def test_a_socket_left_by_a_crash_is_replaced_and_removed(tmp_path: Path):
    path = tmp_path / "endpoint.sock"
    process = await asyncio.create_subprocess_exec(
        "python3", "-c", f"import socket; s = socket.socket(socket.AF_UNIX); s.bind({str(path)!r})"
    )
    await process.wait()
    assert path.exists()
    async with server_of(unix_socket=path) as server:
        assert server.url == f"unix:{path}"
    assert not path.exists()
    path.write_text("a file")
    with pytest.raises(ConfigError, match="no socket"):
        await server_of(unix_socket=path).start()


# Who may ask


async def test_keys(serve: Serve):
    import hashlib

    hashed = "sha256:" + hashlib.sha256(b"second").hexdigest()
    endpoint = await serve(keys=(ApiKey("one", "first"), ApiKey("two", hashed)))
    assert (await endpoint.openai.chat.completions.create(model=MODEL, messages=HELLO)).choices
    assert (await endpoint.get("/v1/models", headers={"Authorization": "bearer second"}))[0] == 200
    for header in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic first"},
        {"Authorization": "Bearer"},
    ):
        status, text = await endpoint.get("/v1/models", headers=header)
        assert status == 401
        assert "invalid_api_key" in text
    with pytest.raises(openai.AuthenticationError):
        await endpoint.openai.with_options(api_key="x").models.list()
    for path in ("/health/live", "/health/ready"):
        assert (await endpoint.get(path))[0] == 200
    for path in ("/metrics", "/props"):
        assert (await endpoint.get(path))[0] == 401
    assert endpoint.inference.requests[0].client == "one"


async def test_each_key_has_its_limits(serve: Serve):
    endpoint = await serve(
        SimulatedInference(first_delay_s=0.2),
        keys=(ApiKey("slow", "a", requests_per_minute=2), ApiKey("narrow", "b", concurrent=1), ApiKey("free", "c")),
    )
    ask = [endpoint.openai.with_options(api_key=key).chat.completions.create for key in "abc"]
    await asyncio.gather(*(ask[0](model=MODEL, messages=HELLO) for _ in range(2)))
    with pytest.raises(openai.RateLimitError, match="2 requests a minute") as caught:
        await ask[0](model=MODEL, messages=HELLO)
    assert 25 <= int(caught.value.response.headers["Retry-After"]) <= 30
    both = await asyncio.gather(*(ask[1](model=MODEL, messages=HELLO) for _ in range(2)), return_exceptions=True)
    assert sorted(type(one).__name__ for one in both) == ["ChatCompletion", "RateLimitError"]
    await asyncio.gather(*(ask[2](model=MODEL, messages=HELLO) for _ in range(8)))


def test_two_keys_alike_and_empty_ones_are_refused():
    for keys, says in (
        ((ApiKey("a", "x"), ApiKey("b", "x")), "same"),
        ((ApiKey("a", ""),), "empty"),
        ((ApiKey("a", "sha256:zz"),), "64 hex"),
    ):
        with pytest.raises(ConfigError, match=says):
            EndpointConfig(keys=keys).check()
    assert "secret" not in repr(ApiKey("a", "secret"))


async def test_pages_from_elsewhere_are_refused(endpoint: Endpoint):
    for origin in ("https://evil.example", "null", f"http://127.0.0.1:{endpoint.address[1] + 1}"):
        status, text = await endpoint.get("/v1/models", headers={"Origin": origin})
        assert (status, "origin_refused" in text) == (403, True)
    assert (await endpoint.get("/v1/models", headers={"Origin": endpoint.url}))[0] == 200


async def test_named_origins_may(serve: Serve):
    endpoint = await serve(cors_origins=("https://app.example",))
    asks_first = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    async with endpoint.http.options(endpoint.url + CHAT, headers=asks_first) as response:
        assert response.status == 204
        assert response.headers["Access-Control-Allow-Origin"] == "https://app.example"
        assert "Authorization" in response.headers["Access-Control-Allow-Headers"]
    headers = {"Origin": "https://app.example"}
    async with endpoint.http.post(endpoint.url + CHAT, json={**BODY, "stream": True}, headers=headers) as response:
        assert response.headers["Access-Control-Allow-Origin"] == "https://app.example"
    async with endpoint.http.get(endpoint.url + "/nothing", headers=headers) as response:
        assert response.headers["Access-Control-Allow-Origin"] == "https://app.example"
    assert (await endpoint.get("/v1/models", headers={"Origin": "https://evil.example"}))[0] == 403


async def test_dns_rebinding_is_refused(serve: Serve):
    endpoint = await serve(allowed_hosts=("phi.local",))
    port = endpoint.address[1]
    for host, expected in (
        (f"evil.example:{port}", 403),
        (f"localhost:{port}", 200),
        (f"[::1]:{port}", 200),
        ("phi.local", 200),
        ("[broken", 403),
        ("", 403),
    ):
        assert (await endpoint.get("/v1/models", headers={"Host": host}))[0] == expected, host


# Who sends too much, too slowly, or too often


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


#: Bytes that nobody sends in the half second that a client has to read its refusal: 64 GiB.
ENDLESS = 1 << 36


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_without_end(endpoint: Endpoint, chunked: bool):
    await endpoint.post(CHAT, BODY)
    before, sent, piece = resident(), 0, b"x" * (1 << 20)
    reader, writer = await asyncio.open_connection(*endpoint.address)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    writer.write(head + (b"Transfer-Encoding: chunked\r\n\r\n" if chunked else b"Content-Length: %d\r\n\r\n" % ENDLESS))
    try:
        while sent < ENDLESS:
            writer.write((b"100000\r\n" + piece + b"\r\n") if chunked else piece)
            await writer.drain()
            sent += len(piece)
    except ConnectionError:
        pass
    assert sent < ENDLESS
    with suppress(ConnectionError):
        assert b" 413 " in await reader.read(300)
    writer.close()
    assert resident() - before < 48 << 20
    assert (await endpoint.post(CHAT, BODY))[0] == 200


async def test_the_size_limit_has_an_error_object(serve: Serve):
    endpoint = await serve(limits={"body_bytes": 1000})
    status, answer = await endpoint.post(CHAT, {**BODY, "user": "x" * 400, "metadata": {"a": "x" * 1000}})
    assert status == 413
    assert "1000 bytes" in answer["error"]["message"]
    assert (await endpoint.post(CHAT, BODY))[0] == 200


async def test_bodies_together_are_bounded(serve: Serve):
    endpoint = await serve(
        SimulatedInference(first_delay_s=0.3, context=10**6), limits={"body_bytes": 100_000, "bodies_bytes": 250_000}
    )
    large = {"model": MODEL, "messages": [{"role": "user", "content": "x" * 90_000}]}
    answers = await asyncio.gather(*(endpoint.post(CHAT, large) for _ in range(4)), endpoint.post(CHAT, BODY))
    assert sorted(status for status, _ in answers) == [200, 200, 200, 429, 429]
    assert (await endpoint.post(CHAT, large))[0] == 200
    for _ in range(5):
        assert (await endpoint.post(CHAT, b"{"))[0] == 400
    assert (await endpoint.post(CHAT, large))[0] == 200


async def test_a_body_that_trickles(serve: Serve):
    endpoint = await serve(limits={"body_timeout_s": 0.2})
    reader, writer = await asyncio.open_connection(*endpoint.address)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n")
    writer.write(b"Content-Length: 100\r\n\r\n{")
    answer = await asyncio.wait_for(reader.read(), 5)
    assert b" 408 " in answer
    writer.close()


@pytest.mark.parametrize("start", [b"", b"GET /aa", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-A: b\r\n"])
async def test_slow_loris(serve: Serve, start: bytes):
    endpoint = await serve(limits={"header_timeout_s": 0.3})
    reader, writer = await asyncio.open_connection(*endpoint.address)

    async def trickle() -> None:
        while True:
            if start:
                writer.write(b"x")
            await asyncio.sleep(0.05)

    writer.write(start)
    task = asyncio.create_task(trickle())
    with pytest.raises(ConnectionError):
        assert await asyncio.wait_for(reader.read(), 20) == b""
        raise ConnectionResetError
    task.cancel()
    writer.close()
    assert 'refused_total{reason="slow_headers"} 1.0' in (await endpoint.get("/metrics"))[1]


async def test_a_second_request_that_trickles_on_a_kept_connection(serve: Serve):
    endpoint = await serve(limits={"header_timeout_s": 0.2})
    reader, writer = await asyncio.open_connection(*endpoint.address)
    writer.write(b"GET /health/live HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    assert b"200" in await reader.readuntil(b"}")
    await asyncio.sleep(0.3)
    writer.write(b"GET /heal")
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await asyncio.wait_for(reader.readexactly(1), 20)
    writer.close()


async def test_idle_connections_are_closed(serve: Serve):
    endpoint = await serve(limits={"keepalive_timeout_s": 0.2})
    reader, writer = await asyncio.open_connection(*endpoint.address)
    writer.write(b"GET /health/live HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    assert b"200" in await asyncio.wait_for(reader.read(), 5)
    writer.close()


async def test_ten_thousand_connections(serve: Serve):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    count = min(10_000, hard - 1000)
    endpoint = await serve(limits={"connections": 256})
    await endpoint.post(CHAT, BODY)
    before = resident()
    writers = []
    try:
        for at in range(count):
            writers.append((await asyncio.open_connection(*endpoint.address))[1])
            if at % 1000 == 0:
                assert (await endpoint.post(CHAT, BODY))[0] == 200, "those that do nothing keep nobody out"
        text = (await endpoint.get("/metrics"))[1]
        held = next(
            float(line.split()[1]) for line in text.splitlines() if line.startswith("phifleet_http_connections ")
        )
        assert held <= 256
        # The client's own end of 10,000 connections is most of this.
        assert resident() - before < 400 << 20
    finally:
        for writer in writers:
            writer.transport.abort()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    await asyncio.sleep(0.05)
    assert (await endpoint.post(CHAT, BODY))[0] == 200


async def test_busy_connections_are_not_evicted(serve: Serve):
    endpoint = await serve(SimulatedInference(first_delay_s=1.5), limits={"connections": 3})
    running = [asyncio.create_task(endpoint.post(CHAT, BODY)) for _ in range(3)]
    await until(lambda: endpoint.inference.running == 3)
    with pytest.raises((ConnectionError, aiohttp.ClientError)):
        await endpoint.get("/health/live")
    assert [status for status, _ in await asyncio.gather(*running)] == [200, 200, 200]
    assert (await endpoint.get("/health/live"))[0] == 200


async def test_a_reader_that_stops_reading_is_dropped(serve: Serve):
    inference = SimulatedInference(answer=["word " * 2000] * 5000)
    endpoint = await serve(
        inference,
        limits={"write_timeout_s": 0.3},
    )
    body = b'{"model": "phi-test", "messages": [{"role": "user", "content": "x"}], "stream": true}'
    _, writer = await asyncio.open_connection(*endpoint.address, limit=1024)
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n")
    writer.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
    before = resident()
    await until(lambda: endpoint.finished, "the reader is dropped")
    assert endpoint.finished[0].error == "cancelled"
    assert inference.running == 0
    assert resident() - before < 32 << 20
    writer.close()


async def test_stopping_lets_requests_finish(serve: Serve):
    endpoint = await serve(SimulatedInference(first_delay_s=0.3), drain_s=5)
    task = asyncio.create_task(endpoint.post(CHAT, BODY))
    await until(lambda: endpoint.inference.running == 1)
    await endpoint.server.stop()
    assert (await task)[0] == 200
    with pytest.raises(aiohttp.ClientConnectionError):
        await endpoint.get("/health/live")


async def test_stopping_ends_those_that_do_not(serve: Serve):
    endpoint = await serve(SimulatedInference(first_delay_s=60), drain_s=0.2)
    task = asyncio.create_task(endpoint.post(CHAT, BODY))
    await until(lambda: endpoint.inference.running == 1)
    await asyncio.wait_for(endpoint.server.stop(), 20)
    with pytest.raises(aiohttp.ClientError):
        await task
    assert endpoint.inference.running == 0


async def test_an_allowed_page_may_add_what_headers_its_client_has(serve: Serve):
    endpoint = await serve(cors_origins=("https://app.example",))
    wanted = "authorization,content-type,x-stainless-arch,x-stainless-retry-count,openai-organization, bad\x0bname, x y"
    headers = {
        "Origin": "https://app.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": wanted.replace("\x0b", ";"),
    }
    url = endpoint.url + "/v1/chat/completions"
    async with endpoint.http.options(url, headers=headers) as response:
        assert response.status == 204
        allowed = {name.strip().lower() for name in response.headers["Access-Control-Allow-Headers"].split(",")}
    assert allowed == {
        "authorization",
        "content-type",
        "x-stainless-arch",
        "x-stainless-retry-count",
        "openai-organization",
    }
    async with endpoint.http.options(url, headers={**headers, "Origin": "https://other.example"}) as response:
        assert response.status == 403


@pytest.mark.parametrize("encoding", ["gzip", "br", "zstd", "deflate, gzip", "x" * 500])
async def test_an_encoding_that_is_not_taken_is_named(endpoint: Endpoint, encoding: str):
    headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
    url = endpoint.url + "/v1/chat/completions"
    async with endpoint.http.post(url, data=b"\x1f\x8b\x08", headers=headers) as response:
        error = (await response.json())["error"]
        assert (response.status, error["code"]) == (415, "unsupported_content_encoding")
        assert encoding[:64] in error["message"]
