"""Waiting for what happens in its own time, instead of sleeping for as long as it usually takes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable

import psutil

TIMEOUT_S = 30.0


async def until(condition: Callable[[], object], what: str = "it happened", timeout_s: float = TIMEOUT_S) -> None:
    """Return as soon as the condition is true; fail, and say what did not come about, after ``timeout_s``."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"waited {timeout_s:g} s in vain until {what}"
        await asyncio.sleep(0.01)


def wait_until(condition: Callable[[], object], what: str = "it happened", timeout_s: float = TIMEOUT_S) -> None:
    """The same outside an event loop."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"waited {timeout_s:g} s in vain until {what}"
        time.sleep(0.02)


def alive(process: psutil.Process) -> bool:
    """A zombie, which nobody has waited for, is not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def child_running(parent: psutil.Process, module: str) -> psutil.Process | None:
    """A child of a process that runs this module; one that ends while it is looked at is none."""
    for child in parent.children():
        with contextlib.suppress(psutil.Error):
            if any(module in word for word in child.cmdline()):
                return child
    return None


def listens(host: str, port: int) -> bool:
    """Something takes TCP connections there."""
    with socket.socket() as sock:
        return sock.connect_ex((host, port)) == 0
