"""The settings of the endpoint, and the refusals that need no socket."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from agent.endpoint.openai.strictness import Strictness
from agent.errors import ConfigError
from agent.platform.addresses import is_loopback

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A bearer key and what its holder may do. None: not limited.

    ``secret`` is the key itself, or ``sha256:<hex>`` so that a configuration file need not hold it.
    """

    name: str
    secret: str = field(repr=False)
    requests_per_minute: int | None = None
    concurrent: int | None = None

    def digest(self) -> bytes:
        """Return SHA-256 of the key.

        Raises:
            ConfigError: it is empty, or ``sha256:`` is not followed by 64 hex digits.
        """
        if not self.secret:
            raise ConfigError(f"API key {self.name!r} is empty: give it a value, or leave it out")
        if not self.secret.startswith("sha256:"):
            return hashlib.sha256(self.secret.encode()).digest()
        try:
            digest = bytes.fromhex(self.secret.removeprefix("sha256:"))
        except ValueError:
            digest = b""
        if len(digest) != hashlib.sha256().digest_size:
            raise ConfigError(f"API key {self.name!r}: 'sha256:' must be followed by 64 hex digits")
        return digest


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client, and all together, may take. Times in seconds."""

    body_bytes: int = 2 * MIB
    #: Of all requests in flight together; a request past it is refused at once, with a Retry-After.
    bodies_bytes: int = 64 * MIB
    header_bytes: int = 16 * 1024
    headers: int = 64
    connections: int = 512
    #: From the first byte of a request (or from connecting) to the end of its headers.
    header_timeout_s: float = 10.0
    #: For the whole body.
    body_timeout_s: float = 30.0
    keepalive_timeout_s: float = 75.0
    #: For the whole generation, waiting in the model host's queue included.
    request_timeout_s: float = 600.0
    #: A client that does not read its stream for so long is dropped.
    write_timeout_s: float = 30.0
    #: Choices of one request (``n``), and prompts of one completions request.
    choices: int = 8
    stored_responses: int = 256
    #: Responses that are made in the background at the same time.
    background_responses: int = 16
    stored_bytes: int = 16 * MIB
    stored_age_s: float = 3600.0


@dataclass(frozen=True, slots=True)
class EndpointConfig:
    """Where to listen, whom to serve, and how much.

    ``unix_socket`` takes the place of ``host`` and ``port``. ``port`` 0 is a free one. ``allowed_hosts`` are
    names beside the address that clients may use in the Host header (which refuses DNS rebinding).
    """

    host: str = "127.0.0.1"
    port: int = 8600
    unix_socket: Path | None = None
    keys: tuple[ApiKey, ...] = ()
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    tls_cert: Path | None = None
    tls_key: Path | None = None
    allow_plain_http: bool = False
    #: What happens to parameters of a request that this API does not have.
    unknown_parameters: Strictness = Strictness.WARN
    limits: Limits = Limits()
    #: Seconds that ``stop`` gives to the requests in flight.
    drain_s: float = 10.0

    def check(self) -> None:
        """Refuse what is unsafe or cannot work.

        Raises:
            ConfigError: says which setting, and what to do.
        """
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("tls_cert and tls_key go together: give both PEM files, or neither")
        for file in (self.tls_cert, self.tls_key):
            if file is not None and not file.is_file():
                raise ConfigError(f"TLS file {file} does not exist: name a PEM file")
        if self.unix_socket is None and not self.loopback and self.tls_cert is None and not self.allow_plain_http:
            raise ConfigError(
                f"the endpoint would serve {self.host} without TLS: give tls_cert and tls_key, listen on 127.0.0.1 or "
                "a Unix socket, or set allow_plain_http if the network is trusted"
            )
        digests = [key.digest() for key in self.keys]
        if len(set(digests)) != len(digests):
            raise ConfigError("two API keys are the same: each holder needs its own")

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        return self.unix_socket is not None or is_loopback(self.host)
