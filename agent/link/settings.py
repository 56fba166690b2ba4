"""Where the broker is and who we are to it."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from agent.core.backoff import BackoffPolicy
from agent.errors import LinkError

_PORTS = {"mqtt": 1883, "mqtts": 8883}


@dataclass(frozen=True, slots=True)
class Will:
    """What the broker publishes for us when we vanish: QoS 1, retained."""

    topic: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """An MQTT 5 connection.

    ``url`` is ``mqtt://host[:port]`` or ``mqtts://host[:port]``, with ``user:password@`` where the broker asks for
    it. ``ca_file`` is the broker's CA (the system's, when None); ``cert_file`` and ``key_file`` are the client's, PEM.
    ``receive_maximum`` bounds the QoS 1 messages that the broker may have under way to us. With ``repeat_retained``
    the newest retained publication to each topic is sent again at each connect: right for what a device says of
    itself, and wrong for what several controllers publish to the same topics.
    """

    url: str
    client_id: str
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    will: Will | None = None
    keepalive_s: int = 30
    session_expiry_s: int = 0
    receive_maximum: int = 1024
    repeat_retained: bool = False
    max_packet_bytes: int = 1024 * 1024
    connect_timeout_s: float = 10.0
    backoff: BackoffPolicy = field(default_factory=BackoffPolicy)


@dataclass(frozen=True, slots=True)
class Address:
    """A broker's URL, taken apart. As text it holds no password, so it may be logged."""

    host: str
    port: int
    tls: bool
    username: str | None
    password: str | None = field(repr=False)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}"


def parse_url(url: str) -> Address:
    """Take a broker's URL apart.

    Raises:
        agent.errors.LinkError: no ``mqtt://`` or ``mqtts://`` URL; the text says what is missing.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise LinkError(f"broker URL cannot be read: {error}; write mqtt://host:port or mqtts://host:port") from None
    if parts.scheme not in _PORTS:
        raise LinkError(f"broker URL has the scheme {parts.scheme!r}; write mqtt://host:port or mqtts://host:port")
    if not parts.hostname:
        raise LinkError(f"broker URL names no host; write {parts.scheme}://host:port")
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise LinkError(
            f"broker URL ends in {parts.path or '?'!r}; write {parts.scheme}://host:port and nothing after it"
        )
    return Address(
        host=parts.hostname,
        port=_PORTS[parts.scheme] if port is None else port,
        tls=parts.scheme == "mqtts",
        username=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password) if parts.password else None,
    )


def tls_context(settings: LinkSettings) -> ssl.SSLContext:
    """TLS 1.2 or later; the broker's name is always checked.

    Raises:
        agent.errors.LinkError: a certificate or key cannot be read; the text names the file.
    """
    try:
        context = ssl.create_default_context(cafile=settings.ca_file)
    except (OSError, ssl.SSLError) as error:
        raise LinkError(f"the broker's CA certificate cannot be read: {settings.ca_file}: {error}") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    load_certificate(context, settings)
    return context


def load_certificate(context: ssl.SSLContext, settings: LinkSettings) -> None:
    """Read the client certificate and its key, if there are any: it may have been renewed since the last time.

    Raises:
        agent.errors.LinkError: a file cannot be read; the text names both.
    """
    if settings.cert_file is None:
        return
    try:
        context.load_cert_chain(settings.cert_file, settings.key_file)
    except (OSError, ssl.SSLError) as error:
        files = f"{settings.cert_file} and {settings.key_file}"
        raise LinkError(f"the client certificate and its key cannot be used: {files}: {error}") from None
