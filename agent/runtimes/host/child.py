"""A child process whose end is always noticed: by its exit, whatever the status, and never later than a bound.

Public parts of asyncio alone: ``loop.subprocess_exec`` calls ``process_exited`` when the process ends, even while a
grandchild still holds its pipes, which ``asyncio.subprocess.Process.wait`` does not promise.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, cast

import structlog

log = structlog.get_logger(component=__name__)

_LINES = 20
_LINE_CHARACTERS = 500
_OUTPUT_BYTES = 1 << 20
#: Windows' status codes (NTSTATUS) by which native code ends there.
_NT_STATUS = {
    0xC0000005: "access violation",
    0xC0000017: "no memory",
    0xC000001D: "illegal instruction",
    0xC00000FD: "stack overflow",
    0xC0000135: "a DLL is missing",
    0xC000013A: "Ctrl-C",
    0xC0000374: "heap corruption",
    0xC0000409: "stack buffer overrun or abort",
}


class ChildProcess(asyncio.SubprocessProtocol):
    """One child. It keeps the last lines of standard error and the first megabyte of standard output.

    ``exited`` is the exit status: negative for a signal. It is set whatever the status is, and never with an exception.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.pid = 0
        self.exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.output = bytearray()
        self._drained = asyncio.Event()
        self._lines: deque[str] = deque(maxlen=_LINES)
        self._partial = b""
        self._transport: asyncio.SubprocessTransport | None = None

    @classmethod
    async def start(
        cls, name: str, command: Sequence[str], *, env: Mapping[str, str] | None = None, **options: Any
    ) -> ChildProcess:
        """Start ``command``; ``options`` are those of ``loop.subprocess_exec``.

        Raises:
            OSError: there is no process to be had, or no file descriptor.
        """
        loop = asyncio.get_running_loop()
        _, child = await loop.subprocess_exec(
            lambda: cls(name), *command, env=None if env is None else dict(env), **options
        )
        return child

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio has started it."""
        self._transport = cast("asyncio.SubprocessTransport", transport)
        self.pid = self._transport.get_pid()

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        """Output of the child."""
        if fd == 1:
            self.output += data[: _OUTPUT_BYTES - len(self.output)]
            return
        *lines, self._partial = (self._partial + data).split(b"\n")
        if len(self._partial) > _LINE_CHARACTERS * 4:  # a line without an end
            lines, self._partial = [*lines, self._partial], b""
        for line in lines:
            self._line(line)

    def process_exited(self) -> None:
        """The process is gone; its pipes may be open still."""
        status = self._transport.get_returncode() if self._transport is not None else None
        if not self.exited.done():
            self.exited.set_result(255 if status is None else status)

    def connection_lost(self, exc: Exception | None) -> None:
        """The process is gone, and so are all its pipes."""
        self.process_exited()
        self._line(self._partial)
        self._partial = b""
        self._drained.set()

    @property
    def last_lines(self) -> tuple[str, ...]:
        """What it wrote to standard error last."""
        return tuple(self._lines)

    def write_input(self, data: bytes) -> None:
        """Write to its standard input, where that is a pipe."""
        pipe = self._transport.get_pipe_transport(0) if self._transport is not None else None
        if isinstance(pipe, asyncio.WriteTransport):
            pipe.write(data)

    def kill(self) -> None:
        """End it at once, unless it has ended."""
        if self.exited.done():
            return
        # Not the transport's kill(): it reaps a child that is dead already, and the exit status is lost to asyncio.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(self.pid, getattr(signal, "SIGKILL", signal.SIGTERM))

    async def ended(self, timeout_s: float) -> int | None:
        """Wait for its exit status; None when it has not ended within ``timeout_s``."""
        await asyncio.wait({self.exited}, timeout=timeout_s)
        return self.exited.result() if self.exited.done() else None

    async def drained(self, timeout_s: float) -> None:
        """Wait until all that it wrote is here, for at most ``timeout_s``: a grandchild may hold its pipes open."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._drained.wait()

    def close(self) -> None:
        """Kill it and let go of its pipes; nothing waits for it any more."""
        self.kill()
        if self._transport is not None and self.exited.done():
            self._transport.close()

    def _line(self, raw: bytes) -> None:
        text = raw.decode("utf-8", "replace").rstrip()[:_LINE_CHARACTERS]
        if text:
            self._lines.append(text)
            log.debug("worker output", runtime=self.name, pid=self.pid, line=text)


def describe_exit(status: int) -> str:
    """Say how a process ended, for any ``status``: negative is a signal, above 255 is a code of Windows."""
    if status < 0:
        return f"killed by {_signal_name(-status)}"
    if status > 0xFF:
        code = status & 0xFFFFFFFF
        known = f" ({_NT_STATUS[code]})" if code in _NT_STATUS else ""
        return f"exit status 0x{code:08X}{known}"
    return f"exit status {status}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal between the two that have names, or one that Python does not know
        first = getattr(signal, "SIGRTMIN", None)
        if first is not None and first < number <= getattr(signal, "SIGRTMAX", 0):
            return f"SIGRTMIN+{number - first}"
        return f"signal {number}"
