"""The device CA, as TLS sees it, and as mosquitto does."""

from __future__ import annotations

import asyncio
import dataclasses
import ssl
import stat
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID

from agent.errors import LinkError
from agent.link.mqtt import MqttLink
from agent.link.settings import LinkSettings
from fleet.errors import RepositoryError, UsageError
from fleet.home import Home
from fleet.trust.ca import Credentials, DeviceCA
from tests.simulators.broker import Broker, have_mosquitto, mosquitto
from tests.simulators.clock import FakeClock


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "fleet")


@pytest.fixture
def ca(home: Home) -> DeviceCA:
    made = DeviceCA(home, lambda: datetime.now(UTC))
    made.init()
    return made


def parsed(pem: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem.encode())


def test_a_device_certificate(ca: DeviceCA, home: Home) -> None:
    credentials = ca.enrol("pi-1")
    certificate = parsed(credentials.certificate)
    assert [name.value for name in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)] == ["pi-1"]
    certificate.verify_directly_issued_by(parsed(credentials.ca))
    assert certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert credentials.expires == parsed(credentials.ca).not_valid_after_utc
    assert ca.enrol("pi-1", days=30).expires < datetime.now(UTC) + timedelta(days=31)
    assert "PRIVATE" not in repr(credentials)
    assert stat.S_IMODE((home.ca / "ca-key.pem").stat().st_mode) == 0o600


def test_a_device_without_a_clock_can_check_the_broker(ca: DeviceCA) -> None:
    for pem in (ca.ca_pem(), ca.server_certificate(["127.0.0.1"]).certificate):
        assert parsed(pem).not_valid_before_utc < datetime(1970, 1, 3, tzinfo=UTC)


def test_no_certificate_outlives_the_ca(home: Home) -> None:
    clock = FakeClock()
    ca = DeviceCA(home, clock.now)
    ca.init()
    clock.advance(days=3600)
    assert ca.enrol("pi-1").expires == parsed(ca.ca_pem()).not_valid_after_utc


@pytest.mark.parametrize("device", ["", "A", "a/b", "../a", "a b", "a" * 64, "+", "fleet.controller"])
def test_what_is_no_device_id(ca: DeviceCA, device: str) -> None:
    with pytest.raises(UsageError, match="is no device id"):
        ca.enrol(device)


def test_a_controller_cannot_be_mistaken_for_a_device(ca: DeviceCA) -> None:
    assert parsed(ca.client_certificate("fleet.controller").certificate)
    with pytest.raises(UsageError, match="could be a device's"):
        ca.client_certificate("pi-1")


def test_init_again_is_refused(ca: DeviceCA) -> None:
    before = ca.ca_pem()
    with pytest.raises(RepositoryError, match="holds a CA already"):
        ca.init()
    assert ca.ca_pem() == before


def test_without_a_ca(home: Home) -> None:
    with pytest.raises(RepositoryError, match="holds no CA: run `phifleet init`"):
        DeviceCA(home).enrol("pi-1")


def test_a_damaged_key(ca: DeviceCA, home: Home) -> None:
    (home.ca / "ca-key.pem").write_bytes(b"-----BEGIN PRIVATE KEY-----\n")
    with pytest.raises(RepositoryError, match="cannot be read or written"):
        ca.enrol("pi-1")


def test_revoking_is_listed_and_the_list_is_kept_fresh(home: Home) -> None:
    clock = FakeClock()
    ca = DeviceCA(home, clock.now)
    ca.init()
    serials = {parsed(ca.enrol("pi-1").certificate).serial_number for _ in range(2)}
    ca.enrol("pi-2")
    assert ca.revoke("pi-1") == 2
    assert ca.revoke("pi-1") == 0
    assert ca.revoke("nobody") == 0
    assert not ca.refresh_crl()
    clock.advance(days=16)
    assert ca.refresh_crl()
    crl = x509.load_pem_x509_crl((home.ca / "crl.pem").read_bytes())
    assert {entry.serial_number for entry in crl} == serials
    assert crl.is_signature_valid(parsed(ca.ca_pem()).public_key())  # type: ignore[arg-type] # an ECDSA key


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "pem"
    path.mkdir()
    return path


def write(folder: Path, name: str, credentials: Credentials) -> tuple[Path, Path, Path]:
    paths = (folder / f"{name}.pem", folder / f"{name}-key.pem", folder / "ca.pem")
    for path, text in zip(paths, (credentials.certificate, credentials.private_key, credentials.ca), strict=True):
        path.write_text(text)
    return paths


@pytest.fixture
def broker(ca: DeviceCA, home: Home, folder: Path) -> Iterator[Broker]:
    """mosquitto with mutual TLS and the revocation list."""
    if not have_mosquitto():
        pytest.skip("mosquitto is not installed")
    certificate, key, ca_file = write(folder, "broker", ca.server_certificate(["localhost", "127.0.0.1"]))
    listener = (
        f"cafile {ca_file}\ncertfile {certificate}\nkeyfile {key}\ncrlfile {home.ca / 'crl.pem'}\n"
        "require_certificate true\nuse_identity_as_username true\nallow_anonymous false"
    )
    with mosquitto(folder, listener=listener, tls=True) as running:
        yield running


def settings(broker: Broker, paths: tuple[Path, Path, Path], device: str) -> LinkSettings:
    certificate, key, ca_file = paths
    return LinkSettings(broker.url, device, ca_file=ca_file, cert_file=certificate, key_file=key, connect_timeout_s=5)


async def connects(settings: LinkSettings, timeout_s: float = 10.0) -> bool:
    link = MqttLink(settings)
    await link.start()
    try:
        await link.wait_connected(timeout_s)
    except LinkError:
        return False
    finally:
        await link.close()
    return True


async def test_mutual_tls_with_a_real_broker(
    ca: DeviceCA, home: Home, folder: Path, broker: Broker, tmp_path: Path
) -> None:
    assert broker.process is not None
    ours = settings(broker, write(folder, "pi-1", ca.enrol("pi-1")), "pi-1")
    other_ca = DeviceCA(Home(tmp_path / "other"))
    other_ca.init()
    stranger = dataclasses.replace(other_ca.enrol("pi-1"), ca=ca.ca_pem())
    strangers = settings(broker, write(folder, "stranger", stranger), "pi-1")
    assert await connects(ours)
    assert not await connects(strangers, 2)
    ca.revoke("pi-1")
    broker.process.send_signal(1)  # SIGHUP: mosquitto reads the list again
    await asyncio.sleep(0.3)
    renewed = settings(broker, write(folder, "pi-1-new", ca.enrol("pi-1")), "pi-1")
    assert await connects(renewed)
    assert not await connects(ours, 2)


def test_openssl_refuses_what_is_revoked(ca: DeviceCA, home: Home, folder: Path) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cadata=ca.ca_pem())
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
    context.load_cert_chain(*write(folder, "broker", ca.server_certificate(["localhost"]))[:2])
    paths = write(folder, "pi-1", ca.enrol("pi-1"))
    ca.revoke("pi-1")
    context.load_verify_locations(home.ca / "crl.pem")
    client = ssl.create_default_context(cadata=ca.ca_pem())
    client.load_cert_chain(*paths[:2])
    with pytest.raises(ssl.SSLError, match="revoked"):
        handshake(context, client)


def handshake(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """In memory."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    here = client.wrap_bio(to_client, to_server, server_hostname="localhost")
    there = server.wrap_bio(to_server, to_client, server_side=True)
    done: set[ssl.SSLObject] = set()
    for _ in range(10):
        for side in (here, there):
            try:
                side.do_handshake()
                done.add(side)
            except ssl.SSLWantReadError:
                pass
        if len(done) == 2:
            return
