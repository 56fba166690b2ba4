"""`phifleet rollout` and labels, as an operator types them."""

from __future__ import annotations

import json

import pytest

from fleet.core.rollout_events import Stopped
from tests.fleet.cli.conftest import Phifleet
from tests.fleet.world import PROFILE, World


@pytest.fixture
def fleet_of_three(phifleet: Phifleet, world: World) -> Phifleet:
    world.add("pi-1", "pi-2", "pi-3")
    return phifleet


def test_a_rollout_from_plan_to_abort(fleet_of_three: Phifleet, world: World):
    phifleet, artifact = fleet_of_three, world.manifest.id
    selected = ("--selector", f"profile={PROFILE}", "--waves", "1,100%")
    plan = phifleet("rollout", "plan", artifact, *selected)
    assert plan.code == 0
    assert f"{PROFILE}, {artifact}" in plan.out and "none: too few devices" in plan.out
    found = json.loads(phifleet("rollout", "plan", artifact, *selected, "--json").out)
    assert (found["devices"], [wave["wave"] for wave in found["waves"]]) == (3, ["1", "100%"])
    started = phifleet("rollout", "start", artifact, *selected, "--name", "autumn")
    assert started.code == 0 and "phifleet rollout watch autumn" in started.out
    assert phifleet("rollout", "pause", "autumn").out == "rollout autumn is paused\n"
    assert phifleet("rollout", "resume", "autumn").out == "rollout autumn is opening\n"
    listed = phifleet("rollout", "list").out
    assert "autumn" in listed and "1 of 2" in listed
    status = json.loads(phifleet("rollout", "status", "autumn", "--json").out)
    assert (status["state"], status["wave"], status["waves"]) == ("opening", 1, ["1", "100%"])
    assert "opening, wave 1 of 2" in phifleet("rollout", "status", "autumn").out
    assert "no device has been compared yet" in phifleet("rollout", "explain", "autumn").out
    aborted = phifleet("rollout", "abort", "autumn", "--keep", "--reason", "the wrong one")
    assert aborted.out == "rollout autumn is stopping\n"
    trail = json.loads(phifleet("audit", "list", "--json").out)
    assert [entry["action"] for entry in trail if entry["subject"] == "autumn"][:2] == [
        "rollout.abort",
        "rollout.state",
    ]
    assert json.loads(phifleet("rollout", "list", "--json").out)[0]["reason"] == "the wrong one"


def test_why_it_stopped_is_printed_and_as_json(fleet_of_three: Phifleet, world: World):
    phifleet = fleet_of_three
    phifleet("rollout", "start", world.manifest.id, "--selector", "name=pi-1", "--name", "r")
    world.registry.rollouts.note_findings(
        "r", {"stop": True, "findings": [{"stops": True, "text": "17 of 18 devices are slower"}]}
    )
    world.registry.rollouts.apply("r", Stopped(reason="17 of 18 devices are slower"), world.actor)
    explained = phifleet("rollout", "explain", "r").out
    assert "r is stopping: 17 of 18 devices are slower" in explained and "stops  17 of 18" in explained
    assert json.loads(phifleet("rollout", "explain", "r", "--json").out)["stop"] is True


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--selector", "profil=x"), "no attribute is named profil; did you mean profile?\n  profil=x\n  ^"),
        (("--selector", "name=nobody"), "no device is meant by 'name=nobody'"),
        (("--selector", "name=pi-1", "--waves", "60%,60%"), "this rollout cannot be: the waves take 120%"),
        (("--selector", "name=pi-1", "--waves", "x%"), "--waves: 'x%' is no percentage"),
        (("--selector", "name=pi-1", "--waves", "0"), "this rollout cannot be: devices: "),
        (("--selector", "name=pi-1", "--waves", "1,nmae=x"), "no attribute is named nmae; did you mean name?"),
        (("--selector", "name=pi-1", "--name", "Autumn Leaves"), "--name 'Autumn Leaves': lower case letters"),
    ],
)
def test_what_cannot_be_started_is_said_and_nothing_is_recorded(
    fleet_of_three: Phifleet, world: World, arguments: tuple[str, ...], words: str
):
    result = fleet_of_three("rollout", "start", world.manifest.id, *arguments)
    assert result.code == 2 and words in result.err
    assert world.registry.rollouts.all() == []
    assert world.repository.published() == ()


def test_what_is_not_possible_now_is_said(fleet_of_three: Phifleet, world: World):
    phifleet = fleet_of_three
    phifleet("rollout", "start", world.manifest.id, "--selector", "name=pi-1", "--name", "r")
    result = phifleet("rollout", "approve", "r")
    assert result.code == 2 and "rollout r is opening: it cannot be approved now" in result.err
    result = phifleet("rollout", "status", "s")
    assert result.code == 2 and "no rollout is named s; there are: r" in result.err
    result = phifleet("rollout", "start", world.manifest.id, "--selector", "name=pi-2", "--name", "r")
    assert result.code == 2 and "rollout r is there already" in result.err


def test_labels_are_set_removed_and_selected(fleet_of_three: Phifleet, world: World):
    phifleet = fleet_of_three
    assert phifleet("device", "label", "pi-1", "site=rue 4", "rack=a").out == "pi-1: rack=a, site=rue 4\n"
    assert phifleet("device", "label", "pi-1", "rack-").out == "pi-1: site=rue 4\n"
    listed = json.loads(phifleet("device", "list", "--selector", 'label.site="rue 4"', "--json").out)
    assert [row["device"] for row in listed] == ["pi-1"]
    assert listed[0]["labels"] == {"site": "rue 4"}
    for wrong, words in (("Site=x", "lower case letters"), ("site", "write NAME=VALUE"), ("a=\x1b", "printable")):
        result = phifleet("device", "label", "pi-1", wrong)
        assert result.code == 2 and words in result.err
    assert world.registry.devices.get("pi-1").labels == {"site": "rue 4"}
