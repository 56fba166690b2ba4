"""Runs the state machine: one event after the other, saved before it is performed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from agent.contract.base import MalformedMessageError
from agent.contract.failures import FailureCode
from agent.contract.messages import Failure
from agent.core import deployment as core
from agent.core.ports import Journal
from agent.daemon.orders import Orders
from agent.daemon.serving import Serving
from agent.daemon.steps import Parts, Works
from agent.errors import AgentError

log = structlog.get_logger()

Decided = tuple[core.Deployment, tuple[core.Effect, ...]]
Listener = Callable[[core.Deployment], None]


class Deployer:
    """Owns the deployment. ``run`` takes events until it is cancelled; everything else only posts to it."""

    def __init__(self, works: Works, parts: Parts, journal: Journal, on_change: Listener) -> None:
        self._works = works
        self._parts = parts
        self._journal = journal
        self._on_change = on_change
        self._events: asyncio.Queue[tuple[int, core.Event]] = asyncio.Queue()
        self._epoch = 0
        self._task: asyncio.Task[None] | None = None
        self._halted: set[asyncio.Task[None]] = set()
        self.deployment = self._remembered()
        self.orders = Orders(
            parts.trust,
            parts.wait_s,
            newest=lambda: self.deployment.newest_sequence,
            accept=lambda desired: self.post(core.Ordered(desired)),
            on_rejected=lambda: on_change(self.deployment),
        )
        self._serving = Serving(
            works,
            parts.wait_s,
            current=lambda: self.deployment,
            post=self.post,
            on_change=lambda: on_change(self.deployment),
        )

    def _remembered(self) -> core.Deployment:
        document = self._journal.load()
        if document is None:
            return core.Deployment()
        try:
            return core.Deployment.from_json(document)
        except MalformedMessageError as error:
            log.error("journal is of no use, starting afresh", error=str(error))
            return core.Deployment()

    def post(self, event: core.Event) -> None:
        """Hand in an event that is not the result of the present work."""
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
            self.orders.cancel()
            self._halt()
            await asyncio.gather(*self._halted, self._serving.end(), return_exceptions=True)

    async def _handle(self, event: core.Event) -> None:
        before = self.deployment
        try:
            after, effects = core.decide(before, event, self._parts.clock.now())
        except core.IllegalTransitionError as error:
            log.warning("event ignored", error=str(error))
            return
        failure = await self._save(after) if after != before else None
        if failure is not None:
            after, effects = self._without_memory(before, event, failure, (after, effects))
        self.deployment = after
        if after.state is not before.state or after.deployment_id != before.deployment_id:
            self._tell(before, after)
        for effect in effects:
            await self._perform(effect)

    async def _save(self, deployment: core.Deployment) -> Failure | None:
        try:
            await asyncio.to_thread(self._journal.save, deployment.to_json())
        except AgentError as error:
            log.error("journal not saved", code=error.code.value, error=str(error))
            return Failure(code=error.code, message=str(error))
        return None

    def _without_memory(
        self, before: core.Deployment, event: core.Event, failure: Failure, decided: Decided
    ) -> Decided:
        """A disk that refuses must not end the agent: nothing new is begun on it, and what serves goes on."""
        if isinstance(event, core.Ordered):
            self.orders.again(failure)
            return before, (core.Report(),)
        if before.underway and not isinstance(event, core.Failed | core.DeadlinePassed | core.Restarted):
            return core.decide(before, core.Failed(failure), self._parts.clock.now())
        return decided

    def _tell(self, before: core.Deployment, after: core.Deployment) -> None:
        words = {"deployment": after.deployment_id, "was": before.state.value, "state": after.state.value}
        if after.failure is not None:
            log.error("deployment", **words, code=after.failure.code.value, reason=after.failure.message)
        else:
            log.info("deployment", **words)

    async def _perform(self, effect: core.Effect) -> None:
        match effect:
            case core.Begin(work, deadline_s):
                self._halt()
                self._task = asyncio.create_task(self._work(self._epoch, work, deadline_s))
            case core.Halt():
                self._halt()
            case core.Serve():
                self._serving.begin()
            case core.Report():
                self._on_change(self.deployment)
            case core.Collect():
                await self._collect()

    async def _collect(self) -> None:
        keep = self.deployment.keep()
        self._works.forget(keep)
        try:
            freed = await asyncio.to_thread(self._parts.store.collect, keep)
        except AgentError as error:
            log.warning("old artifacts not collected", code=error.code.value, error=str(error))
        else:
            log.info("old artifacts collected", bytes=freed, kept=len(keep))

    def _halt(self) -> None:
        self._epoch += 1
        if self._task is not None:
            self._task.cancel()
            self._halted.add(self._task)
            self._task.add_done_callback(self._halted.discard)
            self._task = None

    async def _work(self, epoch: int, work: core.Work, deadline_s: float) -> None:
        structlog.contextvars.bind_contextvars(deployment=self.deployment.deployment_id)
        event: core.Event
        # What was halted may still be putting its things away: two at once would work on the same files.
        await asyncio.gather(*self._halted, return_exceptions=True)
        try:
            async with asyncio.timeout(deadline_s):
                event = await self._works.perform(work, self.deployment)
        except TimeoutError:
            event = core.DeadlinePassed(deadline_s)
        except AgentError as error:
            event = core.Failed(Failure(code=error.code, message=str(error)))
        except Exception as error:  # the boundary: a fault of ours must end as a reported failure
            log.exception("work broke", work=work.value)
            event = core.Failed(Failure(code=FailureCode.INTERNAL, message=f"{type(error).__name__}: {error}"))
        self._events.put_nowait((epoch, event))
