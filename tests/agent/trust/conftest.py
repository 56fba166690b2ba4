"""A device and a fleet joined by a broker in memory: the real repository, server, fetcher and client."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import pytest

from agent.contract.bundle import Bundle
from agent.trust.client import TrustClient
from agent.trust.identity import Identity, enrol
from agent.trust.requests import Patience
from fleet.delivery.metadata import MetadataServer
from fleet.trust.repository import Repository
from tests.simulators.clock import FakeClock
from tests.simulators.link import Faults, MemoryBroker, MemoryLink
from tests.simulators.repository import DEVICE, make_repository

IMPATIENT = Patience(timeout_s=0.05, attempts=3, factor=1.0, grace_s=0.3, min_bytes_per_s=1e6)


class Source:
    """What the metadata server reads: the repository, and what an attacker puts before it."""

    def __init__(self, repository: Repository) -> None:
        self.repository = repository
        self.forged: dict[str, bytes | None] = {}
        self.served: list[str] = []

    def read(self, name: str) -> bytes | None:
        self.served.append(name)
        return self.forged[name] if name in self.forged else self.repository.read(name)


@dataclass
class World:
    folder: Path
    clock: FakeClock
    repository: Repository
    broker: MemoryBroker
    source: Source
    server: MetadataServer
    device_link: MemoryLink
    identity: Identity
    client: TrustClient
    patience: Patience = field(default_factory=lambda: IMPATIENT)

    def reboot(self, clock: FakeClock | None = None) -> TrustClient:
        """The agent starts again with what is on disk, and maybe with another time."""
        self.client = TrustClient(self.identity, self.device_link, clock or self.clock, self.patience)
        return self.client

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


MakeWorld = Callable[..., "AsyncIterator[World]"]


@pytest.fixture
async def make_world(tmp_path: Path) -> AsyncIterator[Callable[..., object]]:
    async with AsyncExitStack() as stack:

        async def make(faults: Faults | None = None, patience: Patience = IMPATIENT) -> World:
            clock = FakeClock()
            repository = make_repository(tmp_path / "fleet", clock)
            identity = enrol(make_bundle(repository, clock.now()), tmp_path / "device")
            broker = MemoryBroker(faults)
            fleet_link = await stack.enter_async_context(broker.link("fleet"))
            device_link = await stack.enter_async_context(broker.link("device"))
            source = Source(repository)
            server = MetadataServer(fleet_link, source)
            await server.start()
            stack.push_async_callback(server.stop)
            client = TrustClient(identity, device_link, clock, patience)
            return World(
                tmp_path, clock, repository, broker, source, server, device_link, identity, client, patience
            )

        yield make


@pytest.fixture
async def world(make_world: Callable[..., object]) -> World:
    return await make_world()  # type: ignore[misc, no-any-return] # a coroutine; pytest's fixtures are not typed
