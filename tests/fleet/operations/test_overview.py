"""The fleet at a glance, on both databases: each figure in its column, and what a person should look at."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from agent.contract.messages import HealthReport, State
from fleet.core.freshness import presence
from fleet.operations.overview import LISTED, overview
from fleet.operations.views import confirmed, summarize
from fleet.registry import Received, Recorder
from tests.fleet.registry.conftest import fresh_postgresql, postgresql, url
from tests.fleet.world import World, controller_runs, make_world, topic_of

__all__ = ["fresh_postgresql", "postgresql", "url"]  # fixtures


@pytest.fixture
def world(url: str, tmp_path: Path) -> Iterator[World]:
    made = make_world(tmp_path / "home", url)
    yield made
    made.registry.close()


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
    shown = overview(world.registry, world.clock.now())
    assert shown["devices"] == ["pi-1", "pi-2"]
    assert (shown["tpot_ms"], shown["ttft_ms"], shown["tokens_per_s"]) == ([12.5, None], [100.0, None], [80.0, None])
    assert [shown["states"][place] for place in shown["state"]] == ["committed", "none"]
    assert [shown["artifacts"][place] for place in shown["artifact"]] == [order.artifact, ""]
    assert (shown["presence"], shown["stale"][0], shown["attention"]) == (["online", "offline"], False, [])
    assert overview(world.registry, world.clock.now(), ["pi-2"])["devices"] == ["pi-2"]


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
    found = {entry["device"]: entry for entry in overview(world.registry, world.clock.now())["attention"]}
    assert found["cut"]["kind"] == "offline"
    assert found["failed"]["text"] == f"failed failed with {failed.artifact}: it cannot be read"
    assert found["held"]["text"].startswith("held holds its order back")
    assert found["silent"]["kind"] == "silent" and found["silent"]["age_s"] == 3600


def test_a_long_list_is_counted_and_cut(world: World):
    world.add(*(f"pi-{number:03}" for number in range(LISTED + 5)))
    orders = world.deploy(*(f"pi-{number:03}" for number in range(LISTED + 5)))
    say(world, *(world.reported(order, State.ROLLED_BACK) for order in orders))
    shown = overview(world.registry, world.clock.now())
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
    assert overview(world.registry, now)["presence"] == [expected]
    assert summarize(world.registry, now)["by_presence"] == {expected: 1}
