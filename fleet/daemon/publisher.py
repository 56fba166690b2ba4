"""Publishes what devices are told: what the outbox names, as the tables say it now."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta

import structlog

from agent.contract import topics
from agent.link import Link, LinkError
from fleet.core.retry import RetryPolicy
from fleet.daemon.retry import DatabaseRetry
from fleet.registry import Registry
from fleet.registry.outbox import Claim

POLL_S = 0.5
#: Deadlines are hours long; looking for passed ones more often would only cost reads.
TICK_S = 5.0
#: After it a publication that the broker has not acknowledged is given up (see ``fleet.registry.outbox.LEASE``).
PUBLISH_TIMEOUT_S = 10.0
#: Publications whose acknowledgements are awaited together: a fleet's worth must not take a round trip each.
AT_ONCE = 64
#: Devices claimed in one turn; another controller claims the others meanwhile.
AT_MOST = 256
#: Devices that one log line names.
MAX_NAMED = 10

_CLEARED = (topics.desired, topics.presence, topics.facts, topics.reported)

_log = structlog.get_logger(component="controller")


class Publisher:
    """Looks at the outbox a few times a second, as the commands of an operator only write there.

    One topic that the broker refuses, or never acknowledges, holds up no other. ``owner`` is this controller's id.
    """

    def __init__(
        self,
        link: Link,
        registry: Registry,
        clock: Callable[[], datetime],
        notify: Callable[[str], bool],
        poll_s: float = POLL_S,
        *,
        owner: str,
        policy: RetryPolicy | None = None,
    ) -> None:
        self._link, self._registry, self._clock, self._notify, self._poll_s = link, registry, clock, notify, poll_s
        self._owner, self._policy = owner, policy or RetryPolicy()
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._refused: dict[str, str] = {}
        self._away = False
        #: Something is on its way to the broker, or was when this was cancelled.
        self.busy = False

    async def run(self) -> None:
        """Publish, for ever.

        Raises:
            RegistryError: the database was away for too long.
        """
        loop = asyncio.get_running_loop()
        retry, next_tick = DatabaseRetry(), 0.0
        await asyncio.to_thread(self._registry.outbox.take_over, self._clock())
        while True:
            busy = False
            with retry.attempt():
                busy = await self._turn()
                if loop.time() >= next_tick:
                    next_tick = loop.time() + TICK_S
                    await self._tick()
            self._notify("WATCHDOG=1")
            if retry.failing:
                await retry.wait()
            elif not busy:
                await asyncio.sleep(self._poll_s)

    async def _turn(self) -> bool:
        """Claim, publish, write down what became of it; whether there may be more to do at once."""
        if await self._broker_is_away():
            return False
        claims = await asyncio.to_thread(self._registry.outbox.claim, self._owner, self._clock(), AT_MOST)
        if not claims:
            return False
        self.busy = True
        outcomes = await asyncio.gather(*(self._publish(claim) for claim in claims))
        self.busy = False
        taken = [claim for claim, error in zip(claims, outcomes, strict=True) if error is None]
        errors = {claim.device: (claim, error) for claim, error in zip(claims, outcomes, strict=True) if error}
        done = (
            await asyncio.to_thread(self._registry.outbox.complete, self._owner, taken, self._clock()) if taken else []
        )
        if errors:
            now = self._clock()
            again = {device: (claim, error, now + self._wait(claim)) for device, (claim, error) in errors.items()}
            await asyncio.to_thread(self._registry.outbox.refused, self._owner, again)
        self._log(claims, done, {device: error for device, (_, error) in errors.items()})
        return bool(taken)

    def _wait(self, claim: Claim) -> timedelta:
        """Return how long to wait; while the broker is away, nothing was said about this publication in particular."""
        return timedelta(seconds=self._policy.wait_s(claim.attempts + 1) if self._link.connected else 0.0)

    async def _publish(self, claim: Claim) -> str | None:
        """Why the broker has not taken it; None where it has."""
        try:
            async with self._slots:
                for topic, payload in _publications(claim):
                    async with asyncio.timeout(PUBLISH_TIMEOUT_S):
                        await self._link.publish(topic, payload, retain=True)
        except (LinkError, TimeoutError) as error:
            return str(error) or f"no acknowledgement within {PUBLISH_TIMEOUT_S:g} s"
        return None

    def _log(self, claims: Sequence[Claim], done: Sequence[Claim], errors: Mapping[str, str]) -> None:
        for claim in done:
            if claim.barred:
                _log.info("device cleared", device=claim.device)
            elif claim.order is not None:
                _log.info("order published", deployment=claim.deployment, device=claim.device)
        fresh = {device: error for device, error in errors.items() if self._refused.get(device) != error}
        if fresh and self._link.connected:
            named = sorted(fresh)
            more = f" and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else ""
            _log.warning(
                "publications refused, trying again",
                refused=len(errors),
                published=len(done),
                of=len(claims),
                devices=", ".join(named[:MAX_NAMED]) + more,
                error=fresh[named[0]],
            )
        for claim in done:
            if self._refused.pop(claim.device, None) and not self._refused:
                _log.info("no publication refused any more")
        self._refused |= errors

    async def _broker_is_away(self) -> bool:
        away = not self._link.connected
        if away and not self._away:
            waiting = await asyncio.to_thread(self._registry.outbox.waiting)
            if not waiting:
                return True
            _log.warning("not published, waiting for the broker", waiting=waiting)
        self._away = away
        return away

    async def _tick(self) -> None:
        for late in await asyncio.to_thread(self._registry.deployments.tick, self._clock()):
            _log.warning(
                "deployment given up",
                deployment=late.id,
                device=late.device,
                code=late.failure_code,
                error=late.failure_message,
            )


def _publications(claim: Claim) -> list[tuple[str, bytes]]:
    """Topics and payloads in order; an empty payload clears a topic."""
    if claim.barred:
        return [(topic(claim.device), b"") for topic in _CLEARED]
    return [] if claim.order is None else [(topics.desired(claim.device), claim.order)]
