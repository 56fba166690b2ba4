"""A controller's world in a folder: a home with a repository, a registry, an artifact, and devices to order about."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from agent.contract import topics
from agent.contract.base import WireModel
from agent.contract.manifest import Manifest, Quality
from agent.contract.messages import Desired, Facts, Presence, Reported, State
from agent.contract.profile import DeviceProfile
from fleet.home import Home
from fleet.profiles_loader import load_profile
from fleet.registry import Actor, Registry, open_registry
from fleet.registry.controllers import Heartbeat
from fleet.registry.models import DeploymentRow
from fleet.trust.repository import Repository
from tests.simulators.clock import FakeClock
from tests.simulators.repository import make_desired, make_manifest, make_repository, ref

PROFILE = "iot-x86"
#: Within the gate of any profile.
QUALITY = Quality(
    kl_divergence=0.01, kl_divergence_p99=0.1, perplexity=8.0, perplexity_ratio=1.01, same_top_token=0.95, tokens=1000,
    evaluation="test",
)  # fmt: skip


def put_artifact(home: Home, content: bytes = b"weights", **changes: Any) -> Manifest:
    """As `phifleet build` leaves one."""
    manifest = make_manifest(content, **({"quality": QUALITY} | changes))
    folder = home.artifacts / manifest.id
    (folder / "files").mkdir(parents=True)
    (folder / "files" / "model.bin").write_bytes(content)
    (folder / "manifest.json").write_bytes(manifest.to_json())
    return manifest


@dataclass
class World:
    home: Home
    clock: FakeClock
    repository: Repository
    registry: Registry
    manifest: Manifest
    profile: DeviceProfile

    @property
    def actor(self) -> Actor:
        return Actor("tester", self.clock.now())

    def add(self, *devices: str) -> None:
        for device in devices:
            self.registry.devices.add(device, self.profile, None, self.actor)

    def deploy(self, *devices: str, **changes: Any) -> list[DeploymentRow]:
        self.repository.publish(self.manifest)
        self.registry.artifacts.record(self.manifest, self.actor)

        def draft(device: str, sequence: int, deployment: str) -> Desired:
            named = {"device": device, "sequence": sequence, "deployment": deployment}
            return make_desired(self.clock, ref(self.manifest), **(named | changes))

        return self.registry.deployments.create(devices, draft, self.repository.sign_desired, self.actor)

    def reported(self, order: DeploymentRow, state: State, **fields: Any) -> Reported:
        named: dict[str, Any] = {"device": order.device, "sequence": order.sequence, "deployment": order.id}
        if state is State.COMMITTED:
            named["digest"] = order.digest
        return Reported(state=state, at=self.clock.now(), **(named | fields))

    def presence(self, device: str, online: bool = True) -> Presence:
        return Presence(device=device, online=online, at=self.clock.now() if online else None, agent_version="0.1.0")

    def facts(self, device: str, **changes: Any) -> Facts:
        fields: dict[str, Any] = {
            "device": device,
            "profile": PROFILE,
            "agent_version": "0.1.0",
            "system": "Linux",
            "machine": "x86_64",
            "cpu": "x",
            "cpu_count": 2,
            "memory_total_bytes": 64 * 1024**3,
            "memory_available_bytes": 32 * 1024**3,
            "disk_free_bytes": 64 * 1024**3,
            "at": self.clock.now(),
        }
        return Facts(**(fields | changes))


_LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)


def controller_runs(world: World, seen_at: datetime | None = None, since: datetime = _LONG_AGO) -> None:
    """As a controller says that it is alive, and has been connected to the broker ``since`` then."""
    beat = Heartbeat(
        id="controller-1",
        host="here",
        pid=1,
        version="0.2.0",
        started_at=world.clock.now(),
        interval_s=5.0,
        broker="mqtt://127.0.0.1:1",
        connected_since=since,
        broker_error=None,
    )
    world.registry.controllers.beat(beat, seen_at or datetime.now(UTC))


def topic_of(message: WireModel, device: str) -> str:
    leaf = {"Presence": topics.presence, "Facts": topics.facts, "Reported": topics.reported}
    return leaf.get(type(message).__name__, topics.health)(device)


def make_world(folder: Path, url: str | None = None, clock: FakeClock | None = None) -> World:
    clock, home = clock or FakeClock(), Home(folder)
    repository = make_repository(folder, clock)
    registry = open_registry(url or f"sqlite:///{home.database}")
    return World(home, clock, repository, registry, put_artifact(home), load_profile(PROFILE))
