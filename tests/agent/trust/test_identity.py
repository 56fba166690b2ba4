"""Bundles, whole and damaged, and their import."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.contract.base import MalformedMessageError
from agent.contract.bundle import Bundle
from agent.errors import ConfigError
from agent.trust.identity import enrol, load, read_bundle
from fleet.home import Home
from fleet.trust.ca import DeviceCA
from fleet.trust.repository import Repository
from tests.agent.trust.conftest import make_bundle
from tests.simulators.clock import FakeClock


@pytest.fixture(scope="module")
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture(scope="module")
def bundle(template: Path, clock: FakeClock, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    ca = DeviceCA(Home(tmp_path_factory.mktemp("ca")), clock.now)
    ca.init()
    credentials = ca.enrol("pi-1")
    return make_bundle(
        Repository(Home(template), clock.now),
        clock.now(),
        broker="mqtts://broker.example:8883",
        broker_ca=credentials.ca,
        certificate=credentials.certificate,
        private_key=credentials.private_key,
    )


def write(folder: Path, data: bytes, mode: int = 0o600) -> Path:
    path = folder / "device.bundle"
    path.write_bytes(data)
    path.chmod(mode)
    return path


def test_import_and_load(bundle: Bundle, tmp_path: Path) -> None:
    state = tmp_path / "state"
    imported = enrol(read_bundle(write(tmp_path, bundle.to_json())), state)
    assert load(state) == imported
    assert (imported.device, imported.profile, imported.broker) == ("pi-1", "demo", "mqtts://broker.example:8883")
    assert imported.root.decode() == bundle.root
    for path, text in (
        (imported.broker_ca, bundle.broker_ca),
        (imported.certificate, bundle.certificate),
        (imported.private_key, bundle.private_key),
    ):
        assert path is not None and path.read_text() == text
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert enrol(bundle, state) == imported


def test_a_renewed_bundle_replaces_the_old_one(bundle: Bundle, tmp_path: Path) -> None:
    enrol(bundle, tmp_path)
    (tmp_path / "trust").mkdir()
    plain = bundle.model_copy(update={"certificate": None, "private_key": None, "broker": "mqtt://other:1883"})
    renewed = enrol(plain, tmp_path)
    assert (renewed.certificate, renewed.broker) == (None, "mqtt://other:1883")
    assert not (tmp_path / "identity" / "client-key.pem").exists()
    assert (tmp_path / "trust").exists()


def test_another_device_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    enrol(bundle, tmp_path)
    other = bundle.model_copy(update={"device": "pi-2"})
    with pytest.raises(ConfigError, match="enrolled as pi-1, the bundle is for pi-2"):
        enrol(other, tmp_path)
    assert load(tmp_path).device == "pi-1"
    assert enrol(other, tmp_path, replace=True).device == "pi-2"


def test_another_fleet_is_refused_and_with_replace_forgets_the_old_one(
    bundle: Bundle, clock: FakeClock, tmp_path: Path
) -> None:
    repository = Repository(Home(tmp_path / "other"), clock.now)
    repository.init()
    enrol(bundle, tmp_path / "state")
    (tmp_path / "state" / "trust").mkdir()
    other = bundle.model_copy(update={"root": repository.root_bytes().decode()})
    with pytest.raises(ConfigError, match="trusts another root"):
        enrol(other, tmp_path / "state")
    enrol(other, tmp_path / "state", replace=True)
    assert not (tmp_path / "state" / "trust").exists()


def test_without_an_identity(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no identity.*--bundle FILE"):
        load(tmp_path)


def test_readable_by_others(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can be read by others: chmod 600"):
        read_bundle(write(tmp_path, bundle.to_json(), 0o644))


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere cannot be read: No such file"):
        read_bundle(tmp_path / "nowhere")


def edit(**changes: object) -> Callable[[bytes], bytes]:
    return lambda data: json.dumps(json.loads(data) | changes).encode()


def without(name: str) -> Callable[[bytes], bytes]:
    return lambda data: json.dumps({key: value for key, value in json.loads(data).items() if key != name}).encode()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: data[: len(data) // 2], "damaged: Invalid JSON"),
        (lambda data: b"", "damaged: Invalid JSON"),
        (lambda data: b"\xff\xfe", "damaged: Invalid JSON"),
        (lambda data: b"[]", "damaged: Input should be an object"),
        (edit(version=2), "version: .*this agent reads version 1"),
        (edit(device="../x"), "device: String should match"),
        (edit(broker="http://x"), "broker: .*must be mqtt://host:port"),
        (edit(broker="mqtt://x:port"), "broker: .*must be mqtt://host:port"),
        (edit(root="{}"), "root: .*is not TUF root metadata"),
        (edit(root=[]), "root: Input should be a valid string"),
        (edit(private_key=None), "certificate and private_key go together"),
        (edit(certificate="x"), "certificate: .*is not PEM"),
        (without("root"), "root: is missing"),
        (without("issued_at"), "issued_at: is missing"),
    ],
)
def test_damaged_bundles(bundle: Bundle, tmp_path: Path, damage: Callable[[bytes], bytes], says: str) -> None:
    path = write(tmp_path, damage(bundle.to_json()))
    with pytest.raises(ConfigError, match=says) as caught:
        read_bundle(path)
    assert str(path) in str(caught.value)
    assert "phifleet device add" in str(caught.value)
    assert "PRIVATE KEY" not in str(caught.value)


def test_a_bundle_does_not_show_its_key(bundle: Bundle) -> None:
    assert "PRIVATE KEY" not in repr(bundle)


@given(data=st.data())
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_damage_shows_the_key_or_raises_anything_else(bundle: Bundle, data: st.DataObject) -> None:
    payload = bundle.to_json()
    begin = data.draw(st.integers(0, len(payload)))
    end = data.draw(st.integers(begin, len(payload)))
    try:
        Bundle.from_json(payload[:begin] + data.draw(st.binary(max_size=5)) + payload[end:])
    except MalformedMessageError as error:
        assert "PRIVATE KEY" not in str(error)


def test_a_damaged_identity_is_replaced_when_it_is_asked_for(bundle: Bundle, tmp_path: Path) -> None:
    enrol(bundle, tmp_path)
    (tmp_path / "identity" / "bundle.json").write_bytes(b"{")
    with pytest.raises(ConfigError, match="is damaged"):
        enrol(bundle, tmp_path)
    assert enrol(bundle, tmp_path, replace=True) == load(tmp_path)
