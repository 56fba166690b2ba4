"""Who may ask, how often, and from which web pages."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from aiohttp import web

from agent.endpoint.http.config import ApiKey, EndpointConfig
from agent.endpoint.openai.errors import ApiError

#: Open without a key: probes of supervisors, and the page, whose calls then need one.
_OPEN = frozenset({"/health/live", "/health/ready", "/", "/favicon.ico"})
_OPEN_PREFIX = "/static/"
#: A header's name, as RFC 9110 has it.
_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,128}")
_LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})


class Keyring:
    """The bearer keys, each with its own limits."""

    def __init__(self, keys: tuple[ApiKey, ...]) -> None:
        # Looked up by digest: the time that comparing digests takes says nothing about a key.
        self._holders = {key.digest(): _Holder(key) for key in keys}

    def holder(self, request: web.Request) -> _Holder | None:
        """Who asks; None where no keys are set.

        Raises:
            ApiError: 401, the key is missing or unknown.
        """
        if not self._holders:
            return None
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if not scheme and (key := request.headers.get("X-Api-Key")):  # as Anthropic's clients send it
            scheme, token = "bearer", key
        holder = self._holders.get(hashlib.sha256(token.strip().encode(errors="surrogateescape")).digest())
        if scheme.lower() != "bearer" or holder is None:
            raise ApiError(
                401,
                "a valid key is needed: send 'Authorization: Bearer <key>'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return holder


class _Holder:
    """A token bucket for requests a minute, and a count of those running."""

    def __init__(self, key: ApiKey) -> None:
        self.key = key
        self._running = 0
        self._credit = float(key.requests_per_minute or 0)
        self._at: float | None = None

    @contextmanager
    def request(self) -> Iterator[None]:
        """One request within the limits.

        Raises:
            ApiError: 429, with the time after which there is room.
        """
        self._spend()
        concurrent = self.key.concurrent
        if concurrent is not None and self._running >= concurrent:
            raise self._refusal(f"{concurrent} requests at once", 1.0)
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    def _spend(self) -> None:
        rate = self.key.requests_per_minute
        if rate is None:
            return
        now = asyncio.get_running_loop().time()
        if self._at is not None:
            self._credit = min(float(rate), self._credit + (now - self._at) * rate / 60)
        self._at = now
        if self._credit < 1:
            raise self._refusal(f"{rate} requests a minute", (1 - self._credit) * 60 / rate)
        self._credit -= 1

    def _refusal(self, limit: str, retry_after_s: float) -> ApiError:
        message = f"the key {self.key.name!r} is limited to {limit}"
        return ApiError(429, message, code="rate_limit_exceeded", kind="busy", retry_after_s=retry_after_s)


def is_open(path: str) -> bool:
    """Return whether a path is served without a key."""
    return path in _OPEN or path.startswith(_OPEN_PREFIX)


def check_host(request: web.Request, config: EndpointConfig) -> None:
    """On loopback, a page from elsewhere could reach us under a name of its own (DNS rebinding): only our names pass.

    Raises:
        ApiError: 403.
    """
    if config.unix_socket is not None or not config.loopback:
        return
    host = _hostname(request.headers.get("Host", ""))
    if host in _LOOPBACK_HOSTS or host == config.host or host in config.allowed_hosts:
        return
    if request.version < (1, 1) and not host:
        return
    raise ApiError(403, f"the Host {host[:128]!r} is not served here: use 127.0.0.1 or localhost", code="host_refused")


def _hostname(header: str) -> str:
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return header


class Cors:
    """Origins that browsers may call from. None are, unless named; ``*`` names all."""

    def __init__(self, origins: tuple[str, ...]) -> None:
        self._origins = frozenset(origins)

    def check(self, request: web.Request) -> str | None:
        """Return the origin to allow, or None where the request comes from no foreign page.

        Raises:
            ApiError: 403, a page of another origin asks.
        """
        origin = request.headers.get("Origin")
        if origin is None:
            return None
        if origin in self._origins or "*" in self._origins:
            return origin
        if origin == f"{request.scheme}://{request.host}":
            return None
        raise ApiError(403, f"the origin {origin[:128]!r} may not call this endpoint", code="origin_refused")

    def preflight(self, origin: str, wanted: str) -> web.Response:
        """Return the answer to a browser that asks first; ``wanted`` are the headers that its page adds.

        An origin that may call may add what it likes: clients name their version and platform in headers of their own.
        """
        allowed = [name for part in wanted.split(",")[:64] if _HEADER.fullmatch(name := part.strip())]
        return web.Response(
            status=204,
            headers={
                **self.headers(origin),
                "Access-Control-Allow-Methods": "GET, POST, DELETE",
                "Access-Control-Allow-Headers": ", ".join(dict.fromkeys(["Authorization", "Content-Type", *allowed])),
                "Access-Control-Max-Age": "600",
            },
        )

    @staticmethod
    def headers(origin: str) -> dict[str, str]:
        """On every answer to that origin."""
        return {"Access-Control-Allow-Origin": origin, "Vary": "Origin", "Access-Control-Expose-Headers": "*"}
