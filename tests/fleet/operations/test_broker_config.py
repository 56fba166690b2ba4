"""`phifleet broker config`: what it writes for mosquitto starts and serves; what it writes for EMQX says the same."""

from __future__ import annotations

import re
import shutil
import stat
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.contract import topics
from agent.core.backoff import BackoffPolicy
from agent.errors import LinkError
from agent.link import LinkSettings, MqttLink
from fleet.cli.main import run
from fleet.errors import UsageError
from fleet.operations.broker_config import BrokerKind, BrokerOptions, write_broker_config
from fleet.operations.fleet import Fleet
from fleet.settings import FleetSettings
from fleet.trust.ca import DeviceCA
from tests.fleet.world import World, make_world
from tests.simulators.broker import free_port, have_mosquitto, mosquitto


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = make_world(tmp_path / "home")
    DeviceCA(made.home).init()
    yield made
    made.registry.close()


@pytest.fixture
def fleet(world: World) -> Iterator[Fleet]:
    with Fleet(FleetSettings(home=world.home.root)) as made:
        yield made


def test_the_settings_and_the_keys_that_the_controller_gets(world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    home = ["--home", str(world.home.root)]
    assert run([*home, "broker", "config", "broker.example.org", "10.0.0.7", "--out", str(out), "--port", "8884"]) == 0
    settings = tomllib.loads((out / "controller" / "fleet.toml").read_text())
    assert FleetSettings(**settings).broker_url == "mqtts://broker.example.org:8884"
    assert "listener 8884" in (out / "broker" / "phifleet.conf").read_text()
    for key in ("broker/broker-key.pem", "broker/acl", "controller/controller-key.pem"):
        assert stat.S_IMODE((out / key).stat().st_mode) == 0o600


@pytest.mark.skipif(not have_mosquitto(), reason="mosquitto is not installed")
async def test_mosquitto_starts_with_it_and_holds_each_to_its_rights(fleet: Fleet, tmp_path: Path) -> None:
    port, out = free_port(), tmp_path / "out"
    options = BrokerOptions(BrokerKind.MOSQUITTO, ["localhost"], port, str(out / "broker"))
    write_broker_config(fleet, options, out)
    lines = (out / "broker" / "phifleet.conf").read_text().splitlines()
    listener = "\n".join(line for line in lines if not line.startswith("listener"))
    device = DeviceCA(fleet.home).enrol("pi-1")
    (tmp_path / "pi.pem").write_text(device.certificate)
    (tmp_path / "pi-key.pem").write_text(device.private_key)
    with mosquitto(tmp_path / "run", port=port, listener=listener, tls=True) as broker:
        ca, quick = out / "controller" / "ca.pem", BackoffPolicy(0.1, 0.5)
        controller = LinkSettings(
            broker.url, "c", ca, out / "controller" / "controller.pem", out / "controller" / "controller-key.pem"
        )
        own = LinkSettings(broker.url, "d", ca, tmp_path / "pi.pem", tmp_path / "pi-key.pem", backoff=quick)
        async with MqttLink(controller) as fleets, MqttLink(own) as devices:
            await fleets.wait_connected(10)
            await devices.wait_connected(10)
            await fleets.publish(topics.desired("pi-1"), b"order")
            await devices.publish(topics.want("pi-1"), b"want")
            with pytest.raises(LinkError, match="Not authorized"):
                await devices.publish(topics.desired("pi-1"), b"forged")


def test_emqx_is_told_the_same_rights(fleet: Fleet, tmp_path: Path) -> None:
    write_broker_config(fleet, BrokerOptions(BrokerKind.EMQX, ["broker.example.org"]), tmp_path)
    acl = (tmp_path / "broker" / "acl.conf").read_text()
    written = re.findall(r'\{allow, all, (\w+), \["([^"]+)"\]\}\.', acl)
    documented = (Path(__file__).parents[3] / "docs" / "mosquitto" / "acl").read_text()
    meant = re.findall(r"^pattern (read|write) (\S+)$", documented, re.MULTILINE)
    words = {"read": "subscribe", "write": "publish"}
    assert written == [(words[action], topic.replace("%u", "${username}")) for action, topic in meant]
    assert acl.rstrip().endswith("{deny, all}.")
    hocon = (tmp_path / "broker" / "phifleet.hocon").read_text()
    assert hocon.count("{") == hocon.count("}")
    assert "verify = verify_peer" in hocon and "fail_if_no_peer_cert = true" in hocon


def test_what_cannot_be_is_said(fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="port 70000"):
        write_broker_config(fleet, BrokerOptions(BrokerKind.MOSQUITTO, ["x"], 70_000), tmp_path)
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UsageError, match="cannot be written"):
        write_broker_config(fleet, BrokerOptions(BrokerKind.MOSQUITTO, ["x"]), tmp_path / "taken")
    monkeypatch.setattr("fleet.operations.broker_config._PLACES", (tmp_path / "nowhere",))
    with pytest.raises(UsageError, match="does not belong to this installation"):
        write_broker_config(fleet, BrokerOptions(BrokerKind.MOSQUITTO, ["x"]), tmp_path / "out")
    shutil.rmtree(fleet.home.ca)
    with pytest.raises(Exception, match="holds no CA"):
        write_broker_config(fleet, BrokerOptions(BrokerKind.MOSQUITTO, ["x"]), tmp_path / "out")
