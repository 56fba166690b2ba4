"""The link's own thread, and the paho client that no other thread touches.

paho's loop waits with ``select``, which fails for good once a process holds more than 1024 descriptors, as an
endpoint with many clients does; and its thread-safe calls give a message id only after the acknowledgement may have
come. So this thread waits with the selector of the platform, and others hand it work instead of calling paho.
"""

from __future__ import annotations

import random
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from agent.core.backoff import Backoff
from agent.core.ports import Message
from agent.errors import LinkError
from agent.link import reasons
from agent.link.packets import Done, Publication, make_client, publish_properties, to_message
from agent.link.settings import LinkSettings, load_certificate, parse_url

#: How many QoS 1 publications of ours may be unacknowledged, unless the broker wants fewer.
MAX_IN_FLIGHT = 64
#: Bulk publications in one turn of the loop, before it reads again.
BULK_BURST = 8

#: As long as nothing else is known of an attempt.
_UNANSWERED = "the broker does not answer"
_STARTING = "still connecting"
#: mosquitto answers a payload above this limit with a reason code that paho takes for a malformed packet.
_HINTS = {"Protocol error": " (perhaps a payload above the broker's message_size_limit)"}

BulkSource = Callable[[], "tuple[str, bytes] | None"]
"""The next bulk publication as ``(topic, payload)``, or None when there is none now."""


_log = structlog.get_logger(component=__name__)


@dataclass(frozen=True, slots=True)
class Listener:
    """Called on the link's thread: the broker accepted us; connection or attempt ended, and why; a publication."""

    connected: Callable[[], None]
    disconnected: Callable[[str], None]
    received: Callable[[Message], None]


@dataclass(slots=True)
class _Owed:
    """A message at QoS 1 that came; ``safe``: it may be acknowledged."""

    mid: int
    qos: int
    safe: bool = False


class Network:
    """Connects, reconnects with back-off, publishes within the broker's receive maximum.

    Every method may be called from any thread.

    Raises:
        agent.errors.LinkError: the URL or a certificate cannot be used (from the constructor).
    """

    def __init__(self, settings: LinkSettings, listener: Listener) -> None:
        self._settings = settings
        self._listener = listener
        self.address = parse_url(settings.url)
        self._client = make_client(settings, self.address)
        self._client.on_connect, self._client.on_disconnect = self._on_connect, self._on_disconnect
        self._client.on_subscribe, self._client.on_message = self._on_subscribe, self._on_message
        self._client.on_plain = self._on_plain
        self._reason = "not started"
        self._up = False
        self._connections = 0
        self._of_use = False
        #: Messages of this connection that are not acknowledged yet, in the order in which they came.
        self._owed: deque[_Owed] = deque()
        self._running = False
        self._stopping = threading.Event()
        self._work: deque[Callable[[], None]] = deque()
        self._backlog: deque[Publication] = deque()
        self._unacknowledged: dict[int, Done] = {}
        self._subscribing: dict[int, Callable[[Sequence[ReasonCode]], None]] = {}
        self._known = False
        self._bulk: BulkSource | None = None
        self._bulk_more = False
        self._max_in_flight = MAX_IN_FLIGHT
        self._max_packet_bytes: int | None = None
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._thread = threading.Thread(target=self._main, name=f"link-{settings.client_id}", daemon=True)

    @property
    def up(self) -> bool:
        """Whether the broker has accepted us."""
        return self._up

    @property
    def reason(self) -> str:
        """Why it is not up."""
        return self._reason

    def start(self) -> None:
        """Begin to connect; returns at once."""
        self._reason = _STARTING
        self._running = True
        self._thread.start()

    def stop(self) -> None:
        """Say goodbye and end the thread; blocks for a second or so."""
        self._stopping.set()
        self._wake()
        if self._thread.ident is None:
            self._close_wake()
        else:
            self._thread.join(3.0)  # an attempt to connect may last longer, and ends by itself

    def publish(self, publication: Publication) -> None:
        """Send as soon as the broker's window has room; ``done`` tells the outcome."""
        self._do(lambda: self._accept(publication))

    def subscribe(self, filters: Sequence[tuple[str, int]], done: Callable[[Sequence[ReasonCode]], None]) -> None:
        """Subscribe to ``(filter, qos)``; ``done`` gets one reason code a filter, or none if we are not connected."""
        self._do(lambda: self._subscribe(filters, done))

    def unsubscribe(self, topics: list[str]) -> None:
        """Best effort: the session forgets subscriptions anyhow when it ends."""
        self._do(lambda: self._unsubscribe(topics))

    def serve_bulk(self, source: BulkSource) -> None:
        """Take publications from ``source``, on the link's thread, whenever the socket has room for one."""
        self._bulk = source
        self._wake()

    def progressed(self) -> None:
        """What came over this connection is verified and kept: when it is lost, the next attempt is soon."""
        self._of_use = True

    def wake_bulk(self) -> None:
        """``source`` has something again. Needless on the link's own thread."""
        if threading.current_thread() is not self._thread:
            self._wake()

    def _do(self, work: Callable[[], None]) -> None:
        self._work.append(work)
        if self._running:
            self._wake()
        else:  # not started, or ended: it fails at once, as without a connection
            self._run_work()

    def _wake(self) -> None:
        try:
            self._wake_out.send(b"\0")
        except OSError:
            return  # full means that a wake-up is under way; closed means that nobody waits

    # Everything below runs on the link's thread.

    def _main(self) -> None:
        backoff = Backoff()
        try:
            while not self._stopping.is_set():
                self._of_use = False
                backoff = self._attempt(backoff)
                if self._of_use:
                    backoff = backoff.progressed()
                if self._stopping.is_set():
                    self._reason = "closed"
                backoff = backoff.lost(time.monotonic(), self._settings.backoff)
                self._ended()
                self._wait(backoff.delay_s(self._settings.backoff, random.random()))  # noqa: S311 - jitter, not a secret
        finally:
            self._running = False
            self._fail_all("the link was closed")
            self._close_wake()

    def _close_wake(self) -> None:
        self._wake_in.close()
        self._wake_out.close()

    def _attempt(self, backoff: Backoff) -> Backoff:
        try:
            return self._converse(backoff) if self._connect() else backoff
        except Exception as error:
            # Whatever a hostile or broken server can make paho raise, the link must come back from.
            _log.exception("link fault", broker=str(self.address))
            self._reason = f"fault in the link: {error!r}"
            return backoff

    def _wait(self, seconds: float) -> None:
        # In slices, so that work handed over meanwhile fails at once instead of after the back-off.
        end = time.monotonic() + seconds
        while not self._stopping.is_set() and (left := end - time.monotonic()) > 0:
            self._stopping.wait(min(left, 0.1))
            self._run_work()

    def _connect(self) -> bool:
        # What ended the attempt before stays the reason until this one says more: who asks meanwhile reads it.
        self._known = False
        if self._reason in ("", _STARTING):
            self._reason = _UNANSWERED
        # Until the broker has accepted us: a line for each packet later would cost more than the packet.
        self._client.on_log = self._on_log
        try:
            if self._client.tls is not None:
                load_certificate(self._client.tls, self._settings)
            self._client.reconnect()
        except LinkError as error:
            self._tell(str(error))
        except (OSError, ValueError) as error:  # ValueError: a host name that cannot be one
            self._tell(reasons.of_exception(error, self._client.host, self._client.port))
        else:
            return True
        return False

    def _converse(self, backoff: Backoff) -> Backoff:
        """Until the connection ends."""
        sock = self._client.socket()
        if sock is None:
            return backoff
        with selectors.DefaultSelector() as selector:
            selector.register(sock, selectors.EVENT_READ)
            selector.register(self._wake_in, selectors.EVENT_READ)
            interest = selectors.EVENT_READ
            while self._client.socket() is sock and not self._stopping.is_set():
                interest = _watch(selector, sock, interest, self._wanted_events())
                self._turn(sock, selector)
                if self._up and backoff.up_since is None:
                    backoff = backoff.connected(time.monotonic())
        self._goodbye()
        return backoff

    @property
    def _held_up(self) -> bool:
        """More is unacknowledged than the broker may have sent: then TCP stops it, for some brokers send on."""
        return len(self._owed) >= 2 * self._settings.receive_maximum

    def _wanted_events(self) -> int:
        read = 0 if self._held_up else selectors.EVENT_READ
        return read | (selectors.EVENT_WRITE if self._client.want_write() else 0)

    def _turn(self, sock: Any, selector: selectors.BaseSelector) -> None:
        client = self._client
        pending = not self._held_up and getattr(sock, "pending", int)() > 0
        ready = selector.select(0.0 if self._bulk_more or pending else 1.0)
        if pending:
            self._read()
        for key, events in ready:
            if key.fileobj is self._wake_in:
                self._drain_wake()
            elif events & selectors.EVENT_READ:
                self._read()
        self._run_work()
        self._send_backlog()
        if client.want_write():
            client.loop_write()
        self._send_bulk()
        client.loop_misc()

    def _read(self) -> None:
        # Set only here: paho would build a reason code and properties for each QoS 0 packet that it writes.
        self._client.on_publish = self._on_publish
        self._client.loop_read()
        self._client.on_publish = None

    def _drain_wake(self) -> None:
        try:
            self._wake_in.recv(4096)
        except BlockingIOError:
            return

    def _run_work(self) -> None:
        while self._work:
            try:
                work = self._work.popleft()
            except IndexError:  # once this thread has ended, others empty it, and two may at once
                return
            work()

    def _goodbye(self) -> None:
        """Flush what is queued and a DISCONNECT after it, unless the connection has ended by itself."""
        if self._up:
            self._client.disconnect()
        end = time.monotonic() + 1.0
        while self._client.socket() is not None and time.monotonic() < end:
            if not self._client.want_write():
                break
            self._client.loop_write()
        if (sock := self._client.socket()) is not None:
            sock.close()

    def _accept(self, publication: Publication) -> None:
        limit = self._max_packet_bytes
        size = len(publication.payload) + len(publication.topic) + 256
        if not self._up:
            publication.done(f"not connected: {self._reason}")
        elif limit is not None and size > limit:
            publication.done(
                f"payload too large: {len(publication.payload)} bytes, and the broker takes packets of {limit}"
            )
        else:
            self._backlog.append(publication)

    def _send_backlog(self) -> None:
        while self._backlog and self._up and len(self._unacknowledged) < self._max_in_flight:
            publication = self._backlog.popleft()
            if publication.cancelled:
                publication.done("given up before it was sent")
            else:
                self._send(publication)

    def _send(self, publication: Publication) -> None:
        properties = publish_properties(publication)
        try:
            info = self._client.publish(
                publication.topic, publication.payload, publication.qos, publication.retain, properties
            )
        except ValueError as error:  # a wildcard in the topic, or 256 MiB of payload
            publication.done(f"cannot be published: {error}")
            return
        if publication.qos == 0:
            publication.done(None)
        else:
            self._unacknowledged[info.mid] = publication.done

    def _send_bulk(self) -> None:
        client = self._client
        self._bulk_more = False
        for _ in range(BULK_BURST):
            if self._bulk is None or not self._up or client.want_write():
                return
            item = self._bulk()
            if item is None:
                return
            client.publish(item[0], item[1], 0)
            client.loop_write()
        self._bulk_more = True

    def _subscribe(self, filters: Sequence[tuple[str, int]], done: Callable[[Sequence[ReasonCode]], None]) -> None:
        if not self._up:
            done([])
            return
        _, mid = self._client.subscribe([(topic, _options(topic, qos)) for topic, qos in filters])
        if mid is None:
            done([])
        else:
            self._subscribing[mid] = done

    def _unsubscribe(self, topics: list[str]) -> None:
        if self._up:
            self._client.unsubscribe(topics)

    def _ended(self) -> None:
        self._up = False
        # What was not acknowledged is the caller's to repeat: a queue that outlives the connection would grow
        # without bound, and send what nobody wants any more.
        self._client.drop_out_messages()
        self._fail_all(f"connection lost: {self._reason}")
        self._listener.disconnected(self._reason)

    def _fail_all(self, reason: str) -> None:
        waiting = list(self._unacknowledged.values()) + [publication.done for publication in self._backlog]
        subscribing = list(self._subscribing.values())
        self._unacknowledged.clear()
        self._backlog.clear()
        self._subscribing.clear()
        for done in waiting:
            done(reason)
        for answer in subscribing:
            answer([])
        self._run_work()

    # paho's callbacks.

    def _on_connect(self, _client: Client, _data: Any, _flags: Any, reason: ReasonCode, properties: Any) -> None:
        """CONNACK."""
        if reason.is_failure:
            self._tell(f"the broker refuses: {reason}")
            return
        self._max_in_flight = min(MAX_IN_FLIGHT, getattr(properties, "ReceiveMaximum", 65535))
        self._max_packet_bytes = getattr(properties, "MaximumPacketSize", None)
        self._reason, self._up = "", True
        self._connections += 1
        self._owed.clear()
        self._client.on_log = None
        self._listener.connected()

    def _on_disconnect(self, _client: Client, _data: Any, flags: Any, reason: ReasonCode, _properties: Any) -> None:
        """The broker's DISCONNECT, or a socket that ended."""
        if flags.is_disconnect_packet_from_server:
            self._reason = f"the broker disconnected us: {reason}"
        elif self._client.refused:
            self._tell(self._client.refused)
            self._client.refused = ""
        elif not self._up and not self._known:
            self._reason = reasons.NO_WORD
        elif self._up:
            self._reason = f"the connection ended: {reason}{_HINTS.get(str(reason), '')}"
        self._up = False

    def _on_log(self, _client: Client, _data: Any, _level: int, line: str) -> None:
        """What the MQTT client keeps to itself: an alert of TLS that came in place of the CONNACK."""
        if (reason := reasons.of_log(line)) is not None:
            self._tell(reason)

    def _tell(self, reason: str) -> None:
        self._reason, self._known = reason, True

    def _on_publish(self, _client: Client, _data: Any, mid: int, reason: ReasonCode, _properties: Any) -> None:
        """PUBACK."""
        done = self._unacknowledged.pop(mid, None)
        if done is not None:
            done(f"the broker refuses: {reason}" if reason.is_failure else None)

    def _on_subscribe(self, _client: Client, _data: Any, mid: int, reasons: list[ReasonCode], _properties: Any) -> None:
        """SUBACK."""
        done = self._subscribing.pop(mid, None)
        if done is not None:
            done(reasons)

    def _on_message(self, _client: Client, _data: Any, message: MQTTMessage) -> None:
        """PUBLISH."""
        acknowledge = self._acknowledger(message.mid, message.qos) if message.qos else None
        try:
            topic = message.topic
        except UnicodeDecodeError:
            if acknowledge is not None:
                acknowledge()
            return
        self._listener.received(to_message(topic, message, acknowledge))

    def _acknowledger(self, mid: int, qos: int) -> Callable[[], None]:
        """Says that a message is safe; its PUBACK goes out once those of all earlier messages have.

        They must go in the order in which the messages came (MQTT 5, section 4.6); rumqttd ends the connection
        otherwise. One of a connection that has ended is not sent: the next one uses the same ids.
        """
        owed, connection = _Owed(mid, qos), self._connections
        self._owed.append(owed)

        def settle() -> None:
            owed.safe = True
            while self._up and connection == self._connections and self._owed and self._owed[0].safe:
                first = self._owed.popleft()
                self._client.ack(first.mid, first.qos)

        return lambda: settle() if threading.current_thread() is self._thread else self._do(settle)

    def _on_plain(self, topic: str, payload: bytes, retained: bool) -> None:
        """PUBLISH at QoS 0 without properties."""
        self._listener.received(Message(topic, payload, retained))


def _watch(selector: selectors.BaseSelector, sock: Any, before: int, wanted: int) -> int:
    """Wait for these events of the socket from now on; a selector cannot wait for none."""
    if wanted == before:
        return wanted
    if not wanted:
        selector.unregister(sock)
    elif before:
        selector.modify(sock, wanted)
    else:
        selector.register(sock, wanted)
    return wanted


def _options(topic: str, qos: int) -> SubscribeOptions:
    # MQTT 5 (4.8.2) has no retained message sent for a shared subscription. Mosquitto 2.0 sends all of them: 30,000 at
    # 10,000 devices, of which it drops what its queue does not hold, and with it what comes behind them.
    never = (
        SubscribeOptions.RETAIN_DO_NOT_SEND
        if topic.startswith("$share/")
        else SubscribeOptions.RETAIN_SEND_ON_SUBSCRIBE
    )
    return SubscribeOptions(qos=qos, retainHandling=never)
