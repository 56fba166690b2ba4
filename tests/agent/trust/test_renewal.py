"""A device's certificate goes on: renewed over MQTT in time, and over HTTPS when it was off for too long."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import x25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from structlog.testing import capture_logs

from agent.contract import topics
from agent.contract.bundle import Bundle
from agent.contract.enrolment import EnrolmentToken
from agent.contract.messages import CertificateAnswer
from agent.core.ports import Message
from agent.errors import ConfigError, TrustError, UnavailableError
from agent.trust import identity
from agent.trust.enrolment import Asking, enrol_by_token, remember_controller, renew_at_controller
from agent.trust.keys import read_key, request_for
from agent.trust.renewal import CertificateRenewal, keep_certificate
from fleet.daemon.renewals import EVERY_S, Renewals
from fleet.operations.devices import make_bundle
from fleet.operations.fleet import Fleet
from fleet.settings import FleetSettings
from fleet.trust.ca import DeviceCA
from tests.agent.trust.test_enrolment import settings_of, token_of, url, world
from tests.fleet.world import World
from tests.simulators.clock import FakeClock
from tests.simulators.link import MemoryBroker, MemoryLink
from tests.waiting import until

__all__ = ["url", "world"]  # fixtures
DEVICE = "dev-r"


def bundle_of(world: World, device: str = DEVICE, days: float = 90.0) -> Bundle:
    """With a key and a certificate of ``days`` from now on the fleet's clock."""
    with Fleet(FleetSettings(home=world.home.root, **settings_of(world.home.root.parent))) as fleet:
        made = make_bundle(fleet, device, "raspberry-pi-5", None)
    credentials = DeviceCA(world.home, world.clock.now).enrol(device, days)
    return made.model_copy(update={"certificate": credentials.certificate, "private_key": credentials.private_key})


@dataclass
class Scene:
    """A device and a controller with a broker between them; ``ends`` is what the device tells of its certificate."""

    world: World
    clock: FakeClock
    who: identity.Identity
    device: MemoryLink
    broker: MemoryBroker
    server: Renewals
    now: list[float]
    ends: list[datetime] = field(default_factory=list)

    def renewal(self, **more: Any) -> CertificateRenewal:
        quick: dict[str, Any] = {"look_s": 0.01, "retry_s": 0.01, "answer_s": 2.0, "jitter": lambda: 0.0}
        return CertificateRenewal(self.who, self.device, self.clock, self.ends.append, **(quick | more))

    def certificate(self) -> x509.Certificate:
        assert self.who.certificate is not None
        return x509.load_pem_x509_certificate(self.who.certificate.read_bytes())


@asynccontextmanager
async def running(renewal: CertificateRenewal) -> AsyncIterator[None]:
    task = asyncio.create_task(renewal.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def scene_of(world: World, folder: Path, refused: dict[str, str] | None = None) -> AsyncIterator[Scene]:
    clock, broker, now = FakeClock(world.clock.now()), MemoryBroker(), [0.0]
    who = identity.enrol(bundle_of(world), folder)
    async with broker.link("fleet") as fleet, broker.link("device") as device:
        ca = DeviceCA(world.home, clock.now)
        refusals = (refused or {}).get
        server = Renewals(
            fleet, world.registry, ca, refusals, group="g", days=90, clock=clock.now, monotonic=lambda: now[0]
        )
        await server.start()
        yield Scene(world, clock, who, device, broker, server, now)
        await server.stop()


async def test_it_is_renewed_when_two_thirds_are_over_and_not_before(world: World, tmp_path: Path) -> None:
    async with scene_of(world, tmp_path) as scene:
        before = scene.certificate()
        async with running(scene.renewal()):
            scene.clock.advance(days=59)
            await until(lambda: len(scene.ends) > 3)
            assert scene.certificate() == before
            scene.clock.advance(days=2)
            await until(lambda: scene.certificate() != before)
            await until(lambda: scene.ends[-1] == scene.certificate().not_valid_after_utc)
        after = scene.certificate()
        assert after.public_key() == before.public_key()
        assert after.not_valid_after_utc - before.not_valid_after_utc > timedelta(days=60)
        bundle = Bundle.from_json((tmp_path / "identity" / "bundle.json").read_bytes())
        assert bundle.certificate == after.public_bytes(Encoding.PEM).decode()
        assert any(row.action == "device.certificate" for row in world.registry.audit.trail(5))


async def test_the_bundle_of_the_first_start_does_not_bring_the_old_one_back(world: World, tmp_path: Path) -> None:
    """A unit may say `run --bundle FILE`, so the file is imported at each start."""
    async with scene_of(world, tmp_path) as scene:
        first = Bundle.from_json((tmp_path / "identity" / "bundle.json").read_bytes())
        before = scene.certificate()
        scene.clock.advance(days=80)
        async with running(scene.renewal()):
            await until(lambda: scene.certificate() != before)
        after = scene.certificate()
        identity.enrol(first, tmp_path)
        assert scene.certificate() == after
        renewed_by_hand = bundle_of(world, days=400)
        identity.enrol(renewed_by_hand, tmp_path)
        assert scene.certificate() != after, "a bundle with another key is a new identity"


async def test_where_the_broker_asks_for_no_certificate_there_is_nothing_to_do(world: World, tmp_path: Path) -> None:
    plain = bundle_of(world).model_copy(update={"certificate": None, "private_key": None})
    async with scene_of(world, tmp_path / "one") as scene:
        scene.who = identity.enrol(plain, tmp_path / "two")
        await asyncio.wait_for(scene.renewal().run(), 5)
        assert scene.ends == []


async def test_without_a_controller_it_asks_again_and_warns_only_when_the_end_is_near(
    world: World, tmp_path: Path
) -> None:
    async with scene_of(world, tmp_path) as scene:
        await scene.server.stop()
        scene.clock.advance(days=61)
        with capture_logs() as logs:
            async with running(scene.renewal(answer_s=0.01)):
                await until(lambda: len([one for one in logs if one["event"].startswith("certificate not")]) > 2)
                scene.clock.advance(days=20)
                await until(lambda: any(one["log_level"] == "warning" for one in logs))
        assert logs[0]["log_level"] == "info"
        assert "no controller has answered" in logs[0]["error"]


async def test_who_is_barred_gets_none(world: World, tmp_path: Path) -> None:
    async with scene_of(world, tmp_path, {DEVICE: "the device was revoked or removed"}) as scene:
        scene.clock.advance(days=61)
        before = scene.certificate()
        async with running(scene.renewal(answer_s=0.01)):
            await until(lambda: scene.server.ignored > 1)
        assert scene.certificate() == before


async def test_an_answer_that_was_lost_is_given_again_and_another_key_waits(world: World, tmp_path: Path) -> None:
    async with scene_of(world, tmp_path) as scene:
        answers: list[CertificateAnswer] = []
        await scene.device.subscribe(
            topics.certificate(DEVICE), lambda message: answers.append(CertificateAnswer.from_json(message.payload))
        )
        assert scene.who.private_key is not None
        key: Any = load_pem_private_key(scene.who.private_key.read_bytes(), None)
        same = request_for(key, DEVICE)
        other = request_for(key, DEVICE)  # ECDSA draws: another request for the same key
        for csr, wait_s in ((same, 0.0), (same, 0.0), (other, 0.0), (other, EVERY_S)):
            scene.now[0] += wait_s
            count = len(answers)
            await scene.device.publish(topics.certificate_want(DEVICE), json.dumps({"csr": csr}).encode())
            await until(lambda count=count: len(answers) > count)
        assert answers[0] == answers[1]
        assert answers[2].certificate is None and "less than 10 minutes ago" in answers[2].refused
        assert answers[3].certificate not in (None, answers[0].certificate)


NONSENSE = [b"", b"{", b'{"csr": ""}', b'{"csr": "x"}', json.dumps({"csr": "x" * 20000}).encode()]


@pytest.mark.parametrize("payload", NONSENSE)
async def test_nonsense_is_no_request(world: World, tmp_path: Path, payload: bytes) -> None:
    async with scene_of(world, tmp_path) as scene:
        answers: list[Message] = []
        await scene.device.subscribe(topics.certificate(DEVICE), answers.append)
        await scene.device.publish(topics.certificate_want(DEVICE), payload)
        await until(lambda: scene.server.ignored or answers)
        assert all(CertificateAnswer.from_json(one.payload).certificate is None for one in answers)


async def test_what_comes_back_must_be_for_this_device_and_its_key(world: World, tmp_path: Path) -> None:
    who = identity.enrol(bundle_of(world), tmp_path)
    assert who.certificate is not None and who.private_key is not None
    before, ca = who.certificate.read_bytes(), DeviceCA(world.home, world.clock.now)
    now = world.clock.now()
    key: Any = load_pem_private_key(who.private_key.read_bytes(), None)
    for pem, why in (
        (ca.enrol(DEVICE).certificate, "another key"),
        (ca.certify("dev-x", request_for(key, "dev-x")).certificate, "is for dev-x"),
        ("no PEM", "cannot be read"),
        (ca.certify(DEVICE, request_for(key, DEVICE), 1).certificate, "ends no later"),
    ):
        with pytest.raises(TrustError, match=why):
            keep_certificate(tmp_path / "identity", DEVICE, who.private_key, pem, now + timedelta(days=30))
    assert who.certificate.read_bytes() == before
    (tmp_path / "identity" / "bundle.json").write_text("{}")
    good = ca.certify(DEVICE, request_for(key, DEVICE), 200).certificate
    with pytest.raises(TrustError, match=r"the identity in .* is damaged"):
        keep_certificate(tmp_path / "identity", DEVICE, who.private_key, good, now)
    who.private_key.write_text("damaged")
    with pytest.raises(TrustError, match="cannot be read"):
        keep_certificate(tmp_path / "identity", DEVICE, who.private_key, good, now)
    who.private_key.unlink()
    with pytest.raises(TrustError, match="No such file"):
        keep_certificate(tmp_path / "identity", DEVICE, who.private_key, good, now)


async def test_one_that_was_off_until_it_had_expired_comes_back_with_its_old_key(
    world: World, url: str, tmp_path: Path
) -> None:
    asking = Asking(url, token_of(world), "dev-long")
    who = identity.enrol(enrol_by_token(asking, tmp_path, lambda: None, lambda _: None), tmp_path)
    remember_controller(tmp_path, url, asking.token)
    assert who.certificate is not None
    before = x509.load_pem_x509_certificate(who.certificate.read_bytes())
    clock, ends = FakeClock(before.not_valid_after_utc + timedelta(days=100)), list[datetime]()
    async with MemoryBroker().link("device") as device:
        device.cut()  # the broker lets nobody in whose certificate has expired
        with capture_logs() as logs:
            renewal = CertificateRenewal(who, device, clock, ends.append, retry_s=0.01, jitter=lambda: 0.0)
            async with running(renewal):
                # What the controller gives ends 90 days from today, which this clock is past: in the same second as
                # the first one, which is not kept, or in a later one, which is.
                await until(
                    lambda: any(
                        "ends no later" in str(one.get("error")) or one["event"] == "certificate renewed"
                        for one in logs
                    )
                )
                clock.set(before.not_valid_after_utc)
                await until(lambda: len(ends) > 2)
    fresh = renew_at_controller(tmp_path / "identity", "dev-long", csr_of(who))
    assert fresh is not None
    assert x509.load_pem_x509_certificate(fresh.encode()).public_key() == before.public_key()
    world.registry.devices.revoke("dev-long", world.actor)
    with pytest.raises(ConfigError, match="was revoked or removed"):
        renew_at_controller(tmp_path / "identity", "dev-long", csr_of(who))


def csr_of(who: identity.Identity) -> str:
    assert who.private_key is not None
    key: Any = load_pem_private_key(who.private_key.read_bytes(), None)
    return request_for(key, who.device)


async def test_one_that_knows_no_controller_says_what_to_do(world: World, tmp_path: Path) -> None:
    async with scene_of(world, tmp_path) as scene:
        scene.clock.advance(days=200)
        scene.device.cut()
        with capture_logs() as logs:
            async with running(scene.renewal()):
                await until(lambda: logs)
        assert f"`phifleet device bundle {DEVICE} --bundle FILE`" in logs[0]["error"]


def test_a_damaged_note_of_the_controller_is_said(tmp_path: Path) -> None:
    assert renew_at_controller(tmp_path, "dev-1", "csr") is None
    (tmp_path / "controller.json").write_text("[]")
    with pytest.raises(UnavailableError, match=r"controller\.json cannot be read"):
        renew_at_controller(tmp_path, "dev-1", "csr")
    (tmp_path / "controller.json").write_text(json.dumps({"url": "http://127.0.0.1:1", "ca": None}))
    with pytest.raises(UnavailableError, match="cannot be asked"):
        renew_at_controller(tmp_path, "dev-1", "csr")
    (tmp_path / "identity").write_text("in the way")
    with pytest.raises(UnavailableError, match=r"controller\.json cannot be written"):
        remember_controller(tmp_path, "https://x", EnrolmentToken("s"))


@pytest.mark.parametrize("device", ["dev-none", "dev-r"])
async def test_a_key_that_no_token_enrolled_gets_nothing_over_https(
    world: World, url: str, tmp_path: Path, device: str
) -> None:
    who = identity.enrol(bundle_of(world, device), tmp_path)
    remember_controller(tmp_path, url, token_of(world))
    with pytest.raises(ConfigError, match=f"{device} is not enrolled with this key"):
        await asyncio.to_thread(renew_at_controller, tmp_path / "identity", device, csr_of(who))


async def test_an_answer_that_nobody_asked_for_and_rubbish_change_nothing(world: World, tmp_path: Path) -> None:
    async with scene_of(world, tmp_path) as scene:
        scene.clock.advance(days=61)
        before, renewal = scene.certificate(), scene.renewal(answer_s=0.3)
        await scene.server.stop()
        async with running(renewal):
            await until(lambda: renewal._waiting)
            (asked,) = renewal._waiting
            renewal._on_answer(Message("t", b"{}", correlation=b"another"))
            renewal._on_answer(Message("t", b"rubbish", correlation=asked))
            assert not renewal._waiting[asked].done()
            with capture_logs() as logs:
                renewal._on_answer(Message("t", b'{"refused": "no"}', correlation=asked))
                renewal._on_answer(Message("t", b'{"refused": "late"}', correlation=asked))
                await until(lambda: logs)
        assert "the controller refuses a new certificate: no" in logs[0]["error"]
        assert scene.certificate() == before


def test_keys_that_no_certificate_is_asked_for_are_said() -> None:
    key = x25519.X25519PrivateKey.generate()
    for encryption, why in ((NoEncryption(), "is not used"), (BestAvailableEncryption(b"x"), "assword")):
        with pytest.raises(ValueError, match=why):
            read_key(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
