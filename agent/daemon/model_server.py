"""Keeps the committed artifact serving: tries again what may pass, and says when it is lost for good."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable

import structlog

from agent.contract.failures import FailureCode
from agent.contract.messages import Failure, State
from agent.contract.profile import HealthLimits
from agent.core import deployment as core
from agent.core.supervision import after_failed_serve
from agent.daemon.steps import Steps
from agent.errors import AgentError
from agent.platform.concurrency import cancelled_once, ended

log = structlog.get_logger(component=__name__)


class ModelServer:
    """Performs ``core.Serve``; the newest request replaces one that is waiting for its next attempt."""

    def __init__(
        self,
        steps: Steps,
        wait_s: Callable[[int], float],
        current: Callable[[], core.Deployment],
        post: Callable[[core.Event], None],
        on_change: Callable[[], None],
    ) -> None:
        self._steps = steps
        self._wait_s = wait_s
        self._current = current
        self._post = post
        self._on_change = on_change
        self._turn = 0
        self._woken = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self) -> None:
        """Serve what is committed now, or nothing."""
        self._turn += 1
        self._woken.set()
        task = asyncio.create_task(self._serve(self._turn, tuple(self._tasks)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def end(self) -> None:
        """Stop trying, and wait until what was tried has ended."""
        self._turn += 1
        for task in self._tasks:
            task.cancel()
        await ended(self._tasks)

    async def _serve(self, turn: int, before: tuple[asyncio.Task[None], ...]) -> None:
        await ended(before)
        await cancelled_once(self._keep_trying(turn))

    async def _keep_trying(self, turn: int) -> None:
        for attempt in itertools.count():
            if turn != self._turn:
                return
            self._woken.clear()
            deployment = self._current()
            failure = await self._try(deployment)
            if failure is None:
                self._on_change()
                return
            decision = after_failed_serve(attempt, failure.code, has_previous=deployment.previous is not None)
            wait = self._wait_s(attempt)
            retry_in_s = wait if decision.retry else None
            log.error("not serving", code=failure.code.value, error=failure.message, retry_in_s=retry_in_s)
            if decision.report and deployment.committed is not None:
                self._post(core.Unhealthy(deployment.committed.digest, failure))
            if not decision.retry:
                return
            await self._sleep(wait)

    async def _try(self, deployment: core.Deployment) -> Failure | None:
        try:
            await self._steps.serve(deployment.committed, _limits(deployment))
        except AgentError as error:
            return Failure(code=error.code, message=str(error))
        except Exception as error:  # the boundary: a fault of ours must not leave the device silent
            log.exception("serving broke")
            return Failure(code=FailureCode.INTERNAL, message=f"{type(error).__name__}: {error}")
        return None

    async def _sleep(self, seconds: float) -> None:
        # Not wait_for: until Python 3.12 it swallows a cancellation that comes together with the event.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._woken.wait()


def _limits(deployment: core.Deployment) -> HealthLimits:
    """Return those of the order that put there what serves.

    What serves after a rollback was ordered with others, now gone.
    """
    ordered = deployment.desired if deployment.state is State.COMMITTED else None
    return ordered.limits if ordered else HealthLimits()
