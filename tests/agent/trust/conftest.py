"""A device and a fleet joined by a broker in memory: the real repository, server, fetcher and client."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import pytest

from agent.contract.bundle import Bundle
from agent.trust.client import TrustClient
from agent.trust.identity import Identity, enrol
from agent.trust.requests import RetryPolicy
from fleet.delivery.metadata import MetadataServer
from fleet.home import Home
from fleet.trust.keyring import Keyring
from fleet.trust.release import Release
from fleet.trust.repository import Repository
from tests.simulators.clock import FakeClock
from tests.simulators.link import Faults, MemoryBroker, MemoryLink
from tests.simulators.repository import DEVICE, make_repository

IMPATIENT = RetryPolicy(timeout_s=0.05, attempts=3, factor=1.0, grace_s=0.3, min_bytes_per_s=1e6)


class Source:
    """What the metadata server reads: the repository, and what an attacker puts before it."""

    def __init__(self, repository: Repository) -> None:
        self.repository = repository
        self.forged: dict[str, bytes | None] = {}

    def read(self, name: str) -> bytes | None:
        return self.forged[name] if name in self.forged else self.repository.read(name)


@dataclass
class World:
    folder: Path
    clock: FakeClock
    repository: Repository
    broker: MemoryBroker
    source: Source
    server: MetadataServer
    fleet_link: MemoryLink
    device_link: MemoryLink
    identity: Identity
    client: TrustClient
    retry_policy: RetryPolicy
    first_release: dict[str, bytes | None] = field(default_factory=dict)

    @property
    def home(self) -> Home:
        return Home(self.folder / "fleet")

    @property
    def keyring(self) -> Keyring:
        return Keyring(self.home.keys)

    @property
    def release(self) -> Release:
        return Release(self.home.tuf, self.keyring, self.clock.now)

    def strangers_home(self) -> Home:
        """Of a fleet that this device knows nothing of."""
        make_repository(self.folder / "strangers", self.clock)
        return Home(self.folder / "strangers")

    def clock_at(self, now: datetime) -> FakeClock:
        return FakeClock(now)

    def reboot(self, clock: FakeClock | None = None) -> TrustClient:
        """The agent starts again with what is on disk, and maybe with another time."""
        self.client = TrustClient(self.identity, self.device_link, clock or self.clock, self.retry_policy)
        return self.client

    async def stop_server(self) -> None:
        await self.server.stop()

    async def end_attack(self) -> None:
        """The broker and the controller are good again."""
        self.source.forged.clear()
        self.broker.intercept = lambda message: message
        self.device_link.restore()
        await self.server.stop()
        self.server = MetadataServer(self.fleet_link, self.source, group="secret")
        await self.server.start()

    def on_disk(self) -> dict[str, str]:
        """Every file of the trust store, by the hash of its bytes."""
        folder = self.identity.trust_folder
        return {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }


def make_bundle(repository: Repository, now: datetime, **changes: object) -> Bundle:
    fields = {
        "device": DEVICE,
        "profile": "demo",
        "broker": "mqtt://127.0.0.1:1883",
        "root": repository.root_bytes().decode(),
        "issued_at": now,
    }
    return Bundle.model_validate(fields | changes)


MakeWorld = Callable[..., Awaitable[World]]


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fleet as `phifleet init` leaves it, to be copied."""
    folder = tmp_path_factory.mktemp("template") / "fleet"
    make_repository(folder, FakeClock())
    return folder


@pytest.fixture
async def make_world(tmp_path: Path, template: Path) -> AsyncIterator[MakeWorld]:
    async with AsyncExitStack() as stack:

        async def make(faults: Faults | None = None, retry_policy: RetryPolicy = IMPATIENT) -> World:
            clock = FakeClock()
            shutil.copytree(template, tmp_path / "fleet")
            repository = Repository(Home(tmp_path / "fleet"), clock.now)
            identity = enrol(make_bundle(repository, clock.now()), tmp_path / "device")
            broker = MemoryBroker(faults)
            fleet_link = await stack.enter_async_context(broker.link("fleet"))
            device_link = await stack.enter_async_context(broker.link("device"))
            source = Source(repository)
            server = MetadataServer(fleet_link, source, group="secret")
            await server.start()
            client = TrustClient(identity, device_link, clock, retry_policy)
            world = World(
                tmp_path,
                clock,
                repository,
                broker,
                source,
                server,
                fleet_link,
                device_link,
                identity,
                client,
                retry_policy,
            )
            stack.push_async_callback(world.stop_server)
            return world

        yield make


@pytest.fixture
async def world(make_world: MakeWorld) -> World:
    return await make_world()
