"""What the agent tells the fleet: presence, facts, reported state and health. It never waits for the broker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from agent.contract import topics
from agent.contract.base import WireModel
from agent.contract.messages import ArtifactRef, Facts, Failure, HealthReport, Presence, Progress, Reported, RuntimeFact
from agent.core.deployment import Deployment
from agent.core.inference import ModelInfo
from agent.core.ports import Clock, Link
from agent.daemon.monitor import Monitor
from agent.errors import LinkError

log = structlog.get_logger()

#: Progress is told at most this often; every change of state is told at once.
PROGRESS_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Identity:
    """Who reports."""

    device: str
    profile: str
    version: str


class Reporter:
    """Publishes; the newest value of each retained topic wins."""

    def __init__(
        self,
        identity: Identity,
        link: Link,
        clock: Clock,
        active: Callable[[], ModelInfo | None],
        collect_facts: Callable[[Sequence[RuntimeFact]], Facts],
    ) -> None:
        self.identity = identity
        self._link = link
        self._clock = clock
        self._active = active
        self._collect_facts = collect_facts
        self._pending: dict[str, tuple[WireModel, int, bool]] = {}
        self._wake = asyncio.Event()
        self._progress: Progress | None = None
        self._progress_told = 0.0
        self._deployment = Deployment()
        self.paused: Callable[[], bool] = lambda: False
        self.rejected: Callable[[], Failure | None] = lambda: None
        self.endpoint: str | None = None
        self.malformed = 0

    async def run(self) -> None:
        """Send what is pending, until cancelled; what cannot be sent now is sent when the broker is back."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            await self._drain()

    async def _drain(self) -> None:
        while self._pending:
            topic, (message, qos, retain) = next(iter(self._pending.items()))
            del self._pending[topic]
            try:
                await self._link.publish(topic, message.to_json(), qos=qos, retain=retain)
            except LinkError as error:
                log.debug("not published", topic=topic, error=str(error))
                if retain:
                    self._pending.setdefault(topic, (message, qos, retain))
                return

    def _put(self, topic: str, message: WireModel, *, qos: int = 1, retain: bool = True) -> None:
        self._pending[topic] = (message, qos, retain)
        self._wake.set()

    def connected(self) -> None:
        """The broker is there (again): say that we are too, and what was kept."""
        self._put(topics.presence(self.identity.device), self.presence(online=True))
        self.deployment(self._deployment)

    def presence(self, *, online: bool) -> Presence:
        """The message; offline is what the will says."""
        at = self._clock.now() if online else None
        return Presence(device=self.identity.device, online=online, at=at, agent_version=self.identity.version)

    async def goodbye(self) -> None:
        """Offline, said in person."""
        topic = topics.presence(self.identity.device)
        try:
            await asyncio.wait_for(self._link.publish(topic, self.presence(online=False).to_json(), retain=True), 2.0)
        except (LinkError, TimeoutError):
            log.debug("left without a word; the will says it")

    def facts(self, runtimes: Sequence[RuntimeFact]) -> None:
        """What the device is."""
        self._put(topics.facts(self.identity.device), self._collect_facts(runtimes))

    def progress(self, progress: Progress) -> None:
        """Of the transfer; told now and then."""
        self._progress = progress
        now = self._clock.monotonic()
        if now - self._progress_told >= PROGRESS_EVERY_S or progress.chunks_done == progress.chunks_total:
            self._progress_told = now
            self.deployment(self._deployment)

    def deployment(self, deployment: Deployment) -> None:
        """Where the deployment stands."""
        if deployment.newest_sequence != self._deployment.newest_sequence:
            self._progress = None
        self._deployment = deployment
        self._put(topics.reported(self.identity.device), self.reported())

    def tell(self) -> None:
        """Where the deployment stands, once more: something beside it changed."""
        self.deployment(self._deployment)

    def reported(self) -> Reported:
        """The message as of now."""
        deployment, active = self._deployment, self._active()
        rejected = self.rejected()
        return Reported(
            device=self.identity.device,
            sequence=deployment.newest_sequence,
            deployment=deployment.deployment_id,
            state=deployment.state,
            desired=_wanted(deployment),
            digest=active.digest if active else None,
            artifact=active.artifact if active else None,
            runtime=active.runtime if active else None,
            endpoint=self.endpoint,
            progress=self._progress,
            proof=deployment.proof,
            failure=rejected or deployment.failure,
            malformed_messages=self.malformed,
            paused=self.paused(),
            at=self._clock.now(),
        )

    def health(self, monitor: Monitor, restarts: int, temperature_c: float | None, throttled: bool | None) -> None:
        """How well inference runs; lost when the broker is away."""
        vitals, active = monitor.vitals(), self._active()
        report = HealthReport(
            device=self.identity.device,
            at=self._clock.now(),
            window_s=monitor.window_s,
            digest=active.digest if active else None,
            requests=vitals.requests,
            errors=vitals.errors,
            ttft_ms_p50=vitals.ttft_ms_p50,
            ttft_ms_p95=vitals.ttft_ms_p95,
            tpot_ms_p50=vitals.tpot_ms_p50,
            tpot_ms_p95=vitals.tpot_ms_p95,
            tokens_per_s=vitals.tokens_per_s,
            worker_memory_bytes=vitals.memory_bytes,
            worker_restarts=restarts,
            temperature_c=temperature_c,
            throttled=throttled,
            verdict=monitor.verdict.value,
            reason=monitor.reason,
        )
        self._put(topics.health(self.identity.device), report, qos=0, retain=False)


def _wanted(deployment: Deployment) -> ArtifactRef | None:
    if deployment.chosen is not None:
        return deployment.chosen
    return deployment.desired.artifacts[0] if deployment.desired else None
