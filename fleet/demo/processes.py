"""The demo's own processes: a controller and an agent, each with a log that is shown when it ends too early."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from fleet.errors import FleetError

TAIL_LINES = 15


class ProcessEndedError(FleetError):
    """A process that should be running is not; the message ends with the tail of its log."""


class Process:
    """A child in a process group of its own, so that an interrupt reaches the demo alone, which then ends the child."""

    def __init__(self, name: str, arguments: list[str], log: Path, environment: dict[str, str]) -> None:
        self.name = name
        self.log = log
        with log.open("ab") as sink:
            self._child = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                env={**os.environ, **environment},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Of the child."""
        return self._child.pid

    def check(self) -> None:
        """See that it is still running.

        Raises:
            ProcessEndedError: it is not.
        """
        code = self._child.poll()
        if code is not None:
            raise ProcessEndedError(f"the {self.name} ended with {code}; its last words:\n{self.tail()}")

    def tail(self) -> str:
        """Return the last lines of its log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(f"    {line}" for line in lines[-TAIL_LINES:])

    def stop(self, timeout_s: float = 10.0) -> None:
        """Ask it to end, and see that it did."""
        if self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)
            try:
                self._child.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()


@contextlib.contextmanager
def running(process: Process) -> Iterator[Process]:
    """The process, until the block ends, however it ends."""
    try:
        yield process
    finally:
        process.stop()


def free_port() -> int:
    """Return a TCP port of loopback that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def port_is_free(port: int) -> bool:
    """Return whether loopback's TCP port can be listened on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
