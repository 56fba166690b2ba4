"""Workers that die, hang and grow, for real, under a real agent: what serves afterwards, and what is reported."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

import psutil
import pytest

from agent.contract.failures import FailureCode
from agent.contract.messages import Reported, State
from fleet.demo.watch import DemoError, chat
from tests.load import Load
from tests.models import Built
from tests.rig import Rig
from tests.waiting import alive

QUESTION = "What is the capital of France?"


@pytest.fixture
def rig(sample_artifact: Built, tiny_artifact: Built) -> Iterator[Rig]:
    with Rig() as rig:
        for each in (sample_artifact, tiny_artifact):
            rig.take_over(each.manifest, each.files)
        rig.start_controller()
        yield rig


def answers(rig: Rig, built: Built) -> bool:
    reported = rig.reported()
    try:
        return bool(chat(f"{reported.endpoint}/v1", built.manifest.model.name, QUESTION)) if reported else False
    except DemoError:
        return False


def serves(rig: Rig, built: Built) -> bool:
    reported = rig.reported()
    return reported is not None and reported.digest == built.manifest.digest


def kill_workers_until(rig: Rig, built: Built, over: Callable[[Reported], bool]) -> None:
    """Each worker as soon as it answers, until the device reports what is wanted."""
    victims = set()

    def done() -> bool:
        reported = rig.reported()
        if reported and over(reported):
            return True
        pid = rig.worker()
        if pid is not None and pid not in victims and answers(rig, built):
            victims.add(pid)
            os.kill(pid, signal.SIGKILL)
        return False

    rig.until(done, "the agent to give the model up", every_s=0.2)


async def test_a_killed_worker_is_back_in_its_load_time_and_queued_requests_are_served(
    rig: Rig, sample_artifact: Built
):
    rig.start_agent(PHIFLEET_AGENT_CANARY_INTERVAL_S="0")
    rig.order(sample_artifact.manifest)
    reported = await asyncio.to_thread(rig.settled, 1)
    pid = await asyncio.to_thread(rig.worker)
    assert pid is not None
    # More clients than the host decodes at once (eight and a short one): the others wait in the queue at any moment.
    load = Load(str(reported.endpoint), sample_artifact.manifest.model.name, clients=18, tokens=24)
    running = asyncio.create_task(load.run())
    await load.finished(18)
    killed = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    waiting = [seen for seen in load.under_way if not seen.times]
    await load.finished(len(load.seen) + 36)
    load.stop()
    await running
    broken = [seen for seen in load.seen if seen.error]
    assert 0 < len(broken) <= 9, [seen.error for seen in broken]
    assert all(seen.began < killed for seen in broken)
    assert all("worker" in seen.error or "process" in seen.error for seen in broken), [seen.error for seen in broken]
    assert [seen for seen in waiting if not seen.error and seen.text], "queued ones are served"
    assert (await asyncio.to_thread(rig.settled, 1)).state is State.COMMITTED


def test_a_model_whose_worker_keeps_dying_gives_way_to_the_one_before(
    rig: Rig, sample_artifact: Built, tiny_artifact: Built
):
    rig.start_agent(PHIFLEET_AGENT_CANARY_INTERVAL_S="0")
    rig.order(sample_artifact.manifest)
    assert rig.settled(1).state is State.COMMITTED
    rig.order(tiny_artifact.manifest)
    assert rig.settled(2).state is State.COMMITTED
    kill_workers_until(rig, tiny_artifact, lambda now: now.state is State.ROLLED_BACK)
    # An answer alone is no proof: the new model answers to the old one's name, too, and a report is a moment old.
    rig.until(lambda: serves(rig, sample_artifact) and answers(rig, sample_artifact), "the old model to serve")
    reported = rig.reported()
    assert reported
    assert reported.failure
    assert reported.failure.code in (FailureCode.HEALTH_RESTARTS, FailureCode.RUNTIME_CRASHED)


def test_with_nothing_to_go_back_to_it_serves_nothing_and_says_why(rig: Rig, tiny_artifact: Built):
    rig.start_agent(PHIFLEET_AGENT_CANARY_INTERVAL_S="0")
    rig.order(tiny_artifact.manifest)
    reported = rig.settled(1)
    assert reported.state is State.COMMITTED
    kill_workers_until(rig, tiny_artifact, lambda now: now.digest is None and now.failure is not None)
    last = rig.reported()
    assert last and last.failure
    assert last.failure.code in (FailureCode.HEALTH_RESTARTS, FailureCode.RUNTIME_CRASHED)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{reported.endpoint}/health/ready", timeout=5)
    assert caught.value.code == 503
    request = urllib.request.Request(
        f"{reported.endpoint}/v1/completions", b'{"model": "x", "prompt": "y"}', {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=5)
    assert caught.value.code == 503
    assert json.load(caught.value)["error"]["message"]


def test_a_worker_that_hangs_is_replaced(rig: Rig, sample_artifact: Built):
    rig.start_agent(PHIFLEET_AGENT_HANG_TIMEOUT_S="2", PHIFLEET_AGENT_CANARY_INTERVAL_S="0")
    rig.order(sample_artifact.manifest)
    assert rig.settled(1).state is State.COMMITTED
    stopped = rig.worker()
    assert stopped is not None
    os.kill(stopped, signal.SIGSTOP)
    rig.until(lambda: answers(rig, sample_artifact), "a new worker, on which the request is begun once more")
    assert rig.worker() != stopped
    assert not psutil.pid_exists(stopped) or not alive(psutil.Process(stopped))


def test_a_worker_past_its_memory_limit_is_replaced_and_said(rig: Rig, sample_artifact: Built):
    # The sample takes some 250 MB resident; its limit here lets it load and then not serve for long.
    rig.start_agent(PHIFLEET_AGENT_MEMORY_LIMIT_BYTES=str(60 * 2**20), PHIFLEET_AGENT_CANARY_INTERVAL_S="0")
    rig.order(sample_artifact.manifest)
    reported = rig.settled(1)
    assert reported.state in (State.FAILED, State.ROLLED_BACK)
    assert reported.failure
    assert reported.failure.code in (FailureCode.RUNTIME_MEMORY, FailureCode.HEALTH_MEMORY)
    assert any(letter.isdigit() for letter in reported.failure.message), "with the figures"
