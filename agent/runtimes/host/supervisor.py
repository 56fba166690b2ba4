"""One worker process: start it, talk to it, notice when it dies, and never leave it behind."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import structlog

from agent.contract.failures import FailureCode
from agent.core.inference import DoneEvent, GenerationEvent, GenerationRequest, InferenceError, TokenEvent
from agent.core.supervision import Pace
from agent.errors import RuntimeLoadError
from agent.runtimes.host.child import ChildProcess, describe_exit
from agent.runtimes.protocol import wire
from agent.runtimes.protocol.engine import LoadOptions, ModelSource
from agent.runtimes.protocol.registry import RuntimeSpec

log = structlog.get_logger(component=__name__)

Sink = Callable[[GenerationEvent | InferenceError], None]
"""Where the events of one request go; an ``InferenceError`` is its end."""

#: How long a killed process may take to end: the operating system needs a moment to free its memory.
KILL_TIMEOUT_S = 10.0
#: How long the last messages and the last lines of a worker that has ended are waited for.
_LAST_WORDS_S = 1.0


@dataclass(frozen=True, slots=True)
class Death:
    """How a worker ended."""

    code: FailureCode
    message: str


class WorkerProcess:
    """A child that holds one model. All methods belong to the event loop that started it."""

    def __init__(self, spec: RuntimeSpec, child: ChildProcess, sock: socket.socket) -> None:
        self.spec = spec
        self.pid = child.pid
        self.last_message_at = asyncio.get_running_loop().time()
        self.steps = 0
        self.stats: dict[str, float] = {}
        self.died: asyncio.Future[Death] = asyncio.get_running_loop().create_future()
        self._child = child
        self._sock = sock
        self._writer: asyncio.StreamWriter | None = None
        self._sinks: dict[str, Sink] = {}
        self._pace = Pace()
        #: Requests whose prompt is read, and its characters. None: how long its guidance compiles is not known before.
        self._reading: dict[str, int | None] = {}
        self._counts: dict[int, asyncio.Future[int]] = {}
        self._count_ref = 0
        self._loaded: asyncio.Future[wire.Loaded | wire.LoadFailed] = asyncio.get_running_loop().create_future()
        self._verdict: Death | None = None
        self._attending: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, spec: RuntimeSpec, memory_limit_bytes: int = 0) -> WorkerProcess:
        """Return a new child, not loaded yet.

        Raises:
            RuntimeLoadError: the operating system gives no process, or no file descriptor to talk to it.
        """
        async with contextlib.AsyncExitStack() as undo:
            try:
                ours, theirs = socket.socketpair()
                undo.callback(ours.close)
                with theirs:
                    child = await _spawn(spec, theirs, memory_limit_bytes)
                undo.push_async_callback(_end, child)
                worker = cls(spec, child, ours)
                await worker._connect()
            except OSError as error:
                raise RuntimeLoadError(f"cannot start a worker for {spec.name}: {error}") from error
            undo.pop_all()
            return worker

    @property
    def alive(self) -> bool:
        """Whether it may still answer."""
        return not self.died.done()

    @property
    def requests(self) -> int:
        """Sequences in flight."""
        return len(self._sinks)

    async def load(self, source: ModelSource, options: LoadOptions, timeout_s: float) -> wire.Loaded:
        """Load a model.

        Raises:
            RuntimeLoadError: it does not load, crashes on the way, or takes longer than ``timeout_s``. The worker
                is gone then.
        """
        self._send(wire.Load(source, options))
        both: set[asyncio.Future[Any]] = {self._loaded, self.died}
        done, _ = await asyncio.wait(both, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if self._loaded in done:
            answer = self._loaded.result()
            if isinstance(answer, wire.Loaded):
                return answer
            await self.close()
            raise RuntimeLoadError(answer.message, _failure_code(answer.code))
        if not done:
            await self.kill(
                Death(FailureCode.RUNTIME_LOAD, f"{self.spec.name} did not load {source.path} in {timeout_s:.0f} s")
            )
        death = await self.died
        raise RuntimeLoadError(death.message, death.code)

    def submit(self, request: GenerationRequest, sink: Sink) -> None:
        """Begin a sequence; its events go to ``sink`` until its ``DoneEvent`` or an ``InferenceError``."""
        if not self.alive:
            sink(InferenceError("crashed", "the model's process has ended"))
            return
        if not self._sinks:
            self.last_message_at = asyncio.get_running_loop().time()
        self._sinks[request.id] = sink
        self._reading[request.id] = None if request.sampling.guidance else len(request.prompt)
        self._send(wire.Generate(request))

    def cancel(self, request_id: str) -> None:
        """Stop a sequence; its ``DoneEvent`` still comes."""
        if request_id in self._sinks and self.alive:
            self._send(wire.Cancel(request_id))

    async def count_tokens(self, text: str) -> int:
        """Return the number of tokens of ``text``.

        Raises:
            InferenceError: the worker ends before it answers.
        """
        if not self.alive:
            raise InferenceError("crashed", "the model's process has ended")
        self._count_ref += 1
        ref = self._count_ref
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._counts[ref] = answer
        self._send(wire.Count(ref, text))
        try:
            return await answer
        finally:
            self._counts.pop(ref, None)

    def silent_s(self) -> float:
        """Return the seconds without a sign of life while one is due; 0 when none is."""
        return asyncio.get_running_loop().time() - self.last_message_at if self._sinks and self.alive else 0.0

    def patience_s(self, most: float) -> float:
        """Return how long it may be silent: by what its steps have taken so far, and never longer than ``most``."""
        known = [size for size in self._reading.values() if size is not None]
        if len(known) < len(self._reading):
            return most
        return self._pace.patience_s(max(known, default=None), most)

    def memory_bytes(self) -> int:
        """Resident now; 0 when it is gone."""
        try:
            return int(psutil.Process(self.pid).memory_info().rss) if self.alive else 0
        except (psutil.Error, OSError):  # OSError: no file descriptor is left to look with
            return 0

    async def close(self, grace_s: float = 5.0) -> None:
        """Unload and leave; killed after ``grace_s``. Requests in flight end as crashed."""
        if self.alive:
            self._verdict = self._verdict or Death(FailureCode.CANCELLED, "the worker was asked to leave")
            self._send(wire.Close())
            try:
                await asyncio.wait({self.died}, timeout=grace_s)
            except asyncio.CancelledError:
                await self.kill()
                raise
        await self.kill()

    async def kill(self, verdict: Death | None = None) -> None:
        """End it at once; ``verdict`` is why, for those who see it die. Returns within about KILL_TIMEOUT_S."""
        if self.alive:
            self._verdict = self._verdict or verdict
            self._child.kill()
            await asyncio.wait({self.died}, timeout=KILL_TIMEOUT_S + 3 * _LAST_WORDS_S)
        if self._attending is not None:
            self._attending.cancel()  # it books the death on its way out, if it has not done so
            await asyncio.gather(self._attending, return_exceptions=True)

    async def _connect(self) -> None:
        reader, self._writer = await asyncio.open_connection(sock=self._sock, limit=wire.MAX_LINE_BYTES)
        self._attending = asyncio.create_task(self._attend(reader), name=f"worker-{self.pid}")

    def _send(self, message: wire.ToWorker) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(wire.encode(message))

    async def _attend(self, reader: asyncio.StreamReader) -> None:
        """Take in its messages until it ends, and book its death, whatever it died of and whatever fails here."""
        reading = asyncio.create_task(self._read(reader), name=f"worker-{self.pid}-messages")
        try:
            # Its exit alone ends it too: a process that it has forked may hold the socket open for ever.
            ends: set[asyncio.Future[Any]] = {reading, self._child.exited}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if self._child.exited.done():
                await asyncio.wait({reading}, timeout=_LAST_WORDS_S)
            self._child.kill()
            if await self._child.ended(KILL_TIMEOUT_S) is not None:
                await self._child.drained(_LAST_WORDS_S)
        finally:
            reading.cancel()
            self._child.close()
            if self._writer is not None:
                self._writer.close()
            self._bury(self._verdict or self._post_mortem())

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while line := await reader.readline():
                self._handle(wire.decode(line))
        except OSError:
            return  # the socket is gone, and so is the worker
        except (wire.WireError, ValueError) as error:
            self._verdict = self._verdict or Death(
                FailureCode.RUNTIME_CRASHED, f"the worker of {self.spec.name} broke its protocol: {error}"
            )
        except Exception as error:  # a fault of ours: without its messages the worker is of no use
            log.exception("worker messages failed", runtime=self.spec.name, pid=self.pid)
            self._verdict = self._verdict or Death(
                FailureCode.INTERNAL, f"a message of the worker could not be handled: {type(error).__name__}: {error}"
            )

    def _handle(self, message: wire.Wire) -> None:
        now = asyncio.get_running_loop().time()
        if self._sinks:
            self._pace.stepped(now - self.last_message_at, reads=bool(self._reading))
        self.last_message_at = now
        if isinstance(message, wire.Events):
            for event in message.events:
                self._deliver(event)
        elif isinstance(message, wire.Refused):
            error = InferenceError(
                message.kind, message.message, param=message.param, retry_after_s=message.retry_after_s
            )
            self._reading.pop(message.id, None)
            if sink := self._sinks.pop(message.id, None):
                sink(error)
        elif isinstance(message, wire.Beat):
            self.steps, self.stats = message.steps, message.stats
        elif isinstance(message, wire.Counted):
            answer = self._counts.get(message.ref)
            if answer is not None and not answer.done():
                answer.set_result(message.tokens)
        elif isinstance(message, wire.Loaded | wire.LoadFailed) and not self._loaded.done():
            self._loaded.set_result(message)

    def _deliver(self, event: GenerationEvent) -> None:
        characters = self._reading.pop(event.id, None)
        if characters is not None and isinstance(event, TokenEvent):  # one that was cancelled was not read
            self._pace.has_read(characters)
        sink = self._sinks.pop(event.id, None) if isinstance(event, DoneEvent) else self._sinks.get(event.id)
        if sink is not None:
            sink(event)

    def _post_mortem(self) -> Death:
        lines = self._child.last_lines
        last = "; its last output: " + " | ".join(lines[-3:]) if lines else ""
        who = f"the worker of {self.spec.name} (pid {self.pid})"
        if not self._child.exited.done():
            message = f"{who} was killed and has not ended in {KILL_TIMEOUT_S:.0f} s: the operating system holds it"
            return Death(FailureCode.RUNTIME_HUNG, message)
        how = describe_exit(self._child.exited.result())
        return Death(FailureCode.RUNTIME_CRASHED, f"{who} died: {how}{last}")

    def _bury(self, death: Death) -> None:
        """Report the death to everybody who waits. One who cannot take it must not keep it from the others."""
        if self.died.done():
            return
        self.died.set_result(death)
        sinks, self._sinks = self._sinks, {}
        self._reading.clear()
        kind = "timeout" if death.code is FailureCode.RUNTIME_HUNG else "crashed"
        for request_id, sink in sinks.items():
            try:
                sink(InferenceError(kind, f"the model's process ended during the answer: {death.message}"))
            except Exception:
                log.exception("request not notified", request=request_id, pid=self.pid)
        for answer in self._counts.values():
            if not answer.done():
                answer.set_exception(InferenceError("crashed", "the model's process has ended"))


def _failure_code(text: str) -> FailureCode:
    """As the worker names it; RUNTIME_LOAD for a name that is none."""
    try:
        return FailureCode(text)
    except ValueError:
        return FailureCode.RUNTIME_LOAD


async def _end(child: ChildProcess) -> None:
    child.kill()
    await child.ended(KILL_TIMEOUT_S)
    child.close()


async def _spawn(spec: RuntimeSpec, theirs: socket.socket, memory_limit_bytes: int) -> ChildProcess:
    command = [sys.executable, "-P", "-m", "agent.runtimes.engines.worker", spec.module, "--parent", str(os.getpid())]
    if memory_limit_bytes:
        command += ["--memory-limit", str(memory_limit_bytes)]
    pipe, null = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
    if sys.platform == "win32":
        # Not run here: a socket is shared with a process that exists already, so its handle follows on standard input.
        child = await ChildProcess.start(spec.name, command, stdin=pipe, stdout=null, stderr=pipe)
        child.write_input(base64.b64encode(theirs.share(child.pid)) + b"\n")
        return child
    command += ["--fd", str(theirs.fileno())]
    return await ChildProcess.start(
        spec.name, command, stdin=null, stdout=null, stderr=pipe, pass_fds=(theirs.fileno(),)
    )
