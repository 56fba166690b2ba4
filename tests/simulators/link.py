"""An MQTT broker in memory: `MemoryLink` implements ports.Link, with loss, duplication, reordering and cuts.

    broker = MemoryBroker(Faults(loss=0.1, seed=7))
    async with broker.link("device") as device, broker.link("fleet") as fleet: ...

Faults are drawn from a seeded generator, so a failing run can be run again.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from agent.core.ports import Handler, Message
from agent.errors import LinkError


@dataclass(frozen=True)
class Faults:
    """Shares of deliveries that are lost, sent twice, or held back until `hold` more messages have passed."""

    loss: float = 0.0
    duplication: float = 0.0
    reordering: float = 0.0
    hold: int = 3
    hold_s: float = 0.02
    delay_s: float = 0.0
    seed: int = 0


@dataclass(eq=False)
class _Subscription:
    topic: str
    group: str | None
    handler: Handler
    bulk: bool
    link: MemoryLink
    manual_ack: bool = False
    exact: bool = False


def matches(pattern: str, topic: str) -> bool:
    """MQTT 5 section 4.7: `+` is one level, a trailing `#` is any number of them."""
    levels, parts = pattern.split("/"), topic.split("/")
    for index, level in enumerate(levels):
        if level == "#":
            return True
        if index >= len(parts) or level not in ("+", parts[index]):
            return False
    return len(levels) == len(parts)


class MemoryBroker:
    """Routes between its links. `published` keeps every publication; `intercept` may change or swallow (None) one."""

    def __init__(self, faults: Faults | None = None) -> None:
        self.faults = faults or Faults()
        self.retained: dict[str, Message] = {}
        self.published: list[Message] = []
        self.delivered = 0
        #: Topics that its ACL lets nobody write to.
        self.forbidden: set[str] = set()
        self.intercept: Callable[[Message], Message | None] = lambda message: message
        self._random = random.Random(self.faults.seed)
        self._subscriptions: list[_Subscription] = []
        self._turn: defaultdict[tuple[str, str], int] = defaultdict(int)
        self._held: list[tuple[int, _Subscription, Message]] = []

    @asynccontextmanager
    async def link(self, name: str = "link", *, faulty: bool = True) -> AsyncIterator[MemoryLink]:
        """A connected client; `faulty` False keeps the faults away from what it receives."""
        link = MemoryLink(self, name, faulty=faulty)
        try:
            yield link
        finally:
            link.close()

    def accept(self, message: Message) -> None:
        self.published.append(message)
        passed = self.intercept(message)
        if passed is None:
            return
        if passed.retained:
            self._retain(passed)
        self._route(replace(passed, retained=False))

    def _retain(self, message: Message) -> None:
        if message.payload:
            self.retained[message.topic] = message
        else:
            self.retained.pop(message.topic, None)

    def _route(self, message: Message) -> None:
        groups: defaultdict[tuple[str, str], list[_Subscription]] = defaultdict(list)
        for subscription in self._subscriptions:
            if not subscription.link.connected or not matches(subscription.topic, message.topic):
                continue
            if subscription.group is None:
                self._send(subscription, message)
            else:
                groups[subscription.group, subscription.topic].append(subscription)
        for key, members in groups.items():
            self._turn[key] += 1
            self._send(members[self._turn[key] % len(members)], message)

    def _send(self, subscription: _Subscription, message: Message) -> None:
        self._release()
        if not subscription.link.faulty:
            self._deliver(subscription, message)
            return
        draw = self._random.random
        if draw() < self.faults.loss:
            return
        if draw() < self.faults.reordering:
            self._hold(subscription, message)
        else:
            self._deliver(subscription, message)
        if draw() < self.faults.duplication:
            self._deliver(subscription, message)

    def _hold(self, subscription: _Subscription, message: Message) -> None:
        entry = (self.faults.hold, subscription, message)
        self._held.append(entry)
        asyncio.get_running_loop().call_later(self.faults.hold_s, self._flush, subscription, message)

    def _flush(self, subscription: _Subscription, message: Message) -> None:
        for index, (_, held_by, held) in enumerate(self._held):
            if held_by is subscription and held is message:
                del self._held[index]
                self._deliver(subscription, message)
                return

    def _release(self) -> None:
        due = [entry for entry in self._held if entry[0] <= 1]
        self._held = [(count - 1, to, message) for count, to, message in self._held if count > 1]
        for _, subscription, message in due:
            self._deliver(subscription, message)

    def _deliver(self, subscription: _Subscription, message: Message) -> None:
        self.delivered += 1
        subscription.link.receive(subscription, message, self.faults.delay_s)

    def add(self, subscription: _Subscription) -> None:
        self.remove(subscription.link, subscription.topic, subscription.group)
        self._subscriptions.append(subscription)
        self._send_retained(subscription)

    def resubscribe(self, link: MemoryLink) -> None:
        """A client that comes back subscribes again, and so gets what is retained again."""
        for subscription in [entry for entry in self._subscriptions if entry.link is link]:
            self._send_retained(subscription)

    def _send_retained(self, subscription: _Subscription) -> None:
        if subscription.group is None:
            for message in list(self.retained.values()):
                if matches(subscription.topic, message.topic):
                    self._send(subscription, message)

    def remove(self, link: MemoryLink, topic: str | None = None, group: str | None = None) -> None:
        self._subscriptions = [
            entry
            for entry in self._subscriptions
            if entry.link is not link or (topic is not None and (entry.topic, entry.group) != (topic, group))
        ]


@dataclass(eq=False)
class MemoryLink:
    """A client of a `MemoryBroker`. `cut()` and `restore()` are the connection's; subscriptions survive."""

    broker: MemoryBroker
    name: str = "link"
    faulty: bool = True
    will: Message | None = None
    #: What handlers that acknowledge by hand have acknowledged.
    acknowledged: list[Message] = field(default_factory=list)
    _up: bool = True
    _connected_callbacks: list[Callable[[], None]] = field(default_factory=list)
    _bulk: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "bulk"))

    @property
    def connected(self) -> bool:
        return self._up

    @property
    def address(self) -> str:
        return "mqtt://in-memory"

    @property
    def reason(self) -> str:
        return "" if self._up else "the connection was cut"

    def on_connected(self, callback: Callable[[], None]) -> None:
        self._connected_callbacks.append(callback)

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
        await asyncio.sleep(0)
        if not self._up:
            raise LinkError(f"{self.name}: not connected to the broker in memory")
        if topic in self.broker.forbidden:
            raise LinkError(f"{self.name}: the broker refused the publication to {topic}: Not authorized")
        self.broker.accept(Message(topic, bytes(payload), retain, response_topic, correlation, dict(properties or {})))

    async def subscribe(
        self, topic: str, handler: Handler, *, qos: int = 1, bulk: bool = False, manual_ack: bool = False
    ) -> None:
        group, pattern = _split(topic)
        self.broker.add(_Subscription(pattern, group, handler, bulk, self, manual_ack))
        await asyncio.sleep(0)

    async def subscribe_exact(self, topics: Sequence[str], handler: Handler, *, manual_ack: bool = False) -> None:
        if not self._up:
            raise LinkError(f"{self.name}: not connected to the broker in memory")
        for topic in topics:
            self.broker.add(_Subscription(topic, None, handler, False, self, manual_ack, exact=True))
        await asyncio.sleep(0)

    async def unsubscribe_exact(self, topics: Sequence[str]) -> None:
        for topic in topics:
            self.broker.remove(self, topic, None)
        await asyncio.sleep(0)

    async def unsubscribe(self, topic: str) -> None:
        group, pattern = _split(topic)
        self.broker.remove(self, pattern, group)
        await asyncio.sleep(0)

    def progressed(self) -> None:
        """This connection comes back when it is told to."""

    def receive(self, subscription: _Subscription, message: Message, delay_s: float) -> None:
        loop = asyncio.get_running_loop()
        if delay_s:
            loop.call_later(delay_s, self._handle, subscription, message)
        else:
            loop.call_soon(self._handle, subscription, message)

    def _handle(self, subscription: _Subscription, message: Message) -> None:
        if not self._up or (subscription.exact and not message.retained):
            return
        if subscription.manual_ack:
            message = replace(message, acknowledge=lambda: self.acknowledged.append(message))
        if subscription.bulk:
            self._bulk.submit(subscription.handler, message)
        else:
            subscription.handler(message)

    def cut(self) -> None:
        """The connection breaks: the broker publishes the will."""
        if self._up:
            self._up = False
            if self.will is not None:
                self.broker.accept(self.will)

    def restore(self) -> None:
        """Connected again, subscriptions as before."""
        self._up = True
        self.broker.resubscribe(self)
        for callback in self._connected_callbacks:
            callback()

    def close(self) -> None:
        self._up = False
        self.broker.remove(self)
        self._bulk.shutdown(wait=False)


def _split(topic: str) -> tuple[str | None, str]:
    if topic.startswith("$share/"):
        _, group, pattern = topic.split("/", 2)
        return group, pattern
    return None, topic
