"""Vital and optional jobs, apart from the agent."""

from __future__ import annotations

import asyncio
import errno
import itertools

import pytest
from structlog.testing import capture_logs

from agent.core.supervision import RestartPolicy
from agent.daemon.jobs import RETRY, Job, Jobs
from agent.errors import StoreError
from tests.waiting import until

QUICK = RestartPolicy(window_s=300.0, first_s=0.001, max_s=0.004)


async def forever() -> None:
    await asyncio.Event().wait()


async def test_an_optional_job_is_tried_again_with_growing_pauses_and_its_error_is_told():
    errors = iter([OSError(errno.EIO, "eio"), StoreError("no room"), RuntimeError("ours")])
    done = asyncio.Event()

    async def run() -> None:
        error = next(errors, None)
        if error is not None:
            raise error
        done.set()

    jobs = Jobs([Job("one", run), Job("other", forever)], QUICK)
    with capture_logs() as logs:
        jobs.start()
        await done.wait()
        await jobs.end()
    told = [line for line in logs if line["event"].startswith("optional job failed")]
    assert [line["retry_in_s"] for line in told] == [0.001, 0.002, 0.004]
    assert [line["log_level"] for line in told] == ["warning", "warning", "error"]
    assert [line.get("code") for line in told] == [None, "store.io", None]
    assert all(line["job"] == "one" for line in told)


async def test_after_a_good_while_the_pauses_begin_anew():
    now = itertools.count(0, 1000)
    loop = asyncio.get_running_loop()
    failed = 0

    async def run() -> None:
        nonlocal failed
        failed += 1
        if failed < 4:
            raise OSError("again")

    class Clock(Jobs):
        pass

    original = loop.time
    jobs = Clock([Job("one", run)], QUICK)
    with capture_logs() as logs:
        loop.time = lambda: float(next(now))  # type: ignore[method-assign]
        try:
            await asyncio.wait_for(jobs._kept_running(Job("one", run)), None)
        finally:
            loop.time = original  # type: ignore[method-assign]
    assert {line["retry_in_s"] for line in logs} == {0.001}


def test_the_pauses_of_the_agent_are_bounded():
    pauses = [RETRY.pause_s(failures + 1) for failures in range(1, 100)]
    assert pauses[0] == 1.0
    assert max(pauses) == 60.0


async def test_a_vital_job_that_fails_is_raised_and_the_others_can_be_ended():
    async def fail() -> None:
        await asyncio.sleep(0)
        raise RuntimeError("vital")

    ended: list[str] = []

    async def other() -> None:
        try:
            await forever()
        finally:
            ended.append("other")

    jobs = Jobs([Job("vital", fail, vital=True), Job("other", other)])
    jobs.start()
    with pytest.raises(RuntimeError, match="vital"):
        await jobs.until(asyncio.Event())
    await jobs.end()
    assert ended == ["other"]


async def test_a_stop_ends_the_wait_and_a_job_that_is_done_does_not():
    async def done() -> None:
        return

    stop = asyncio.Event()
    jobs = Jobs([Job("done", done), Job("other", forever)])
    jobs.start()
    waiting = asyncio.create_task(jobs.until(stop))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    stop.set()
    await until(waiting.done)
    await jobs.end()
