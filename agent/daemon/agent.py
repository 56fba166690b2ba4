"""The agent: its parts joined, started in the order that a device wants them, and ended without a trace."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import structlog

from agent.contract import topics
from agent.contract.base import MalformedMessageError
from agent.contract.failures import FailureCode
from agent.contract.messages import Failure, RuntimeFact, SignedDesired, State
from agent.core import deployment as core
from agent.core.health import after_unhealthy
from agent.core.ports import Message, ModelHost
from agent.core.supervision import HostNews, RestartPolicy, meaning_of_host_event
from agent.daemon.control import Command, ControlServer
from agent.daemon.deployer import Deployer
from agent.daemon.jobs import RETRY, Job, Jobs
from agent.daemon.monitor import Monitor
from agent.daemon.reporter import Reporter
from agent.daemon.state import AgentState
from agent.daemon.stick import Connection, Sticks
from agent.errors import AgentError
from agent.platform import facts, systemd
from agent.runtimes.host.settings import HostEvent

log = structlog.get_logger(component=__name__)

#: What the device is changes slowly: disk and memory are reported again this often, in seconds.
FACTS_EVERY_S = 600.0
_CANDIDATE_SERVES = frozenset({State.ACTIVATING, State.PROBATION})

T = TypeVar("T")


class Server(Protocol):
    """The endpoint."""

    @property
    def url(self) -> str:
        """Where it listens."""
        ...

    async def start(self) -> None:
        """Listen.

        Raises:
            agent.errors.ConfigError: the port is taken, or the settings are unsafe.
        """
        ...

    async def stop(self) -> None:
        """Finish what is in flight, then close."""
        ...


class Host(ModelHost, Protocol):
    """A model host that is closed at the end."""

    async def close(self) -> None:
        """End all workers."""
        ...


@dataclass(frozen=True, slots=True)
class Body:
    """Everything an agent is made of."""

    link: Connection
    server: Server
    host: Host
    deployer: Deployer
    monitor: Monitor
    reporter: Reporter
    state: AgentState
    #: What the model host has to say; it writes, the agent reads.
    host_events: asyncio.Queue[HostEvent]
    restarts: Callable[[], int]
    state_dir: Path
    health_interval_s: float
    canary_interval_s: float
    temperature_c: Callable[[], float | None] = facts.temperature_c
    throttled: Callable[[], bool | None] = facts.throttled
    #: Keeps the device's certificate from ending; returns where the broker asks for none.
    renew_certificate: Callable[[], Coroutine[Any, Any, None]] | None = None
    #: Orders that come on a stick; None where the link is no ``StickLink``.
    sticks: Sticks | None = None
    #: Gives complete artifacts to neighbours; None where they may have none.
    share: Callable[[], Coroutine[Any, Any, None]] | None = None


#: Presence and state are reported again within it.
AGAIN_S = 3600.0


class Agent:
    """Runs until told to stop."""

    def __init__(self, body: Body, retry: RestartPolicy = RETRY) -> None:
        self._body = body
        self._paused = body.state_dir / "paused"
        self._unread: set[str] = set()
        self._jobs = Jobs(self._all_jobs(), retry)

    def _all_jobs(self) -> tuple[Job, ...]:
        """Return the one place that says what is vital: taking decisions about the model, which includes serving it."""
        body = self._body
        sharing = (Job("sharing", body.share),) if body.share is not None else ()
        renewal = (Job("certificate", body.renew_certificate),) if body.renew_certificate is not None else ()
        return (
            Job("deployments", body.deployer.run, vital=True),
            Job("host events", self._take_host_events),
            Job("orders", self._receive_orders),
            Job("reports", body.reporter.run),
            Job("facts", self._report_facts),
            Job("health", self._report_health),
            Job("state", self._report_state_again),
            Job("canaries", self._ask_canaries),
            Job("control", self._answer_at_the_device),
            Job("watchdog", self._feed_watchdog),
            *renewal,
            *sharing,
        )

    async def run(self, stop: asyncio.Event) -> None:
        """Serve what is there first; the broker may be away for as long as it likes.

        Raises:
            AgentError: the endpoint cannot listen, or the link's settings are wrong.
        """
        body = self._body
        body.state.paused = self._was_paused()
        await body.server.start()
        body.state.endpoint = body.server.url
        log.info("endpoint listens", url=body.server.url)
        try:
            body.link.on_connected(body.reporter.connected)
            self._jobs.start()
            await body.link.start()
            systemd.notify("READY=1")
            await self._jobs.until(stop)
        finally:
            systemd.notify("STOPPING=1")
            await self._end()

    async def _end(self) -> None:
        body = self._body
        parts: tuple[tuple[str, Callable[[], Awaitable[None]]], ...] = (
            ("endpoint", body.server.stop),
            ("presence", body.reporter.goodbye),
            ("jobs", self._jobs.end),
            ("model host", body.host.close),
            ("link", body.link.close),
        )
        for name, end in parts:
            try:
                await end()
            except Exception as error:  # the rest must end even so
                log.exception("part not ended", part=name, error=str(error))
        log.info("stopped")

    async def _receive_orders(self) -> None:
        await self._body.link.subscribe(topics.desired(self._body.reporter.identity.device), self._ordered)

    def _ordered(self, message: Message) -> None:
        if not message.payload:
            return  # the retained order was taken back; what is committed stays
        try:
            SignedDesired.from_json(message.payload)
        except MalformedMessageError as error:
            self._body.state.malformed_messages += 1
            if self._body.state.malformed_messages == 1:
                log.warning(
                    "malformed message ignored, further ones only counted", topic=message.topic, error=str(error)
                )
            return
        self._body.deployer.orders.take(message.payload)

    async def _take_host_events(self) -> None:
        body = self._body
        while True:
            event = await body.host_events.get()
            match meaning_of_host_event(event.kind, event.digest, body.monitor.digest):
                case HostNews.DEATH:
                    body.monitor.worker_died()
                case HostNews.LOST:
                    failure = Failure(code=event.code or FailureCode.RUNTIME_CRASHED, message=event.message)
                    body.deployer.post(core.Unhealthy(event.digest, failure))
                case HostNews.NOTHING:
                    pass

    async def _answer_at_the_device(self) -> None:
        commands: dict[str, Command] = {
            "status": self._status, "rollback": self._roll_back, "pause": self._pause, "resume": self._resume,
        }  # fmt: skip
        if self._body.sticks is not None:
            commands |= {"stick": self._body.sticks.plug, "stick-end": self._body.sticks.end}
        control = ControlServer(self._body.state_dir, commands)
        try:
            await control.start()
            await asyncio.Event().wait()
        finally:
            await control.stop()

    async def _status(self, _: str) -> dict[str, Any]:
        body, active = self._body, self._body.host.active()
        reported, vitals = body.reporter.reported(), body.monitor.vitals()
        fields = reported.model_dump(mode="json", exclude_none=True, exclude={"version", "endpoint"})
        return {
            "running": True,
            "connected": body.link.connected,
            "paused": body.state.paused,
            "endpoint": body.server.url,
            "serving": None if active is None else {"model": active.name, "artifact": active.artifact},
            **fields,
            "health": {"verdict": body.monitor.verdict.value, **asdict(vitals)},
            "stick": body.sticks.status() if body.sticks is not None else None,
        }

    async def _roll_back(self, _: str) -> dict[str, Any]:
        try:
            return {"ok": self._body.deployer.roll_back("the person at the device asked for it")}
        except AgentError as error:
            return {"error": str(error)}

    def _was_paused(self) -> bool:
        try:
            return self._paused.exists()
        except OSError as error:
            log.warning("pause not read, orders are taken", path=str(self._paused), error=str(error))
            return False

    async def _pause(self, _: str) -> dict[str, Any]:
        self._body.deployer.orders.pause()
        self._body.reporter.report()
        try:
            self._paused.touch()
        except OSError as error:
            log.warning("pause not remembered", path=str(self._paused), error=str(error))
            return {"ok": f"paused until the agent restarts: {self._paused} cannot be written ({error.strerror})"}
        return {"ok": "paused: new orders are held; what serves goes on serving"}

    async def _resume(self, _: str) -> dict[str, Any]:
        self._body.deployer.orders.resume()
        self._body.reporter.report()
        try:
            self._paused.unlink(missing_ok=True)
        except OSError as error:
            log.warning("resumption not remembered", path=str(self._paused), error=str(error))
            return {"ok": f"orders are taken until the agent restarts: {self._paused} stays ({error.strerror})"}
        return {"ok": "orders are taken again"}

    async def _report_state_again(self) -> None:
        """Now and then, at no common moment: a broker that was flooded may have dropped what was said before."""
        while True:
            await asyncio.sleep(AGAIN_S * (1 - random.random() / 2))  # noqa: S311 - jitter, not a secret
            self._body.reporter.connected()

    async def _report_facts(self) -> None:
        runtimes: Sequence[RuntimeFact] = ()
        while True:
            self._body.reporter.facts(runtimes)
            found = await self._body.host.runtimes()
            if found != runtimes:
                runtimes = found
                self._body.reporter.facts(runtimes)
            await asyncio.sleep(FACTS_EVERY_S)

    async def _report_health(self) -> None:
        body = self._body
        while True:
            await asyncio.sleep(body.health_interval_s)
            if body.state.deployment.state not in _CANDIDATE_SERVES:  # there the deployment's own step looks
                self._judge()
            temperature = self._read("temperature", body.temperature_c)
            body.reporter.health(body.monitor, body.restarts(), temperature, self._read("throttling", body.throttled))

    def _read(self, name: str, sensor: Callable[[], T | None]) -> T | None:
        """A sensor that cannot be read costs its own figure, and not the report; it is logged once until it works."""
        try:
            found = sensor()
        except Exception as error:  # drivers raise as they like
            if name not in self._unread:
                log.warning("sensor not read, reports go on without it", sensor=name, error=str(error))
            self._unread.add(name)
            return None
        self._unread.discard(name)
        return found

    def _judge(self) -> None:
        body, before = self._body, self._body.monitor.verdict
        failure = body.monitor.look()
        if failure is None:
            return
        deployment, digest = body.state.deployment, body.monitor.digest
        decision = after_unhealthy(
            failure.code,
            serves_committed=deployment.committed is not None and deployment.committed.digest == digest,
            has_previous=deployment.previous is not None,
            is_new=body.monitor.verdict is not before,
        )
        if decision.report:
            log.error("unhealthy", code=failure.code.value, error=failure.message, rolls_back=decision.give_way)
        if decision.give_way:
            body.deployer.post(core.Unhealthy(digest, failure))

    async def _ask_canaries(self) -> None:
        if self._body.canary_interval_s <= 0:
            return
        while True:
            await asyncio.sleep(self._body.canary_interval_s)
            await self._body.monitor.canary()

    async def _feed_watchdog(self) -> None:
        """From the event loop, so that a loop that hangs is noticed."""
        interval = systemd.watchdog_interval_s()
        while interval is not None:
            systemd.notify("WATCHDOG=1")
            await asyncio.sleep(interval)
