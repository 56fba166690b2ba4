"""Ends are waited for, whatever cancels the wait."""

from __future__ import annotations

import asyncio
import threading

import pytest

from agent.platform.concurrency import cancelled_once, ended, in_thread
from tests.waiting import until


async def cancel_often(task: asyncio.Task[object], times: int = 5) -> None:
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)


async def test_a_thread_is_told_to_stop_and_waited_for_however_often_it_is_cancelled():
    ends, running, calls = threading.Event(), threading.Event(), []

    def work(stop: object) -> str:
        running.set()
        ends.wait(10)
        assert callable(stop) and stop()
        running.clear()
        return "result"

    task = asyncio.create_task(in_thread(work, on_cancel=lambda: calls.append("told"), undo=calls.append))
    await until(running.is_set)
    await cancel_often(task)
    assert running.is_set() and not task.done()
    ends.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not running.is_set()
    assert calls[-1] == "result"
    assert set(calls[:-1]) == {"told"}


async def test_a_thread_that_fails_after_the_cancellation_undoes_nothing():
    ends, running, undone = threading.Event(), threading.Event(), []

    def work(_stop: object) -> None:
        running.set()
        ends.wait(10)
        raise OSError("too late")

    task = asyncio.create_task(in_thread(work, undo=undone.append))
    await until(running.is_set)
    task.cancel()
    await asyncio.sleep(0)
    ends.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not undone


async def test_a_thread_gives_its_result_and_its_error():
    assert await in_thread(lambda stop: stop()) is False
    with pytest.raises(ZeroDivisionError):
        await in_thread(lambda _stop: 1 // 0)


async def test_work_is_cancelled_once_and_cleans_up_undisturbed():
    cancellations, go_on = 0, asyncio.Event()

    async def work() -> None:
        nonlocal cancellations
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancellations += 1
            try:
                await go_on.wait()
            except asyncio.CancelledError:
                cancellations += 1
            raise

    task = asyncio.create_task(cancelled_once(work()))
    await asyncio.sleep(0.01)
    await cancel_often(task)
    assert not task.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cancellations == 1


async def test_work_that_ends_well_or_badly_after_a_cancellation_was_cancelled():
    async def stubborn(error: Exception | None) -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if error is not None:
                raise error from None
        return "done"

    for error in (None, ValueError("while cleaning up")):
        task = asyncio.create_task(cancelled_once(stubborn(error)))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_deadline_and_a_cancellation_together_are_one_cancellation_to_the_work():
    cancellations = 0

    async def work() -> None:
        nonlocal cancellations
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancellations += 1
            await asyncio.sleep(0.05)
            cancellations += 10
            raise

    async def bounded() -> None:
        async with asyncio.timeout(0.01):
            await cancelled_once(work())

    task = asyncio.create_task(bounded())
    await until(lambda: cancellations == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cancellations == 11


async def test_waiting_for_the_end_cancels_nobody():
    go_on = asyncio.Event()

    async def work() -> str:
        await go_on.wait()
        return "undisturbed"

    works = [asyncio.create_task(work()) for _ in range(3)]
    waiting = asyncio.create_task(ended(works))
    await asyncio.sleep(0.01)
    await cancel_often(waiting)
    assert not waiting.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert [task.result() for task in works] == ["undisturbed"] * 3
