"""Devices that are not there: they speak the real protocol over real connections, and only the model is drawn.

Each has presence, facts, orders, states and health as an agent has, with the messages of ``agent.contract`` and the
link of ``agent.link``. What is not as on a device: signatures are not verified, no byte of an artifact is fetched, and
many devices share a connection, so that no will tells when one is lost.
"""

from __future__ import annotations

import asyncio
import base64
import math
import random
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated

import structlog
from pydantic import BaseModel, ConfigDict, Field

from agent.contract import topics
from agent.contract.base import MalformedMessageError
from agent.contract.failures import FailureCode
from agent.contract.messages import (
    Boot,
    Desired,
    DeviceMessage,
    Facts,
    Failure,
    HealthReport,
    Presence,
    Reported,
    RuntimeFact,
    SignedDesired,
    State,
)
from agent.link import Handler, LinkError, LinkSettings, Message, MqttLink

#: Devices that share a connection.
PER_CONNECTION = 250
#: Orders are subscribed to so many at a time.
BATCH = 200
GIB = 2**30
#: A device passes through these on its way, at equal times.
_WAY = (State.RESOLVING, State.TRANSFERRING, State.VERIFYING, State.PROVING, State.ACTIVATING, State.PROBATION)

_log = structlog.get_logger(component="simulator")


@dataclass(frozen=True, slots=True)
class Slow:
    """Devices of a profile are slower by a share, such as 0.2, on artifacts whose id begins so."""

    artifact: str
    profile: str
    share: float

    def holds(self, artifact: str, profile: str) -> bool:
        """Return whether it concerns a device of this profile on this artifact."""
        return artifact.startswith(self.artifact) and self.profile in ("*", profile)


class FaultKind(StrEnum):
    """What goes wrong at a simulated device."""

    #: The connection is lost, the broker tells so, and a new run of the agent comes back.
    OFFLINE = "offline"
    #: No health report comes, though the device is connected.
    SILENT = "silent"
    #: ``percent`` of the orders that are proven meanwhile fail.
    FAILING = "failing"
    #: Slower by ``percent`` whatever it serves.
    SLOW = "slow"
    #: Health comes ``percent`` more often: 900 is ten times as often.
    FLOOD = "flood"
    #: Its clock is a day ahead.
    FUTURE = "future"


class Fault(BaseModel):
    """Something that goes wrong from ``at_s`` seconds after the start on, for ``for_s`` seconds.

    It concerns a ``share`` of the devices, drawn, of a ``profile`` or of all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: FaultKind
    at_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    for_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e9
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    profile: str = "*"
    percent: Annotated[float, Field(ge=0, le=100_000)] = 100.0


class FaultsFile(BaseModel):
    """The file of ``--faults``: TOML with a table ``[[fault]]`` for each."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fault: tuple[Fault, ...] = ()


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What is drawn. Seconds; ``noise`` is the spread of a figure as a share of it, ``failing`` a share of orders."""

    seed: int = 1
    interval_s: float = 10.0
    change_s: float = 5.0
    noise: float = 0.05
    failing: float = 0.0
    slow: tuple[Slow, ...] = ()
    faults: tuple[Fault, ...] = ()
    machine: Mapping[str, str] = field(default_factory=dict)


class SimulatedDevice:
    """One device. It has no clock and no connection: each method returns what it would publish."""

    def __init__(self, name: str, profile: str, behaviour: Behaviour) -> None:
        self.name, self.profile, self._behaviour = name, profile, behaviour
        self._draw = random.Random(f"{behaviour.seed}/{name}")  # noqa: S311 - a simulation
        self._tpot_ms = math.exp(self._draw.gauss(math.log(20), 0.4))
        self._boot = Boot(id=f"{self._draw.getrandbits(64):016x}", number=behaviour.seed)
        self._count = 0
        self._order: Desired | None = None
        self._newest = 0
        self._state = State.IDLE
        self._failure: Failure | None = None
        self._digest: str | None = None
        self._artifact: str | None = None
        self.next_health_s = self._draw.uniform(0, behaviour.interval_s)
        self.next_step_s: float | None = None
        self._faults = tuple(fault for number, fault in enumerate(behaviour.faults) if self._concerns(number, fault))
        self._began_s = 0.0
        self._is_off = False

    def begin(self, now_s: float) -> None:
        """The faults are counted from here on."""
        self._began_s = now_s

    def turn(self, at: datetime, now_s: float) -> list[DeviceMessage]:
        """Return everything that it would publish now."""
        if self._fault(FaultKind.OFFLINE, now_s) is not None:
            if self._is_off:
                return []
            self._is_off = True
            return [Presence(device=self.name, online=False, agent_version="0.2.0", boot=self._boot)]
        said: list[DeviceMessage] = []
        if self._is_off:
            self._is_off = False
            self._boot = Boot(id=f"{self._draw.getrandbits(64):016x}", number=self._boot.number + 1)
            said += self.hello(at)
        if self._fault(FaultKind.FUTURE, now_s) is not None:
            at += timedelta(days=1)
        return [*said, *self.step(at, now_s), *self.health(at, now_s)]

    def _concerns(self, number: int, fault: Fault) -> bool:
        if fault.profile not in ("*", self.profile):
            return False
        drawn = random.Random(f"{self._behaviour.seed}/{self.name}/{number}")  # noqa: S311 - a simulation
        return drawn.random() < fault.share

    def _fault(self, kind: FaultKind, now_s: float) -> Fault | None:
        since = now_s - self._began_s
        holding = (one for one in self._faults if one.kind is kind and one.at_s <= since < one.at_s + one.for_s)
        return next(holding, None)

    def hello(self, at: datetime) -> list[DeviceMessage]:
        """At its start."""
        facts = Facts(
            device=self.name, profile=self.profile, agent_version="0.2.0", system="Linux", cpu="simulated",
            machine=self._behaviour.machine.get(self.profile, "x86_64"), cpu_count=4, memory_total_bytes=8 * GIB,
            memory_available_bytes=6 * GIB, disk_free_bytes=32 * GIB, at=at,
            runtimes=(RuntimeFact(name="onnx_genai", version="0.18", devices=("CPU",), usable=True),),
        )  # fmt: skip
        said = Presence(device=self.name, online=True, at=at, agent_version="0.2.0")
        return [self._numbered(said), self._numbered(facts), self._reported(at)]

    def ordered(self, payload: bytes, now_s: float) -> None:
        """An order came; one that is not newer is a repetition."""
        try:
            signed = SignedDesired.from_json(payload)
            order = Desired.from_json(base64.b64decode(signed.payload))
        except (MalformedMessageError, ValueError):
            return
        if order.sequence <= self._newest or order.device != self.name:
            return
        self._order, self._newest, self._state, self._failure = order, order.sequence, State.IDLE, None
        self.next_step_s = now_s

    def step(self, at: datetime, now_s: float) -> list[DeviceMessage]:
        """Return the next state on the way of its order, if it is time."""
        if self._order is None or self.next_step_s is None or now_s < self.next_step_s:
            return []
        behaviour = self._behaviour
        fault = self._fault(FaultKind.FAILING, now_s)
        failing = behaviour.failing if fault is None else fault.percent / 100
        if self._state is State.PROVING and self._draw.random() < failing:
            self._failure = Failure(code=FailureCode.PROBE_FAILED, message="a failure that the simulation drew")
            self._end(State.FAILED)
        elif self._state is State.PROBATION:
            self._digest, self._artifact = self._order.artifacts[0].digest, self._order.artifacts[0].id
            self._end(State.COMMITTED)
        else:
            place = _WAY.index(self._state) + 1 if self._state in _WAY else 0
            self._state = _WAY[place]
            self.next_step_s = now_s + self._draw.uniform(0.5, 1.5) * behaviour.change_s / len(_WAY)
        return [self._reported(at)]

    def health(self, at: datetime, now_s: float) -> list[DeviceMessage]:
        """Its health report, if it is time and it serves something."""
        if now_s < self.next_health_s:
            return []
        flood, slow = self._fault(FaultKind.FLOOD, now_s), self._fault(FaultKind.SLOW, now_s)
        interval_s = self._behaviour.interval_s / (1 + (flood.percent / 100 if flood else 0.0))
        self.next_health_s = max(now_s, self.next_health_s + interval_s)
        if self._digest is None or self._artifact is None or self._fault(FaultKind.SILENT, now_s) is not None:
            return []
        slower = (slow.percent / 100 if slow else 0.0) + sum(
            one.share for one in self._behaviour.slow if one.holds(self._artifact, self.profile)
        )
        tpot = self._tpot_ms * (1 + slower) * math.exp(self._draw.gauss(0, self._behaviour.noise))
        ttft = 12 * self._tpot_ms * math.exp(self._draw.gauss(0, self._behaviour.noise))
        report = HealthReport(
            device=self.name, at=at, window_s=self._behaviour.interval_s, digest=self._digest,
            requests=self._draw.randint(6, 12), ttft_ms_p50=ttft, ttft_ms_p95=ttft * 1.3, tpot_ms_p50=tpot,
            tpot_ms_p95=tpot * 1.2, tokens_per_s=1000 / tpot, worker_memory_bytes=GIB, verdict="healthy",
        )  # fmt: skip
        return [self._numbered(report)]

    def _end(self, state: State) -> None:
        self._state, self.next_step_s = state, None

    def _reported(self, at: datetime) -> DeviceMessage:
        order = self._order
        return self._numbered(
            Reported(
                device=self.name,
                sequence=self._newest,
                deployment=order.deployment if order else "",
                state=self._state,
                desired=order.artifacts[0] if order else None,
                digest=self._digest,
                artifact=self._artifact,
                runtime="onnx_genai" if self._digest else None,
                failure=self._failure,
                at=at,
            )
        )

    def _numbered(self, message: DeviceMessage) -> DeviceMessage:
        self._count += 1
        return message.model_copy(update={"boot": self._boot.model_copy(update={"counter": self._count})})


class Simulation:
    """Many devices over a few connections, on one event loop."""

    def __init__(self, link: LinkSettings, devices: Sequence[SimulatedDevice], tick_s: float = 0.2) -> None:
        self._settings, self._devices, self._tick_s = link, devices, tick_s
        self.published = 0

    async def run(self, stop: asyncio.Event) -> None:
        """Until ``stop``.

        Raises:
            LinkError: the broker cannot be reached at the start.
        """
        groups = [
            self._devices[start : start + PER_CONNECTION] for start in range(0, len(self._devices), PER_CONNECTION)
        ]
        async with asyncio.TaskGroup() as tasks:
            for number, group in enumerate(groups):
                tasks.create_task(self._serve(number, group, stop))

    async def _serve(self, number: int, group: Sequence[SimulatedDevice], stop: asyncio.Event) -> None:
        settings = LinkSettings(
            url=self._settings.url,
            client_id=f"simulator-{number}-{secrets.token_hex(4)}",
            ca_file=self._settings.ca_file,
            cert_file=self._settings.cert_file,
            key_file=self._settings.key_file,
            username=self._settings.username,
            password=self._settings.password,
        )
        loop = asyncio.get_running_loop()
        by_topic = {topics.desired(device.name): device for device in group}

        def ordered(message: Message) -> None:
            device = by_topic.get(message.topic)
            if device is not None and message.payload:
                loop.call_soon_threadsafe(device.ordered, message.payload, loop.time())

        async with MqttLink(settings) as link:
            await link.wait_connected(10)
            again = asyncio.Event()
            link.on_connected(again.set)
            again.set()
            for device in group:
                device.begin(loop.time())
            while not stop.is_set():
                try:
                    if again.is_set():
                        again.clear()
                        await self._start(link, group, ordered)
                    await self._turn(link, group)
                except LinkError as error:
                    _log.debug("not published", error=str(error))
                await asyncio.sleep(self._tick_s)

    async def _start(self, link: MqttLink, group: Sequence[SimulatedDevice], ordered: Handler) -> None:
        for start in range(0, len(group), BATCH):
            some = group[start : start + BATCH]
            await link.subscribe_exact([topics.desired(device.name) for device in some], ordered)
        for device in group:
            await self._publish(link, device.hello(datetime.now(UTC)))

    async def _turn(self, link: MqttLink, group: Sequence[SimulatedDevice]) -> None:
        now_s, at = asyncio.get_running_loop().time(), datetime.now(UTC)
        said = [message for device in group for message in device.turn(at, now_s)]
        await self._publish(link, said)

    async def _publish(self, link: MqttLink, messages: Sequence[DeviceMessage]) -> None:
        await asyncio.gather(*(self._send(link, message) for message in messages))
        self.published += len(messages)

    @staticmethod
    async def _send(link: MqttLink, message: DeviceMessage) -> None:
        match message:
            case HealthReport():
                await link.publish(topics.health(message.device), message.to_json(), qos=0)
            case Presence():
                await link.publish(topics.presence(message.device), message.to_json(), retain=True)
            case Facts():
                await link.publish(topics.facts(message.device), message.to_json(), retain=True)
            case _:
                await link.publish(topics.reported(message.device), message.to_json(), retain=True)
