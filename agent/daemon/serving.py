"""Keeps the committed artifact serving: tries again what may pass, and says when it is lost for good."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from agent.contract.failures import FailureCode
from agent.contract.messages import ArtifactRef, Failure, State
from agent.contract.profile import HealthLimits
from agent.core import deployment as core
from agent.daemon.steps import Works
from agent.errors import AgentError

log = structlog.get_logger()

#: Attempts with the newest artifact before the one before it is tried, where there is one.
PATIENT_ATTEMPTS = 3
#: After so many there is no more trying until the next restart or order.
MOST_ATTEMPTS = 30


class Serving:
    """Performs ``core.Serve``; the newest request replaces one that is waiting for its next attempt."""

    def __init__(
        self,
        works: Works,
        wait_s: Callable[[int], float],
        current: Callable[[], core.Deployment],
        post: Callable[[core.Event], None],
        on_change: Callable[[], None],
    ) -> None:
        self._works = works
        self._wait_s = wait_s
        self._current = current
        self._post = post
        self._on_change = on_change
        self._turn = 0
        self._woken = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Serve what is committed now, or nothing."""
        self._turn += 1
        self._woken.set()
        self._task = asyncio.create_task(self._serve(self._turn, self._task))

    async def end(self) -> None:
        """Stop trying."""
        self._turn += 1
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _serve(self, turn: int, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.gather(before, return_exceptions=True)
        for attempt in range(MOST_ATTEMPTS):
            if turn != self._turn:
                return
            self._woken.clear()
            deployment = self._current()
            failure = await self._try(deployment)
            if failure is None:
                self._on_change()
                return
            lost = failure.code is FailureCode.STORE_CORRUPT
            last = lost or (attempt + 1 == PATIENT_ATTEMPTS and deployment.previous is not None)
            wait = self._wait_s(attempt)
            log.error("not serving", code=failure.code.value, reason=failure.message, retry_in_s=None if last else wait)
            if attempt == 0 or last:
                self._tell(deployment.committed, failure, lose=last)
            if last:
                return
            await self._sleep(wait)

    async def _try(self, deployment: core.Deployment) -> Failure | None:
        try:
            await self._works.serve(deployment.committed, _limits(deployment))
        except AgentError as error:
            return Failure(code=error.code, message=str(error))
        except Exception as error:  # the boundary: a fault of ours must not leave the device silent
            log.exception("serving broke")
            return Failure(code=FailureCode.INTERNAL, message=f"{type(error).__name__}: {error}")
        return None

    def _tell(self, committed: ArtifactRef | None, failure: Failure, *, lose: bool) -> None:
        if committed is not None and (lose or self._current().previous is None):
            self._post(core.Unhealthy(committed.digest, failure))

    async def _sleep(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._woken.wait(), seconds)
        except TimeoutError:
            return


def _limits(deployment: core.Deployment) -> HealthLimits:
    """Those of the order that put there what serves; what serves after a rollback was ordered with others, now gone."""
    ordered = deployment.desired if deployment.state is State.COMMITTED else None
    return ordered.limits if ordered else HealthLimits()
