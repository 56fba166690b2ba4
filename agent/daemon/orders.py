"""Takes orders in: checks each before anybody acts on it, holds them while paused, retries what may yet work."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from agent.contract.failures import FailureCode
from agent.contract.messages import Desired, Failure
from agent.core.ports import Trust
from agent.errors import AgentError, TrustError

log = structlog.get_logger()

#: The controller is away, or the disk is full: neither says anything about the order.
_PASSING = frozenset({FailureCode.TRUST_UNREACHABLE, FailureCode.STORE_DISK_FULL, FailureCode.STORE_IO})
_KEYS_MAY_BE_NEW = frozenset({FailureCode.TRUST_SIGNATURE, FailureCode.TRUST_UNREACHABLE, FailureCode.TRUST_NOT_FOUND})


class Orders:
    """One order at a time: the newest that came replaces one that is still being checked."""

    def __init__(
        self,
        trust: Trust,
        wait_s: Callable[[int], float],
        newest: Callable[[], int],
        accept: Callable[[Desired], None],
        on_rejected: Callable[[], None],
    ) -> None:
        self._trust = trust
        self._wait_s = wait_s
        self._newest = newest
        self._accept = accept
        self._on_rejected = on_rejected
        self._last: bytes | None = None
        self._task: asyncio.Task[None] | None = None
        self._held = False
        #: Whether orders are held for now.
        self.paused = False
        #: Why the last order was not accepted; None when it was.
        self.rejected: Failure | None = None

    def take(self, payload: bytes, after_s: float = 0.0) -> None:
        """A ``SignedDesired`` arrived."""
        self._last = payload
        if self.paused:
            self._held = True
            log.info("order held, the agent is paused")
            return
        self.cancel()
        self._task = asyncio.create_task(self._check(payload, after_s))

    def again(self, failure: Failure) -> None:
        """The last order was good, but the device could not take it now: try once more, later."""
        self.rejected = failure
        if self._last is not None:
            self.take(self._last, after_s=self._wait_s(5))

    def pause(self) -> None:
        """Hold orders, also one that is being checked."""
        self.paused = True
        if self._task is not None and not self._task.done():
            self.cancel()
            self._held = True

    def resume(self) -> None:
        """Take orders again, and the newest that was held."""
        self.paused = False
        if self._held and self._last is not None:
            self._held = False
            self.take(self._last)

    def cancel(self) -> None:
        """Stop checking."""
        if self._task is not None:
            self._task.cancel()

    async def _check(self, payload: bytes, after_s: float) -> None:
        await asyncio.sleep(after_s)
        attempt = 0
        while True:
            try:
                desired = await self._checked(payload)
            except AgentError as error:
                if error.code not in _PASSING:
                    self._reject(error.code, str(error))
                    return
                wait = self._wait_s(attempt)
                log.warning("order not checked yet", code=error.code.value, error=str(error), retry_in_s=wait)
                await asyncio.sleep(wait)
                attempt += 1
            except Exception as error:  # the boundary: a fault of ours must not end the taking of orders unseen
                log.exception("order check broke")
                self._reject(FailureCode.INTERNAL, f"{type(error).__name__}: {error}")
                return
            else:
                self.rejected = None
                self._accept(desired)
                return

    async def _checked(self, payload: bytes) -> Desired:
        # The retained order comes again at every reconnect: the newest accepted is no replay.
        newest = self._newest() - 1
        try:
            return await asyncio.to_thread(self._trust.verify_desired, payload, newest)
        except TrustError as error:
            if error.code not in _KEYS_MAY_BE_NEW:
                raise
        await self._trust.refresh()  # the director's keys may be new to this device
        return await asyncio.to_thread(self._trust.verify_desired, payload, newest)

    def _reject(self, code: FailureCode, why: str) -> None:
        log.error("order rejected", code=code.value, error=why)
        self.rejected = Failure(code=code, message=why)
        self._on_rejected()
