"""`phifleet serve` as a process, on the embedded broker and on mosquitto, with faults injected for real."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest

from agent.contract import topics
from agent.contract.bundle import Bundle
from agent.contract.messages import MetadataWant, Presence
from agent.link import LinkError, LinkSettings, Message, MqttLink
from fleet.registry.models import DeploymentRow
from fleet.trust.ca import DeviceCA
from tests.fleet.cli.conftest import Phifleet
from tests.fleet.world import PROFILE, World, make_world
from tests.simulators.broker import MOSQUITTO, free_port, have_mosquitto, mosquitto
from tests.simulators.clock import FakeClock
from tests.waiting import wait_until

DEVICE = "pi-1"
DOCUMENTED = Path(__file__).parents[3] / "docs" / "mosquitto"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = make_world(tmp_path / "home", clock=FakeClock(datetime.now(UTC)))  # the processes have the real one
    made.add(DEVICE)
    yield made
    made.registry.close()


@dataclass(frozen=True)
class Served:
    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        return "controller ready" in self.log.read_text()


@contextmanager
def serve(world: World, url: str, **environment: str) -> Iterator[Served]:
    """A controller on a broker; an `embedded:PORT` is started by the controller itself."""
    embedded = url.startswith("embedded:")
    flags = ["--broker-port", url.removeprefix("embedded:")] if embedded else ["--broker", url]
    log = world.home.root / f"serve-{time.monotonic_ns()}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "fleet", "--home", str(world.home.root), "serve", *flags],
            stderr=file,
            env=os.environ | environment,
            start_new_session=True,  # a foreground group of its own, as a shell makes it
        )
    served = Served(process, f"mqtt://127.0.0.1:{url.removeprefix('embedded:')}" if embedded else url, log)
    try:
        yield served
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(10)


@pytest.fixture(params=["embedded", "mosquitto"])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "embedded":
        yield f"embedded:{free_port()}"
    else:
        with mosquitto(tmp_path / "mosquitto") as running:
            yield running.url


def newest(world: World) -> DeploymentRow:
    return world.registry.deployments.newest()[DEVICE]


async def retained(url: str, topic: str, timeout_s: float = 20) -> Message:
    """What a device that connects now gets on a topic."""
    came: asyncio.Queue[Message] = asyncio.Queue()
    async with MqttLink(LinkSettings(url, "test-device")) as link:
        await link.wait_connected(timeout_s)
        await link.subscribe(topic, came.put_nowait)
        async with asyncio.timeout(timeout_s):
            return await came.get()


async def ask_for_root(url: str) -> Message:
    came: asyncio.Queue[Message] = asyncio.Queue()
    async with MqttLink(LinkSettings(url, "test-asking")) as link:
        await link.wait_connected(10)
        await link.subscribe(topics.metadata(DEVICE), came.put_nowait)
        want = MetadataWant(name="1.root.json").to_json()
        for _ in range(5):  # as a device does, which asks again when no answer comes
            await link.publish(
                topics.metadata_want(DEVICE), want, response_topic=topics.metadata(DEVICE), correlation=b"1"
            )
            with suppress(TimeoutError):
                return await asyncio.wait_for(came.get(), 2)
        pytest.fail("no answer to five requests")


def test_it_serves_and_publishes_what_the_command_line_records_and_ends_in_good_order(
    world: World, broker: str
) -> None:
    with serve(world, broker) as served:
        wait_until(served.ready, "it is ready")
        (order,) = world.deploy(DEVICE)
        wait_until(lambda: newest(world).stage == "published", "the order is published")
        assert asyncio.run(retained(served.url, topics.desired(DEVICE))).payload == order.envelope
        assert asyncio.run(ask_for_root(served.url)).payload == world.repository.root_bytes()
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(10) == 0
        log = served.log.read_text()
        assert "controller stopped" in log and "Traceback" not in log
        assert f'"deployment": "{order.id}"' in log, "JSON when not on a terminal"


def test_killed_and_started_again_it_goes_on(world: World, broker: str) -> None:
    with serve(world, broker) as served:
        wait_until(served.ready, "it is ready")
        (order,) = world.deploy(DEVICE)
        wait_until(lambda: newest(world).stage == "published", "the order is published")
        served.process.kill()
        served.process.wait(10)
    with serve(world, broker) as again:
        wait_until(again.ready, "it is ready again")
        read = "retained messages read"
        wait_until(lambda: read in again.log.read_text(), "it has compared what is retained")
        assert asyncio.run(retained(again.url, topics.desired(DEVICE))).payload == order.envelope
        # An embedded broker forgets with its process, mosquitto has kept the order.
        lost = "orders at the broker differ from the table, publishing again" in again.log.read_text()
        assert lost == broker.startswith("embedded")


def test_an_embedded_broker_that_dies_is_started_again_with_all_orders(world: World) -> None:
    with serve(world, f"embedded:{free_port()}") as served:
        wait_until(served.ready, "it is ready")
        (order,) = world.deploy(DEVICE)
        wait_until(lambda: newest(world).stage == "published", "the order is published")
        children = psutil.Process(served.process.pid).children(recursive=True)
        assert children, "the broker is a child"
        for child in children:
            child.kill()
        wait_until(lambda: "starting it again" in served.log.read_text(), "it is noticed")
        assert asyncio.run(retained(served.url, topics.desired(DEVICE), 30)).payload == order.envelope


def test_systemd_is_told_over_its_socket(world: World, tmp_path: Path) -> None:
    address = tmp_path / "notify"
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as systemd:
        systemd.bind(str(address))
        systemd.settimeout(30)
        with serve(world, f"embedded:{free_port()}", NOTIFY_SOCKET=str(address)) as served:
            assert systemd.recv(100) == b"READY=1"
            assert systemd.recv(100) == b"WATCHDOG=1"
            served.process.send_signal(signal.SIGINT)
            while (said := systemd.recv(100)) == b"WATCHDOG=1":
                pass
            assert said == b"STOPPING=1"
            assert served.process.wait(10) == 0


def test_a_broker_that_cannot_be_reached_is_said_in_one_line(world: World) -> None:
    url = f"mqtt://127.0.0.1:{free_port()}"
    with serve(world, url, PHIFLEET_CONNECT_TIMEOUT_S="0.5") as served:
        assert served.process.wait(20) == 7
        last = served.log.read_text().splitlines()[-1]
        assert last.startswith(f"error: broker {url}: ") and "refused" in last.lower()


def test_a_broker_that_refuses_is_said_in_one_line(world: World, tmp_path: Path) -> None:
    refusing = mosquitto(tmp_path / "m", listener="allow_anonymous false")
    with refusing as running, serve(world, running.url, PHIFLEET_CONNECT_TIMEOUT_S="4") as served:
        assert served.process.wait(20) == 7
        assert "not authori" in served.log.read_text().splitlines()[-1].lower()


@pytest.mark.parametrize("kind", ["embedded", "away"])
def test_an_interrupt_while_it_starts_ends_it_with_130_and_no_trace(world: World, kind: str) -> None:
    """The whole foreground group gets it, as from a terminal."""
    url = f"embedded:{free_port()}" if kind == "embedded" else f"mqtt://127.0.0.1:{free_port()}"
    with serve(world, url) as served:
        parent = psutil.Process(served.process.pid)
        if kind == "embedded":
            wait_until(lambda: bool(parent.children()), "the broker is being started")
        else:
            wait_until(lambda: "broker not connected" in served.log.read_text(), "it tries")
        os.killpg(served.process.pid, signal.SIGINT)
        assert served.process.wait(20) == 130
        log = served.log.read_text()
        assert log.splitlines()[-1] == "interrupted" and "Traceback" not in log and "--broker-port" not in log


def test_a_port_in_use_is_said_in_one_line(world: World) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    with closing(taken), serve(world, f"embedded:{taken.getsockname()[1]}") as served:
        assert served.process.wait(30) == 7
        last = served.log.read_text().splitlines()[-1]
        assert last.startswith("error: ") and "--broker-port" in last


@contextmanager
def documented_mosquitto(world: World, phifleet: Phifleet, folder: Path) -> Iterator[str]:
    """mosquitto with docs/mosquitto's configuration; only port and paths are the test's."""
    DeviceCA(world.home).init()
    assert phifleet("trust", "issue-broker", "localhost", "--out", str(folder)).code == 0
    assert phifleet("trust", "issue-controller", "--out", str(folder)).code == 0
    shutil.copy(world.home.ca / "crl.pem", folder)
    shutil.copy(DOCUMENTED / "acl", folder)
    port = free_port()
    text = (DOCUMENTED / "mosquitto.conf").read_text().replace("listener 8883", f"listener {port} 127.0.0.1")
    text = text.replace("/etc/mosquitto/phifleet", str(folder)).replace("/var/lib/mosquitto", str(folder))
    (folder / "mosquitto.conf").write_text(f"user root\n{text}")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([MOSQUITTO, "-c", str(folder / "mosquitto.conf")], stdout=log, stderr=log)
    try:
        yield f"mqtts://localhost:{port}"
    finally:
        process.terminate()
        process.wait(5)


async def devices_talk(url: str, bundle: Bundle, folder: Path) -> tuple[Message, list[Message]]:
    """What a device gets as its order, and what it hears of another's; and it speaks for both."""
    for name, text in (
        ("own.pem", bundle.certificate),
        ("own-key.pem", bundle.private_key),
        ("b.pem", bundle.broker_ca),
    ):
        (folder / name).write_text(text or "")
    files = {"ca_file": folder / "b.pem", "cert_file": folder / "own.pem", "key_file": folder / "own-key.pem"}
    orders: asyncio.Queue[Message] = asyncio.Queue()
    foreign: list[Message] = []
    async with MqttLink(LinkSettings(url, bundle.device, **files)) as link:
        await link.wait_connected(20)
        await link.subscribe(topics.desired(bundle.device), orders.put_nowait)
        with suppress(LinkError):
            await link.subscribe(topics.desired("pi-2"), foreign.append)
        for device in (bundle.device, "pi-2"):
            said = Presence(device=device, online=True).to_json()
            with suppress(LinkError):
                await link.publish(topics.presence(device), said, retain=True)
        return await asyncio.wait_for(orders.get(), 20), foreign


@pytest.mark.skipif(not have_mosquitto(), reason="mosquitto is not installed")
def test_on_the_documented_broker_each_device_has_its_own_topics_and_no_others(
    world: World, phifleet: Phifleet, tmp_path: Path
) -> None:
    folder, bundle = tmp_path / "tls", tmp_path / "pi-3.json"
    folder.mkdir()
    world.add("pi-2")
    with documented_mosquitto(world, phifleet, folder) as url:
        environment = {
            "PHIFLEET_BROKER_CA": str(folder / "ca.pem"),
            "PHIFLEET_BROKER_CERT": str(folder / "controller.pem"),
            "PHIFLEET_BROKER_KEY": str(folder / "controller-key.pem"),
        }
        config = tmp_path / "fleet.toml"
        config.write_text(f'broker = "{url}"\nbroker_ca = "{folder / "ca.pem"}"\n')
        added = phifleet(
            "--config", str(config), "device", "add", "pi-3", "--profile", PROFILE, "--bundle", str(bundle)
        )
        assert added.code == 0, added.err
        with serve(world, url, **environment) as served:
            wait_until(served.ready, "it is ready")
            order, _ = world.deploy("pi-3", "pi-2")
            wait_until(lambda: world.registry.deployments.get(order.id).stage == "published", "the order is published")
            mine, foreign = asyncio.run(devices_talk(url, Bundle.from_json(bundle.read_bytes()), folder))
            assert mine.payload == order.envelope and foreign == []
            wait_until(lambda: world.registry.devices.get("pi-3").online, "its own word is taken")
            assert not world.registry.devices.get("pi-2").online
