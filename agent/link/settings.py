"""Where the broker is and who we are to it."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from agent.core.backoff import BackoffPolicy
from agent.errors import LinkError

#: Of a broker's URL, with the port that it means. ws and wss are MQTT within WebSocket, which proxies let through.
SCHEMES = {"mqtt": 1883, "mqtts": 8883, "ws": 80, "wss": 443}
_WRITE = "write mqtt://host:port, mqtts://host:port, ws://host:port/path or wss://host:port/path"
#: Of a proxy's URL; ``socks5h`` has the proxy look the broker's name up, as ``http`` always does.
_PROXIES = {"http": 3128, "socks5": 1080, "socks5h": 1080}


@dataclass(frozen=True, slots=True)
class Will:
    """What the broker publishes for us when we vanish: QoS 1, retained."""

    topic: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """An MQTT 5 connection.

    ``url`` is ``mqtt://host[:port]``, ``mqtts://host[:port]``, or ``ws`` or ``wss://host[:port][/path]``, with
    ``user:password@`` where the broker asks for it. ``proxy`` is ``http://``, ``socks5://`` or ``socks5h://host[:port]``,
    with ``user:password@`` where it asks. ``alpn`` is what TLS offers as the application's protocol, such as ``mqtt``
    where a broker shares port 443 with HTTPS. ``ca_file`` is the broker's CA (the system's, when None); ``cert_file``
    and ``key_file`` are the client's, PEM. ``receive_maximum`` bounds the QoS 1 messages that the broker may have under
    way to us. With ``repeat_retained`` the newest retained publication to each topic is sent again at each connect:
    right for what a device says of itself, and wrong for what several controllers publish to the same topics.
    """

    url: str
    client_id: str
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    proxy: str | None = field(default=None, repr=False)
    alpn: str | None = None
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
    #: Of the WebSocket; None where MQTT is spoken on the connection itself.
    path: str | None = None

    def __str__(self) -> str:
        scheme = ("mqtts" if self.tls else "mqtt") if self.path is None else ("wss" if self.tls else "ws")
        return f"{scheme}://{bracketed(self.host)}:{self.port}{self.path or ''}"


@dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy's URL, taken apart. ``looks_up``: it is given the broker's name and not its address."""

    scheme: str
    host: str
    port: int
    looks_up: bool
    username: str | None
    password: str | None = field(repr=False)

    def __str__(self) -> str:
        return f"{self.scheme}://{bracketed(self.host)}:{self.port}"


def bracketed(host: str) -> str:
    """A host as it stands in a URL."""
    return f"[{host}]" if ":" in host else host


def parse_url(url: str) -> Address:
    """Take a broker's URL apart.

    Raises:
        agent.errors.LinkError: no URL of a scheme in ``SCHEMES``; the text says what is missing.
    """
    parts, port = _split("broker URL", url, SCHEMES, _WRITE)
    websocket = parts.scheme in ("ws", "wss")
    if parts.fragment or (not websocket and (parts.path not in ("", "/") or parts.query)):
        raise LinkError(
            f"broker URL ends in {parts.path or '?'!r}; write {parts.scheme}://host:port and nothing after it"
        )
    path = (parts.path or "/mqtt") + (f"?{parts.query}" if parts.query else "")
    return Address(
        host=str(parts.hostname),
        port=port,
        tls=parts.scheme in ("mqtts", "wss"),
        username=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password) if parts.password else None,
        path=path if websocket else None,
    )


def parse_proxy(url: str) -> Proxy:
    """Take a proxy's URL apart.

    Raises:
        agent.errors.LinkError: no URL of a proxy; the text says what it can be.
    """
    parts, port = _split(
        "proxy URL", url, _PROXIES, "write http://host:port, socks5://host:port or socks5h://host:port"
    )
    return Proxy(
        scheme=parts.scheme,
        host=str(parts.hostname),
        port=port,
        looks_up=parts.scheme != "socks5",
        username=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password) if parts.password else None,
    )


def _split(what: str, url: str, schemes: Mapping[str, int], write: str) -> tuple[SplitResult, int]:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise LinkError(f"{what} cannot be read: {error}; {write}") from None
    if parts.scheme not in schemes:
        raise LinkError(f"{what} has the scheme {parts.scheme!r}; {write}")
    if not parts.hostname:
        raise LinkError(f"{what} names no host; write {parts.scheme}://host:port")
    return parts, schemes[parts.scheme] if port is None else port


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
    if settings.alpn is not None:
        context.set_alpn_protocols([settings.alpn])
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
