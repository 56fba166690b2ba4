"""Delivers the audit's entries to webhooks: each in its own time, in order, again until it is taken.

Signed as Standard Webhooks 1.0 has it (standardwebhooks.com): HMAC-SHA256 over id, timestamp and body.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import hmac
import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta

import structlog
from aiohttp import ClientError, ClientSession, ClientTimeout

from fleet.core.retry import RetryPolicy
from fleet.errors import RegistryError
from fleet.operations.views import describe_audit
from fleet.registry import Registry
from fleet.registry.webhooks import SECRET_PREFIX, Due

POLL_S = 0.5
TIMEOUT_S = 10.0
#: The receiver is gone for good.
GONE = 410

_log = structlog.get_logger(component="webhooks")


class WebhookSender:
    """A part that runs beside the controller; a receiver that hangs holds up nobody but itself."""

    def __init__(
        self,
        registry: Callable[[], Registry],
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        policy: RetryPolicy | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._open, self._clock, self._timeout_s = registry, clock, timeout_s
        self._policy = policy or RetryPolicy(first_s=5.0, most_s=3600.0)
        self._under_way: dict[str, asyncio.Task[None]] = {}
        self._ready = asyncio.Event()

    async def run(self) -> None:
        """Deliver, for ever."""
        registry = await asyncio.to_thread(self._open)
        async with ClientSession(timeout=ClientTimeout(total=self._timeout_s)) as session:
            try:
                while True:
                    try:
                        due = await asyncio.to_thread(registry.webhooks.claim, self._clock(), list(self._under_way))
                    except RegistryError as error:  # the publisher counts how long the database is away
                        _log.debug("webhooks not read", error=str(error))
                        due = []
                    for one in due:
                        task = asyncio.create_task(self._deliver(session, registry, one))
                        self._under_way[one.id] = task
                        task.add_done_callback(functools.partial(self._ended, one.id))
                    # Who waits for a delivery is woken by it: what comes next is due at once.
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(POLL_S):
                            await self._ready.wait()
                    self._ready.clear()
            finally:
                for task in list(self._under_way.values()):
                    task.cancel()
                await asyncio.gather(*self._under_way.values(), return_exceptions=True)

    def _ended(self, webhook: str, _: asyncio.Task[None]) -> None:
        self._under_way.pop(webhook, None)
        self._ready.set()

    async def _deliver(self, session: ClientSession, registry: Registry, due: Due) -> None:
        error, gone = await self._post(session, due)
        try:
            if error is None:
                await asyncio.to_thread(registry.webhooks.delivered, due, self._clock())
                return
            wait = timedelta(seconds=self._policy.wait_s(due.failures + 1))
            again = None if gone else self._clock() + wait
            await asyncio.to_thread(registry.webhooks.failed, due, error, again)
        except RegistryError as failure:  # its lease ends, and it is sent once more
            _log.debug("delivery not written down", webhook=due.id, error=str(failure))
            return
        if due.failures == 0 or gone:
            hint = "it is sent nothing more" if gone else "it is tried again"
            _log.warning("webhook does not take what it is sent", webhook=due.id, url=due.url, error=error, hint=hint)

    async def _post(self, session: ClientSession, due: Due) -> tuple[str | None, bool]:
        assert due.entry is not None  # noqa: S101 - that is what made it due
        entry = due.entry
        at = self._clock()
        body = json.dumps({"type": entry.action, "timestamp": entry.at.isoformat(), "data": describe_audit(entry)})
        headers = sign(due.secret, f"audit_{due.id}_{entry.id}", at, body.encode())
        try:
            async with session.post(due.url, data=body.encode(), headers=headers, allow_redirects=False) as response:
                if 200 <= response.status < 300:
                    return None, False
                return f"{response.status} {response.reason or ''}".strip(), response.status == GONE
        except TimeoutError:
            return f"no answer within {self._timeout_s:g} s", False
        except (ClientError, OSError, ValueError) as error:
            return f"{type(error).__name__}: {error}", False


def sign(secret: str, identity: str, at: datetime, body: bytes) -> Mapping[str, str]:
    """Return the headers of a delivery."""
    moment = str(int(at.timestamp()))
    key = base64.b64decode(secret.removeprefix(SECRET_PREFIX))
    signature = base64.b64encode(hmac.digest(key, f"{identity}.{moment}.".encode() + body, "sha256")).decode()
    return {
        "Content-Type": "application/json",
        "webhook-id": identity,
        "webhook-timestamp": moment,
        "webhook-signature": f"v1,{signature}",
    }
