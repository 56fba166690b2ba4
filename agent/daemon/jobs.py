"""The agent's background jobs: a vital one that fails ends the agent, an optional one fails alone and is retried."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from agent.core.supervision import RestartPolicy
from agent.errors import AgentError
from agent.platform.concurrency import ended

log = structlog.get_logger(component=__name__)

#: An optional job is retried for ever, ever more seldom; after ``window_s`` without a failure the pauses begin anew.
RETRY = RestartPolicy(window_s=300.0, first_s=1.0, max_s=60.0)


@dataclass(frozen=True, slots=True)
class Job:
    """``run`` lasts as long as the agent, unless it has nothing (more) to do.

    ``vital``: without it the device cannot be what it is for, so the agent ends and its service manager starts it
    afresh. Whatever else goes wrong must not take the served model away.
    """

    name: str
    run: Callable[[], Coroutine[Any, Any, None]]
    vital: bool = False


class Jobs:
    """Runs them side by side."""

    def __init__(self, jobs: Sequence[Job], retry: RestartPolicy = RETRY) -> None:
        self._jobs = jobs
        self._retry = retry
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin all of them."""
        self._tasks = [
            asyncio.create_task(job.run() if job.vital else self._kept_running(job), name=job.name)
            for job in self._jobs
        ]

    async def until(self, stop: asyncio.Event) -> None:
        """Until ``stop``, or until a vital job fails.

        Raises:
            Exception: whatever the vital job raised.
        """
        stopping = asyncio.create_task(stop.wait())
        pending: set[asyncio.Task[Any]] = {stopping, *self._tasks}
        try:
            while not stopping.done():
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            stopping.cancel()

    async def end(self) -> None:
        """Cancel all of them, and wait until they have ended."""
        for task in self._tasks:
            task.cancel()
        await ended(self._tasks)

    async def _kept_running(self, job: Job) -> None:
        clock = asyncio.get_running_loop().time
        failures = 0
        for _ in itertools.count():
            began = clock()
            try:
                await job.run()
            except Exception as error:  # the boundary: it fails alone, whatever it was
                failures = 1 if clock() - began >= self._retry.window_s else failures + 1
                pause = self._retry.pause_s(failures + 1)
                _log_failure(job, error, pause)
            else:
                return
            await asyncio.sleep(pause)


def _log_failure(job: Job, error: Exception, retry_in_s: float) -> None:
    known = {"code": error.code.value} if isinstance(error, AgentError) else {}
    text = str(error) if isinstance(error, AgentError) else f"{type(error).__name__}: {error}"
    # An error that the world makes explains itself; any other is a fault of ours, and its traceback is wanted.
    expected = isinstance(error, AgentError | OSError)
    write = log.warning if expected else log.exception
    write("optional job failed, the agent goes on", job=job.name, error=text, retry_in_s=retry_in_s, **known)
