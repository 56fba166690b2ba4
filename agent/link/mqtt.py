"""MQTT 5 for asyncio: control messages on the event loop, bulk straight on the link's thread."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import structlog

from agent.core.ports import Handler, Message
from agent.errors import LinkError
from agent.link.network import BulkSource, Listener, Network
from agent.link.packets import Publication
from agent.link.settings import LinkSettings

#: Control messages waiting for the event loop; what comes past that is dropped and counted.
MAX_WAITING = 10_000

_log = structlog.get_logger(component=__name__)


@dataclass(frozen=True, slots=True)
class _Subscription:
    handler: Handler
    qos: int
    bulk: bool
    manual_ack: bool = False


class MqttLink:
    """Implements ``agent.core.ports.Link``: comes back by itself, with its subscriptions.

    Made anywhere, started on the event loop that its control handlers are to run on.

    Raises:
        agent.errors.LinkError: the URL or a certificate in ``settings`` cannot be used.
    """

    def __init__(self, settings: LinkSettings) -> None:
        self._network = Network(settings, Listener(self._connected, self._disconnected, self._received))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._repeat_retained = settings.repeat_retained
        self._subscriptions: dict[str, _Subscription] = {}
        self._exact: dict[str, _Subscription] = {}
        self._routes: tuple[tuple[re.Pattern[str], _Subscription], ...] = ()
        self._retained: dict[str, tuple[bytes, int]] = {}
        self._waiting: deque[tuple[Handler, Message]] = deque()
        self._on_connected: list[Callable[[], None]] = []
        self._up = asyncio.Event()
        self._told = "closed"
        self.dropped = 0
        self._client = settings.client_id
        self.reconnects = -1

    @property
    def connected(self) -> bool:
        """Whether the broker answers now."""
        return self._network.up

    @property
    def address(self) -> str:
        """The broker's URL without a password."""
        return str(self._network.address)

    @property
    def reason(self) -> str:
        """Why it is not connected; empty when it is."""
        return self._network.reason

    async def start(self) -> None:
        """Begin to connect; returns at once, for an agent must work without a broker too."""
        self._loop = asyncio.get_running_loop()
        self._network.start()

    async def wait_connected(self, timeout_s: float) -> None:
        """Until the broker has accepted us.

        Raises:
            agent.errors.LinkError: it has not within ``timeout_s``; the text says why.
        """
        if not self.connected:  # its end may not have reached the event loop yet
            self._up.clear()
        try:
            async with asyncio.timeout(timeout_s):
                await self._up.wait()
        except TimeoutError:
            raise LinkError(f"broker {self.address}: {self.reason} (waited {timeout_s:g} s)") from None

    async def close(self) -> None:
        """Disconnect in good order: the broker then publishes no will."""
        await asyncio.to_thread(self._network.stop)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def on_connected(self, callback: Callable[[], None]) -> None:
        """Run ``callback`` on the event loop after each connect, when the broker knows our subscriptions again."""
        self._on_connected.append(callback)

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
        """Hand over to the broker; waits for its acknowledgement at QoS 1.

        With ``LinkSettings.repeat_retained`` a retained publication is remembered also when this raises, and sent at
        each connect.

        Raises:
            agent.errors.LinkError: not connected, or refused, naming the broker and its reason.
        """
        if retain and self._repeat_retained:
            self._retained[topic] = (payload, qos)
        outcome: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        done = self._resolver(outcome)
        publication = Publication(topic, payload, done, qos, retain, response_topic, correlation, properties or {})
        self._network.publish(publication)
        try:
            error = await outcome
        except asyncio.CancelledError:
            publication.cancelled = True  # what still waits for the broker's window is not sent after all
            raise
        if error is not None:
            raise LinkError(f"broker {self.address}: {topic}: {error}")

    async def subscribe(
        self, topic: str, handler: Handler, *, qos: int = 1, bulk: bool = False, manual_ack: bool = False
    ) -> None:
        """From now on, also after a reconnect. Without a connection, from the next one on.

        Raises:
            agent.errors.LinkError: the broker refuses this filter.
        """
        subscription = _Subscription(handler, qos, bulk, manual_ack)
        self._subscriptions = {**self._subscriptions, topic: subscription}
        self._rebuild_routes()
        outcome: asyncio.Future[Sequence[Any]] = asyncio.get_running_loop().create_future()
        self._network.subscribe([(topic, qos)], self._resolver(outcome))
        refused = [reason for reason in await outcome if reason.is_failure]
        if refused:
            self._forget(topic)
            raise LinkError(f"broker {self.address}: refuses the subscription to {topic}: {refused[0]}")

    async def subscribe_exact(self, topics: Sequence[str], handler: Handler, *, manual_ack: bool = False) -> None:
        """Receive what is retained at these topics, until ``unsubscribe_exact``, and what comes there if nothing else
        is subscribed to it.

        One packet for all; ``handler`` runs on the link's thread. Of this connection alone: a reconnect forgets it.

        Raises:
            agent.errors.LinkError: not connected, or the broker refuses one of them.
        """
        entry = _Subscription(handler, 1, bulk=True, manual_ack=manual_ack)
        self._exact = {**self._exact, **dict.fromkeys(topics, entry)}
        outcome: asyncio.Future[Sequence[Any]] = asyncio.get_running_loop().create_future()
        self._network.subscribe([(topic, 1) for topic in topics], self._resolver(outcome))
        reasons = await outcome
        refused = [reason for reason in reasons if reason.is_failure]
        if refused or not reasons:
            self._forget_exact(topics)
            text = f"refuses the subscription: {refused[0]}" if refused else f"not connected: {self.reason}"
            raise LinkError(f"broker {self.address}: {text}")

    async def unsubscribe_exact(self, topics: Sequence[str]) -> None:
        """No longer."""
        self._forget_exact(topics)
        self._network.unsubscribe(list(topics))

    def _forget_exact(self, topics: Sequence[str]) -> None:
        gone = frozenset(topics)
        self._exact = {topic: entry for topic, entry in self._exact.items() if topic not in gone}

    def progressed(self) -> None:
        """What came over this connection is verified and kept: when it is lost, the next attempt is soon."""
        self._network.progressed()

    async def unsubscribe(self, topic: str) -> None:
        """No longer."""
        self._forget(topic)
        self._network.unsubscribe([topic])

    def serve_bulk(self, source: BulkSource) -> None:
        """Publish what ``source`` gives, at QoS 0, whenever the socket has room; it runs on the link's thread.

        Pulled, so that a slow broker slows the source instead of filling memory. While disconnected it is not asked.
        """
        self._network.serve_bulk(source)

    def wake_bulk(self) -> None:
        """The source of ``serve_bulk`` has something again."""
        self._network.wake_bulk()

    def _forget(self, topic: str) -> None:
        self._subscriptions = {key: value for key, value in self._subscriptions.items() if key != topic}
        self._rebuild_routes()

    def _rebuild_routes(self) -> None:
        # Replaced as a whole: the link's thread reads it at any moment.
        self._routes = tuple((filter_pattern(topic), entry) for topic, entry in self._subscriptions.items())

    def _resolver(self, future: asyncio.Future[Any]) -> Callable[[Any], None]:
        loop = asyncio.get_running_loop()
        return lambda value: _on_loop(loop, _set_unless_done, future, value)

    # What follows runs on the link's thread.

    def _connected(self) -> None:
        self.reconnects += 1
        self._told = "closed"  # by us is no news
        self._exact = {}
        _log.info("broker connected", broker=self.address, client=self._client, reconnects=self.reconnects)
        for topic, (payload, qos) in list(self._retained.items()):
            self._network.publish(Publication(topic, payload, lambda error: None, qos, retain=True))
        subscriptions = [(topic, subscription.qos) for topic, subscription in self._subscriptions.items()]
        if subscriptions:
            self._network.subscribe(subscriptions, lambda reasons: self._subscribed(subscriptions, reasons))
        else:
            self._subscribed([], [])

    def _disconnected(self, reason: str) -> None:
        if reason not in (self._told, "closed"):  # once, not at each attempt
            self._told = reason
            _log.warning("broker not connected", broker=self.address, client=self._client, error=reason)
        if self._loop is not None:
            _on_loop(self._loop, self._up.clear)

    def _received(self, message: Message) -> None:
        owed = message.acknowledge
        routes = [entry for pattern, entry in self._routes if pattern.match(message.topic) is not None]
        exact = self._exact.get(message.topic)
        if exact is not None and (message.retained or not routes):  # else it comes by the pattern too
            routes = [exact]
        if owed is not None and not any(entry.manual_ack for entry in routes):
            owed()
            message = replace(message, acknowledge=None)
        for entry in routes:
            if entry.bulk:
                _guard(entry.handler, message)
            else:
                self._queue(entry.handler, message)

    def _queue(self, handler: Handler, message: Message) -> None:
        # What is still to be acknowledged is bounded by the receive maximum, and dropping it would stop the broker.
        if len(self._waiting) >= MAX_WAITING and message.acknowledge is None:
            self.dropped += 1
            return
        self._waiting.append((handler, message))
        if self._loop is not None:
            _on_loop(self._loop, self._deliver)

    def _subscribed(self, filters: Sequence[tuple[str, int]], reasons: Sequence[Any]) -> None:
        for (topic, _), reason in zip(filters, reasons, strict=False):
            if reason.is_failure:
                _log.error("subscription refused", broker=self.address, topic=topic, error=str(reason))
        if self._loop is not None:
            _on_loop(self._loop, self._tell_connected)

    # And this on the event loop again.

    def _deliver(self) -> None:
        handler, message = self._waiting.popleft()
        _guard(handler, message)

    def _tell_connected(self) -> None:
        if not self.connected:
            return
        self._up.set()
        for callback in self._on_connected:
            callback()


def filter_pattern(topic: str) -> re.Pattern[str]:
    """Return what an MQTT filter matches (MQTT 5 section 4.7); a shared one, what comes after ``$share/<group>/``."""
    inner = topic.split("/", 2)[2] if topic.startswith("$share/") else topic
    levels = inner.split("/")
    text = "/".join("[^/]*" if level == "+" else re.escape(level) for level in levels if level != "#")
    if levels[-1] == "#":
        text = f"{text}(/.*)?" if len(levels) > 1 else ".*"
    hidden = "(?!\\$)" if levels[0] in ("+", "#") else ""
    return re.compile(f"{hidden}{text}\\Z", re.DOTALL)


def _guard(handler: Handler, message: Message) -> None:
    # One handler's defect must cost neither the connection nor the other handlers.
    try:
        handler(message)
    except Exception:
        _log.exception("message handler failed", topic=message.topic)


def _on_loop(loop: asyncio.AbstractEventLoop, call: Callable[..., object], *arguments: object) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
        loop.call_soon_threadsafe(call, *arguments)


def _set_unless_done(future: asyncio.Future[Any], value: object) -> None:
    if not future.done():
        future.set_result(value)
