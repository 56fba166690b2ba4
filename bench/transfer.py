"""An artifact over mosquitto to verified on disk, against the same bytes published plainly.

Every part is a process of its own, as in the product: broker, controller's chunk server, agent. The plain run is paho
to paho, QoS 1, 128 KiB a message, with nothing hashed, nothing written. Both run in turns on the same broker; compare
the ratio. Then our side over long round trips, emulated by a proxy, against the rate that the link has; and the same
from a web server (nginx), against curl.

    python -m bench.transfer [--mib 96] [--rounds 5] [--no-wan] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from paho.mqtt.client import Client  # noqa: E402 - after the path
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion  # noqa: E402

from agent.contract.manifest import Manifest  # noqa: E402
from bench.figures import Figure, table  # noqa: E402
from tests.simulators.artifacts import make_artifact, noise  # noqa: E402
from tests.simulators.broker import embedded, mosquitto  # noqa: E402
from tests.simulators.proxy import proxy  # noqa: E402
from tests.simulators.web import HAVE, nginx  # noqa: E402

MESSAGE = 128 * 1024
#: Below the 1000 messages that mosquitto queues for a client before it drops: the plain side has no flow control.
MIB = 112
WINDOW = 4 * 1024 * 1024
#: How long a connection of the poorest link holds.
CUT_S = 5.0
#: Round trips of the emulated links, in ms, and their rate, in MiB/s.
WAN = ((20, 20.0), (100, 20.0), (100, 2.0))


def main() -> None:
    options = parse(sys.argv[1:])
    if options.role:
        ROLES[options.role](options)
        return
    measured = figures(options)
    print(table(measured))
    if options.json:
        options.json.write_text(json.dumps([asdict(figure) for figure in measured], indent=2) + "\n", encoding="utf-8")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=MIB, help="size of the artifact")
    parser.add_argument("--rounds", type=int, default=5, help="the median counts")
    parser.add_argument("--window", type=int, default=WINDOW, help="bytes in flight")
    parser.add_argument("--no-wan", action="store_true", help="leave out the emulated round trips")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--role", choices=sorted(ROLES), help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def figures(options: argparse.Namespace | None = None) -> list[Figure]:
    """For `make bench`: the ratio to a plain publication, then what is reported without a target."""
    options = options or parse([])
    with tempfile.TemporaryDirectory(prefix="phifleet-bench-", dir=Path.cwd()) as name:  # a disk, not a tmpfs
        options.folder = Path(name)
        manifest = make_artifact(
            options.folder / "source", {"model.bin": noise(options.mib << 20), "config.json": b"{}"}
        )
        (options.folder / "manifest.json").write_bytes(manifest.to_json())
        with mosquitto(options.folder / "broker") as broker:
            options.url = broker.url
            rounds = [(plain(options), ours(options)) for _ in range(options.rounds)]
            measured = on_mosquitto(options, rounds)
            options.broker = broker
            far = [] if options.no_wan else [over_wan(options, rtt_ms, mib_s) for rtt_ms, mib_s in WAN]
            far += [] if options.no_wan else [cut_often(options)]
        with embedded() as broker:
            options.url = broker.url
            measured.append(Figure("the same over the embedded broker", ours(options)["mib_s"], "MiB/s"))
        if HAVE and shutil.which("curl") and not options.no_wan:
            far += mirrored(options)
    return measured + far


def on_mosquitto(options: argparse.Namespace, rounds: list[tuple[float, dict[str, Any]]]) -> list[Figure]:
    plain_mib_s = statistics.median(pair[0] for pair in rounds)

    def compared(name: str, key: str, at_least: float | None, note: str) -> Figure:
        speed = statistics.median(pair[1][key] for pair in rounds)
        ratio = statistics.median(pair[1][key] / pair[0] for pair in rounds)
        return Figure(name, speed, "MiB/s", "plain publish to subscribe", plain_mib_s, ratio, at_least, note=note)

    size = f"{options.mib} MiB, window {options.window >> 20} MiB, median of {len(rounds)} rounds in turn"
    peak = max(pair[1]["peak_rss_mib"] for pair in rounds)
    return [
        compared("artifact over mosquitto to verified on disk", "mib_s", 0.6, size),
        compared("and every file read and hashed once more", "mib_s_reread", None, ""),
        Figure("agent's peak memory meanwhile", peak, "MiB"),
    ]


def plain(options: argparse.Namespace) -> float:
    with role(options, "plain-subscribe") as subscriber:
        subscriber.ready()
        with role(options, "plain-publish"):
            return float(subscriber.result()["mib_s"])


def ours(options: argparse.Namespace) -> dict[str, Any]:
    with role(options, "serve") as server:
        server.ready()
        with role(options, "fetch") as agent:
            return agent.result()


def over_wan(options: argparse.Namespace, rtt_ms: int, mib_s: float) -> Figure:
    """The agent behind a proxy that delays and limits, as netem would where the kernel has it."""
    size = min(options.mib, 32)
    manifest = make_artifact(options.folder / "source", {"model.bin": noise(size << 20, rtt_ms), "config.json": b"{}"})
    (options.folder / "manifest.json").write_bytes(manifest.to_json())
    broker = options.broker
    with proxy(broker.host, broker.port, delay_s=rtt_ms / 2000, bytes_per_s=mib_s * 1048576) as far:
        options.url = broker.url
        with role(options, "serve") as server:
            server.ready()
            options.url = far.url
            with role(options, "fetch") as agent:
                speed = agent.result()["mib_s"]
    return Figure(f"over {rtt_ms} ms and {mib_s:g} MiB/s", speed, "MiB/s", "the link", mib_s, speed / mib_s)


def cut_often(options: argparse.Namespace) -> Figure:
    """A poor link that works: 2 Mbit/s, 300 ms, and every few seconds its connections break."""
    rate, manifest = 250_000, make_artifact(options.folder / "source", {"model.bin": noise(4 << 20, 5)})
    (options.folder / "manifest.json").write_bytes(manifest.to_json())
    with proxy(options.broker.host, options.broker.port, delay_s=0.15, bytes_per_s=rate) as far:
        options.url = options.broker.url
        with role(options, "serve") as server:
            server.ready()
            done = threading.Event()

            def cut() -> None:
                while not done.wait(CUT_S):
                    far.cut()

            cutting = threading.Thread(target=cut)
            cutting.start()
            try:
                options.url = far.url
                with role(options, "fetch") as agent:
                    found = agent.result()
            finally:
                done.set()
                cutting.join()
    speed, link = found["mib_s"], rate / 1048576
    note = f"{far.connections} connections, {found['received'] / manifest.size:.2f} of the bytes came"
    what = f"over 300 ms and 2 Mbit/s whose connections break every {CUT_S:g} s"
    return Figure(what, speed, "MiB/s", "the link", link, speed / link, note=note)


def mirrored(options: argparse.Namespace) -> list[Figure]:
    """From a web server to verified on disk, against curl that writes the same to disk; here, and over round trips."""
    links = [("loopback", None, 0, 0.0), *((f"{rtt} ms and {rate:g} MiB/s", True, rtt, rate) for rtt, rate in WAN)]
    found: list[Figure] = []
    for name, far, rtt_ms, mib_s in links:
        size = min(options.mib, 32) if far else options.mib
        shutil.rmtree(options.folder / "www", ignore_errors=True)
        manifest = make_artifact(options.folder / "www" / "new", {"model.bin": noise(size << 20, rtt_ms)})
        (options.folder / "www" / "new").rename(options.folder / "www" / manifest.digest)
        (options.folder / "manifest.json").write_bytes(manifest.to_json())
        with contextlib.ExitStack() as stack:
            port = stack.enter_context(
                nginx(options.folder / f"nginx-{rtt_ms}-{mib_s:g}", root=options.folder / "www")
            ).port
            if far:
                link = proxy("127.0.0.1", port, delay_s=rtt_ms / 2000, bytes_per_s=mib_s * 1048576)
                port = stack.enter_context(link).port
            options.url = f"http://127.0.0.1:{port}/{{digest}}/{{path}}"
            pairs = [
                (curl(options, manifest, port), read_mirror(options)) for _ in range(options.rounds if not far else 3)
            ]
        ratio = statistics.median(one / theirs for theirs, one in pairs)
        spread = f"{min(one / theirs for theirs, one in pairs):.2f} to {max(one / theirs for theirs, one in pairs):.2f}"
        speed, theirs = (statistics.median(pair[place] for pair in pairs) for place in (1, 0))
        what = f"artifact from a mirror, {name}"
        found.append(Figure(what, speed, "MiB/s", "curl", theirs, ratio, at_least=0.97 if far else None, note=spread))
    return found


def curl(options: argparse.Namespace, manifest: Manifest, port: int) -> float:
    """MiB/s of one file to disk, synchronized as an artifact is, and neither hashed nor compared."""
    target = options.folder / "curl.bin"
    began = time.monotonic()
    url = f"http://127.0.0.1:{port}/{manifest.digest}/model.bin"
    subprocess.run(["curl", "-sS", "--noproxy", "*", "-o", str(target), url], check=True)
    subprocess.run(["sync", str(target)], check=True)
    seconds = time.monotonic() - began
    target.unlink()
    return manifest.size / 1048576 / seconds


def read_mirror(options: argparse.Namespace) -> float:
    with role(options, "mirror") as agent:
        return float(agent.result()["mib_s"])


class Role:
    """One of our processes: says ``ready``, then its result as JSON, one line each."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    def ready(self) -> None:
        self._line()

    def result(self) -> dict[str, Any]:
        return dict(json.loads(self._line()))

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args!r} ended with {self._process.wait()}")
        return line


@contextmanager
def role(options: argparse.Namespace, name: str, script: str = __file__) -> Iterator[Role]:
    command = [sys.executable, script, "--role", name, "--url", options.url, "--folder", str(options.folder)]
    command += ["--window", str(options.window)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Role(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()  # each ends with its standard input
        process.wait(20)


def until_told() -> None:
    sys.stdin.read()


def say(value: object) -> None:
    print(json.dumps(value), flush=True)


def paho(options: argparse.Namespace) -> Client:
    client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
    host, port = options.url.removeprefix("mqtt://").split(":")
    client.connect(host, int(port))
    return client


def plain_subscribe(options: argparse.Namespace) -> None:
    total = Manifest.from_json((options.folder / "manifest.json").read_bytes()).size
    received, started, done = 0, 0.0, threading.Event()

    def on_message(_client: Client, _data: Any, message: Any) -> None:
        nonlocal received, started
        started = started or time.monotonic()
        received += len(message.payload)
        if received >= total:
            say({"mib_s": total / 1048576 / (time.monotonic() - started)})
            done.set()

    client = paho(options)
    client.on_message = on_message
    client.on_subscribe = lambda *_: say("ready")
    client.subscribe("bench/plain", 1)
    client.loop_start()
    done.wait()
    until_told()


def plain_publish(options: argparse.Namespace) -> None:
    client = paho(options)
    client.loop_start()
    slots = threading.Semaphore(64)
    client.on_publish = lambda *_: slots.release()
    for path in sorted((options.folder / "source").iterdir()):
        with path.open("rb") as file:
            while data := file.read(MESSAGE):
                slots.acquire()
                client.publish("bench/plain", data, 1)
    until_told()
    client.disconnect()


def serve(options: argparse.Namespace) -> None:
    from agent.link import LinkSettings, MqttLink
    from fleet.delivery.chunk_server import ChunkServer
    from fleet.store.local import LocalArtifact

    manifest = Manifest.from_json((options.folder / "manifest.json").read_bytes())

    async def run() -> None:
        async with MqttLink(LinkSettings(options.url, "server")) as link:
            await link.wait_connected(10)
            source = LocalArtifact(manifest, options.folder / "source")
            server = ChunkServer(link, lambda digest: source, group="bench")
            await server.start()
            say("ready")
            await asyncio.to_thread(until_told)

    with quiet():
        asyncio.run(run())


def mirror(options: argparse.Namespace) -> None:
    from agent.link import LinkSettings, MqttLink
    from agent.store.artifacts import ArtifactStore
    from agent.store.fetch import Fetcher

    manifest = Manifest.from_json((options.folder / "manifest.json").read_bytes())

    async def run(home: Path) -> None:
        fetcher = Fetcher(MqttLink(LinkSettings("mqtt://127.0.0.1:1", "agent")), ArtifactStore(home), "agent")
        started = time.monotonic()
        await fetcher.fetch(
            manifest, window_bytes=options.window, stall_s=30, on_progress=lambda progress: None, mirrors=[options.url]
        )
        say({"mib_s": manifest.size / 1048576 / (time.monotonic() - started)})

    with quiet(), tempfile.TemporaryDirectory(dir=options.folder) as home:
        asyncio.run(run(Path(home)))
    until_told()


def fetch(options: argparse.Namespace) -> None:
    import psutil

    from agent.link import LinkSettings, MqttLink
    from agent.store.artifacts import ArtifactStore
    from agent.store.fetch import Fetcher

    manifest = Manifest.from_json((options.folder / "manifest.json").read_bytes())

    async def run(home: Path) -> None:
        async with MqttLink(LinkSettings(options.url, "agent")) as link:
            await link.wait_connected(10)
            store = ArtifactStore(home)
            started = time.monotonic()
            fetcher = Fetcher(link, store, "agent")
            progress = await fetcher.fetch(
                manifest, window_bytes=options.window, stall_s=30, on_progress=lambda progress: None
            )
            seconds = time.monotonic() - started
            store.verify(manifest.digest)
            again = time.monotonic() - started
            say(
                {
                    "mib_s": manifest.size / 1048576 / seconds,
                    "mib_s_reread": manifest.size / 1048576 / again,
                    "received": progress.bytes_received,
                    "peak_rss_mib": peak_rss(psutil.Process()),
                }
            )

    with quiet(), tempfile.TemporaryDirectory(dir=options.folder) as home:
        asyncio.run(run(Path(home)))
    until_told()


def peak_rss(process: Any) -> float:
    """In MiB, since the process began."""
    status = Path(f"/proc/{process.pid}/status")  # getrusage would count the parent's, from before exec
    if not status.exists():
        return float(process.memory_info().rss) / 1048576
    return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024


@contextmanager
def quiet() -> Iterator[None]:
    import logging

    import structlog

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    yield


ROLES: dict[str, Callable[[argparse.Namespace], None]] = {
    "plain-subscribe": plain_subscribe,
    "plain-publish": plain_publish,
    "serve": serve,
    "fetch": fetch,
    "mirror": mirror,
}

if __name__ == "__main__":
    main()
