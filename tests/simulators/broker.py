"""Real brokers for tests: Debian's mosquitto with a configuration of its own, and the embedded rumqttd."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from fleet.delivery.broker import EmbeddedBroker
from tests.waiting import listens, wait_until

MOSQUITTO = shutil.which("mosquitto") or "/usr/sbin/mosquitto"


@dataclass(frozen=True)
class Broker:
    """Where it listens, and its process where there is one."""

    host: str
    port: int
    tls: bool = False
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"{'mqtts' if self.tls else 'mqtt'}://{self.host}:{self.port}"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def have_mosquitto() -> bool:
    return Path(MOSQUITTO).exists()


@contextmanager
def mosquitto(
    folder: Path,
    *,
    port: int = 0,
    listener: str = "allow_anonymous true",
    tls: bool = False,
    general: str = "",
    address: str = "127.0.0.1",
) -> Iterator[Broker]:
    """mosquitto on loopback; ``listener`` holds the lines of its one listener, ``general`` those before it."""
    port = port or free_port()
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / f"mosquitto-{port}.conf"
    config.write_text(f"per_listener_settings false\nuser root\n{general}\nlistener {port} {address}\n{listener}\n")
    with (folder / f"mosquitto-{port}.log").open("ab") as log:
        process = subprocess.Popen([MOSQUITTO, "-c", str(config)], stdout=log, stderr=log)
    try:
        _wait_listening(address, port, process, folder / f"mosquitto-{port}.log")
        yield Broker("localhost" if tls else address, port, tls, process)
    finally:
        process.terminate()
        process.wait(5)


@contextmanager
def embedded(port: int = 0) -> Iterator[Broker]:
    """The product's own embedded broker."""
    with EmbeddedBroker(port=port) as broker:
        yield Broker(broker.host, broker.port)


def _wait_listening(address: str, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    wait_until(lambda: process.poll() is not None or listens(address, port), "mosquitto listens")
    if process.poll() is not None:
        raise RuntimeError(f"mosquitto does not listen on {port}: {log.read_text()[-2000:]}")


@pytest.fixture(scope="session")
def mosquitto_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    if not have_mosquitto():
        pytest.skip("mosquitto is not installed")
    with mosquitto(tmp_path_factory.mktemp("mosquitto")) as running:
        yield running


@pytest.fixture(scope="session")
def embedded_broker() -> Iterator[Broker]:
    with embedded() as running:
        yield running


@pytest.fixture(params=["mosquitto", "embedded"])
def broker(request: pytest.FixtureRequest) -> Broker:
    """Each of the brokers that the product runs on."""
    running = request.getfixturevalue(f"{request.param}_broker")
    assert isinstance(running, Broker)
    return running
