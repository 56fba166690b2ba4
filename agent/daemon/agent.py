"""The agent: its parts joined, started in the order that a device wants them, and ended without a trace."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import structlog

from agent.contract import topics
from agent.contract.base import MalformedMessageError
from agent.contract.messages import RuntimeFact, SignedDesired, State
from agent.core import deployment as core
from agent.core.health import BROKEN
from agent.core.ports import Link, Message, ModelHost
from agent.daemon.control import ControlServer
from agent.daemon.deployer import Deployer
from agent.daemon.monitor import Monitor
from agent.daemon.reporter import Reporter
from agent.errors import AgentError
from agent.platform import facts, systemd

log = structlog.get_logger()

#: What the device is changes slowly: disk and memory are told again this often, in seconds.
FACTS_EVERY_S = 600.0
_CANDIDATE_SERVES = frozenset({State.ACTIVATING, State.PROBATION})


class Connection(Link, Protocol):
    """A link that is started and closed."""

    async def start(self) -> None:
        """Connect, and keep connected, in the background."""
        ...

    async def close(self) -> None:
        """Disconnect for good."""
        ...

    def on_connected(self, callback: Callable[[], None]) -> None:
        """Called after each connection."""
        ...


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
    restarts: Callable[[], int]
    state_dir: Path
    health_interval_s: float
    canary_interval_s: float


class Agent:
    """Runs until told to stop."""

    def __init__(self, body: Body) -> None:
        self._body = body
        self._paused = body.state_dir / "paused"
        commands = {"status": self._status, "rollback": self._roll_back, "pause": self._pause, "resume": self._resume}
        self._control = ControlServer(body.state_dir, commands)

    async def run(self, stop: asyncio.Event) -> None:
        """Serve what is there first; the broker may be away for as long as it likes.

        Raises:
            AgentError: the endpoint cannot listen, or the link's settings are wrong.
        """
        body = self._body
        body.deployer.orders.paused = self._paused.exists()
        await body.server.start()
        await self._control.start()
        body.reporter.endpoint = body.server.url
        log.info("endpoint", url=body.server.url)
        body.link.on_connected(body.reporter.connected)
        tasks = [asyncio.create_task(work) for work in self._works()]
        try:
            await body.link.start()
            await body.link.subscribe(topics.desired(body.reporter.identity.device), self._ordered)
            systemd.notify("READY=1")
            await _first(stop, tasks)
        finally:
            systemd.notify("STOPPING=1")
            await self._end(tasks)

    def _works(self) -> Sequence[Coroutine[None, None, None]]:
        return (
            self._body.deployer.run(),
            self._body.reporter.run(),
            self._tell_facts(),
            self._tell_health(),
            self._ask_canaries(),
            self._feed_watchdog(),
        )

    async def _end(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        body = self._body
        await self._control.stop()
        await body.server.stop()
        await body.reporter.goodbye()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await body.host.close()
        await body.link.close()
        log.info("stopped")

    def _ordered(self, message: Message) -> None:
        if not message.payload:
            return  # the retained order was taken back; what is committed stays
        try:
            SignedDesired.from_json(message.payload)
        except MalformedMessageError as error:
            self._body.reporter.malformed += 1
            if self._body.reporter.malformed == 1:
                log.warning(
                    "malformed message ignored, further ones only counted", topic=message.topic, error=str(error)
                )
            return
        self._body.deployer.orders.take(message.payload)

    async def _status(self) -> dict[str, Any]:
        body, active = self._body, self._body.host.active()
        reported, vitals = body.reporter.reported(), body.monitor.vitals()
        told = reported.model_dump(mode="json", exclude_none=True, exclude={"version", "endpoint"})
        return {
            "running": True,
            "connected": body.link.connected,
            "paused": body.deployer.orders.paused,
            "endpoint": body.server.url,
            "serving": None if active is None else {"model": active.name, "artifact": active.artifact},
            **told,
            "health": {"verdict": body.monitor.verdict.value, **asdict(vitals)},
        }

    async def _roll_back(self) -> dict[str, Any]:
        try:
            return {"ok": self._body.deployer.roll_back("asked for at the device")}
        except AgentError as error:
            return {"error": str(error)}

    async def _pause(self) -> dict[str, Any]:
        self._paused.touch()
        self._body.deployer.orders.pause()
        self._body.reporter.tell()
        return {"ok": "paused: new orders are held; what serves goes on serving"}

    async def _resume(self) -> dict[str, Any]:
        self._paused.unlink(missing_ok=True)
        self._body.deployer.orders.resume()
        self._body.reporter.tell()
        return {"ok": "orders are taken again"}

    async def _tell_facts(self) -> None:
        runtimes: Sequence[RuntimeFact] = ()
        while True:
            self._body.reporter.facts(runtimes)
            found = await self._body.host.runtimes()
            if found != runtimes:
                runtimes = found
                self._body.reporter.facts(runtimes)
            await asyncio.sleep(FACTS_EVERY_S)

    async def _tell_health(self) -> None:
        body = self._body
        while True:
            await asyncio.sleep(body.health_interval_s)
            if body.deployer.deployment.state not in _CANDIDATE_SERVES:  # there the deployment's own work looks
                self._judge()
            body.reporter.health(body.monitor, body.restarts(), facts.temperature_c(), facts.throttled())

    def _judge(self) -> None:
        body, before = self._body, self._body.monitor.verdict
        failure = body.monitor.look()
        if failure is None:
            return
        deployment = body.deployer.deployment
        serves = deployment.committed is not None and deployment.committed.digest == body.monitor.digest
        # With nothing to go back to, a model that limps is better than none; the host says when it cannot run at all.
        gives_way = serves and deployment.previous is not None and failure.code in BROKEN
        if gives_way or body.monitor.verdict is not before:
            log.error("unhealthy", code=failure.code.value, reason=failure.message, rolls_back=gives_way)
        if gives_way:
            body.deployer.post(core.Unhealthy(body.monitor.digest, failure))

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


async def _first(stop: asyncio.Event, tasks: Sequence[asyncio.Task[None]]) -> None:
    """Until ``stop``; a task that breaks ends the agent, so that its supervisor starts it afresh."""
    stopping = asyncio.create_task(stop.wait())
    pending: set[asyncio.Task[object]] = {stopping, *tasks}
    try:
        while not stopping.done():
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
    finally:
        stopping.cancel()
