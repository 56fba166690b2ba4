"""Runs the state machine: one event after the other, saved before it is performed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from agent.contract.base import MalformedMessageError
from agent.contract.failures import FailureCode
from agent.contract.messages import Desired, Failure, State
from agent.contract.profile import HealthLimits
from agent.core import deployment as core
from agent.core.ports import Journal
from agent.daemon.works import Parts, Works
from agent.errors import AgentError, TrustError

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
        self._serving: asyncio.Task[None] | None = None
        self._order: asyncio.Task[None] | None = None
        self.deployment = self._remembered()
        self._held: bytes | None = None
        #: Whether orders are held for now.
        self.paused = False
        #: Why the last order was not accepted; None when it was.
        self.rejected: Failure | None = None

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

    def order(self, payload: bytes) -> None:
        """A ``SignedDesired`` arrived; the newest one replaces one that is still being checked."""
        if self.paused:
            self._held = payload
            log.info("order held, the agent is paused")
            return
        if self._order is not None:
            self._order.cancel()
        self._order = asyncio.create_task(self._take(payload))

    def resume(self) -> None:
        """Take orders again, and the newest that was held."""
        self.paused = False
        held, self._held = self._held, None
        if held is not None:
            self.order(held)

    def roll_back(self, reason: str) -> str:
        """Give up what is under way, or go back to the artifact before; returns what will happen.

        Raises:
            AgentError: there is nothing to go back to.
        """
        failure = Failure(code=FailureCode.CANCELLED, message=reason)
        if self.deployment.underway:
            self.post(core.Failed(failure))
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
            tasks = [task for task in (self._task, self._serving, self._order) if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

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
            self._perform(effect)

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
            self.rejected = failure
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

    def _perform(self, effect: core.Effect) -> None:
        match effect:
            case core.Begin(work, deadline_s):
                self._halt()
                self._task = asyncio.create_task(self._work(self._epoch, work, deadline_s))
            case core.Halt():
                self._halt()
            case core.Serve():
                self._serving = asyncio.create_task(self._serve(self._serving))
            case core.Report():
                self._on_change(self.deployment)
            case core.Collect():
                freed = self._parts.store.collect(self.deployment.keep())
                log.info("old artifacts collected", bytes=freed, kept=len(self.deployment.keep()))

    def _halt(self) -> None:
        self._epoch += 1
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _work(self, epoch: int, work: core.Work, deadline_s: float) -> None:
        structlog.contextvars.bind_contextvars(deployment=self.deployment.deployment_id)
        event: core.Event
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

    async def _serve(self, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.gather(before, return_exceptions=True)
        committed = self.deployment.committed
        try:
            await self._works.serve(committed, _limits(self.deployment))
        except AgentError as error:
            if committed is not None:
                self.post(core.Unhealthy(committed.digest, Failure(code=error.code, message=str(error))))
        else:
            self._on_change(self.deployment)

    async def _take(self, payload: bytes) -> None:
        """Check an order; keep asking for the keys to check it with while the controller is away."""
        attempt = 0
        while True:
            try:
                desired = await self._checked(payload)
            except TrustError as error:
                if error.code is not FailureCode.TRUST_UNREACHABLE:
                    self._reject(error)
                    return
                wait = self._parts.wait_s(attempt)
                log.warning("order not checked yet", error=str(error), retry_in_s=wait)
                await asyncio.sleep(wait)
                attempt += 1
            else:
                self.rejected = None
                self.post(core.Ordered(desired))
                return

    async def _checked(self, payload: bytes) -> Desired:
        # The retained order comes again at every reconnect: the newest accepted is no replay.
        newest = self.deployment.newest_sequence - 1
        try:
            return await asyncio.to_thread(self._parts.trust.verify_desired, payload, newest)
        except TrustError as error:
            if error.code not in (
                FailureCode.TRUST_SIGNATURE,
                FailureCode.TRUST_UNREACHABLE,
                FailureCode.TRUST_NOT_FOUND,
            ):
                raise
        await self._parts.trust.refresh()  # the director's keys may be new to this device
        return await asyncio.to_thread(self._parts.trust.verify_desired, payload, newest)

    def _reject(self, error: TrustError) -> None:
        log.error("order rejected", code=error.code.value, error=str(error))
        self.rejected = Failure(code=error.code, message=str(error))
        self._on_change(self.deployment)


def _limits(deployment: core.Deployment) -> HealthLimits:
    """Those of the order that put there what serves; what serves after a rollback was ordered with others, now gone."""
    ordered = deployment.desired if deployment.state is State.COMMITTED else None
    return ordered.limits if ordered else HealthLimits()
