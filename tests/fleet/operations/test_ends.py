"""What ends soon is told in the status, on the page, in the figures and in the log, before it has ended."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from fleet.api.metrics import Metrics
from fleet.daemon.refresh import Refresh
from fleet.operations.ends import describe_ends, fleet_ends, warnings
from fleet.operations.fleet import Fleet
from fleet.operations.overview import overview
from fleet.registry import Received, Recorder
from fleet.settings import FleetSettings
from fleet.trust.ca import DeviceCA
from tests.fleet.world import World, make_world, topic_of


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = make_world(tmp_path / "home")
    made.add("pi-1", "pi-2", "pi-3")
    ca = DeviceCA(made.home, made.clock.now)
    ca.init()
    controller = ca.client_certificate("fleet.controller", days=40)
    (tmp_path / "controller.pem").write_text(controller.certificate)
    (tmp_path / "controller-key.pem").write_text(controller.private_key)
    yield made
    made.registry.close()


@pytest.fixture
def fleet(world: World) -> Iterator[Fleet]:
    folder = world.home.root.parent
    certificate, key = folder / "controller.pem", folder / "controller-key.pem"
    with Fleet(FleetSettings(home=world.home.root, broker_cert=certificate, broker_key=key)) as made:
        yield made


def test_everything_that_ends_the_soonest_first(world: World, fleet: Fleet) -> None:
    found = fleet_ends(fleet)
    assert found[0].name == "broker_cert"
    assert {end.name for end in found} == {"broker_cert", "root", "targets", "device_ca"}
    assert found == sorted(found, key=lambda end: end.expires)
    assert warnings(fleet, world.clock.now()) == []


def test_an_end_that_is_near_is_told_with_what_to_do(world: World, fleet: Fleet) -> None:
    world.clock.advance(days=15)
    (line,) = warnings(fleet, world.clock.now())
    assert "controller.pem (broker_cert) ends on" in line and "phifleet trust issue-controller" in line
    world.clock.advance(days=30)
    assert " ended on " in warnings(fleet, world.clock.now())[0]
    found = json.loads(overview(world.registry, world.clock.now(), ending=[line]))
    assert found["attention"][0] == {"kind": "ends", "text": line}


def test_devices_that_have_not_renewed_are_told(world: World, fleet: Fleet) -> None:
    at = world.clock.now()
    for device, days in (("pi-1", 10), ("pi-2", 13), ("pi-3", 60)):
        facts = world.facts(device, certificate_expires_at=at + timedelta(days=days))
        Recorder(world.registry).record([Received(topic_of(facts, device), facts.to_json(), at)])
    (line,) = warnings(fleet, at)
    assert line.startswith("2 devices have not renewed their certificate, first pi-1, whose ends on")
    listed = describe_ends(fleet, at)["devices"]
    assert [one["device"] for one in listed] == ["pi-1", "pi-2"]
    text = Metrics(fleet, world.clock.now).render()[0].decode()
    assert "phifleet_devices_not_renewed 2.0" in text
    assert 'phifleet_end_timestamp_seconds{name="device_ca"}' in text
    world.registry.devices.revoke("pi-1", world.actor)
    assert [one["device"] for one in describe_ends(fleet, at)["devices"]] == ["pi-2"]


async def test_the_controller_logs_it(world: World, fleet: Fleet) -> None:
    world.clock.advance(days=15)
    refresh = Refresh(world.repository, fleet.ca, world.clock.now, fleet.settings.certificates)
    with capture_logs() as logs:
        await refresh._refresh()
    (entry,) = [one for one in logs if one["event"] == "certificate expires soon"]
    assert (entry["name"], entry["log_level"]) == ("broker_cert", "warning")


def test_a_file_that_is_no_certificate_is_somebody_elses_error(world: World, fleet: Fleet) -> None:
    (world.home.root.parent / "controller.pem").write_text("nonsense")
    assert "broker_cert" not in {end.name for end in fleet_ends(fleet)}


def test_where_there_is_no_trust_there_is_nothing_to_tell(tmp_path: Path, world: World) -> None:
    with Fleet(FleetSettings(home=tmp_path / "nothing", database=None)) as fleet:
        assert fleet_ends(fleet) == []
