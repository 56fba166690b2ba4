"""Rollouts over simulated devices: the real database, core and roller; only the model's speed is drawn."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from agent.contract.failures import FailureCode
from agent.contract.manifest import MemoryNeed
from agent.contract.messages import Failure, HealthReport, Presence, Reported, State
from agent.contract.windows import DAYS
from fleet.core.evidence import Gate
from fleet.core.rollout_events import AbortAsked, Approved, PauseAsked, ResumeAsked
from fleet.core.rollout_spec import RolloutSpec, Wave
from fleet.core.rollouts import State as RolloutState
from fleet.errors import UsageError
from fleet.operations.fleet import Fleet
from fleet.operations.rollout_views import describe_rollout
from fleet.operations.rollouts import Roller, control_rollout, plan_rollout, start_rollout
from fleet.registry import Received, Recorder
from fleet.registry.rollouts import DeviceStage, read
from fleet.settings import FleetSettings
from tests.fleet.registry.conftest import fresh_postgresql, postgresql, url
from tests.fleet.world import PROFILE, World, make_world, put_artifact, topic_of

__all__ = ["fresh_postgresql", "postgresql", "url"]  # fixtures


@dataclass
class Devices:
    """Devices that do what they are ordered, at a speed that depends on what they serve."""

    world: World
    names: list[str]
    slow: dict[str, float] = field(default_factory=dict)
    offline: set[str] = field(default_factory=set)
    failing: set[str] = field(default_factory=set)
    serves: dict[str, str | None] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    draw: random.Random = field(default_factory=lambda: random.Random(1))

    def __post_init__(self) -> None:
        self.world.add(*self.names)
        self.recorder = Recorder(self.world.registry)
        self.base = {name: self.draw.uniform(10, 60) for name in self.names}
        self.say(*(self.world.presence(name) for name in self.names))

    def say(self, *messages: Any) -> None:
        now = self.world.clock.now()
        self.recorder.record([Received(topic_of(one, one.device), one.to_json(), now) for one in messages])

    def obey(self) -> None:
        """Take up each order that is new, and report on it."""
        said: list[Any] = []
        for name, row in self.world.registry.deployments.newest().items():
            if name in self.offline or row.id in self.done:
                continue
            self.done.add(row.id)
            if name in self.failing and row.rollout is not None:
                failure = Failure(code=FailureCode.PROBE_FAILED, message="said London")
                said.append(self.reported(name, row, State.FAILED, failure=failure))
                continue
            self.serves[name] = row.digest
            said.append(self.reported(name, row, State.COMMITTED))
        self.say(*said)

    def reported(self, name: str, row: Any, state: State, **more: Any) -> Reported:
        fields = {"device": name, "sequence": row.sequence, "deployment": row.id, "state": state}
        return Reported(**fields, at=self.world.clock.now(), digest=self.serves.get(name), **more)

    def measure(self) -> None:
        """A health report of each that is connected."""
        self.say(*(self.health(name) for name in self.names if name not in self.offline and self.serves.get(name)))

    def health(self, name: str) -> HealthReport:
        digest = self.serves[name] or ""
        tpot = self.base[name] * (1 + self.slow.get(digest, 0.0)) * self.draw.gauss(1, 0.03)
        at = self.world.clock.now()
        return HealthReport(
            device=name,
            at=at,
            window_s=60,
            digest=digest,
            requests=9,
            tpot_ms_p50=tpot,
            ttft_ms_p50=10 * self.base[name],
        )

    def connect(self, name: str, online: bool) -> None:
        (self.offline.discard if online else self.offline.add)(name)
        self.say(Presence(device=name, online=online, at=self.world.clock.now() if online else None))


@pytest.fixture
def world(url: str, tmp_path: Path) -> Iterator[World]:
    made = make_world(tmp_path / "home", url)
    yield made
    made.registry.close()


@dataclass
class Story:
    world: World
    fleet: Fleet
    roller: Roller
    devices: Devices
    new: str

    def start(self, **changes: Any) -> None:
        spec: dict[str, Any] = {
            "selector": f"profile={PROFILE}",
            "artifacts": (self.new,),
            "waves": (Wave(devices=20), Wave(percent=100)),
            "bake_s": 600.0,
            "gate": Gate(),
        }
        start_rollout(self.fleet, "r-1", RolloutSpec(**(spec | changes)), self.world.actor)

    @property
    def state(self) -> RolloutState:
        return read(self.world.registry.rollouts.get("r-1")).state

    def turn(self, times: int = 1, minutes: float = 1.0) -> None:
        """The controller moves, devices obey and measure, and time passes."""
        for _ in range(times):
            self.roller.step_all()
            self.devices.obey()
            self.world.clock.advance(minutes=minutes)
            self.devices.measure()

    def until(self, *states: RolloutState, turns: int = 200) -> None:
        for _ in range(turns):
            if self.state in states:
                return
            self.turn()
        pytest.fail(f"it is {self.state}, and not {' or '.join(states)}")

    def stages(self) -> dict[str, int]:
        rows = self.world.registry.rollouts.devices("r-1")
        return {stage.value: count for stage in DeviceStage if (count := sum(row.stage == stage for row in rows))}


@pytest.fixture
def story(world: World, url: str) -> Iterator[Story]:
    """Sixty devices that serve the first artifact, and a second one to change to."""
    devices = Devices(world, [f"pi-{number:02}" for number in range(60)])
    second = put_artifact(world.home, b"the second weights", id="sample-second")
    world.deploy(*devices.names)
    devices.obey()
    for _ in range(3):
        world.clock.advance(minutes=1)
        devices.measure()
    settings = FleetSettings(home=world.home.root, database=url)
    with Fleet(settings) as fleet:
        fleet.__dict__["repository"] = world.repository  # with the clock of the story
        yield Story(world, fleet, Roller(fleet, "me", world.clock.now), devices, second.digest)


def test_a_healthy_release_reaches_every_device_wave_by_wave(story: Story):
    story.start()
    story.turn(3)
    assert story.stages() == {"succeeded": 20}
    assert sum(digest == story.new for digest in story.devices.serves.values()) == 20
    story.until(RolloutState.COMPLETED)
    assert story.stages() == {"succeeded": 60}
    assert set(story.devices.serves.values()) == {story.new}


def test_devices_are_ordered_only_within_its_windows(story: Story):
    now = story.world.clock.now()
    begins = now + timedelta(hours=2)
    story.start(windows=(f"{DAYS[begins.weekday()]} {begins:%H:%M}-{begins + timedelta(hours=1):%H:%M} UTC",))
    story.turn(3)
    assert story.stages() == {"waiting": 20}
    shown = describe_rollout(story.world.registry.rollouts.get("r-1"), now)
    assert shown["opens_at"] == begins.replace(second=0, microsecond=0).isoformat()
    story.world.clock.advance(hours=2)
    story.turn(3)
    assert story.stages() == {"succeeded": 20}
    assert describe_rollout(story.world.registry.rollouts.get("r-1"), story.world.clock.now())["opens_at"] is None


def test_a_fifth_slower_stops_in_the_first_wave_and_every_device_goes_back_the_last_one_first(story: Story):
    story.devices.slow[story.new] = 0.2
    story.start()
    story.until(RolloutState.TAKEN_BACK)
    assert set(story.devices.serves.values()) == {story.world.manifest.digest}
    assert story.stages() == {"reverted": 20}
    row = story.world.registry.rollouts.get("r-1")
    reason = read(row).reason
    assert (
        f"{PROFILE}, sample-second: " in reason and "devices are over 5% slower per token than before; e = " in reason
    )
    trail = story.world.registry.audit.trail(1000)
    states = [(entry.details or {}).get("to") for entry in trail if entry.action == "rollout.state"]
    assert [state for state in reversed(states) if state != "baking"] == [
        "opening",
        "running",
        "stopping",
        "taking_back",
        "taken_back",
    ]
    assert story.world.registry.audit.broken() == []


def test_three_failures_among_the_first_stop_it_at_once(story: Story):
    story.devices.failing = set(story.devices.names)
    story.start(waves=(Wave(devices=5), Wave(percent=100)))
    story.until(RolloutState.TAKEN_BACK)
    assert "of the first 5" in read(story.world.registry.rollouts.get("r-1")).reason
    assert set(story.devices.serves.values()) == {story.world.manifest.digest}, "a failed order has changed nothing"


def test_devices_that_are_offline_hold_nothing_up_and_are_ordered_when_they_come_back(story: Story):
    away = story.devices.names[:5]
    for name in away:
        story.devices.connect(name, False)
    story.start(waves=(Wave(percent=100),), wave_deadline_s=3600.0)
    story.turn(3)
    assert story.stages() == {"waiting": 5, "succeeded": 55}
    story.devices.connect(away[0], True)
    story.turn(2)
    assert story.stages() == {"waiting": 4, "succeeded": 56}
    story.until(RolloutState.INCOMPLETE)


def test_devices_that_are_offline_when_it_stops_go_back_when_they_return(story: Story):
    story.devices.slow[story.new] = 0.5
    story.start()
    story.turn(2)
    away = [name for name, digest in story.devices.serves.items() if digest == story.new][:2]
    assert len(away) == 2
    for name in away:
        story.devices.connect(name, False)
    story.until(RolloutState.TAKING_BACK)
    story.turn(5)
    assert story.state is RolloutState.TAKING_BACK
    for name in away:
        story.devices.connect(name, True)
    story.until(RolloutState.TAKEN_BACK)
    assert set(story.devices.serves.values()) == {story.world.manifest.digest}


@pytest.mark.parametrize("dynamic", [True, False])
def test_devices_that_join_later_are_taken_by_a_dynamic_rollout(story: Story, dynamic: bool):
    late = story.devices.names[-3:]
    for name in late:
        story.world.registry.devices.label(name, {"ring": "late"}, story.world.actor)
    story.start(selector=f"profile={PROFILE} and label.ring!=late", dynamic=dynamic, gate=None, bake_s=300.0)
    story.until(RolloutState.BAKING)
    story.turn(6)  # the second wave is under way, or bakes
    story.world.registry.devices.label(late[0], {"ring": None}, story.world.actor)
    story.until(RolloutState.COMPLETED)
    taken = {row.device for row in story.world.registry.rollouts.devices("r-1")}
    assert (late[0] in taken) is dynamic
    assert late[1] not in taken
    assert (story.devices.serves[late[0]] == story.new) is dynamic


def test_a_person_pauses_approves_and_aborts(story: Story):
    story.start(approval=True, bake_s=60.0)
    story.until(RolloutState.APPROVING)
    story.turn(5)
    assert story.state is RolloutState.APPROVING
    control_rollout(story.fleet, "r-1", Approved(), story.world.actor)
    control_rollout(story.fleet, "r-1", PauseAsked(), story.world.actor)
    story.turn(3)
    assert sum(story.stages().values()) == 20, "a paused rollout chooses nobody"
    control_rollout(story.fleet, "r-1", ResumeAsked(), story.world.actor)
    story.turn(2)
    control_rollout(story.fleet, "r-1", AbortAsked(revert=True, reason="a wrong release"), story.world.actor)
    story.until(RolloutState.TAKEN_BACK)
    assert set(story.devices.serves.values()) == {story.world.manifest.digest}
    with pytest.raises(UsageError, match="rollout r-1 is taken back: it cannot be resumed now"):
        control_rollout(story.fleet, "r-1", ResumeAsked(), story.world.actor)


def test_concurrency_and_rate_are_kept(story: Story):
    story.start(waves=(Wave(percent=100),), concurrency=4, rate_per_minute=3.0)
    story.roller.step_all()
    assert len(story.world.registry.rollouts.devices("r-1", DeviceStage.ORDERED)) == 0, "the wave was chosen"
    for _ in range(4):
        story.roller.step_all()
    assert len(story.world.registry.rollouts.devices("r-1", DeviceStage.ORDERED)) == 3
    story.world.clock.advance(minutes=2)
    story.roller.step_all()
    assert len(story.world.registry.rollouts.devices("r-1", DeviceStage.ORDERED)) == 4


def test_a_controller_that_is_killed_at_any_step_repeats_nothing(story: Story, monkeypatch: pytest.MonkeyPatch):
    """Each call that the roller makes of the registry is its last one once; another roller goes on."""

    class Killed(Exception):  # noqa: N818 - it is no error of the program
        pass

    story.start(waves=(Wave(percent=100),), bake_s=60.0)
    calls = [
        "settle",
        "assign",
        "apply",
        "note_before",
        "figures_before",
        "counts",
        "note_findings",
        "evidence",
        "to_order",
    ]
    for name in calls:
        rollouts = story.fleet.registry.rollouts
        real = getattr(rollouts, name)

        def killed(*given: Any, real: Any = real, **more: Any) -> Any:
            real(*given, **more)
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(rollouts, name, killed)
            try:
                story.roller.step_all()
            except Killed:
                story.roller = Roller(story.fleet, "me", story.world.clock.now)
        story.turn()
    story.until(RolloutState.COMPLETED)
    ordered = [row.rollout for name in story.devices.names for row in story.world.registry.deployments.history(name)]
    assert ordered.count("r-1") == 60, "each device was ordered once"


def test_one_rollout_has_a_device_at_a_time_and_the_more_urgent_one_gets_it(story: Story):
    third = put_artifact(story.world.home, b"a third", id="sample-third")
    story.start(waves=(Wave(percent=100),), concurrency=1)
    story.turn(2)
    spec = RolloutSpec(selector="name in (pi-50, pi-51)", artifacts=(third.digest,))
    found = plan_rollout(story.fleet, spec)
    assert (found.devices, len(found.taken)) == (0, 2)
    with pytest.raises(UsageError, match=r"no device is meant by .*; 2 are in another rollout"):
        start_rollout(story.fleet, "r-2", spec, story.world.actor)
    start_rollout(story.fleet, "r-2", spec.model_copy(update={"priority": 90}), story.world.actor)
    story.turn(4)
    assert {story.devices.serves[name] for name in ("pi-50", "pi-51")} == {third.digest}
    rows = {row.device: row for row in story.world.registry.rollouts.devices("r-1")}
    assert rows["pi-50"].stage == "cancelled" and rows["pi-50"].reason == "rollout r-2 took it"


def test_devices_that_nothing_fits_are_named_before_the_start(story: Story):
    memory = MemoryNeed(weights_bytes=2**50, kv_bytes_per_token=1, overhead_bytes=1)
    huge = put_artifact(story.world.home, b"huge", id="sample-huge", memory=memory)
    spec = RolloutSpec(selector=f"profile={PROFILE}", artifacts=(huge.digest,))
    assert len(plan_rollout(story.fleet, spec).unfit) == 60
    with pytest.raises(UsageError, match=r"60 devices have no variant that fits:\n  pi-00: sample-huge: it takes"):
        start_rollout(story.fleet, "r-1", spec, story.world.actor)
    assert story.world.registry.rollouts.all() == []


def test_the_plan_says_what_each_wave_takes_and_what_it_can_show(story: Story):
    waves = (Wave(devices=5), Wave(selector="name=pi-0*"), Wave(percent=100))
    found = plan_rollout(story.fleet, RolloutSpec(selector="has profile", artifacts=(story.new,), waves=waves))
    assert [wave.devices for wave in found.waves] == [5, 5, 50] or found.devices == 60
    cohort = f"{PROFILE}, sample-second"
    assert found.waves[0].detectable[cohort] is None, "five devices show nothing"
    assert (found.waves[2].detectable[cohort] or 1) <= 0.2


def test_only_one_controller_moves_a_rollout(story: Story):
    story.start()
    assert story.world.registry.rollouts.claim("one", story.world.clock.now()) == ["r-1"]
    assert story.world.registry.rollouts.claim("two", story.world.clock.now()) == []
    later = story.world.clock.now() + timedelta(seconds=31)
    assert story.world.registry.rollouts.claim("two", later) == ["r-1"]
