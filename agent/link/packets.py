"""paho's vocabulary, in and out of ours. No paho type leaves this package."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from agent.core.ports import Message
from agent.link.settings import Address, LinkSettings, Proxy, parse_proxy, tls_context

Done = Callable[[str | None], None]
"""Called once on the link's thread: None, or why it failed."""


@dataclass(slots=True)
class Publication:
    """Handed to the link's thread; ``done`` is called when the broker has it."""

    topic: str
    payload: bytes
    done: Done
    qos: int = 1
    retain: bool = False
    response_topic: str | None = None
    correlation: bytes | None = None
    properties: Mapping[str, str] = field(default_factory=dict)
    #: Nobody wants it sent any more; set by any thread.
    cancelled: bool = False


class LeanClient(Client):
    """paho's client with a shorter way for what comes most: publications at QoS 0 without properties, as chunks are.

    paho builds a table of all properties for each packet and copies its payload five times, which together cost more
    than hashing it. ``on_plain`` is told topic, payload and whether it was retained.
    """

    on_plain: Callable[[str, bytes, bool], None]
    #: As told to the broker with CONNECT (MQTT 5, section 3.1.2.11.4).
    max_packet_bytes: int
    #: Why the connection was ended by this side, if it was.
    refused = ""
    #: What TLS is made with; the certificate in it is read again before each connection.
    tls: ssl.SSLContext | None = None

    def _sock_recv(self, bufsize: int) -> bytes:
        # paho reads a packet of any length that is announced, up to 256 MiB, before anybody may refuse it, and asks
        # for all of the rest at once.
        if bufsize > self.max_packet_bytes:
            self.refused = (
                f"the broker sends a packet of {bufsize} bytes; this client takes {self.max_packet_bytes} at most, as"
                " it said when it connected"
            )
            raise ConnectionError(self.refused)
        return super()._sock_recv(bufsize)

    def _handle_publish(self) -> MQTTErrorCode:
        packet = self._in_packet["packet"]
        command = self._in_packet["command"]
        end = 2 + int.from_bytes(packet[:2], "big")  # of the topic; the length of the properties follows
        if command & 0b0110 or len(packet) <= end or packet[end] != 0:
            return super()._handle_publish()
        try:
            topic = packet[2:end].decode()
        except UnicodeDecodeError:
            return MQTTErrorCode.MQTT_ERR_SUCCESS  # nobody can have subscribed to it
        with memoryview(packet) as view:
            payload = bytes(view[end + 1 :])
        self.on_plain(topic, payload, bool(command & 0b0001))
        return MQTTErrorCode.MQTT_ERR_SUCCESS


def make_client(settings: LinkSettings, address: Address) -> LeanClient:
    """Return a client that knows where to connect, and has not yet.

    Raises:
        agent.errors.LinkError: a certificate cannot be used.
    """
    client = LeanClient(
        CallbackAPIVersion.VERSION2,
        settings.client_id,
        protocol=MQTTProtocolVersion.MQTTv5,
        manual_ack=True,  # the link says when: at once, or when the handler has made the message safe
        transport="tcp" if address.path is None else "websockets",
    )
    if address.path is not None:
        client.ws_set_options(path=address.path)
    if settings.proxy is not None:
        client.proxy_set(**_proxy_arguments(parse_proxy(settings.proxy)))
    client.max_packet_bytes = settings.max_packet_bytes
    client.connect_timeout = settings.connect_timeout_s
    client.max_inflight_messages = 0  # counted here: paho does not know the broker's receive maximum
    client.suppress_exceptions = True
    username = settings.username or address.username
    if username is not None:
        client.username_pw_set(username, settings.password or address.password)
    if address.tls:
        client.tls = tls_context(settings)
        client.tls_set_context(client.tls)
    if settings.will is not None:
        client.will_set(settings.will.topic, settings.will.payload, qos=1, retain=True)
    client.on_socket_open = _no_delay
    # Its presence tells paho that another loop writes; ours asks want_write() in each turn.
    client.on_socket_register_write = lambda *_: None
    client.connect_async(
        address.host,
        address.port,
        settings.keepalive_s,
        clean_start=settings.session_expiry_s == 0,
        properties=_connect_properties(settings),
    )
    return client


def _connect_properties(settings: LinkSettings) -> Properties:
    properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call] # paho types it in part
    properties.SessionExpiryInterval = settings.session_expiry_s
    properties.ReceiveMaximum = settings.receive_maximum
    properties.MaximumPacketSize = settings.max_packet_bytes
    return properties


def _proxy_arguments(proxy: Proxy) -> dict[str, Any]:
    import socks  # PySocks, with which paho speaks to proxies

    return {
        "proxy_type": socks.HTTP if proxy.scheme == "http" else socks.SOCKS5,
        "proxy_addr": proxy.host,
        "proxy_port": proxy.port,
        "proxy_rdns": proxy.looks_up,
        "proxy_username": proxy.username,
        "proxy_password": proxy.password,
    }


def _no_delay(_client: Client, _data: Any, sock: Any) -> None:
    # paho leaves Nagle on, which holds small packets back for up to 40 ms. Its WebSocket keeps the socket within.
    sock = getattr(sock, "_socket", sock) if not isinstance(sock, socket.socket) else sock
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def publish_properties(publication: Publication) -> Properties | None:
    """Of a PUBLISH packet, or None when it needs none."""
    if publication.response_topic is None and publication.correlation is None and not publication.properties:
        return None
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call] # paho types it in part
    if publication.response_topic is not None:
        properties.ResponseTopic = publication.response_topic
    if publication.correlation is not None:
        properties.CorrelationData = publication.correlation
    if publication.properties:
        properties.UserProperty = list(publication.properties.items())
    return properties


def to_message(topic: str, message: MQTTMessage, acknowledge: Callable[[], None] | None) -> Message:
    """Return what the rest of the program sees of a publication."""
    properties = message.properties
    pairs = getattr(properties, "UserProperty", None)
    return Message(
        topic,
        bytes(message.payload),
        message.retain,
        getattr(properties, "ResponseTopic", None),
        getattr(properties, "CorrelationData", None),
        dict(pairs) if pairs else {},
        acknowledge,
    )
