"""Several processes do the same at the same moment: one of them does it, and the others hear that it is done."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from threading import Barrier
from typing import Any

import pytest
from sqlalchemy import delete

from agent.contract.messages import Presence
from fleet.core.rollout_spec import RolloutSpec
from fleet.core.rollouts import Rollout
from fleet.errors import UsageError
from fleet.registry import Actor, Received, Recorder, Registry, open_registry
from fleet.registry.models import OutboxRow
from fleet.registry.rows import put_in_outbox
from tests.fleet.world import World, topic_of
from tests.simulators.repository import make_manifest

PROCESSES = 4
ROUNDS = 8

#: Returns whether this process was the one that did it; ``round`` names a subject that nobody has used yet.
Act = Callable[[World, Registry, int, Actor], bool]


def _record(world: World, registry: Registry, number: int, actor: Actor) -> bool:
    registry.artifacts.record(make_manifest(f"weights {number}".encode()), actor)
    return True


def _withdraw(world: World, registry: Registry, number: int, actor: Actor) -> bool:
    return registry.artifacts.withdraw(f"{number:064x}", "because", actor)


def _reinstate(world: World, registry: Registry, number: int, actor: Actor) -> bool:
    return registry.artifacts.reinstate(f"{number:064x}", actor)


def _add(world: World, registry: Registry, number: int, actor: Actor) -> bool:
    try:
        registry.devices.add(f"pi-{number}", world.profile, None, actor)
    except UsageError as error:
        assert "is there already" in str(error)
        return False
    return True


def _create(world: World, registry: Registry, number: int, actor: Actor) -> bool:
    spec = RolloutSpec(selector="has profile", artifacts=(world.manifest.digest,))
    try:
        registry.rollouts.create(Rollout(id=f"rollout-{number}", spec=spec, entered_at=actor.at), actor)
    except UsageError as error:
        assert "is there already" in str(error)
        return False
    return True


def _revoke(world: World, registry: Registry, number: int, actor: Actor) -> bool:
    registry.devices.revoke(f"pi-{number}", actor)
    return True


def _said(world: World, registry: Registry, number: int, actor: Actor) -> bool:
    said: Any = Presence(device=f"pi-{number}", online=True, at=actor.at, agent_version="0.2.0")
    Recorder(registry).record([Received(topic_of(said, said.device), said.to_json(), actor.at)])
    return True


def _queue(world: World, registry: Registry, number: int, actor: Actor) -> bool:
    registry.record(lambda session: put_in_outbox(session, [f"pi-{number}", f"pi-{number + 1}"], actor.at))
    return True


#: By name: what must be there before, what all do at once, the audit's word for it, and whether one alone did it.
AT_ONCE: dict[str, tuple[Act | None, Act, str, bool]] = {
    "record an artifact": (None, _record, "artifact.publish", False),
    "withdraw an artifact": (None, _withdraw, "artifact.withdraw", True),
    "reinstate an artifact": (_withdraw, _reinstate, "artifact.reinstate", True),
    "add a device": (None, _add, "device.add", True),
    "revoke a device": (_add, _revoke, "device.revoke", False),
    "create a rollout": (None, _create, "rollout.create", True),
    "hear of a device": (_add, _said, "", False),
}


@pytest.mark.parametrize("name", AT_ONCE)
def test_what_many_do_at_once_is_done_once(world: World, url: str, name: str) -> None:
    before, act, action, one_alone = AT_ONCE[name]
    barrier = Barrier(PROCESSES)

    def process(_: int) -> list[bool]:
        with closing(open_registry(url)) as registry:
            done = []
            for number in range(ROUNDS):
                barrier.wait(30)
                done.append(act(world, registry, number, world.actor))
            return done

    for number in range(ROUNDS if before else 0):
        assert before
        before(world, world.registry, number, world.actor)
    with ThreadPoolExecutor(PROCESSES) as pool:
        drawn = list(pool.map(process, range(PROCESSES)))
    did_it = [sum(one[number] for one in drawn) for number in range(ROUNDS)]
    assert did_it == [1 if one_alone else PROCESSES] * ROUNDS
    if action:
        entries = [row for row in world.registry.audit.trail(limit=1000) if row.action == action]
        assert len(entries) == len({row.subject for row in entries}) == ROUNDS


def test_the_outbox_counts_each_that_puts_a_device_into_it(world: World, url: str) -> None:
    """An entry that is published and deleted between another's look and its update must not swallow that update."""
    world.add(*(f"pi-{number}" for number in range(ROUNDS + 1)))
    barrier = Barrier(PROCESSES)

    def process(which: int) -> None:
        with closing(open_registry(url)) as registry:
            for number in range(ROUNDS):
                barrier.wait(30)
                if which == 0:
                    registry.record(lambda session: session.execute(delete(OutboxRow)) and None)
                _queue(world, registry, number, world.actor)

    with ThreadPoolExecutor(PROCESSES) as pool:
        list(pool.map(process, range(PROCESSES)))
    left = {claim.device for claim in world.registry.outbox.claim("me", world.clock.now(), 100)}
    assert {f"pi-{ROUNDS - 1}", f"pi-{ROUNDS}"} <= left
