"""MQTT where only the web gets through: WebSocket behind nginx, HTTP and SOCKS proxies, and port 443 shared by ALPN.

All of them are what people have: Debian's nginx, tinyproxy and microsocks, in front of Debian's mosquitto.
"""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest

from agent.core.backoff import BackoffPolicy
from agent.core.ports import Message
from agent.errors import LinkError
from agent.link import LinkSettings, MqttLink
from agent.link.settings import parse_proxy, parse_url
from agent.store.artifacts import ArtifactStore
from agent.store.fetch import Fetcher
from fleet.delivery.chunk_server import ChunkServer
from fleet.home import Home
from fleet.store.local import LocalArtifact
from fleet.trust.ca import DeviceCA
from tests.agent.link.test_tls import make_artifact, noise
from tests.simulators.broker import free_port, have_mosquitto, mosquitto
from tests.simulators.web import NGINX
from tests.waiting import listens, until, wait_until

HAVE = all(Path(one).exists() for one in (NGINX, "/usr/bin/tinyproxy", "/usr/bin/microsocks")) and have_mosquitto()
pytestmark = pytest.mark.skipif(not HAVE, reason="needs mosquitto, nginx-light, tinyproxy and microsocks from Debian")
QUICK = BackoffPolicy(0.1, 0.5)


@dataclass(frozen=True)
class Web:
    """mosquitto's listeners for MQTT and for WebSocket, and nginx with TLS before the second."""

    plain: int
    websocket: int
    secure: int
    ca: Path
    log: Path

    def settings(self, url: str, **changes: object) -> LinkSettings:
        base = LinkSettings(url, "device", ca_file=self.ca if url.startswith("wss") else None, backoff=QUICK)
        return replace(base, **changes)  # type: ignore[arg-type]  # tests name fields of LinkSettings alone


@contextmanager
def process(command: list[str], port: int, log: Path) -> Iterator[None]:
    with log.open("ab") as out:
        running = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        wait_until(lambda: running.poll() is not None or listens("127.0.0.1", port), f"{command[0]} listens")
        assert running.poll() is None, log.read_text()
        yield
    finally:
        running.terminate()
        running.wait(10)


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    folder = tmp_path_factory.mktemp("web")
    ca = DeviceCA(Home(folder / "fleet"))
    ca.init()
    made = ca.server_certificate(["localhost", "127.0.0.1"])
    for name, text in (("ca.pem", ca.ca_pem()), ("web.pem", made.certificate), ("web-key.pem", made.private_key)):
        (folder / name).write_text(text)
    websocket, secure, log = free_port(), free_port(), folder / "nginx.log"
    (folder / "nginx.conf").write_text(f"""
        pid {folder}/nginx.pid; error_log {log}; daemon off; user root;
        events {{}}
        http {{
            access_log {log};
            server {{
                listen 127.0.0.1:{secure} ssl;
                ssl_certificate {folder}/web.pem; ssl_certificate_key {folder}/web-key.pem;
                location /mqtt {{
                    proxy_pass http://127.0.0.1:{websocket};
                    proxy_http_version 1.1;
                    proxy_set_header Upgrade $http_upgrade;
                    proxy_set_header Connection "upgrade";
                    proxy_read_timeout 90s;
                }}
            }}
        }}
    """)
    more = f"allow_anonymous true\nlistener {websocket} 127.0.0.1\nprotocol websockets\nallow_anonymous true"
    with (
        mosquitto(folder / "broker", listener=more) as broker,
        process([NGINX, "-c", str(folder / "nginx.conf")], secure, folder / "nginx.out"),
    ):
        yield Web(broker.port, websocket, secure, folder / "ca.pem", log)


@contextmanager
def http_proxy(folder: Path, *, user: str = "") -> Iterator[int]:
    port = free_port()
    config = folder / "tinyproxy.conf"
    lines = [f"Port {port}", "Listen 127.0.0.1", "Timeout 600", f"BasicAuth {user}" if user else ""]
    config.write_text("\n".join(lines) + "\n")
    with process(["tinyproxy", "-d", "-c", str(config)], port, folder / "tinyproxy.log"):
        yield port


@contextmanager
def socks_proxy(folder: Path, *options: str) -> Iterator[int]:
    port = free_port()
    with process(["microsocks", "-i", "127.0.0.1", "-p", str(port), *options], port, folder / "microsocks.log"):
        yield port


async def carries(settings: LinkSettings, size: int = 100_000) -> None:
    """A publication goes out through it and comes back."""
    payload = noise(size)
    async with MqttLink(settings) as link:
        await link.wait_connected(10)
        heard: list[Message] = []
        await link.subscribe("test/#", heard.append)
        await link.publish("test/a", payload)
        await until(lambda: bool(heard))
        assert heard[0].payload == payload


@pytest.mark.parametrize("scheme", ["ws", "wss"])
async def test_mqtt_goes_within_a_websocket(web: Web, scheme: str) -> None:
    url = f"ws://127.0.0.1:{web.websocket}/mqtt" if scheme == "ws" else f"wss://localhost:{web.secure}/mqtt"
    await carries(web.settings(url))
    if scheme == "wss":
        assert '"GET /mqtt HTTP/1.1" 101' in web.log.read_text(), "it went through nginx"


async def test_an_artifact_comes_through_a_websocket_whole(web: Web, tmp_path: Path) -> None:
    """A small one: mosquitto 2.0 sends 4 KiB of a WebSocket's message in each turn of 0.1 s, whoever listens."""
    manifest = make_artifact(tmp_path / "source", {"model.bin": noise(200_000)})
    device = web.settings(f"wss://localhost:{web.secure}/mqtt", client_id="pi-1")
    controller = LinkSettings(f"mqtt://127.0.0.1:{web.plain}", "controller")
    async with MqttLink(controller) as there, MqttLink(device) as here:
        await there.wait_connected(10)
        await here.wait_connected(10)
        source = {manifest.digest: LocalArtifact(manifest, tmp_path / "source")}
        await ChunkServer(there, source.get, group="secret").start()
        store = ArtifactStore(tmp_path / "device", reserve_bytes=0)
        await Fetcher(here, store, "pi-1").fetch(
            manifest, window_bytes=1 << 20, stall_s=20, on_progress=lambda progress: None
        )
    store.verify(manifest.digest)


async def test_the_link_comes_back_when_the_web_server_was_away(web: Web) -> None:
    async with MqttLink(web.settings(f"wss://localhost:{web.secure}/mqtt", client_id="back")) as link:
        await link.wait_connected(10)
        heard: list[Message] = []
        await link.subscribe("back/#", heard.append)
        master = psutil.Process(int((web.log.parent / "nginx.pid").read_text()))
        for worker in master.children():
            worker.kill()  # nginx begins new ones
        await until(lambda: not link.connected)
        await link.wait_connected(10)
        await link.publish("back/again", b"here")
        await until(lambda: bool(heard))


@pytest.mark.parametrize(
    ("proxy", "user", "url"),
    [
        ("http", "", "mqtt"),
        ("http", "phi:secret word", "mqtt"),
        ("http", "", "wss"),
        ("socks5", "", "mqtt"),
        ("socks5h", "phi:secret", "wss"),
    ],
)
async def test_proxies_let_it_through(web: Web, tmp_path: Path, proxy: str, user: str, url: str) -> None:
    broker = f"mqtt://127.0.0.1:{web.plain}" if url == "mqtt" else f"wss://localhost:{web.secure}/mqtt"
    name, _, password = user.partition(":")
    who = f"{name}:{password.replace(' ', '%20')}@" if user else ""
    if proxy == "http":
        running = http_proxy(tmp_path, user=f"{name} {password.replace(' ', '')}" if user else "")
        who = who.replace("%20", "")
    else:
        running = socks_proxy(tmp_path, *(["-u", name, "-P", password] if user else []))
    with running as port:
        await carries(web.settings(broker, proxy=f"{proxy}://{who}127.0.0.1:{port}"))


@pytest.mark.parametrize(
    ("url", "proxy", "words"),
    [
        ("ws://127.0.0.1:{plain}/mqtt", None, "does not open a WebSocket|ended the connection"),
        ("wss://localhost:{secure}/other", None, "does not open a WebSocket: .*; check the path"),
        ("wss://localhost:{closed}/mqtt", None, "nobody listens at localhost"),
        ("mqtt://127.0.0.1:{plain}", "http://127.0.0.1:{closed}", "the proxy does not connect to 127.0.0.1"),
        ("mqtt://127.0.0.1:{plain}", "socks5://127.0.0.1:{closed}", "the proxy does not connect to 127.0.0.1"),
        ("mqtt://127.0.0.1:{closed}", "socks5://127.0.0.1:{socks}", "the proxy does not connect .*refused"),
        ("mqtt://127.0.0.1:{plain}", "socks5://a:b@127.0.0.1:{guarded}", "the proxy does not connect .*authentication"),
        ("mqtt://127.0.0.1:{plain}", "http://127.0.0.1:{plain}", "the proxy does not connect|ended the connection"),
    ],
)
async def test_what_does_not_let_it_through_is_named(
    web: Web, tmp_path: Path, url: str, proxy: str | None, words: str
) -> None:
    with socks_proxy(tmp_path) as socks, socks_proxy(tmp_path, "-u", "phi", "-P", "secret") as guarded:
        ports = {"plain": web.plain, "secure": web.secure, "closed": free_port(), "socks": socks, "guarded": guarded}
        settings = web.settings(url.format(**ports), proxy=proxy.format(**ports) if proxy else None)
        async with MqttLink(replace(settings, connect_timeout_s=3.0)) as link:
            with pytest.raises(LinkError, match=f"(?i){words}"):
                await link.wait_connected(1.5)


async def test_tls_offers_the_protocol_that_shares_port_443(web: Web) -> None:
    """A server that chooses by ALPN, as AWS IoT Core and load balancers do."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(web.ca.parent / "web.pem", web.ca.parent / "web-key.pem")
    context.set_alpn_protocols(["http/1.1", "mqtt"])
    chosen: list[str | None] = []

    async def choose(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        chosen.append(writer.get_extra_info("ssl_object").selected_alpn_protocol())
        there, back = await asyncio.open_connection("127.0.0.1", web.plain)
        async with asyncio.TaskGroup() as both:
            both.create_task(_pump(reader, back))
            both.create_task(_pump(there, writer))

    server = await asyncio.start_server(choose, "127.0.0.1", 0, ssl=context)
    async with server:
        port = server.sockets[0].getsockname()[1]
        settings = web.settings(f"mqtts://localhost:{port}", ca_file=web.ca, alpn="mqtt", client_id="alpn")
        await carries(settings, 1000)
    assert chosen == ["mqtt"]


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while block := await reader.read(65536):
            writer.write(block)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


def test_urls_are_taken_apart() -> None:
    address = parse_url("wss://user:p%40ss@broker.example/iot/mqtt?x=1")
    assert (address.host, address.port, address.tls, address.path) == ("broker.example", 443, True, "/iot/mqtt?x=1")
    assert (address.username, address.password) == ("user", "p@ss")
    assert str(address) == "wss://broker.example:443/iot/mqtt?x=1", "no password"
    assert (parse_url("ws://h").path, parse_url("ws://h").port, parse_url("mqtts://h").path) == ("/mqtt", 80, None)
    assert str(parse_url("ws://[::1]:9001/")) == "ws://[::1]:9001/"
    proxy = parse_proxy("http://phi:s@[::1]")
    assert (proxy.host, proxy.port, proxy.looks_up, proxy.username, proxy.password) == ("::1", 3128, True, "phi", "s")
    assert str(proxy) == "http://[::1]:3128" and "s@" not in repr(proxy)
    assert not parse_proxy("socks5://h").looks_up and parse_proxy("socks5h://h").looks_up


@pytest.mark.parametrize(
    ("read", "url", "words"),
    [
        (parse_url, "http://h", "has the scheme 'http'; write mqtt://host:port, mqtts"),
        (parse_url, "ws://", "names no host"),
        (parse_url, "wss://h:port", "cannot be read"),
        (parse_url, "wss://h/mqtt#x", "ends in"),
        (parse_url, "mqtts://h/mqtt", "nothing after it"),
        (parse_proxy, "ftp://h", "proxy URL has the scheme 'ftp'; write http://host:port, socks5"),
        (parse_proxy, "http://", "names no host"),
        (parse_proxy, "proxy.example:3128", "has the scheme 'proxy.example'"),
    ],
)
def test_urls_that_cannot_be_are_named(read: object, url: str, words: str) -> None:
    assert callable(read)
    with pytest.raises(LinkError, match=words):
        read(url)
