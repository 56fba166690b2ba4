"""Why a device cannot connect: each case at a real broker has words of its own, and none is a guess."""

from __future__ import annotations

import asyncio
import dataclasses
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.core.backoff import BackoffPolicy
from agent.errors import LinkError
from agent.link import LinkSettings, MqttLink
from agent.link.reasons import of_exception, of_log
from fleet.home import Home
from fleet.trust.ca import DeviceCA
from tests.simulators.broker import Broker, free_port, have_mosquitto, mosquitto
from tests.waiting import until

pytestmark = pytest.mark.skipif(not have_mosquitto(), reason="mosquitto is not installed")


@dataclasses.dataclass(frozen=True)
class Site:
    """A broker with mutual TLS and a revocation list, and a device whose certificate is good."""

    broker: Broker
    good: LinkSettings
    revoked: LinkSettings


def credentials(ca: DeviceCA, folder: Path, name: str) -> tuple[Path, Path]:
    made = ca.enrol(name)
    certificate, key = folder / f"{name}.pem", folder / f"{name}-key.pem"
    certificate.write_text(made.certificate)
    key.write_text(made.private_key)
    return certificate, key


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    home = Home(folder / "fleet")
    ca = DeviceCA(home)
    ca.init()
    server = ca.server_certificate(["localhost"])
    for name, text in (("ca", ca.ca_pem()), ("broker", server.certificate), ("broker-key", server.private_key)):
        (folder / f"{name}.pem").write_text(text)
    good, revoked = credentials(ca, folder, "pi-1"), credentials(ca, folder, "pi-2")
    ca.revoke("pi-2")
    listener = (
        f"cafile {folder / 'ca.pem'}\ncertfile {folder / 'broker.pem'}\nkeyfile {folder / 'broker-key.pem'}\n"
        f"crlfile {home.ca / 'crl.pem'}\nrequire_certificate true\nuse_identity_as_username true\nallow_anonymous false"
    )
    with mosquitto(folder, listener=listener, tls=True) as broker:
        settings = LinkSettings(
            broker.url, "pi-1", ca_file=folder / "ca.pem", cert_file=good[0], key_file=good[1],
            backoff=BackoffPolicy(0.1, 0.3), connect_timeout_s=5,
        )  # fmt: skip
        yield Site(broker, settings, dataclasses.replace(settings, cert_file=revoked[0], key_file=revoked[1]))


async def reason(settings: LinkSettings, wanted: str) -> str:
    """What the link says after an attempt; waited for, as attempts follow each other."""
    link = MqttLink(settings)
    await link.start()
    try:
        await until(lambda: wanted in link.reason or link.connected, f"{wanted!r}; it says {link.reason!r}", 20)
        assert not link.connected
        with pytest.raises(LinkError):
            await link.wait_connected(0.1)
        return link.reason
    finally:
        await link.close()


async def test_a_good_device_connects(site: Site):
    async with MqttLink(site.good) as link:
        await link.wait_connected(10)


async def test_a_revoked_device_reads_that_it_was_revoked(site: Site):
    assert "certificate was revoked" in await reason(site.revoked, "revoked")


async def test_a_missing_client_certificate_is_named(site: Site):
    bare = dataclasses.replace(site.good, cert_file=None, key_file=None)
    assert "asks for a client certificate" in await reason(bare, "client certificate")


async def test_plain_mqtt_on_the_port_for_tls_is_told_as_what_happened(site: Site):
    plain = LinkSettings(f"mqtt://localhost:{site.broker.port}", "pi-1", backoff=site.good.backoff)
    assert "ended the connection without an answer to CONNECT" in await reason(plain, "without an answer")


async def test_tls_to_a_server_without_it_says_so(site: Site):
    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        settings = dataclasses.replace(site.good, url=f"mqtts://localhost:{port}")
        assert "does not speak TLS" in await reason(settings, "TLS fails")


async def test_a_broker_of_a_foreign_authority_is_refused_by_name(tmp_path: Path, site: Site):
    other = DeviceCA(Home(tmp_path / "other"))
    other.init()
    (tmp_path / "ca.pem").write_text(other.ca_pem())
    found = await reason(dataclasses.replace(site.good, ca_file=tmp_path / "ca.pem"), "certificate is refused")
    assert "the broker's certificate is refused" in found
    assert "check that the CA file" in found


async def test_another_name_than_the_certificates_is_told(site: Site):
    settings = dataclasses.replace(site.good, url=f"mqtts://127.0.0.1:{site.broker.port}")
    found = await reason(settings, "certificate is refused")
    assert "127.0.0.1" in found and "check that the address in the broker's URL" in found


async def test_a_port_where_nobody_listens(site: Site):
    port = free_port()
    settings = LinkSettings(f"mqtt://127.0.0.1:{port}", "pi-1", backoff=site.good.backoff)
    assert f"nobody listens at 127.0.0.1, port {port}" in await reason(settings, "nobody listens")


async def test_a_name_that_cannot_be_resolved(site: Site):
    settings = LinkSettings("mqtt://no-such-host.invalid:1883", "pi-1", backoff=site.good.backoff)
    assert "the name no-such-host.invalid cannot be resolved" in await reason(settings, "cannot be resolved")


def test_what_is_not_known_is_passed_on_as_it_is():
    assert of_log("Sending CONNECT") is None
    assert of_log("failed: [SSL: TLSV1_ALERT_INTERNAL_ERROR] x") == "TLS fails: tlsv1 alert internal error"
    assert of_exception(OSError(113, "No route to host"), "h", 1) == "No route to host"
    assert of_exception(TimeoutError("timed out"), "h", 1) == "no answer from h, port 1, in time"
    unknown = of_exception(ssl.SSLError(1, "[SSL: TLSV1_ALERT_UNKNOWN_CA] x"), "h", 1)
    assert unknown == "TLS fails: the broker does not know the authority that signed this client's certificate"


@pytest.mark.parametrize("code", [9, 10])
def test_a_certificate_outside_its_dates_points_at_the_clock_too(code: int):
    # A board without a battery for its clock starts in the past.
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_code, error.verify_message = code, "certificate is not yet valid"
    found = of_exception(error, "h", 1)
    assert "certificate is not yet valid; check this device's clock" in found


def test_a_refusal_of_another_kind_gets_no_guess():
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_code, error.verify_message = 24, "invalid CA certificate"
    assert of_exception(error, "h", 1).endswith("is refused: invalid CA certificate")
