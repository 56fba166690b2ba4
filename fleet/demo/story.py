"""A rollout that stops itself, on simulated devices: the controller, broker, database and gate are the real ones."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from agent.contract.base import sha256_hex
from agent.contract.manifest import (
    ArtifactFile,
    Chat,
    Manifest,
    MemoryNeed,
    ModelFacts,
    Precision,
    Quality,
    Target,
    Toolchain,
    artifact_digest,
)
from agent.link import LinkSettings
from fleet.core.rollout_spec import RolloutSpec, Wave
from fleet.core.rollouts import STATES, Rollout
from fleet.demo.processes import Process, free_port
from fleet.demo.simulator import Behaviour, SimulatedDevice, Simulation, Slow
from fleet.errors import FleetError
from fleet.home import Home
from fleet.operations.deploy import DeployOptions, deploy
from fleet.operations.fleet import Fleet
from fleet.operations.rollouts import start_rollout
from fleet.profiles_loader import load_profile
from fleet.registry import Actor
from fleet.registry.rollouts import read
from fleet.settings import FleetSettings
from fleet.trust.repository import Repository

#: The profile that the new variant is slow on, and the one that it is not.
SLOW_PROFILE, OTHER_PROFILE = "raspberry-pi-5", "iot-x86"
ROLLOUT = "autumn"
WAIT_S = 300.0


class StoryError(FleetError):
    """The story did not come to its end."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How the rollout ended, what the gate found, and how many devices serve what they served before."""

    rollout: Rollout
    findings: tuple[str, ...]
    devices: int
    on_the_old_model: int
    seconds: float


def tell(folder: Path, devices: int, slower: float, seed: int, say: Callable[[str], None]) -> Ended:
    """Enrol simulated devices, deploy a model to all, then roll out one that is slower on one of two profiles.

    Raises:
        StoryError: something did not happen in time.
        FleetError: a part cannot work; says which.
    """
    began = time.monotonic()
    with staged(folder, devices, slower, seed, say) as stage:
        fleet = stage.fleet
        start_rollout(fleet, ROLLOUT, canary_spec(stage.new), Actor("story", datetime.now(UTC)))
        stage.until(lambda: STATES[read(fleet.registry.rollouts.get(ROLLOUT)).state].final, "the rollout is over")
        row = fleet.registry.rollouts.get(ROLLOUT)
        found = tuple(one["text"] for one in (row.findings or {}).get("findings", []) if one["stops"])
        return Ended(read(row), found, devices, _serving(fleet, stage.old.digest), time.monotonic() - began)


@dataclass(frozen=True, slots=True)
class Stage:
    """A fleet whose devices all serve the old model and have been measured."""

    fleet: Fleet
    old: Manifest
    new: Manifest
    until: Callable[[Callable[[], bool], str], None]


@contextlib.contextmanager
def staged(
    folder: Path, devices: int, slower: float, seed: int, say: Callable[[str], None], api: str | None = None,
    before: Callable[[Fleet], None] | None = None,
) -> Iterator[Stage]:  # fmt: skip
    """Enrol simulated devices, and let all of them serve a model; ``api``: host and port of the controller's.

    ``before`` is called when the controller has begun and no device is there yet.

    Raises:
        StoryError: something did not happen in time.
        FleetError: a part cannot work; says which.
    """
    settings = FleetSettings(home=folder / "home", broker_port=free_port(), api=api)
    Repository(Home(settings.home)).init()
    old, new = (make_artifact(Home(settings.home), name) for name in ("phi-old", "phi-new"))
    with Fleet(settings) as fleet, _controller(settings, folder) as controller:
        if before is not None:
            before(fleet)
        names = _enrol(fleet, devices)
        behaviour = Behaviour(
            seed=seed,
            interval_s=4.0,
            slow=(Slow("phi-new", SLOW_PROFILE, slower),),
            machine={SLOW_PROFILE: "aarch64"},
        )
        drawn = [SimulatedDevice(name, profile, behaviour) for name, profile in names.items()]
        with simulated(settings, drawn):
            wait = _Wait(controller, say)
            wait.until(lambda: _connected(fleet, names) == devices, f"{devices} devices are connected")
            actor = Actor("story", datetime.now(UTC))
            rows = [row for row in fleet.registry.devices.all() if row.id in names]
            deploy(fleet, [old], rows, DeployOptions(probation_s=1.0), actor)
            wait.until(lambda: _serving(fleet, old.digest) == devices, f"all serve {old.id}")
            wait.until(lambda: _measured(fleet, names) == devices, "all have been measured")
            yield Stage(fleet, old, new, wait.until)


def canary_spec(new: Manifest) -> RolloutSpec:
    """Return the story's rollout: sixty devices first, and watched for twenty seconds."""
    waves = (Wave(devices=60), Wave(percent=25), Wave(percent=100))
    return RolloutSpec(selector="has profile", artifacts=(new.digest,), waves=waves, bake_s=20.0, probation_s=1.0)


@dataclass(frozen=True, slots=True)
class _Wait:
    controller: Process
    say: Callable[[str], None]

    def until(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + WAIT_S
        while not condition():
            self.controller.check()
            if time.monotonic() > end:
                raise StoryError(
                    f"waited {WAIT_S:.0f} s in vain until {what}; the controller's log:\n{self.controller.tail()}"
                )
            time.sleep(0.5)
        self.say(what)


@contextlib.contextmanager
def _controller(settings: FleetSettings, folder: Path) -> Iterator[Process]:
    environment = {"PHIFLEET_BROKER_PORT": str(settings.broker_port)}
    if settings.api is not None:
        environment["PHIFLEET_API"] = settings.api
    process = Process("controller", ["fleet", "--home", str(settings.home), "serve"], folder / "serve.log", environment)
    try:
        yield process
    finally:
        process.stop()


@contextlib.contextmanager
def simulated(settings: FleetSettings, devices: list[SimulatedDevice]) -> Iterator[None]:
    """The devices, on an event loop of a thread of their own."""
    loop, stop = asyncio.new_event_loop(), asyncio.Event()
    simulation = Simulation(LinkSettings(settings.broker_url, "simulator"), devices)

    async def run() -> None:
        while not stop.is_set():
            with contextlib.suppress(BaseExceptionGroup):  # the broker is not there yet
                await simulation.run(stop)
            await asyncio.sleep(0.2)

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),), daemon=True)
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(15)


def _enrol(fleet: Fleet, devices: int) -> dict[str, str]:
    names: dict[str, str] = {}
    for number in range(devices):
        profile = SLOW_PROFILE if number % 2 else OTHER_PROFILE
        name = f"sim-{number:04}"
        fleet.registry.devices.add(name, load_profile(profile), None, Actor("story", datetime.now(UTC)))
        names[name] = profile
    return names


def make_artifact(home: Home, name: str) -> Manifest:
    """Of a few bytes: simulated devices fetch none."""
    content = f"the weights of {name}".encode()
    digest = sha256_hex(content)
    files = (ArtifactFile(path="model.bin", size=len(content), sha256=digest, chunks=((len(content), digest),)),)
    identity = f"{name}-onnx_genai-int4-cpu-{digest[:12]}"
    manifest = Manifest(
        id=identity,
        digest=artifact_digest(identity, files),
        size=len(content),
        model=ModelFacts(
            name=name, architecture="Phi3ForCausalLM", parameters=1, source_digest=digest, max_context=4096
        ),
        toolchain=Toolchain.ONNX_GENAI,
        versions={},
        recipe={},
        precision=Precision.INT4,
        target=Target.CPU,
        profile=OTHER_PROFILE,
        context=4096,
        entry=".",
        memory=MemoryNeed(weights_bytes=len(content), kv_bytes_per_token=1, overhead_bytes=1),
        chat=Chat(template="{{ messages }}"),
        files=files,
        quality=Quality(
            kl_divergence=0.01, kl_divergence_p99=0.1, perplexity=8.0, perplexity_ratio=1.01, same_top_token=0.95,
            tokens=1000, evaluation="simulated",
        ),
    )  # fmt: skip
    folder = home.artifacts / manifest.id
    (folder / "files").mkdir(parents=True)
    (folder / "files" / "model.bin").write_bytes(content)
    (folder / "manifest.json").write_bytes(manifest.to_json())
    return manifest


def _connected(fleet: Fleet, names: dict[str, str]) -> int:
    return sum(row.online and row.facts is not None for row in fleet.registry.devices.all() if row.id in names)


def _serving(fleet: Fleet, digest: str) -> int:
    return sum((row.reported or {}).get("digest") == digest for row in fleet.registry.devices.all())


def _measured(fleet: Fleet, names: dict[str, str]) -> int:
    return sum(bool(row.health) for row in fleet.registry.devices.all() if row.id in names)
