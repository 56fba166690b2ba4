"""Work whose end is waited for, whatever cancels the wait: what still runs still writes to its files."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")
Stop = Callable[[], bool]


async def in_thread(
    work: Callable[[Stop], T],
    *,
    on_cancel: Callable[[], None] = lambda: None,
    undo: Callable[[T], None] = lambda _: None,
) -> T:
    """Run blocking ``work`` in a thread. It is given a function that turns true when it should end early.

    A cancellation is raised only after the thread has ended, however often it comes: ``on_cancel`` is called, and
    ``undo`` with a result that nobody takes.
    """
    stopped = threading.Event()
    context = contextvars.copy_context()
    # A future of the executor and not a task: the end of the event loop cancels all tasks, and the thread goes on.
    future = asyncio.get_running_loop().run_in_executor(None, lambda: context.run(work, stopped.is_set))
    cancelled = False
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError:
            cancelled = True
            stopped.set()
            on_cancel()
    if not cancelled:
        return future.result()
    if future.exception() is None:
        undo(future.result())
    raise asyncio.CancelledError


async def cancelled_once(work: Coroutine[Any, Any, T]) -> T:
    """Await ``work``. The first cancellation is passed on to it, so that it can clean up; further ones are not.

    Either way this ends only when ``work`` has ended.
    """
    task = asyncio.create_task(work)
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            if not cancelled:
                cancelled = True
                task.cancel()
    if cancelled:
        if not task.cancelled():
            task.exception()  # read, or asyncio complains
        raise asyncio.CancelledError
    return task.result()


async def ended(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Wait until all of them have ended, without cancelling them and without taking their results or errors."""
    pending, cancelled = {task for task in tasks if not task.done()}, False
    while pending:
        try:
            _, pending = await asyncio.wait(pending)
        except asyncio.CancelledError:
            cancelled, pending = True, {task for task in pending if not task.done()}
    if cancelled:
        raise asyncio.CancelledError
