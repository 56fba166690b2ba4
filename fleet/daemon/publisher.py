"""Publishes what devices are told: orders that were recorded, and nothing any more for devices that were removed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime

import structlog

from agent.contract import topics
from agent.link import Link, LinkError
from fleet.daemon.retry import DatabaseRetry
from fleet.registry import Registry
from fleet.registry.models import DeploymentRow

POLL_S = 0.5
#: Deadlines are hours long; looking for passed ones more often would only cost reads.
TICK_S = 5.0
PUBLISH_TIMEOUT_S = 30.0
#: Orders whose acknowledgements are awaited together: a fleet's worth must not take a round trip each.
AT_ONCE = 64

_log = structlog.get_logger("controller")


class Publisher:
    """Looks at the registry a few times a second, as the commands of an operator only write there."""

    def __init__(
        self,
        link: Link,
        registry: Registry,
        clock: Callable[[], datetime],
        notify: Callable[[str], bool],
        poll_s: float = POLL_S,
    ) -> None:
        self._link, self._registry, self._clock, self._notify, self._poll_s = link, registry, clock, notify, poll_s
        self._restarted = True
        self._unreachable = False

    async def run(self) -> None:
        """Publish, for ever.

        Raises:
            RegistryError: the database was away for too long.
        """
        retry, next_tick = DatabaseRetry(), 0.0
        loop = asyncio.get_running_loop()
        while True:
            with retry.attempt():
                await self._publish_orders()
                await self._clear_removed()
                if loop.time() >= next_tick:
                    next_tick = loop.time() + TICK_S
                    await self._tick()
            self._notify("WATCHDOG=1")
            if retry.failing:
                await retry.wait()
            else:
                await asyncio.sleep(self._poll_s)

    async def _publish_orders(self) -> None:
        orders = await asyncio.to_thread(self._registry.deployments.to_publish, self._restarted, self._clock())
        for start in range(0, len(orders), AT_ONCE):
            some = orders[start : start + AT_ONCE]
            sent = await asyncio.gather(*(self._send_order(order) for order in some))
            done = [order for order, acknowledged in zip(some, sent, strict=True) if acknowledged]
            if done:
                ids = [order.id for order in done]
                await asyncio.to_thread(self._registry.deployments.mark_published, ids, self._clock())
            for order in done:
                _log_published(order)
            if len(done) < len(some):
                return
            self._notify("WATCHDOG=1")
        self._restarted = False

    async def _send_order(self, order: DeploymentRow) -> bool:
        return await self._send(topics.desired(order.device), order.envelope, deployment=order.id)

    async def _clear_removed(self) -> None:
        for device in await asyncio.to_thread(self._registry.devices.to_clear):
            for topic in (topics.desired, topics.presence, topics.facts, topics.reported):
                if not await self._send(topic(device), b"", device=device):
                    return
            await asyncio.to_thread(self._registry.devices.mark_cleared, device)
            _log.info("device cleared", device=device)

    async def _send(self, topic: str, payload: bytes, **context: str) -> bool:
        try:
            async with asyncio.timeout(PUBLISH_TIMEOUT_S):
                await self._link.publish(topic, payload, retain=True)
        except (LinkError, TimeoutError) as error:
            if not self._unreachable:
                _log.warning("not published, trying again", error=str(error) or "no acknowledgement", **context)
            self._unreachable = True
            return False
        self._unreachable = False
        return True

    async def _tick(self) -> None:
        for late in await asyncio.to_thread(self._registry.deployments.tick, self._clock()):
            _log.warning(
                "deployment given up",
                deployment=late.id,
                device=late.device,
                code=late.failure_code,
                error=late.failure_message,
            )


def _log_published(order: DeploymentRow) -> None:
    again = order.published_at is not None
    _log.info(
        "order published again" if again else "order published",
        deployment=order.id,
        device=order.device,
        artifact=order.artifact,
        sequence=order.sequence,
    )
