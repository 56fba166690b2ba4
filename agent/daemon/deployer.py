"""Runs the state machine: one event after the other, each decision saved before its effects are performed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import structlog

from agent.contract.base import MalformedMessageError
from agent.contract.failures import FailureCode
from agent.contract.messages import Failure
from agent.core import deployment as core
from agent.core.ports import Journal
from agent.daemon.model_server import ModelServer
from agent.daemon.orders import Orders
from agent.daemon.state import AgentState
from agent.daemon.steps import StepParts, Steps
from agent.errors import AgentError, StoreError
from agent.platform.concurrency import cancelled_once, ended, in_thread

log = structlog.get_logger(component=__name__)

#: A step that was told to stop and has not ended after so many seconds is named in the log, again and again.
SLOW_END_S = 30.0


class Deployer:
    """Owns the deployment. ``run`` takes events until it is cancelled; everything else only posts to it.

    ``on_change`` is called when the fleet should know what is in ``state`` now.
    """

    def __init__(
        self, steps: Steps, parts: StepParts, journal: Journal, state: AgentState, on_change: Callable[[], None]
    ) -> None:
        self._steps = steps
        self._parts = parts
        self._journal = journal
        self._state = state
        self._on_change = on_change
        self._events: asyncio.Queue[tuple[int, core.Event]] = asyncio.Queue()
        self._epoch = 0
        self._task: asyncio.Task[None] | None = None
        #: Halted steps and collections that still run.
        self._ending: set[asyncio.Task[None]] = set()
        state.deployment = self._remembered()
        self.orders = Orders(
            parts.trust, parts.wait_s, state, accept=lambda order: self.post(core.Ordered(order)), on_rejected=on_change
        )
        self._model_server = ModelServer(
            steps, parts.wait_s, current=lambda: self.deployment, post=self.post, on_change=on_change
        )

    @property
    def deployment(self) -> core.Deployment:
        """As it was decided last."""
        return self._state.deployment

    def _remembered(self) -> core.Deployment:
        try:
            document = self._journal.load()
            return core.Deployment() if document is None else core.Deployment.from_json(document)
        except AgentError as error:
            log.error("journal not read, starting afresh", code=error.code.value, error=str(error))
        except MalformedMessageError as error:
            log.error("journal is of no use, starting afresh", error=str(error))
        return core.Deployment()

    def post(self, event: core.Event) -> None:
        """Hand in an event that is not the result of the present step."""
        self._events.put_nowait((-1, event))

    def roll_back(self, reason: str) -> str:
        """Give up what is under way, or go back to the artifact before; returns what will happen.

        Raises:
            AgentError: there is nothing to go back to.
        """
        failure = Failure(code=FailureCode.CANCELLED, message=reason)
        if self.deployment.underway:
            self.post(core.Failed(failure, self.deployment.newest_sequence))
            return f"giving up deployment {self.deployment.deployment_id}"
        if self.deployment.committed is None or self.deployment.previous is None:
            raise AgentError("there is no artifact before this one to roll back to")
        self.post(core.Unhealthy(self.deployment.committed.digest, failure))
        return f"rolling back to {self.deployment.previous.id}"

    async def run(self) -> None:
        """Pick up what the journal says, then live."""
        self.post(core.Restarted())
        try:
            while True:
                epoch, event = await self._events.get()
                if epoch in (-1, self._epoch):
                    await self._handle(event)
        finally:
            self._halt()
            await self.orders.end()
            await self._model_server.end()
            await ended(self._ending)

    async def _handle(self, event: core.Event) -> None:
        before = self.deployment
        try:
            after, effects = core.decide(before, event, self._parts.clock.now())
        except core.IllegalTransitionError as error:
            log.warning("event ignored", error=str(error))
            return
        failure = await self._save(after) if after != before else None
        if failure is not None:
            after, effects = core.decide_unsaved(before, event, (after, effects), failure, self._parts.clock.now())
            if isinstance(event, core.Ordered):
                self.orders.again(failure)
        self._state.deployment = after
        if after.state is not before.state or after.deployment_id != before.deployment_id:
            self._log_change(before, after)
        for effect in effects:
            self._perform(effect)

    async def _save(self, deployment: core.Deployment) -> Failure | None:
        try:
            await in_thread(lambda _stop: self._journal.save(deployment.to_json()))
        except AgentError as error:
            log.error("journal not saved", code=error.code.value, error=str(error))
            return Failure(code=error.code, message=str(error))
        return None

    def _log_change(self, before: core.Deployment, after: core.Deployment) -> None:
        words = {"deployment": after.deployment_id, "was": before.state.value, "state": after.state.value}
        if after.waits_for is not None:
            why = after.waits_for
            log.warning("deployment waits", **words, code=why.code.value, error=why.message)
        elif after.failure is not None:
            log.error("deployment", **words, code=after.failure.code.value, error=after.failure.message)
        else:
            log.info("deployment", **words)

    def _perform(self, effect: core.Effect) -> None:
        match effect:
            case core.Begin(step, deadline_s):
                self._halt()
                self._task = asyncio.create_task(self._run_step(self._epoch, step, deadline_s, tuple(self._ending)))
            case core.Halt():
                self._halt()
            case core.Serve():
                self._model_server.begin()
            case core.Report():
                self._on_change()
            case core.Collect():
                self._on_the_disk(asyncio.create_task(self._collect(tuple(self._ending))))

    async def _collect(self, before: Sequence[asyncio.Task[None]]) -> None:
        await _ended(before)
        keep, spare = self.deployment.keep(), self.deployment.spare()
        try:
            freed = await self._steps.collect(keep, spare)
        except AgentError as error:
            log.warning("old artifacts not collected", code=error.code.value, error=str(error))
        except Exception:  # the boundary: the next collection may work
            log.exception("old artifacts not collected")
        else:
            log.info("old artifacts collected", bytes=freed, kept=len(keep), spared=len(spare))

    def _halt(self) -> None:
        self._epoch += 1
        if self._task is not None:
            self._task.cancel()
            self._on_the_disk(self._task)
            self._task = None

    def _on_the_disk(self, task: asyncio.Task[None]) -> None:
        """Two at once would work on the same files: whatever begins later waits until this has ended."""
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _run_step(
        self, epoch: int, step: core.Step, deadline_s: float | None, before: Sequence[asyncio.Task[None]]
    ) -> None:
        structlog.contextvars.bind_contextvars(deployment=self.deployment.deployment_id)
        event: core.Event
        await _ended(before)
        try:
            async with asyncio.timeout(deadline_s):
                event = await cancelled_once(self._steps.perform(step, self.deployment))
        except TimeoutError:
            event = core.DeadlinePassed(deadline_s or 0.0)
        except AgentError as error:
            needs = error.needs_bytes if isinstance(error, StoreError) else 0
            event = core.Failed(Failure(code=error.code, message=str(error)), needs_bytes=needs)
        except Exception as error:  # the boundary: a fault of ours must end as a reported failure
            log.exception("step broke", step=step.value)
            event = core.Failed(Failure(code=FailureCode.INTERNAL, message=f"{type(error).__name__}: {error}"))
        self._events.put_nowait((epoch, event))


async def _ended(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Wait until all have ended. Cancelling the wait does not cancel them a second time, while they clean up."""
    pending, waited_s = {task for task in tasks if not task.done()}, 0.0
    while pending:
        _, pending = await asyncio.wait(pending, timeout=SLOW_END_S)
        if pending:
            waited_s += SLOW_END_S
            log.warning("step still ending, the next one waits", waited_s=waited_s)
