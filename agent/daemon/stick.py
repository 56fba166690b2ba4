"""A link that a stick can take the place of: what the broker would carry, a folder carries.

So an order from a stick goes through the same verification, proof and probation as one from the network.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import structlog

from agent.contract import topics
from agent.contract.base import MalformedMessageError
from agent.contract.messages import Desired, MetadataWant, SignedDesired, State, Want, metadata_segment
from agent.contract.stick import REPORT_PREFIX, SignedReport, StickMessage, StickReport
from agent.core.ports import Clock, Handler, Link, Message
from agent.daemon.reporter import Reporter
from agent.daemon.state import AgentState
from agent.errors import LinkError
from agent.platform.concurrency import ended
from agent.store.stick import Stick, StickError

log = structlog.get_logger(component=__name__)

_ENDED = frozenset({State.COMMITTED, State.ROLLED_BACK, State.FAILED})
#: Chunks read at a time: the thread is left only now and then.
BATCH = 16


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


class StickLink:
    """Implements ``Connection``: over ``network``, and while one is plugged in, over a stick. Of one event loop."""

    def __init__(self, network: Connection, device: str) -> None:
        self._network = network
        self._device = device
        self._handlers: dict[str, Handler] = {}
        self._callbacks: list[Callable[[], None]] = []
        self._stick: Stick | None = None
        self._pump: asyncio.Task[None] | None = None
        self._want: Want | None = None
        self._wanted = asyncio.Event()
        self._kept: dict[str, bytes] = {}
        #: Why the stick was given up while it was in use; None where it was not.
        self.broken: str | None = None

    @property
    def stick(self) -> Stick | None:
        """The one that is plugged in."""
        return self._stick

    @property
    def connected(self) -> bool:
        """Whether somebody answers: the broker, or a stick."""
        return self._stick is not None or self._network.connected

    async def start(self) -> None:
        """Connect to the network, and keep connected."""
        await self._network.start()

    async def close(self) -> None:
        """Disconnect for good."""
        await self.unplug()
        await self._network.close()

    def on_connected(self, callback: Callable[[], None]) -> None:
        """Called after each connection, and when a stick is plugged in."""
        self._callbacks.append(callback)
        self._network.on_connected(callback)

    async def plug(self, stick: Stick, order: bytes) -> None:
        """Take the stick in the network's place, and let the order arrive."""
        await self.unplug()
        self.broken = None
        self._kept.clear()
        self._stick = stick
        self._pump = asyncio.create_task(self._send_chunks(stick))
        log.info("stick plugged in", folder=str(stick.folder))
        for callback in self._callbacks:
            callback()
        topic = topics.desired(self._device)
        self._deliver(topic, Message(topic, order, retained=True))

    async def unplug(self) -> Mapping[str, bytes]:
        """Go back to the network; returns the newest message that was published at each topic."""
        self._stick = None
        if self._pump is not None:
            self._pump.cancel()
            await ended([self._pump])
            self._pump = None
            log.info("stick taken out")
            if self._network.connected:
                for callback in self._callbacks:
                    callback()
        kept = dict(self._kept)
        self._kept.clear()
        return kept

    async def subscribe(
        self, topic: str, handler: Handler, *, qos: int = 1, bulk: bool = False, manual_ack: bool = False
    ) -> None:
        """On both."""
        self._handlers[topic] = handler
        await self._network.subscribe(topic, handler, qos=qos, bulk=bulk, manual_ack=manual_ack)

    async def unsubscribe(self, topic: str) -> None:
        """On both."""
        self._handlers.pop(topic, None)
        await self._network.unsubscribe(topic)

    def progressed(self) -> None:
        """What came over this connection is verified and kept."""
        if self._stick is None:
            self._network.progressed()

    async def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int = 1,
        retain: bool = False,
        response_topic: str | None = None,
        correlation: bytes | None = None,
        properties: Mapping[str, str] | None = None,
    ) -> None:
        """To the broker; or, with a stick, answer what is asked of a controller and keep what it is told.

        Raises:
            agent.errors.LinkError: not connected, or refused; or the stick cannot be read.
        """
        stick = self._stick
        if stick is None:
            await self._network.publish(
                topic, payload, qos=qos, retain=retain, response_topic=response_topic, correlation=correlation,
                properties=properties,
            )  # fmt: skip
        elif topic == topics.metadata_want(self._device):
            await self._answer(stick, MetadataWant.from_json(payload), correlation)
        elif topic == topics.want(self._device):
            self._want = Want.from_json(payload)
            self._wanted.set()
        elif (found := topics.parse_device(topic)) is not None and found[1] in ("facts", "reported", "health"):
            self._kept[topic] = payload

    async def _answer(self, stick: Stick, want: MetadataWant, correlation: bytes | None) -> None:
        try:
            data = await asyncio.to_thread(stick.metadata, want.name)
        except StickError as error:
            self._give_up(stick, str(error))
            raise LinkError(str(error)) from error
        answer, segment = metadata_segment(want, data)
        topic = topics.metadata(self._device)
        self._deliver(topic, Message(topic, segment, correlation=correlation, properties=answer.to_properties()))

    async def _send_chunks(self, stick: Stick) -> None:
        """Of what is wanted, which is always the newest wish alone."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            want = self._want
            assert want is not None  # noqa: S101 - the event is set after it
            try:
                for numbers in _batches(want):
                    if self._wanted.is_set():
                        break
                    await asyncio.to_thread(self._read, stick, want.artifact, numbers)
            except (StickError, MalformedMessageError) as error:
                self._give_up(stick, str(error))
                return

    def _read(self, stick: Stick, digest: str, numbers: Sequence[int]) -> None:
        """In a thread, as the handlers of bulk topics expect."""
        for number in numbers:
            data = stick.chunk(digest, number)
            if data is not None:
                topic = topics.own_chunk(self._device, digest, number)
                self._deliver(topics.own_chunks(self._device, digest), Message(topic, data))

    def _deliver(self, subscribed: str, message: Message) -> None:
        handler = self._handlers.get(subscribed)
        if handler is not None:
            handler(message)

    def _give_up(self, stick: Stick, why: str) -> None:
        """As when a network goes away: deployments wait, and keep what they have."""
        if self._stick is stick:
            self._stick, self.broken = None, why
            log.error("stick given up", folder=str(stick.folder), error=why)


def _named(stick: Stick, order: bytes) -> tuple[str, int]:
    """Return deployment and sequence of an order that is not verified yet: what the person at the device is told.

    Raises:
        StickError: it is no order.
    """
    try:
        desired = Desired.from_json(base64.b64decode(SignedDesired.from_json(order).payload, validate=True))
    except (MalformedMessageError, ValueError) as error:
        raise StickError(f"the order on the stick {stick.folder} is damaged: {error}; write it again") from None
    return desired.deployment, desired.sequence


def _batches(want: Want) -> Iterator[list[int]]:
    """At most ``credit`` numbers of the ranges, in their order, ``BATCH`` at a time."""
    numbers = (number for one in want.ranges for number in range(one.first, one.last + 1))
    left = want.credit
    while left > 0:
        batch = [number for _, number in zip(range(min(left, BATCH)), numbers, strict=False)]
        if not batch:
            return
        left -= len(batch)
        yield batch


class Sticks:
    """What the person at the device asks for: plug a stick in, and take it out with a report.

    ``certificate`` and ``private_key`` are the device's PEM files, None where it has none.
    """

    def __init__(
        self, link: StickLink, state: AgentState, reporter: Reporter, clock: Clock, *,
        certificate: Path | None, private_key: Path | None,
    ) -> None:  # fmt: skip
        self._link, self._state, self._reporter, self._clock = link, state, reporter, clock
        self._certificate, self._private_key = certificate, private_key
        self._deployment, self._sequence = "", 0

    async def plug(self, folder: str) -> dict[str, Any]:
        """Begin with the order that the stick has for this device.

        Raises:
            StickError: it is not whole, has ended, or has nothing for this device.
        """
        device = self._reporter.identity.device
        stick = await asyncio.to_thread(Stick, Path(folder))
        order = await asyncio.to_thread(stick.order, device)
        ends = stick.index.expires_at
        if ends <= self._clock.now():
            raise StickError(
                f"the stick ended on {ends:%Y-%m-%d %H:%M} UTC, and this device's clock says "
                f"{self._clock.now():%Y-%m-%d %H:%M}: write it again, or set the clock"
            )
        self._deployment, sequence = _named(stick, order)
        # An old stick's order is rejected, which is told; only one that comes from now on takes its place.
        self._sequence = max(sequence, self._state.deployment.newest_sequence)
        self._state.rejected = None  # what is rejected from now on came on this stick
        await self._link.plug(stick, order)
        return {"device": device, "deployment": self._deployment, "expires_at": ends.isoformat()}

    def status(self) -> dict[str, Any] | None:
        """Return how far the order of the stick is; None without a stick."""
        if self._link.broken is not None:
            return {"outcome": "broken", "reason": self._link.broken}
        if self._link.stick is None:
            return None
        return {"folder": str(self._link.stick.folder), "deployment": self._deployment, **self._outcome()}

    def _outcome(self) -> dict[str, str]:
        """Return what has become of the order, and why; nothing while it is under way."""
        state, deployment = self._state, self._state.deployment
        if state.rejected is not None:
            return {"outcome": "rejected", "reason": state.rejected.message}
        if state.paused:
            return {"outcome": "paused", "reason": "orders are held: phifleet-agent resume"}
        if deployment.deployment_id == self._deployment and deployment.state in _ENDED:
            return {"outcome": deployment.state.value}
        if deployment.newest_sequence > self._sequence:
            return {"outcome": "superseded", "reason": "a newer order has come over the network"}
        return {}

    async def end(self, _: str) -> dict[str, Any]:
        """Take the stick out; returns the signed report that is to be written on it."""
        self._link.broken = None
        kept = {topic: payload.decode() for topic, payload in (await self._link.unplug()).items()}
        topic, message = self._reporter.newest()
        messages = {**kept, topic: message.to_json().decode()}
        report = StickReport(
            device=self._reporter.identity.device,
            at=self._clock.now(),
            messages=tuple(StickMessage(topic=name, payload=text) for name, text in sorted(messages.items())),
        ).to_json()
        signed = await asyncio.to_thread(self._signed, report)
        return {"ok": "the stick can be taken out", "report": signed.model_dump(mode="json")}

    def _signed(self, report: bytes) -> SignedReport:
        text = base64.b64encode(report).decode()
        if self._certificate is None or self._private_key is None:
            return SignedReport(report=text)
        from agent.trust.keys import read_key, signature_of

        signature = signature_of(read_key(self._private_key.read_bytes()), REPORT_PREFIX + report)
        certificate = self._certificate.read_text(encoding="ascii")
        return SignedReport(report=text, certificate=certificate, signature=base64.b64encode(signature).decode())
