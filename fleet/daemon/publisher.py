"""Publishes what devices are told: orders that were recorded, and nothing any more for devices that are barred."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from datetime import datetime

import structlog

from agent.contract import topics
from agent.link import Link
from fleet.daemon.outbox import Item, Outbox
from fleet.daemon.retry import DatabaseRetry
from fleet.registry import Registry
from fleet.registry.models import DeploymentRow

POLL_S = 0.5
#: Deadlines are hours long; looking for passed ones more often would only cost reads.
TICK_S = 5.0
#: Orders handed to the link in one turn; their envelopes are in memory for so long.
AT_MOST = 512
#: Devices that one log line names.
MAX_NAMED = 10

_CLEARED = (topics.desired, topics.presence, topics.facts, topics.reported)
_CLEAR = "clear "

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
        #: Orders that a controller before this one has published, by deployment: the broker may have lost them since.
        self._again: dict[str, str] | None = None
        self._progress = _Progress()
        self._away = False

    async def run(self) -> None:
        """Publish, for ever.

        Raises:
            RegistryError: the database was away for too long.
        """
        loop = asyncio.get_running_loop()
        retry, next_tick = DatabaseRetry(), 0.0
        outbox = Outbox(self._link, loop.time)
        try:
            while True:
                with retry.attempt():
                    await self._turn(outbox)
                    if loop.time() >= next_tick:
                        next_tick = loop.time() + TICK_S
                        await self._tick()
                self._notify("WATCHDOG=1")
                if retry.failing:
                    await retry.wait()
                else:
                    await outbox.wait(self._poll_s)
        finally:
            await outbox.close()

    async def _turn(self, outbox: Outbox) -> None:
        await self._record(outbox)
        devices = await self._wanted()
        outbox.keep_only(devices.keys())
        self._progress.tell(outbox, devices)
        if self._broker_is_away(len(devices)):
            return
        due = outbox.due(devices)[:AT_MOST]
        outbox.offer(_clearance(devices[key], key) for key in due if key.startswith(_CLEAR))
        await self._offer_orders(outbox, [key for key in due if not key.startswith(_CLEAR)])

    async def _wanted(self) -> dict[str, str]:
        """What the broker should have and is not known to: keys of items, and the device of each."""
        deployments = self._registry.deployments
        if self._again is None:
            self._again = await asyncio.to_thread(deployments.to_publish, True, self._clock())
        queued = await asyncio.to_thread(deployments.to_publish, False, self._clock())
        barred = await asyncio.to_thread(self._registry.devices.to_clear)
        return {f"{_CLEAR}{device}": device for device in barred} | self._again | queued

    async def _offer_orders(self, outbox: Outbox, keys: list[str]) -> None:
        if not keys:
            return
        rows = await asyncio.to_thread(self._registry.deployments.orders, keys, self._clock())
        for key in set(keys) - {row.id for row in rows}:
            (self._again or {}).pop(key, None)  # overtaken by another order, or over
        outbox.offer(_order(row) for row in rows)

    async def _record(self, outbox: Outbox) -> None:
        """Write down what was taken and what was refused since the last turn."""
        sent, refused = outbox.settled()
        orders = [item for item in sent if not item.key.startswith(_CLEAR)]
        cleared = [item.device for item in sent if item.key.startswith(_CLEAR)]
        if orders:
            ids = [item.key for item in orders]
            await asyncio.to_thread(self._registry.deployments.mark_published, ids, self._clock())
        if cleared:
            await asyncio.to_thread(self._registry.devices.mark_cleared, cleared)
        if refused:
            await asyncio.to_thread(self._registry.deployments.mark_refused, refused)
        outbox.forget()
        self._progress.sent += len(sent)
        for item in orders:
            again = (self._again or {}).pop(item.key, None) is not None
            event = "order published again" if again else "order published"
            _log.info(event, deployment=item.key, device=item.device)
        for device in cleared:
            _log.info("device cleared", device=device)

    def _broker_is_away(self, waiting: int) -> bool:
        away = not self._link.connected
        if away and waiting and not self._away:
            _log.warning("not published, waiting for the broker", waiting=waiting)
            self._away = True
        elif not away:
            self._away = False
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


class _Progress:
    """Says how many of how many were published, when some are refused."""

    def __init__(self) -> None:
        self.sent = 0
        self._told = 0

    def tell(self, outbox: Outbox, devices: Mapping[str, str]) -> None:
        """Once all that was on its way has ended, if that has changed anything."""
        errors = outbox.errors
        if outbox.busy or (len(errors) == self._told and not (errors and self.sent)):
            return
        if errors:
            named = sorted({devices[key] for key in errors})
            more = f" and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else ""
            _log.warning(
                "publications refused, trying again",
                refused=len(errors),
                published=self.sent,
                of=self.sent + len(devices),
                devices=", ".join(named[:MAX_NAMED]) + more,
                error=next(iter(errors.values())),
            )
        else:
            _log.info("no publication refused any more", published=self.sent)
        self.sent, self._told = 0, len(errors)


def _order(row: DeploymentRow) -> Item:
    return Item(row.id, row.device, ((topics.desired(row.device), row.envelope),))


def _clearance(device: str, key: str) -> Item:
    return Item(key, device, tuple((topic(device), b"") for topic in _CLEARED))
