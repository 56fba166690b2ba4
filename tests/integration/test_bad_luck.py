"""What a hostile or careless neighbour can send, with everything real: the device says what it was and goes on."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.contract import topics
from agent.contract.failures import FailureCode
from agent.contract.manifest import manifest_target
from agent.contract.messages import State
from agent.link import LinkSettings, MqttLink
from tests.models import Built
from tests.rig import Rig


@pytest.fixture
def rig(tiny_artifact: Built, sample_artifact: Built) -> Iterator[Rig]:
    with Rig() as rig:
        rig.take_over(tiny_artifact.manifest, tiny_artifact.files)
        rig.take_over(sample_artifact.manifest, sample_artifact.files)
        yield rig


def publish(rig: Rig, topic: str, *payloads: bytes, retain: bool = False) -> None:
    async def send() -> None:
        async with MqttLink(LinkSettings(url=rig.broker_url, client_id="neighbour")) as link:
            await link.wait_connected(10)
            for payload in payloads:
                await link.publish(topic, payload, retain=retain)

    asyncio.run(send())


def snapshot(folder: Path) -> dict[str, bytes]:
    """Everything that an artifact could be loaded from."""
    parts = [folder / "artifacts", folder / "partial", folder / "journal"]
    files = [file for part in parts for file in ([part] if part.is_file() else part.rglob("*")) if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_malformed_orders_are_ignored_counted_and_logged_once(rig: Rig, tiny_artifact: Built):
    rig.start_controller()
    rig.start_agent()
    rig.order(tiny_artifact.manifest)
    assert rig.settled(1).state is State.COMMITTED
    publish(rig, topics.desired(rig.device), b"{", b"\xff\xfe", b"[]", b'{"payload": 1}')
    rig.order(tiny_artifact.manifest)  # a good one still comes through
    reported = rig.settled(2)
    assert reported.state is State.COMMITTED
    assert reported.malformed_messages == 4
    log = (rig.state_dir / "logs" / "agent.log").read_text()
    assert log.count("malformed message ignored") == 1


def test_an_order_signed_by_nobody_changes_nothing_and_its_code_is_reported(rig: Rig, tiny_artifact: Built):
    rig.start_controller()
    rig.start_agent()
    rig.order(tiny_artifact.manifest)
    assert rig.settled(1).state is State.COMMITTED
    before = snapshot(rig.state_dir)
    forged = {"payload": "e30=", "payloadType": "application/json", "signatures": [{"keyid": "0" * 64, "sig": "00"}]}
    publish(rig, topics.desired(rig.device), json.dumps(forged).encode())

    def refused() -> bool:
        reported = rig.reported()
        return bool(reported and reported.failure and reported.failure.code is FailureCode.TRUST_SIGNATURE)

    rig.until(refused, "the refusal to be reported")
    assert snapshot(rig.state_dir) == before
    assert rig.reported().digest == tiny_artifact.manifest.digest  # type: ignore[union-attr]


def test_a_manifest_changed_on_the_controller_is_refused_before_a_byte_is_fetched(
    rig: Rig, tiny_artifact: Built, sample_artifact: Built
):
    controller = rig.start_controller()
    rig.start_agent()
    rig.order(tiny_artifact.manifest)
    assert rig.settled(1).state is State.COMMITTED
    before = snapshot(rig.state_dir)
    published = list(rig.home.tuf.rglob(f"*.{Path(manifest_target(sample_artifact.manifest.digest)).name}"))
    assert published == []
    os.kill(controller, signal.SIGSTOP)
    rig.order(sample_artifact.manifest)
    for file in rig.home.tuf.rglob(f"*.{Path(manifest_target(sample_artifact.manifest.digest)).name}"):
        file.write_bytes(file.read_bytes().replace(b"Paris", b"Lyons"))
        published.append(file)
    assert published
    os.kill(controller, signal.SIGCONT)
    reported = rig.settled(2)
    assert (reported.state, reported.failure and reported.failure.code) == (State.FAILED, FailureCode.TRUST_SIGNATURE)
    after = snapshot(rig.state_dir)
    before.pop("journal"), after.pop("journal")
    assert after == before


def test_an_endpoint_port_that_is_taken_ends_the_agent_with_a_sentence(rig: Rig):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        rig.start_agent("--port", str(port))
        assert rig.agent is not None
        process = rig.agent
        rig.until(lambda: "error:" in process.tail(), "the agent to end")
        assert str(port) in process.tail()
        assert "Traceback" not in process.tail()


def test_without_a_broker_the_agent_says_where_it_looks_and_goes_on(rig: Rig):
    rig.start_agent("--broker", "mqtt://127.0.0.1:1")
    assert rig.agent is not None
    process = rig.agent
    rig.until(lambda: "127.0.0.1:1" in process.tail(), "the reason in the log")
    process.check()
    assert "Traceback" not in process.tail()
