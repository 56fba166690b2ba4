"""Takes orders in: checks each before anybody acts on it, holds them while paused, retries what may yet work."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from agent.contract.failures import FailureCode
from agent.contract.messages import Desired, Failure
from agent.core.orders import AfterRefusal, after_refusal, keys_may_be_new
from agent.core.ports import Trust
from agent.daemon.state import AgentState
from agent.errors import AgentError, TrustError
from agent.platform.concurrency import cancelled_once, ended, in_thread

log = structlog.get_logger(component=__name__)


class Orders:
    """One order at a time: the newest that came replaces one that is still being checked."""

    def __init__(
        self,
        trust: Trust,
        wait_s: Callable[[int], float],
        state: AgentState,
        accept: Callable[[Desired], None],
        on_rejected: Callable[[], None],
    ) -> None:
        self._trust = trust
        self._wait_s = wait_s
        self._state = state
        self._accept = accept
        self._on_rejected = on_rejected
        self._last: bytes | None = None
        self._task: asyncio.Task[None] | None = None
        self._held = False

    def take(self, payload: bytes, after_s: float = 0.0) -> None:
        """A ``SignedDesired`` arrived."""
        self._last = payload
        if self._state.paused:
            self._held = True
            log.info("order held, the agent is paused")
            return
        before = self._task
        self.cancel()
        self._task = asyncio.create_task(self._check_after(before, payload, after_s))

    def again(self, failure: Failure) -> None:
        """The last order was good, but the device could not take it now: try once more, later."""
        self._state.rejected = failure
        if self._last is not None:
            self.take(self._last, after_s=self._wait_s(5))

    def pause(self) -> None:
        """Hold orders, also one that is being checked."""
        self._state.paused = True
        if self._task is not None and not self._task.done():
            self.cancel()
            self._held = True

    def resume(self) -> None:
        """Take orders again, and the newest that was held."""
        self._state.paused = False
        if self._held and self._last is not None:
            self._held = False
            self.take(self._last)

    def cancel(self) -> None:
        """Stop checking."""
        if self._task is not None:
            self._task.cancel()

    async def end(self) -> None:
        """Stop checking, and wait until the check has ended."""
        self.cancel()
        if self._task is not None:
            await ended([self._task])

    async def _check_after(self, before: asyncio.Task[None] | None, payload: bytes, after_s: float) -> None:
        # A check that was cancelled may still be in its thread: two at once would write the same trust store.
        if before is not None:
            await ended([before])
        await asyncio.sleep(after_s)
        await cancelled_once(self._check(payload))

    async def _check(self, payload: bytes) -> None:
        attempt = 0
        while True:
            try:
                order = await self._checked(payload)
            except AgentError as error:
                if after_refusal(error.code) is AfterRefusal.REJECT:
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
                self._state.rejected = None
                self._accept(order)
                return

    async def _checked(self, payload: bytes) -> Desired:
        try:
            return await self._verified(payload)
        except TrustError as error:
            if not keys_may_be_new(error.code):
                raise
        await self._trust.refresh()
        return await self._verified(payload)

    async def _verified(self, payload: bytes) -> Desired:
        # The retained order comes again at every reconnect: the newest accepted is no replay.
        newest = self._state.deployment.newest_sequence - 1
        return await in_thread(lambda _stop: self._trust.verify_desired(payload, newest))

    def _reject(self, code: FailureCode, why: str) -> None:
        log.error("order rejected", code=code.value, error=why)
        self._state.rejected = Failure(code=code, message=why)
        self._on_rejected()
