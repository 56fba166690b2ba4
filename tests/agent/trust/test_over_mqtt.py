"""The whole way over a real broker: mutual TLS, the ACL and the configuration that the docs give."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.contract import topics
from agent.contract.bundle import Bundle
from agent.core.ports import Message
from agent.link.mqtt import MqttLink
from agent.link.settings import LinkSettings
from agent.trust.client import TrustClient
from agent.trust.identity import Identity, enrol
from fleet.delivery.metadata import MetadataServer
from fleet.home import Home
from fleet.trust.ca import DeviceCA
from fleet.trust.clock import utc_now
from fleet.trust.repository import Repository
from tests.agent.trust.test_client import large_manifest
from tests.simulators.broker import have_mosquitto, mosquitto
from tests.simulators.clock import FakeClock
from tests.simulators.repository import ref

DOCS = Path(__file__).parents[3] / "docs" / "mosquitto"

pytestmark = pytest.mark.skipif(not have_mosquitto(), reason="mosquitto is not installed")


@dataclass
class Scene:
    folder: Path
    url: str
    ca: DeviceCA
    repository: Repository
    controller: MqttLink
    stack: AsyncExitStack

    def identity(self, device: str) -> Identity:
        credentials = self.ca.enrol(device)
        bundle = Bundle(
            device=device,
            profile="demo",
            broker=self.url,
            broker_ca=credentials.ca,
            root=self.repository.root_bytes().decode(),
            certificate=credentials.certificate,
            private_key=credentials.private_key,
            issued_at=utc_now(),
        )
        return enrol(bundle, self.folder / device)

    async def link(self, who: Identity) -> MqttLink:
        settings = LinkSettings(
            who.broker, who.device, ca_file=who.broker_ca, cert_file=who.certificate, key_file=who.private_key
        )
        link = await self.stack.enter_async_context(MqttLink(settings))
        await link.wait_connected(10)
        return link


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    home = Home(tmp_path / "fleet")
    repository, ca = Repository(home), DeviceCA(home)
    repository.init()
    ca.init()
    pem = tmp_path / "pem"
    pem.mkdir()
    for name, made in (
        ("broker", ca.server_certificate(["localhost", "127.0.0.1"])),
        ("controller", ca.client_certificate("fleet.controller")),
    ):
        (pem / f"{name}.pem").write_text(made.certificate)
        (pem / f"{name}-key.pem").write_text(made.private_key)
    (pem / "ca.pem").write_text(ca.ca_pem())
    (pem / "crl.pem").write_bytes((home.ca / "crl.pem").read_bytes())
    (pem / "acl").write_text((DOCS / "acl").read_text())
    lines = (DOCS / "mosquitto.conf").read_text().replace("/etc/mosquitto/phifleet", str(pem)).splitlines()
    listener = [line for line in lines if not line.startswith(("listener", "persistence", "per_listener"))]
    with mosquitto(tmp_path / "broker", listener="\n".join(listener), tls=True) as broker:
        async with AsyncExitStack() as stack:
            settings = LinkSettings(
                broker.url,
                "fleet.controller",
                ca_file=pem / "ca.pem",
                cert_file=pem / "controller.pem",
                key_file=pem / "controller-key.pem",
            )
            controller = await stack.enter_async_context(MqttLink(settings))
            await controller.wait_connected(10)
            server = MetadataServer(controller, repository, group="secret")
            await server.start()
            yield Scene(tmp_path, broker.url, ca, repository, controller, stack)
            await server.stop()


async def test_a_manifest_over_mutual_tls_with_the_acl_of_the_docs(scene: Scene) -> None:
    manifest = large_manifest(4000)
    scene.repository.publish(manifest)
    who = scene.identity("pi-1")
    client = TrustClient(who, await scene.link(who), FakeClock(utc_now()))
    assert await client.manifest(ref(manifest)) == manifest


async def test_a_device_neither_reads_nor_writes_what_is_anothers(scene: Scene) -> None:
    mine, other = await scene.link(scene.identity("pi-1")), scene.identity("pi-2").device
    seen: list[Message] = []
    heard: list[Message] = []
    for topic in (topics.desired(other), topics.metadata(other), f"{topics.PREFIX}/#", topics.desired("pi-1")):
        await mine.subscribe(topic, seen.append)
    await scene.controller.subscribe(f"{topics.PREFIX}/devices/+/reported", heard.append)
    await scene.controller.publish(topics.desired(other), b"for pi-2")
    await scene.controller.publish(topics.metadata(other), b"for pi-2")
    await scene.controller.publish(topics.desired("pi-1"), b"for pi-1")
    for topic in (topics.reported(other), topics.reported("pi-1"), topics.desired(other)):
        try:
            await mine.publish(topic, b"by pi-1")
        except Exception as error:  # a broker may also say that it refuses
            assert "not authorized" in str(error).lower()
    await asyncio.sleep(0.3)
    assert {message.payload for message in seen} == {b"for pi-1"}
    assert [message.topic for message in heard] == [topics.reported("pi-1")]
