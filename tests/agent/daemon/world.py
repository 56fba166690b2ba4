"""A device of simulated parts: the daemon alone, or the whole agent around it."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from agent.contract import topics
from agent.contract.base import WireModel, sha256_hex
from agent.contract.manifest import ArtifactFile, Manifest, artifact_digest
from agent.contract.messages import ArtifactRef, Boot, Desired, Facts, Progress, State
from agent.core import deployment as core
from agent.core.supervision import RestartPolicy
from agent.daemon.agent import Agent, Body
from agent.daemon.deployer import Deployer
from agent.daemon.monitor import Monitor
from agent.daemon.reporter import Identity, Reporter
from agent.daemon.state import AgentState
from agent.daemon.steps import StepParts, Steps
from agent.platform import facts
from tests.contract.test_contract import MANIFEST
from tests.simulators.device import MemoryJournal, SimClock, SimHost, SimStore, SimTransfer, SimTrust
from tests.simulators.link import MemoryBroker, MemoryLink
from tests.waiting import until

BOOT = Boot(id="0123456789abcdef", number=1)

AT = datetime(2026, 11, 23, tzinfo=UTC)


def make_manifest(word: str) -> Manifest:
    data = word.encode()
    files = (ArtifactFile(path="w", size=len(data), sha256=sha256_hex(data), chunks=((len(data), sha256_hex(data)),)),)
    change = {"id": f"phi-{word}", "files": files, "digest": artifact_digest(f"phi-{word}", files), "size": len(data)}
    return MANIFEST.model_copy(update=change)


OLD, NEW, OTHER = make_manifest("old"), make_manifest("new"), make_manifest("other")


def ref(manifest: Manifest) -> ArtifactRef:
    return ArtifactRef(id=manifest.id, digest=manifest.digest)


def order(sequence: int, *manifests: Manifest, **more: object) -> bytes:
    fields: dict[str, object] = {
        "device": "pi-1", "sequence": sequence, "deployment": f"d{sequence}", "issued_at": AT,
        "expires_at": AT + timedelta(days=1), "artifacts": tuple(map(ref, manifests)), "probation_s": 0.05,
    }  # fmt: skip
    return Desired.model_validate(fields | more).to_json()


@dataclass
class Device:
    """A daemon with its parts; `boot` may be called again after `crash`."""

    trust: SimTrust = field(default_factory=lambda: SimTrust("pi-1", {each.digest: each for each in (OLD, NEW, OTHER)}))
    store: SimStore = field(default_factory=SimStore)
    host: SimHost = field(default_factory=SimHost)
    journal: MemoryJournal = field(default_factory=MemoryJournal)
    states: list[State] = field(default_factory=list)
    transfer: SimTransfer = field(init=False)
    deployer: Deployer = field(init=False)
    monitor: Monitor = field(init=False)
    state: AgentState = field(init=False)
    steps: Steps = field(init=False)
    progress: list[Progress] = field(default_factory=list)
    is_linked: bool = True
    #: Whether a stick is plugged in.
    at_hand: bool = False
    clock: SimClock = field(init=False)

    def linked(self) -> bool:
        return self.is_linked

    def __post_init__(self) -> None:
        self.transfer = SimTransfer(self.store)

    @asynccontextmanager
    async def boot(self) -> AsyncIterator[Device]:
        clock = self.clock = SimClock()
        self.monitor = Monitor(self.host, clock, lambda _, prompt: prompt, lambda: 0, look_every_s=0.02)
        parts = StepParts(
            self.trust,
            self.store,
            self.transfer,
            self.host,
            self.monitor,
            clock,
            lambda: 8 << 30,
            self.linked,
            (0.01,),
            at_hand=lambda: self.at_hand,
        )
        self.steps = Steps(parts, self.progress.append)
        self.state = AgentState()
        self.deployer = Deployer(self.steps, parts, self.journal, self.state, self._saw)
        task = asyncio.create_task(self.deployer.run())
        try:
            yield self
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _saw(self) -> None:
        self.states.append(self.state.deployment.state)

    async def until(self, wanted: Callable[[core.Deployment], bool]) -> core.Deployment:
        await until(lambda: wanted(self.deployer.deployment), timeout_s=10)
        return self.deployer.deployment

    async def settled(self, sequence: int) -> core.Deployment:
        return await self.until(lambda now: now.newest_sequence == sequence and not now.underway)

    async def deploys(self, sequence: int, *manifests: Manifest, **more: object) -> core.Deployment:
        self.deployer.orders.take(order(sequence, *manifests, **more))
        return await self.settled(sequence)


class AgentLink(MemoryLink):
    """A link that is started and closed, as the agent's."""

    started = False

    def on_connected(self, callback: Callable[[], None]) -> None:
        self._on_connected = callback

    async def start(self) -> None:
        self.started = True
        self._on_connected()

    async def close(self) -> None:  # type: ignore[override]
        super().close()


class SimServer:
    """An endpoint that is only there."""

    def __init__(self) -> None:
        self.running = False

    @property
    def url(self) -> str:
        return "http://127.0.0.1:8600"

    async def start(self) -> None:
        self.running = True

    async def stop(self) -> None:
        self.running = False


QUICK = RestartPolicy(window_s=300.0, first_s=0.01, max_s=0.02)


class WholeAgent:
    """All of the daemon around the parts of a ``Device``; ``body`` may be changed before ``run``."""

    def __init__(self, folder: Path, device: Device | None = None) -> None:
        self.folder = folder
        self.device = device or Device()
        self.broker = MemoryBroker()
        self.link = AgentLink(self.broker, "device")
        self.fleet = MemoryLink(self.broker, "fleet")
        clock = SimClock()
        self.state = AgentState()
        host = self.device.host
        monitor = Monitor(host, clock, lambda _, prompt: prompt, lambda: 0, look_every_s=0.02)
        self.reporter = Reporter(
            Identity("pi-1", "demo", "1", BOOT), self.state, self.link, clock, host.active, self.facts
        )
        parts = StepParts(
            self.device.trust,
            self.device.store,
            self.device.transfer,
            host,
            monitor,
            clock,
            lambda: 8 << 30,
            self.device.linked,
            (0.01,),
        )
        deployer = Deployer(
            Steps(parts, self.reporter.progress), parts, self.device.journal, self.state, self.reporter.report
        )
        self.body = Body(
            self.link,
            SimServer(),
            host,
            deployer,
            monitor,
            self.reporter,
            self.state,
            asyncio.Queue(),
            restarts=lambda: 0,
            state_dir=folder,
            health_interval_s=0.02,
            canary_interval_s=0.02,
            temperature_c=lambda: 42.0,
            throttled=lambda: False,
        )

    def facts(self, found: Any) -> Facts:
        return facts.collect("pi-1", "demo", "1", self.folder, found, AT)

    @asynccontextmanager
    async def run(self, **changes: Any) -> AsyncIterator[WholeAgent]:
        self.body = replace(self.body, **changes)
        stop = asyncio.Event()
        task = asyncio.create_task(Agent(self.body, QUICK).run(stop))
        try:
            yield self
        finally:
            stop.set()
            await task

    async def order(self, payload: bytes) -> None:
        signed = {"payload": "e30=", "payloadType": "x", "signatures": [{"keyid": "k", "sig": "s"}]}
        self.device.trust.payloads[json.dumps(signed | {"payload": payload.decode()}).encode()] = payload
        await self.fleet.publish(
            topics.desired("pi-1"), json.dumps(signed | {"payload": payload.decode()}).encode(), retain=True
        )

    async def settled(self, sequence: int) -> core.Deployment:
        def over() -> bool:
            return self.state.deployment.newest_sequence == sequence and not self.state.deployment.underway

        await until(over, f"order {sequence} to end")
        return self.state.deployment

    def published(self, topic: str, kind: type[WireModel]) -> list[Any]:
        return [kind.from_json(message.payload) for message in self.broker.published if message.topic == topic]

    async def ask(self, command: str) -> dict[str, Any]:
        """As the person at the device does."""
        await until((self.folder / "control.json").exists, "the control port to be there")
        where = json.loads((self.folder / "control.json").read_bytes())
        reader, writer = await asyncio.open_connection("127.0.0.1", where["port"], family=socket.AF_INET)
        writer.write(json.dumps({"token": where["token"], "command": command}).encode() + b"\n")
        answer: dict[str, Any] = json.loads(await reader.readline())
        writer.close()
        return answer
