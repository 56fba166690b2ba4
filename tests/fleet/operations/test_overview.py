"""The fleet at a glance, on both databases: each figure in its column, and what a person should look at."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from agent.contract.messages import HealthReport, State
from fleet.api.client import LocalClient
from fleet.core.freshness import age_s, is_stale, presence
from fleet.operations import overview as operation
from fleet.operations.fleet import Fleet
from fleet.operations.overview import LISTED
from fleet.operations.views import confirmed, summarize
from fleet.registry import Received, Recorder
from fleet.registry.models import DeviceRow
from fleet.registry.rows import MANY
from fleet.settings import FleetSettings
from tests.fleet.registry.conftest import fresh_postgresql, postgresql, url
from tests.fleet.world import World, controller_runs, make_world, topic_of

__all__ = ["fresh_postgresql", "postgresql", "url"]  # fixtures


@pytest.fixture
def world(url: str, tmp_path: Path) -> Iterator[World]:
    made = make_world(tmp_path / "home", url)
    yield made
    made.registry.close()


def overview(world: World, names: Sequence[str] | None = None) -> Any:
    return json.loads(operation.overview(world.registry, world.clock.now(), names))


def say(world: World, *messages: Any) -> None:
    Recorder(world.registry).record([Received(topic_of(m, m.device), m.to_json(), world.clock.now()) for m in messages])


def health(world: World, device: str, **figures: Any) -> HealthReport:
    return HealthReport(device=device, at=world.clock.now(), window_s=30, requests=5, **figures)


def test_each_figure_is_in_its_column(world: World):
    world.add("pi-1", "pi-2")
    (order,) = world.deploy("pi-1")
    controller_runs(world)
    said = world.reported(order, State.COMMITTED, artifact=order.artifact)
    figures = health(world, "pi-1", tpot_ms_p50=12.5, ttft_ms_p50=100.0, tokens_per_s=80.0)
    say(world, world.presence("pi-1"), said, figures)
    shown = overview(world)
    assert shown["devices"] == ["pi-1", "pi-2"]
    assert (shown["tpot_ms"], shown["ttft_ms"], shown["tokens_per_s"]) == ([12.5, None], [100.0, None], [80.0, None])
    assert [shown["states"][place] for place in shown["state"]] == ["committed", "none"]
    assert [shown["artifacts"][place] for place in shown["artifact"]] == [order.artifact, ""]
    assert (shown["presence"], shown["stale"][0], shown["attention"]) == (["online", "offline"], False, [])
    assert overview(world, ["pi-2"])["devices"] == ["pi-2"]


def test_what_is_wrong_is_said_once_a_device(world: World):
    world.add("cut", "failed", "held", "silent")
    failed, held = world.deploy("failed", "held")
    controller_runs(world)
    failure = {"code": "runtime.load", "message": "it cannot be read"}
    say(
        world, world.presence("cut"), world.presence("failed"), world.presence("held"), world.presence("silent"),
        world.reported(failed, State.FAILED, failure=failure), health(world, "silent", tpot_ms_p50=1.0),
        world.reported(held, State.IDLE, paused=True, sequence=0, deployment=""),
    )  # fmt: skip
    world.clock.advance(hours=1)
    controller_runs(world)
    say(world, world.presence("cut", online=False), world.presence("silent"), world.presence("failed"))
    found = {entry["device"]: entry for entry in overview(world)["attention"]}
    assert found["cut"]["kind"] == "offline"
    assert found["failed"]["text"] == f"failed failed with {failed.artifact}: it cannot be read"
    assert found["held"]["text"].startswith("held holds its order back")
    assert found["silent"]["kind"] == "silent" and found["silent"]["age_s"] == 3600


def test_a_long_list_is_counted_and_cut(world: World):
    world.add(*(f"pi-{number:03}" for number in range(LISTED + 5)))
    orders = world.deploy(*(f"pi-{number:03}" for number in range(LISTED + 5)))
    say(world, *(world.reported(order, State.ROLLED_BACK) for order in orders))
    shown = overview(world)
    assert (len(shown["attention"]), shown["attention_count"]) == (LISTED, LISTED + 5)
    assert "was rolled back" in shown["attention"][0]["text"]


@pytest.mark.parametrize("said", [None, True, False], ids=["never heard of", "online", "offline"])
@pytest.mark.parametrize("connected", [None, 3600.0, 5.0, -60.0], ids=["no controller", "long", "grace", "since"])
def test_the_database_and_the_rule_agree_on_presence(world: World, said: bool | None, connected: float | None):
    world.add("pi-1")
    if said is not None:
        say(world, world.presence("pi-1", online=said))
    if connected is not None:
        controller_runs(world, since=world.clock.now() - timedelta(seconds=connected))
        world.clock.advance(seconds=1)
    now = world.clock.now()
    row = world.registry.devices.get("pi-1")
    assert row is not None
    expected = presence(row.online, row.presence_received_at, confirmed(world.registry, now))
    assert overview(world)["presence"] == [expected]
    assert summarize(world.registry, now)["by_presence"] == {expected: 1}


def test_the_database_and_the_rule_agree_on_how_old_a_report_is(world: World):
    now, intervals = world.clock.now(), (None, 0.0, 0.04, 10.0, 3600.0)
    ages = (None, -90.0, 0.0, 0.119, 0.121, 29.9, 30.1, 10799.9, 10800.1, 1e8)
    cases = {f"pi-{at}-{every}": (at, every) for at, _ in enumerate(ages) for every, _ in enumerate(intervals)}
    world.add(*cases)
    received = {
        name: None if ages[at] is None else now - timedelta(seconds=ages[at]) for name, (at, _) in cases.items()
    }
    for name, (_, every) in cases.items():
        values = {"health_at": received[name], "health_interval_s": intervals[every]}
        change = update(DeviceRow).where(DeviceRow.id == name).values(values)
        world.registry.record(lambda session, change=change: session.execute(change) and None)
    shown = overview(world)
    assert shown["devices"] == sorted(cases)
    for place, name in enumerate(shown["devices"]):
        age, interval = age_s(received[name], now), intervals[cases[name][1]]
        assert shown["stale"][place] is is_stale(received[name], interval, now), name
        assert shown["health_age_s"][place] == (age if age is None else pytest.approx(age, abs=0.11)), name


def test_some_of_many_devices_are_shown_in_order(world: World):
    names = [f"pi-{number:04}" for number in range(2 * MANY + 1)]
    world.add(*names)
    world.registry.record(
        lambda session: session.execute(update(DeviceRow).values(cloned_at=world.clock.now())) and None
    )
    shown = overview(world, [*reversed(names[1:]), "nobody"])
    assert shown["devices"] == names[1:]
    assert {len(values) for values in shown.values() if isinstance(values, list)} >= {2 * MANY}
    assert [entry["device"] for entry in shown["attention"]] == names[1 : LISTED + 1]
    assert overview(world, [])["devices"] == overview(world, ["nobody"])["stale"] == []


def test_what_devices_write_is_shown_as_they_wrote_it(world: World):
    world.add("pi-1")
    controller_runs(world)
    hostile = 'a"],[null,\\u0000\\n<é>0,1'
    health = {"tpot_ms_p50": 1e300, "ttft_ms_p50": 1e-300, "tokens_per_s": None}
    values = {"reported": {"artifact": hostile, "paused": None}, "health": health, "profile": hostile}
    world.registry.record(lambda session: session.execute(update(DeviceRow).values(values)) and None)
    shown = overview(world)
    assert (shown["artifacts"], shown["profiles"], shown["artifact"]) == ([hostile], [hostile], [0])
    assert (shown["tpot_ms"], shown["ttft_ms"], shown["tokens_per_s"]) == ([pytest.approx(1e300)], [0.0], [None])


def test_a_command_on_the_controller_reads_what_the_api_answers(world: World, url: str):
    world.add("pi-1")
    with Fleet(FleetSettings(home=world.home.root, database=url)) as fleet:
        answer = LocalClient(fleet, world.actor).call("GET", "/overview")
    assert answer["devices"] == ["pi-1"]
