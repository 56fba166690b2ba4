"""Devices by selector, on both databases: what the database narrows down is what the selector means."""

from __future__ import annotations

import pytest

from agent.contract.messages import State
from fleet.core.selectors import parse
from fleet.registry import Received, Recorder
from tests.fleet.world import World, topic_of


@pytest.fixture
def fleet_of_four(world: World) -> World:
    world.add("pi-1", "pi-2", "pi-3", "pi-4")
    devices = world.registry.devices
    devices.label("pi-1", {"site": "rue 4", "rack": "a"}, world.actor)
    devices.label("pi-2", {"site": "lyon"}, world.actor)
    devices.label("pi-2", {"site": None, "quote": 'it\'s "so"'}, world.actor)
    devices.revoke("pi-4", world.actor)
    (order,) = world.deploy("pi-1")
    said = [
        world.presence("pi-1"),
        world.facts("pi-1", machine="aarch64", memory_total_bytes=8 * 2**30),
        world.reported(order, State.COMMITTED, artifact=world.manifest.id),
        world.presence("pi-2", online=False),
    ]
    Recorder(world.registry).record([Received(topic_of(m, m.device), m.to_json(), world.clock.now()) for m in said])
    return world


@pytest.mark.parametrize(
    ("selector", "meant"),
    [
        ("has profile", ["pi-1", "pi-2", "pi-3"]),
        ('label.site="rue 4"', ["pi-1"]),
        ("label.site=lyon", []),
        ("has label.site", ["pi-1"]),
        ('label.quote="it\'s \\"so\\""', ["pi-2"]),
        ('label.site in (lyon, "rue 4") or name=pi-3', ["pi-1", "pi-3"]),
        ("label.rack!=a", ["pi-2", "pi-3"]),
        ("presence=online", ["pi-1"]),
        ("served=sample and state=committed", ["pi-1"]),
        ("served!=sample", ["pi-2", "pi-3"]),
        ("machine=aarch64 and memory_gib>=8", ["pi-1"]),
        ("name in (pi-2, pi-4)", ["pi-2"]),
        ("name=pi-*", ["pi-1", "pi-2", "pi-3"]),
        ("profile=other or agent>=0.1", ["pi-1", "pi-2"]),
        ("not (name=pi-1 or name=pi-2)", ["pi-3"]),
    ],
)
def test_those_that_are_meant_are_found_and_no_others(fleet_of_four: World, selector: str, meant: list[str]):
    assert [found.device for found in fleet_of_four.registry.inventory.select(parse(selector))] == meant


def test_what_a_device_serves_is_known_by_its_digest(fleet_of_four: World):
    (found,) = fleet_of_four.registry.inventory.select(parse("name=pi-1"))
    assert found.served == fleet_of_four.manifest.digest
    assert found.facts["artifact"] == fleet_of_four.manifest.id
