"""Machines become devices with a token: what the controller asks of them, and what it refuses."""

from __future__ import annotations

import base64
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from agent.contract.enrolment import EnrolmentToken
from fleet.core.roles import Role
from fleet.errors import FleetError
from fleet.home import Home
from fleet.operations.enrolment import authority_pin
from fleet.operations.fleet import Fleet
from fleet.registry import Actor, open_registry
from fleet.registry.enrolments import EnrolmentRefusal, Machine
from fleet.settings import FleetSettings
from fleet.trust.ca import DeviceCA, certificate_digest
from tests.fleet.api.conftest import Api, serving
from tests.fleet.registry.conftest import fresh_postgresql, postgresql, url
from tests.fleet.world import World

__all__ = ["fresh_postgresql", "postgresql", "url"]  # fixtures

PROFILE = "raspberry-pi-5"
EC = ec.SECP256R1()


def request_of(name: str, key: Any = None, algorithm: Any = None) -> str:
    key = key or ec.generate_private_key(EC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)] if name else [])
    plain = isinstance(key, ed25519.Ed25519PrivateKey)
    signed = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return signed.sign(key, None if plain else algorithm or hashes.SHA256()).public_bytes(Encoding.PEM).decode()


@pytest.fixture
def world(world: World) -> World:
    DeviceCA(world.home, world.clock.now).init()
    return world


async def token(api: Api, **wanted: Any) -> tuple[dict[str, Any], str]:
    made = await api.post("/enrolment-tokens", {"profile": PROFILE, **wanted}, 201)
    return made, EnrolmentToken.parse(made["token"]).secret


async def ask(api: Api, secret: str, device: str, status: int = 200, csr: str | None = None) -> dict[str, Any]:
    body = {"token": secret, "device": device, "csr": csr or request_of(device)}
    response = await api.client.post("/api/v1/enrolments", json=body)
    assert response.status == status, await response.text()
    return dict(await response.json())


async def test_a_token_makes_a_machine_a_device_and_the_key_stays_with_it(world: World) -> None:
    async with serving(world, broker="mqtts://broker.example:8883") as api:
        made, secret = await token(api, labels={"site": "lyon"})
        key = ec.generate_private_key(EC)
        answer = await ask(api, secret, "cam-1", csr=request_of("cam-1", key))
        bundle = answer["bundle"]
        assert (answer["state"], bundle["device"], bundle["profile"]) == ("enrolled", "cam-1", PROFILE)
        assert "private_key" not in bundle
        certificate = x509.load_pem_x509_certificate(bundle["certificate"].encode())
        assert certificate.public_key() == key.public_key()
        assert certificate.subject.rfc4514_string() == "CN=cam-1"
        device = await api.get("/devices/cam-1")
        assert (device["profile"], device["labels"]) == (PROFILE, {"site": "lyon"})
        (shown,) = (await api.get("/enrolment-tokens"))["items"]
        assert (shown["id"], shown["used"], shown["uses"]) == (made["id"], 1, 1)
        assert secret not in str(shown)
        actions = [entry["action"] for entry in (await api.get("/audit"))["items"]]
        assert {"enrolment.token", "device.enrol"} <= set(actions)


async def test_without_tls_at_the_broker_there_is_no_certificate(api: Api) -> None:
    _, secret = await token(api)
    bundle = (await ask(api, secret, "cam-1"))["bundle"]
    assert bundle["broker"].startswith("mqtt://")
    assert "certificate" not in bundle


async def test_an_answer_that_was_lost_is_given_again_and_costs_no_use(api: Api) -> None:
    _, secret = await token(api)
    csr = request_of("cam-1")
    for _ in range(3):
        assert (await ask(api, secret, "cam-1", csr=csr))["state"] == "enrolled"
    refused = await ask(api, secret, "cam-2", 403)
    assert (refused["code"], refused["detail"]) == ("enrolment.refused", EnrolmentRefusal.USED_UP.value)
    other = await ask(api, (await token(api))[1], "cam-1", 409)
    assert other["detail"] == "device cam-1 is there already: choose another id with --id, or remove it first"


async def test_a_device_that_was_added_by_hand_is_not_taken_over(api: Api) -> None:
    made, secret = await token(api)
    assert (await ask(api, secret, "pi-1", 409))["code"] == "conflict"
    assert (await api.get("/enrolment-tokens"))["items"][0]["used"] == made["used"] == 0


async def test_an_operator_accepts_or_rejects(api: Api) -> None:
    _, secret = await token(api, uses=3, approval=True)
    csr = request_of("cam-1")
    for _ in range(2):
        assert await ask(api, secret, "cam-1", csr=csr) == {"state": "waiting", "bundle": None}
    await ask(api, secret, "cam-2")
    taken = await ask(api, secret, "cam-1", 409)
    assert "another machine waits to become cam-1" in taken["detail"]
    assert (await api.ask("GET", "/devices/cam-1")).status == 404
    waiting = (await api.get("/enrolments", role=Role.OPERATOR))["items"]
    assert [(one["device"], one["profile"]) for one in waiting] == [("cam-1", PROFILE), ("cam-2", PROFILE)]
    for _ in range(2):
        assert (await api.ask("POST", "/enrolments/cam-1/accept", role=Role.OPERATOR)).status == 204
    assert (await ask(api, secret, "cam-1", csr=csr))["state"] == "enrolled"
    assert (await api.ask("POST", "/enrolments/cam-2/reject", role=Role.OPERATOR)).status == 204
    assert (await api.post("/enrolments/cam-1/reject", status=409))["detail"].startswith("cam-1 is enrolled already")
    assert (await api.post("/enrolments/cam-2/accept", status=409))["code"] == "conflict"
    assert (await api.post("/enrolments/cam-9/accept", status=404))["code"] == "not_found"
    assert (await api.ask("POST", "/enrolments/cam-1/accept", role=Role.VIEWER)).status == 403
    assert (await api.get("/enrolments"))["items"] == []
    again = await ask(api, secret, "cam-2")
    assert again["state"] == "waiting", "another machine may ask for an id whose machine was rejected"


async def test_who_was_rejected_is_told(api: Api) -> None:
    _, secret = await token(api, approval=True)
    csr = request_of("cam-1")
    await ask(api, secret, "cam-1", csr=csr)
    await api.ask("POST", "/enrolments/cam-1/reject")
    assert (await ask(api, secret, "cam-1", 403, csr))["code"] == "enrolment.rejected"


async def test_tokens_that_are_not_good(api: Api) -> None:
    unknown = await ask(api, "enrol_guess", "cam-1", 403)
    assert unknown["detail"] == EnrolmentRefusal.UNKNOWN.value
    made, secret = await token(api, uses=5, hours=1)
    csr = request_of("cam-1")
    await ask(api, secret, "cam-1", csr=csr)
    assert (await api.ask("DELETE", f"/enrolment-tokens/{made['id']}")).status == 204
    assert (await ask(api, secret, "cam-2", 403))["detail"] == EnrolmentRefusal.REVOKED.value
    assert (await ask(api, secret, "cam-1", csr=csr))["state"] == "enrolled", "it is a device already"
    _, short = await token(api, hours=1)
    api.world.clock.advance(hours=2)
    assert (await ask(api, short, "cam-3", 403))["detail"] == EnrolmentRefusal.EXPIRED.value
    assert (await api.ask("DELETE", "/enrolment-tokens/nope")).status == 404


async def test_a_removed_device_may_come_again_and_a_revoked_one_may_not(api: Api) -> None:
    _, secret = await token(api, uses=9)
    csr = request_of("cam-1")
    await ask(api, secret, "cam-1", csr=csr)
    await api.post("/devices/cam-1/revoke")
    assert "was revoked" in (await ask(api, secret, "cam-1", 409, csr))["detail"]
    assert (await ask(api, secret, "cam-1", 409))["code"] == "conflict"
    await api.ask("DELETE", "/devices/cam-1")
    assert (await ask(api, secret, "cam-1"))["state"] == "enrolled"


def tampered() -> str:
    """A request that was signed with another key than its own."""
    der = bytearray(x509.load_pem_x509_csr(request_of("cam-1").encode()).public_bytes(Encoding.DER))
    der[-1] ^= 1
    return f"-----BEGIN CERTIFICATE REQUEST-----\n{base64.encodebytes(der).decode()}-----END CERTIFICATE REQUEST-----\n"


@pytest.mark.parametrize(
    ("csr", "why"),
    [
        ("no PEM at all", "cannot be read"),
        (request_of("cam-2"), "is for cam-2, and not for cam-1"),
        (request_of(""), "is for nobody"),
        (request_of("cam-1", rsa.generate_private_key(65537, 1024)), "RSA of 2048 bits"),
        (request_of("cam-1", ec.generate_private_key(ec.SECP256K1())), "ECDSA on P-256"),
        (tampered(), "not signed with its own key"),
    ],
)
async def test_requests_that_no_certificate_is_made_for(api: Api, csr: str, why: str) -> None:
    made, secret = await token(api)
    refused = await ask(api, secret, "cam-1", 422, csr)
    assert why in refused["detail"]
    assert (await api.get("/enrolment-tokens"))["items"][0]["used"] == made["used"] == 0


@pytest.mark.parametrize("key", [ed25519.Ed25519PrivateKey.generate(), rsa.generate_private_key(65537, 2048)])
async def test_keys_of_other_kinds_that_are_strong_enough(world: World, key: Any) -> None:
    async with serving(world, broker="mqtts://broker.example:8883") as api:
        _, secret = await token(api)
        bundle = (await ask(api, secret, "cam-1", csr=request_of("cam-1", key)))["bundle"]
        assert x509.load_pem_x509_certificate(bundle["certificate"].encode()).public_key() == key.public_key()


@pytest.mark.parametrize("device", ["", "Cam 1", "../x", "a" * 64, "-x", "fleet.controller"])
async def test_ids_that_are_none(api: Api, device: str) -> None:
    _, secret = await token(api)
    assert (await ask(api, secret, device, 422))["code"] == "request.invalid"


@pytest.mark.parametrize(
    ("wanted", "code"),
    [
        ({"profile": "no-such"}, "usage"),
        ({"profile": "/etc/passwd"}, "usage"),
        ({"profile": "../x.toml"}, "usage"),
        ({"uses": 0}, "request.invalid"),
        ({"uses": 2**40}, "request.invalid"),
        ({"hours": 0}, "request.invalid"),
        ({"hours": 1e9}, "request.invalid"),
        ({"labels": {"Site": "x"}}, "usage"),
        ({"profile_document": {"name": PROFILE}}, "usage"),
    ],
)
async def test_tokens_that_cannot_be_made(api: Api, wanted: dict[str, Any], code: str) -> None:
    refused = await api.post("/enrolment-tokens", {"profile": PROFILE, **wanted}, 422)
    assert refused["code"] == code


async def test_a_profile_of_ones_own_goes_with_the_token(api: Api) -> None:
    document = api.world.profile.model_dump(mode="json") | {"name": "our-box"}
    _, secret = await token(api, profile="our-box", profile_document=document)
    await ask(api, secret, "cam-1")
    row = api.world.registry.devices.get("cam-1")
    assert (row.profile, row.profile_document) == ("our-box", document)


async def test_only_an_admin_of_the_whole_fleet_makes_tokens(api: Api) -> None:
    for role in (Role.VIEWER, Role.OPERATOR, Role.RELEASER):
        assert (await api.ask("POST", "/enrolment-tokens", {"profile": PROFILE}, role=role)).status == 403
    scoped = api.token(Role.ADMIN, scope="name=pi-1")
    assert (await api.ask("POST", "/enrolment-tokens", {"profile": PROFILE}, token=scoped)).status == 403


def test_machines_that_ask_at_once_use_no_more_than_there_is(url: str, world: World) -> None:
    """And no id is given to two of them."""
    with closing(open_registry(url)) as registry:
        at = world.clock.now()
        _, secret = registry.enrolments.create(PROFILE, Actor("test", at), expires_at=at.replace(year=2099), uses=3)
    outcomes: list[str] = []

    def ask_for(number: int) -> None:
        with closing(open_registry(url)) as registry:
            machine = Machine(f"cam-{number % 5}", f"{number:064x}", "127.0.0.1")
            try:
                found = registry.enrolments.ask(secret, machine, at)
            except FleetError as error:
                outcomes.append(type(error).__name__)
            else:
                outcomes.append(found.name if isinstance(found, EnrolmentRefusal) else found.device)

    threads = [threading.Thread(target=ask_for, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    enrolled = [one for one in outcomes if one.startswith("cam-")]
    assert len(outcomes) == 10
    assert len(enrolled) == len(set(enrolled)) == 3
    with closing(open_registry(url)) as registry:
        assert registry.enrolments.tokens()[0].used == 3
        assert sorted(set(registry.devices.ids()) - {"pi-1", "pi-2", "pi-3"}) == sorted(enrolled)


def test_the_pin_is_of_the_authority_that_signed_the_apis_certificate(tmp_path: Path) -> None:
    home, stranger = Home(tmp_path / "fleet"), Home(tmp_path / "stranger")
    for one in (home, stranger):
        DeviceCA(one).init()
    for ca, expected in ((DeviceCA(home), certificate_digest(DeviceCA(home).ca_pem())), (DeviceCA(stranger), None)):
        made = ca.server_certificate(["localhost"])
        (tmp_path / "api.pem").write_text(made.certificate)
        (tmp_path / "api-key.pem").write_text(made.private_key)
        settings = FleetSettings(home=home.root, api_cert=tmp_path / "api.pem", api_key=tmp_path / "api-key.pem")
        with Fleet(settings) as fleet:
            assert authority_pin(fleet) == expected
