"""Mutual TLS and the ACL of docs/mosquitto: a transfer works, and no device reads another's chunks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest

from agent.contract import topics
from agent.contract.messages import ChunkRange, Want
from agent.core.backoff import BackoffPolicy
from agent.errors import LinkError
from agent.link import LinkSettings, Message, MqttLink
from agent.store.artifacts import ArtifactStore
from agent.store.fetch import Fetcher
from fleet.delivery.chunk_server import ChunkServer
from fleet.home import Home
from fleet.store.local import LocalArtifact
from fleet.trust.ca import DeviceCA
from tests.simulators.artifacts import make_artifact, noise
from tests.simulators.broker import have_mosquitto, mosquitto
from tests.waiting import until

DOCS = Path(__file__).parents[3] / "docs" / "mosquitto"


@dataclass
class Secured:
    url: str
    folder: Path
    ca: DeviceCA

    def settings(self, name: str) -> LinkSettings:
        made = self.ca.client_certificate(name) if "." in name else self.ca.enrol(name)
        certificate, key = self.folder / f"{name}.pem", self.folder / f"{name}-key.pem"
        certificate.write_text(made.certificate)
        key.write_text(made.private_key)
        quick = BackoffPolicy(0.1, 0.5)
        return LinkSettings(
            self.url, name, ca_file=self.folder / "ca.pem", cert_file=certificate, key_file=key, backoff=quick
        )


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[Secured]:
    if not have_mosquitto():
        pytest.skip("mosquitto is not installed")
    home = Home(tmp_path / "fleet")
    ca = DeviceCA(home)
    ca.init()
    pem = tmp_path / "pem"
    pem.mkdir()
    broker = ca.server_certificate(["localhost", "127.0.0.1"])
    for name, text in (
        ("ca.pem", ca.ca_pem()),
        ("broker.pem", broker.certificate),
        ("broker-key.pem", broker.private_key),
    ):
        (pem / name).write_text(text)
    (pem / "crl.pem").write_bytes((home.ca / "crl.pem").read_bytes())
    (pem / "acl").write_text((DOCS / "acl").read_text())
    lines = (DOCS / "mosquitto.conf").read_text().replace("/etc/mosquitto/phifleet", str(pem)).splitlines()
    kept = [line for line in lines if not line.startswith(("listener", "persistence", "per_listener"))]
    with mosquitto(tmp_path / "broker", listener="\n".join(kept), tls=True) as running:
        yield Secured(running.url, pem, ca)


async def test_artifact_over_mutual_tls(secured: Secured, tmp_path: Path) -> None:
    manifest = make_artifact(tmp_path / "source", {"model.bin": noise(8 << 20)})
    async with (
        MqttLink(secured.settings("fleet.controller")) as controller,
        MqttLink(secured.settings("pi-1")) as device,
        MqttLink(secured.settings("pi-2")) as other,
    ):
        for link in (controller, device, other):
            await link.wait_connected(10)
        source = {manifest.digest: LocalArtifact(manifest, tmp_path / "source")}
        await ChunkServer(controller, source.get, group="secret").start()
        heard: list[Message] = []
        await other.subscribe(topics.own_chunks("pi-1", manifest.digest), heard.append)
        await other.subscribe(f"{topics.PREFIX}/devices/#", heard.append)
        store = ArtifactStore(tmp_path / "device", reserve_bytes=0)
        progress = await Fetcher(device, store, "pi-1").fetch(
            manifest, window_bytes=1 << 20, stall_s=20, on_progress=lambda progress: None
        )
        own: list[Message] = []
        await device.subscribe(topics.own_chunks("pi-1", manifest.digest), own.append)
        await device.publish(
            topics.want("pi-1"),
            Want(artifact=manifest.digest, ranges=(ChunkRange(first=0, last=3),), credit=4).to_json(),
        )
        await until(lambda: len(own) == 4)
        await asyncio.sleep(0.2)
        assert heard == []
        for forged in (topics.want("pi-1"), topics.metadata_want("pi-1"), topics.own_chunk("pi-1", manifest.digest, 0)):
            with pytest.raises(LinkError, match="Not authorized"):
                await other.publish(forged, b"forged")
        with pytest.raises(LinkError, match="Not authorized"):
            await other.publish(topics.shared_chunk(manifest.digest, 0), b"forged")
    store.verify(manifest.digest)
    assert progress.bytes_received == manifest.size


async def test_device_of_another_ca_is_refused_with_a_reason(secured: Secured, tmp_path: Path) -> None:
    stranger = DeviceCA(Home(tmp_path / "stranger"))
    stranger.init()
    folder = tmp_path / "strangers"
    folder.mkdir()
    (folder / "ca.pem").write_text(secured.ca.ca_pem())
    settings = Secured(secured.url, folder, stranger).settings("pi-1")
    async with MqttLink(settings) as link:
        with pytest.raises(LinkError, match="mqtts://localhost"):
            await link.wait_connected(1)


async def test_broker_of_another_ca_is_refused_with_a_reason(secured: Secured, tmp_path: Path) -> None:
    stranger = DeviceCA(Home(tmp_path / "stranger"))
    stranger.init()
    settings = secured.settings("pi-1")
    (secured.folder / "ca.pem").write_text(stranger.ca_pem())
    async with MqttLink(settings) as link:
        with pytest.raises(LinkError, match=r"TLS fails: .*(certificate|issuer)"):
            await link.wait_connected(1)


async def test_broker_under_another_name_is_refused(secured: Secured) -> None:
    settings = secured.settings("pi-1")
    by_number = LinkSettings(
        settings.url.replace("localhost", "127.0.0.2"),
        "pi-1",
        ca_file=settings.ca_file,
        cert_file=settings.cert_file,
        key_file=settings.key_file,
    )
    async with MqttLink(by_number) as link:
        with pytest.raises(LinkError):
            await link.wait_connected(1)


async def test_a_certificate_that_was_renewed_is_shown_at_the_next_connection(secured: Secured) -> None:
    settings = secured.settings("pi-1")
    assert settings.cert_file is not None and settings.key_file is not None
    short = secured.ca.enrol("pi-1", days=3 / 86400)
    settings.cert_file.write_text(short.certificate)
    settings.key_file.write_text(short.private_key)
    async with MqttLink(settings) as link:
        await link.wait_connected(10)
        await until(lambda: datetime.now(UTC) > short.expires, "the certificate ends; the session goes on")
        link._network._client._sock_close()  # the network went away
        await until(lambda: "expired" in link.reason, "the broker refuses it", timeout_s=30)
        renewed = secured.ca.enrol("pi-1", days=1)
        settings.key_file.write_text(renewed.private_key)
        settings.cert_file.write_text(renewed.certificate)
        await link.wait_connected(10)
