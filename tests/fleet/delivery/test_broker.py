from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from agent.link import LinkSettings, MqttLink
from fleet.delivery.broker import EmbeddedBroker
from fleet.errors import BrokerError
from tests.waiting import listens, wait_until


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.10", "::", "broker.example.org", "", "8.8.8.8"])
def test_refuses_every_address_but_loopback_and_says_why(host: str) -> None:
    with pytest.raises(BrokerError, match="loopback only") as caught:
        EmbeddedBroker(host)
    assert "--broker mqtts://" in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.2"])
async def test_starts_on_loopback_takes_a_whole_chunk_and_stops(host: str) -> None:
    with EmbeddedBroker(host) as broker:
        assert broker.running
        async with MqttLink(LinkSettings(broker.url, "device")) as link:
            await link.wait_connected(5)
            got = asyncio.Event()
            await link.subscribe("a", lambda message: got.set() if len(message.payload) == 160 * 1024 else None)
            await link.publish("a", bytes(160 * 1024))
            await asyncio.wait_for(got.wait(), 5)
    assert not broker.running
    broker.stop()
    assert not listens("127.0.0.1", broker.port)


def test_it_listens_on_loopback_alone() -> None:
    with EmbeddedBroker() as broker:
        listening = [
            connection.laddr.ip
            for connection in psutil.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == broker.port
        ]
    assert listening == ["127.0.0.1"]


def test_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(BrokerError, match=str(port)):
            EmbeddedBroker(port=port).start()


def test_dies_with_its_parent_however_that_ends(tmp_path: Path) -> None:
    script = """
import time
from fleet.delivery.broker import EmbeddedBroker
broker = EmbeddedBroker().start()
print(broker.port, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    port = int(parent.stdout.readline())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not listens("127.0.0.1", port), "the broker ends with its parent")


@pytest.mark.skipif(sys.platform == "win32", reason="a terminal's interrupt is POSIX here")
def test_the_terminals_interrupt_does_not_reach_it() -> None:
    before = set(psutil.Process().children())  # the brokers of other tests
    with EmbeddedBroker() as broker:
        (child,) = set(psutil.Process().children()) - before
        child.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert broker.running
        with socket.create_connection((broker.host, broker.port), 2):
            pass
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
