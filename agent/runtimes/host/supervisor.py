"""One worker process: start it, talk to it, notice when it dies, and never leave it behind."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import structlog

from agent.contract.failures import FailureCode
from agent.core.inference import DoneEvent, GenerationEvent, GenerationRequest, InferenceError
from agent.errors import RuntimeLoadError
from agent.runtimes.protocol import wire
from agent.runtimes.protocol.engine import LoadOptions, ModelSource
from agent.runtimes.protocol.registry import RuntimeSpec

log = structlog.get_logger(__name__)

Sink = Callable[[GenerationEvent | InferenceError], None]
"""Where the events of one request go; an ``InferenceError`` is its end."""

_STDERR_LINES = 20


@dataclass(frozen=True, slots=True)
class Death:
    """How a worker ended."""

    code: FailureCode
    message: str


class WorkerProcess:
    """A child that holds one model. All methods belong to the event loop that started it."""

    def __init__(self, spec: RuntimeSpec, process: asyncio.subprocess.Process, sock: socket.socket) -> None:
        self.spec = spec
        self.pid = process.pid
        self.last_message_at = asyncio.get_running_loop().time()
        self.steps = 0
        self.stats: dict[str, float] = {}
        self.died: asyncio.Future[Death] = asyncio.get_running_loop().create_future()
        self._process = process
        self._sock = sock
        self._writer: asyncio.StreamWriter | None = None
        self._sinks: dict[str, Sink] = {}
        self._counts: dict[int, asyncio.Future[int]] = {}
        self._count_ref = 0
        self._loaded: asyncio.Future[wire.Loaded | wire.LoadFailed] = asyncio.get_running_loop().create_future()
        self._errors: deque[str] = deque(maxlen=_STDERR_LINES)
        self._verdict: Death | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def start(cls, spec: RuntimeSpec, memory_limit_bytes: int = 0) -> WorkerProcess:
        """A new child, not loaded yet.

        Raises:
            RuntimeLoadError: the operating system gives no process, or no file descriptor to talk to it.
        """
        async with contextlib.AsyncExitStack() as undo:
            try:
                ours, theirs = socket.socketpair()
                undo.callback(ours.close)
                with theirs:
                    process = await _spawn(spec, theirs, memory_limit_bytes)
                undo.push_async_callback(_end, process)
                worker = cls(spec, process, ours)
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
            raise RuntimeLoadError(answer.message, FailureCode(answer.code))
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
        self._send(wire.Generate(request))

    def cancel(self, request_id: str) -> None:
        """Stop a sequence; its ``DoneEvent`` still comes."""
        if request_id in self._sinks and self.alive:
            self._send(wire.Cancel(request_id))

    async def count_tokens(self, text: str) -> int:
        """Tokens of ``text``.

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
        """Seconds without a sign of life while one is due; 0 when none is."""
        return asyncio.get_running_loop().time() - self.last_message_at if self._sinks and self.alive else 0.0

    def memory_bytes(self) -> int:
        """Resident now; 0 when it is gone."""
        try:
            return int(psutil.Process(self.pid).memory_info().rss) if self.alive else 0
        except (psutil.Error, OSError):  # OSError: no file descriptor is left to look with
            return 0

    async def close(self, grace_s: float = 5.0) -> None:
        """Unload and leave; killed after ``grace_s``. Requests in flight end as crashed."""
        if self.alive:
            self._verdict = self._verdict or Death(FailureCode.CANCELLED, "the worker was told to leave")
            self._send(wire.Close())
            try:
                await asyncio.wait({self.died}, timeout=grace_s)
            except asyncio.CancelledError:
                await self.kill()
                raise
        await self.kill()

    async def kill(self, verdict: Death | None = None) -> None:
        """End it at once; ``verdict`` is why, for those who see it die."""
        if self.alive:
            self._verdict = self._verdict or verdict
            self._signal_kill()
        await self.died
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _signal_kill(self) -> None:
        # Not Process.kill(): it reaps a child that is dead already, and its exit status is lost to who waits for it.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(self.pid, getattr(signal, "SIGKILL", signal.SIGTERM))

    async def _connect(self) -> None:
        reader, self._writer = await asyncio.open_connection(sock=self._sock, limit=wire.MAX_LINE_BYTES)
        self._tasks = [
            asyncio.create_task(self._receive(reader), name=f"worker-{self.pid}-messages"),
            asyncio.create_task(self._log_errors(), name=f"worker-{self.pid}-stderr"),
        ]

    def _send(self, message: wire.ToWorker) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(wire.encode(message))

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        try:
            while line := await reader.readline():
                self._handle(wire.decode(line))
        except (wire.WireError, ValueError) as error:
            self._verdict = Death(
                FailureCode.RUNTIME_CRASHED, f"the worker of {self.spec.name} broke its protocol: {error}"
            )
        except OSError:
            pass
        self._signal_kill()
        status = await self._process.wait()
        if self._writer is not None:
            self._writer.close()
        self._bury(self._verdict or self._post_mortem(status))

    def _handle(self, message: wire.Wire) -> None:
        self.last_message_at = asyncio.get_running_loop().time()
        if isinstance(message, wire.Events):
            for event in message.events:
                self._deliver(event)
        elif isinstance(message, wire.Refused):
            error = InferenceError(
                message.kind, message.message, param=message.param, retry_after_s=message.retry_after_s
            )
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
        sink = self._sinks.pop(event.id, None) if isinstance(event, DoneEvent) else self._sinks.get(event.id)
        if sink is not None:
            sink(event)

    def _post_mortem(self, status: int) -> Death:
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        last = "; its last words: " + " | ".join(list(self._errors)[-3:]) if self._errors else ""
        return Death(FailureCode.RUNTIME_CRASHED, f"the worker of {self.spec.name} (pid {self.pid}) died: {how}{last}")

    def _bury(self, death: Death) -> None:
        self.died.set_result(death)
        sinks, self._sinks = self._sinks, {}
        kind = "timeout" if death.code is FailureCode.RUNTIME_HUNG else "crashed"
        for sink in sinks.values():
            sink(InferenceError(kind, f"the model's process ended during the answer: {death.message}"))
        for answer in self._counts.values():
            if not answer.done():
                answer.set_exception(InferenceError("crashed", "the model's process has ended"))

    async def _log_errors(self) -> None:
        errors = self._process.stderr
        while errors is not None:
            try:
                line = await errors.readline()
            except ValueError:  # a line past the limit
                continue
            if not line:
                return
            text = line.decode("utf-8", "replace").rstrip()
            if text:
                self._errors.append(text[:500])
                log.debug("worker_output", runtime=self.spec.name, pid=self.pid, line=text[:500])


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()


async def _spawn(spec: RuntimeSpec, theirs: socket.socket, memory_limit_bytes: int) -> asyncio.subprocess.Process:
    command = [sys.executable, "-P", "-m", "agent.runtimes.engines.worker", spec.module, "--parent", str(os.getpid())]
    if memory_limit_bytes:
        command += ["--memory-limit", str(memory_limit_bytes)]
    if sys.platform == "win32":
        # Not run here: a socket is shared with a process that exists already, so its handle follows on standard input.
        pipe, null = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
        process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=null, stderr=pipe)
        if process.stdin is not None:
            process.stdin.write(base64.b64encode(theirs.share(process.pid)) + b"\n")
            await process.stdin.drain()
        return process
    return await asyncio.create_subprocess_exec(
        *command,
        "--fd",
        str(theirs.fileno()),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        pass_fds=(theirs.fileno(),),
    )
