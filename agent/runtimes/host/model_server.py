"""One model that serves: its queue, its worker, and what happens when the worker dies, hangs or swells."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

import structlog

from agent.contract.failures import FailureCode
from agent.core.inference import (
    DoneEvent,
    FinishReason,
    GenerationEvent,
    GenerationRequest,
    InferenceError,
    ModelInfo,
)
from agent.core.supervision import GiveUp, after_death
from agent.errors import RuntimeLoadError
from agent.runtimes.host.fair_queue import FairQueue
from agent.runtimes.host.loading import LoadedModel
from agent.runtimes.host.settings import HostEvent, HostSettings
from agent.runtimes.host.supervisor import Death, WorkerProcess

#: A look that comes so much later than it was due says that the event loop, or the whole machine, stood still.
_HELD_UP_S = 0.25

log = structlog.get_logger(component=__name__)


class Ticket:
    """One request from its arrival to its end."""

    def __init__(self, request: GenerationRequest, *, short: bool) -> None:
        self.request = request
        self.short = short
        self.events: asyncio.Queue[GenerationEvent | InferenceError] = asyncio.Queue()
        self.begun = 0.0
        self.ended = False
        #: Something of the answer was passed on, it was begun a second time, or nobody waits for it any more.
        self.told = self.again = self.left = False


@dataclass(frozen=True, slots=True)
class ModelStats:
    """Figures of one model, for metrics."""

    queued: int
    active: int
    restarts: int
    memory_bytes: int
    kv_used_tokens: float
    kv_capacity_tokens: float


class ModelServer:
    """Takes requests as long as it is open.

    Those that wait outlive a worker. Of those in flight when it dies, the ones that have told nothing yet are begun
    once more on the next; the others end.
    """

    def __init__(self, loaded: LoadedModel, settings: HostSettings, on_event: Callable[[HostEvent], None]) -> None:
        self.manifest = loaded.manifest
        self.folder = loaded.folder
        self.restarts = 0
        self.failed = ""
        self._loaded = loaded
        self._settings = settings
        self._on_event = on_event
        self._queue: FairQueue[Ticket] = FairQueue(settings.queue_limit, settings.age_s)
        self._short_until = 0.0
        self._long_active = 0
        self._tickets: dict[str, Ticket] = {}
        self._deaths: tuple[float, ...] = ()
        self._durations: deque[float] = deque(maxlen=32)
        self._open = True
        self._recycling = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._supervision = asyncio.create_task(self._supervise(), name=f"supervise-{loaded.manifest.id}")

    @property
    def worker(self) -> WorkerProcess:
        """The process that holds it now."""
        return self._loaded.worker

    @property
    def info(self) -> ModelInfo:
        """As it was loaded last."""
        return self._loaded.info

    @property
    def restarting(self) -> str:
        """Why there is no worker until the next one is loaded; empty while there is one."""
        died = self.worker.died
        return died.result().message if died.done() and self._open else ""

    def stats(self) -> ModelStats:
        """Now."""
        figures = self.worker.stats
        return ModelStats(
            queued=len(self._queue),
            active=self.worker.requests,
            restarts=self.restarts,
            memory_bytes=self.worker.memory_bytes(),
            kv_used_tokens=figures.get("kv_used_tokens", 0.0),
            kv_capacity_tokens=figures.get("kv_capacity_tokens", 0.0),
        )

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        """Yield events of one request. Closing the iterator cancels it."""
        ticket = self._enter(request)
        try:
            while True:
                item = await ticket.events.get()
                if isinstance(item, InferenceError):
                    raise item
                if isinstance(item, DoneEvent) and item.reason is FinishReason.ERROR:
                    raise InferenceError(item.error_kind or "crashed", item.error)
                yield item
                if isinstance(item, DoneEvent):
                    return
        finally:
            self._leave(ticket)

    async def count_tokens(self, text: str) -> int:
        """Return the number of tokens of ``text``; waits for a restart."""
        deadline = asyncio.get_running_loop().time() + self._settings.load_timeout_s
        while not self.worker.alive and not self.failed:
            if asyncio.get_running_loop().time() > deadline:
                break
            await asyncio.sleep(0.05)
        return await self.worker.count_tokens(text)

    async def drain(self, timeout_s: float) -> bool:
        """Take nothing new; whether everything ended within ``timeout_s``."""
        self._open = False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        return self._idle.is_set()

    async def close(self) -> None:
        """Unload the model. Requests that still wait end with an error that says so."""
        self._open = False
        self._supervision.cancel()
        await asyncio.gather(self._supervision, return_exceptions=True)
        self._flush(InferenceError("unavailable", "the model is being unloaded", retry_after_s=1.0))
        await self.worker.close()

    def _enter(self, request: GenerationRequest) -> Ticket:
        if self.failed:
            raise InferenceError("unavailable", self.failed, retry_after_s=30.0)
        if not self._open:
            raise InferenceError("unavailable", "the model is being replaced", retry_after_s=1.0)
        if request.id in self._tickets:
            raise InferenceError("invalid", f"a request with the id {request.id} is running already")
        now = asyncio.get_running_loop().time()
        ticket = Ticket(request, short=self._settings.is_short(request))
        if not self._queue.push(ticket, priority=request.priority, client=request.client, short=ticket.short, now=now):
            wait = self._wait_s()
            raise InferenceError(
                "busy",
                f"{len(self._queue)} requests are waiting already; try again in {wait:.0f} s",
                retry_after_s=wait,
            )
        self._tickets[request.id] = ticket
        self._idle.clear()
        if ticket.short:
            self._short_until = now + self._settings.lane_s
        self._pump()
        return ticket

    def _leave(self, ticket: Ticket) -> None:
        ticket.left = True
        if ticket.ended:
            return
        if self._queue.remove(ticket):
            self._end(ticket)
        else:
            self.worker.cancel(ticket.request.id)

    def _end(self, ticket: Ticket) -> None:
        ticket.ended = True
        self._tickets.pop(ticket.request.id, None)
        if not self._tickets:
            self._idle.set()

    def _pump(self) -> None:
        """Hand over as many as the engine takes at once; the rest waits here, where a crash does not reach it."""
        while self.worker.alive and not self._recycling:
            if self.worker.requests >= self.info.capabilities.max_sequences:
                return
            now = asyncio.get_running_loop().time()
            ticket = self._queue.pop(now, short_only=self._long_active >= self._most_long(now))
            if ticket is None:
                return
            ticket.begun = now
            self._long_active += not ticket.short
            self.worker.submit(ticket.request, lambda event, ticket=ticket: self._arrive(ticket, event))  # type: ignore[misc]

    def _most_long(self, now: float) -> int:
        """Slots that long requests may take: all but one where a slot was made for short ones, or while those come."""
        slots = self.info.capabilities.max_sequences
        made = not self._settings.max_sequences and slots >= self._loaded.spec.slots
        kept = made or now < self._short_until
        return self._settings.long_answers_at_once(slots) if kept else slots

    def _arrive(self, ticket: Ticket, event: GenerationEvent | InferenceError) -> None:
        if isinstance(event, InferenceError) and self.worker.died.done() and self._begins_again(ticket):
            self._long_active -= not ticket.short
            return
        ticket.told = True
        ticket.events.put_nowait(event)
        if isinstance(event, DoneEvent | InferenceError):
            self._durations.append(asyncio.get_running_loop().time() - ticket.begun)
            self._long_active -= not ticket.short
            self._end(ticket)
            self._pump()

    def _begins_again(self, ticket: Ticket) -> bool:
        """Put a request that has told nothing back into the queue, once: what killed the worker may be itself."""
        if ticket.told or ticket.again or ticket.left or self.failed:
            return False
        ticket.again = True
        request, now = ticket.request, asyncio.get_running_loop().time()
        log.info("request begins again", artifact=self.manifest.id, request=request.id)
        return self._queue.push(ticket, priority=request.priority, client=request.client, short=ticket.short, now=now)

    def _wait_s(self) -> float:
        mean = sum(self._durations) / len(self._durations) if self._durations else 2.0
        rounds = (len(self._queue) + 1) / max(1, self.info.capabilities.max_sequences)
        return min(60.0, max(1.0, mean * rounds))

    def _flush(self, error: InferenceError) -> None:
        for ticket in self._queue.drain():
            ticket.events.put_nowait(error)
            self._end(ticket)

    async def _supervise(self) -> None:
        """Keep a worker running until the model is closed, or until the worker dies too often."""
        try:
            while not self.failed:
                death = await self._watch()
                self._report("crashed", death)
                loaded = await self._again(death)
                if loaded is not None:
                    self._loaded = loaded
                    self.restarts += 1
                    self._event("restarted", None, f"serving again after {self.info.load_s:.2f} s of loading")
                    self._pump()
        except Exception as error:  # a fault of ours: without supervision, those who wait would wait for ever
            log.exception("supervision failed", artifact=self.manifest.id)
            message = f"the supervision of the model's process failed: {type(error).__name__}: {error}"
            self._give_up(FailureCode.INTERNAL, message)

    async def _watch(self) -> Death:
        """Until the worker is dead, by itself or by our hand."""
        settings, clock = self._settings, asyncio.get_running_loop().time
        while True:
            looked = clock()
            done, _ = await asyncio.wait({self.worker.died}, timeout=settings.watch_s)
            if done:
                return self.worker.died.result()
            # Where this process was held up itself, what the worker said meanwhile may still be unread.
            held_up = clock() - looked > settings.watch_s + _HELD_UP_S
            silent = self.worker.silent_s()
            if silent > (settings.hang_s if held_up else self.worker.patience_s(settings.hang_s)):
                message = f"no sign of life for {silent:.1f} s with {self.worker.requests} sequences in flight"
                await self.worker.kill(Death(FailureCode.RUNTIME_HUNG, message))
            limit = settings.memory_limit_bytes
            if limit and (held := self.worker.memory_bytes()) > limit:
                await self._recycle(held, limit)

    async def _recycle(self, held: int, limit: int) -> None:
        """It grew past its limit: let those in flight finish if there is time, then start afresh."""
        self._recycling = True
        deadline = asyncio.get_running_loop().time() + self._settings.recycle_grace_s
        while self.worker.requests and asyncio.get_running_loop().time() < deadline:
            if self.worker.memory_bytes() > limit * 1.25:
                break
            await asyncio.sleep(0.05)
        mib = 1 << 20
        message = f"the worker holds {held // mib} MiB, past its limit of {limit // mib} MiB"
        await self.worker.kill(Death(FailureCode.RUNTIME_MEMORY, message))
        self._recycling = False

    async def _again(self, death: Death) -> LoadedModel | None:
        """Return a new worker, after a pause that grows with the deaths in the window.

        None when there were too many.
        """
        policy = self._settings.restart_policy
        while True:
            decision = after_death(self._deaths, death.code, asyncio.get_running_loop().time(), policy)
            self._deaths = decision.deaths
            if isinstance(decision, GiveUp):
                count = len(decision.deaths)
                message = f"the model's process died {count} times in {policy.window_s:.0f} s, last: {death.message}"
                self._give_up(death.code, message)
                return None
            await asyncio.sleep(decision.pause_s)
            try:
                return await self._loaded.again()
            except RuntimeLoadError as error:
                death = Death(error.code, str(error))
            except Exception as error:  # whatever it is: supervision that ends leaves those who wait without an answer
                death = Death(FailureCode.RUNTIME_CRASHED, f"{type(error).__name__}: {error}")
            self._report("crashed", death)

    def _give_up(self, code: FailureCode, message: str) -> None:
        self.failed = message
        self._event("gave_up", code, message)
        self._flush(InferenceError("unavailable", message, retry_after_s=30.0))

    def _report(self, kind: str, death: Death) -> None:
        self._event(kind, death.code, death.message)

    def _event(self, kind: str, code: FailureCode | None, message: str) -> None:
        log.warning(f"worker_{kind}", artifact=self.manifest.id, code=code, error=message, restarts=self.restarts)
        try:
            self._on_event(HostEvent(kind, self.manifest.digest, code, message, self.restarts))
        except Exception:  # whoever listens must not end the supervision
            log.exception("host event not taken", kind=kind, artifact=self.manifest.id)
