"""What the agent reports to the fleet: presence, facts, state and health. Nothing waits for the broker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from agent.contract import topics
from agent.contract.messages import (
    ArtifactRef,
    Boot,
    DeviceMessage,
    Facts,
    HealthReport,
    Presence,
    Progress,
    Reported,
    RuntimeFact,
)
from agent.core.deployment import Deployment
from agent.core.dialect import Dialect
from agent.core.inference import ModelInfo
from agent.core.ports import Clock, Link
from agent.daemon.monitor import Monitor
from agent.daemon.state import AgentState
from agent.errors import LinkError

log = structlog.get_logger(component=__name__)

#: Progress is reported at most this often; every change of state is reported at once.
PROGRESS_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Identity:
    """Who reports."""

    device: str
    profile: str
    version: str
    boot: Boot


class Reporter:
    """Publishes; the newest value of each retained topic wins."""

    def __init__(
        self,
        identity: Identity,
        state: AgentState,
        link: Link,
        clock: Clock,
        active: Callable[[], ModelInfo | None],
        collect_facts: Callable[[Sequence[RuntimeFact]], Facts],
        dialect: Dialect | None = None,
    ) -> None:
        self.identity = identity
        self._state = state
        self._link = link
        self._clock = clock
        self._active = active
        self._collect_facts = collect_facts
        self._dialect = dialect or Dialect()
        self._pending: dict[str, tuple[DeviceMessage, int, bool]] = {}
        self._count = 0
        self._wake = asyncio.Event()
        self._progress: Progress | None = None
        #: The order that the progress is of.
        self._progress_sequence = 0
        self._progress_reported_at = 0.0

    async def run(self) -> None:
        """Send what is pending, until cancelled; what cannot be sent now is sent when the broker is back."""
        while True:
            if not self._pending:
                await self._wake.wait()
            self._wake.clear()
            await self._drain()
            if self._pending:  # the broker is away: its return wakes us
                await self._wake.wait()

    async def _drain(self) -> None:
        while self._pending:
            topic, (message, qos, retain) = next(iter(self._pending.items()))
            del self._pending[topic]
            try:
                await self._link.publish(topic, message.to_json(), qos=qos, retain=retain)
            except LinkError as error:
                log.debug("not published", topic=topic, error=str(error))
                self._put_back(topic, message, qos, retain)
                return
            except BaseException:
                self._put_back(topic, message, qos, retain)
                raise

    def _put_back(self, topic: str, message: DeviceMessage, qos: int, retain: bool) -> None:
        if retain:  # a newer one may be there by now
            self._pending.setdefault(topic, (message, qos, retain))

    def _put(self, topic: str, message: DeviceMessage, *, qos: int = 1, retain: bool = True) -> None:
        self._pending[topic] = (self._numbered(message), qos, retain)
        self._wake.set()

    def _numbered(self, message: DeviceMessage) -> DeviceMessage:
        self._count += 1
        return message.model_copy(update={"boot": self.identity.boot.model_copy(update={"counter": self._count})})

    def connected(self) -> None:
        """The broker is there (again): say that we are too, and what was kept."""
        self._put(topics.presence(self.identity.device), self.presence(online=True))
        self.report()

    def presence(self, *, online: bool) -> Presence:
        """Return the message; offline is what the will says."""
        at = self._clock.now() if online else None
        return Presence(device=self.identity.device, online=online, at=at, agent_version=self.identity.version)

    async def goodbye(self) -> None:
        """Report that this device goes offline, without waiting for the broker to publish the will."""
        topic, offline = topics.presence(self.identity.device), self._numbered(self.presence(online=False))
        try:
            async with asyncio.timeout(2.0):
                await self._link.publish(topic, offline.to_json(), retain=True)
        except (LinkError, TimeoutError):
            log.debug("offline not reported, the will reports it")

    def facts(self, runtimes: Sequence[RuntimeFact]) -> None:
        """What the device is."""
        self._put(topics.facts(self.identity.device), self._collect_facts(runtimes))

    def progress(self, progress: Progress) -> None:
        """Of the transfer; reported now and then."""
        self._progress, self._progress_sequence = progress, self._state.deployment.newest_sequence
        now = self._clock.monotonic()
        if now - self._progress_reported_at >= PROGRESS_EVERY_S or progress.chunks_done == progress.chunks_total:
            self._progress_reported_at = now
            self.report()

    def report(self) -> None:
        """Where the deployment stands, and everything else of ``AgentState``."""
        self._put(topics.reported(self.identity.device), self.reported())

    def newest(self) -> tuple[str, DeviceMessage]:
        """Return what the next report would be and its topic, to be carried some other way."""
        return topics.reported(self.identity.device), self._numbered(self.reported())

    def reported(self) -> Reported:
        """Return the message as of now."""
        state, active = self._state, self._active()
        deployment = state.deployment
        return Reported(
            device=self.identity.device,
            sequence=deployment.newest_sequence,
            deployment=deployment.deployment_id,
            state=self._dialect.state(deployment.state),
            desired=_wanted(deployment),
            digest=active.digest if active else None,
            artifact=active.artifact if active else None,
            runtime=active.runtime if active else None,
            endpoint=state.endpoint,
            progress=self._progress if self._progress_sequence == deployment.newest_sequence else None,
            proof=deployment.proof,
            failure=state.rejected or deployment.failure,
            waiting=deployment.waits_for,
            malformed_messages=state.malformed_messages,
            paused=state.paused,
            at=self._clock.now(),
        )

    def health(self, monitor: Monitor, restarts: int, temperature_c: float | None, throttled: bool | None) -> None:
        """How well inference runs; lost when the broker is away."""
        vitals = monitor.vitals()
        report = HealthReport(
            device=self.identity.device,
            at=self._clock.now(),
            window_s=monitor.window_s,
            digest=monitor.digest or None,  # whose figures they are, also while another model takes over
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
