"""The host against real worker processes that crash, hang and swell for real."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from structlog.testing import capture_logs

from agent.contract.failures import FailureCode
from agent.core import supervision
from agent.core.inference import FinishReason, InferenceError, TokenEvent
from agent.errors import ProbeError, RuntimeLoadError
from agent.runtimes.host.model_host import WorkerHost
from agent.runtimes.protocol.registry import RuntimeSpec
from tests.agent.runtimes.conftest import MIB, ROOT, Artifact, Events, HostFactory, answer, ask, render
from tests.simulators.engine import SPEC
from tests.waiting import alive, until, wait_until

Make = Callable[..., Artifact]
Workers = Callable[[], list[psutil.Process]]


@pytest.fixture
def workers() -> Workers:
    """The processes that the test has started; brokers of other tests may run beside them."""
    before = set(psutil.Process().children())
    return lambda: [child for child in psutil.Process().children() if child not in before]


async def _serving(host: WorkerHost, made: Artifact) -> WorkerHost:
    await host.prove(*made)
    await host.activate(*made)
    return host


def _pid(host: WorkerHost) -> int:
    assert host._active is not None
    return host._active.worker.pid


async def test_a_proven_model_serves(host_of: HostFactory, artifact: Make, events: Events) -> None:
    host = host_of()
    made = artifact(noise="native libraries print to standard output\n")
    proof = await host.prove(*made)
    assert proof.runtime == "simulated"
    assert proof.memory_bytes > 0
    assert host.active() is None
    info = await host.activate(*made)
    assert info.digest == made[0].digest
    assert host.active() == info
    assert host.active_manifest() == made[0]
    text, done = await answer(host, ask("one two three"))
    assert text == "one two three one two three one two"
    assert (done.reason, done.prompt_tokens, done.completion_tokens) == (FinishReason.LENGTH, 3, 8)
    assert await host.count_tokens("a b c") == 3
    assert events.kinds() == ["activated"]
    assert host.stats().state == "serving"


async def test_nothing_serves_before_a_deployment_and_after_retiring(host_of: HostFactory, artifact: Make) -> None:
    host = host_of()
    with pytest.raises(InferenceError, match="no model is deployed") as caught:
        await answer(host, ask("x"))
    assert caught.value.kind == "unavailable"
    await _serving(host, artifact())
    await host.retire()
    assert host.active() is None
    with pytest.raises(InferenceError, match="retired"):
        await answer(host, ask("x"))


async def test_a_stop_string_ends_the_answer(host_of: HostFactory, artifact: Make) -> None:
    host = await _serving(host_of(), artifact())
    text, done = await answer(host, ask("one two three", stop=("two th",)))
    assert (text, done.reason) == ("one ", FinishReason.STOP)


async def test_refusals_reach_the_one_who_asked(host_of: HostFactory, artifact: Make) -> None:
    host = await _serving(host_of(), artifact())
    for prompt, kind in (("[refuse]", "unsupported"), ("[choke]", "invalid"), ("w " * 600, "context_overflow")):
        with pytest.raises(InferenceError) as caught:
            await answer(host, ask(prompt))
        assert caught.value.kind == kind
    with pytest.raises(InferenceError, match="told to fail") as caught:
        await answer(host, ask("[error@2]"))
    assert caught.value.kind == "unsupported"
    assert (await answer(host, ask("still here")))[0].startswith("still here")


async def test_answers_that_have_begun_end_at_a_crash_and_those_that_wait_are_served(
    host_of: HostFactory, artifact: Make, events: Events
) -> None:
    host = await _serving(host_of(), artifact(token_s=0.01))
    begun: set[str] = set()

    async def ask_and_tell(name: str) -> None:
        async for event in host.generate(ask("w", name, max_tokens=200 if name in ("r0", "r1") else 20)):
            begun.add(event.id)

    asked = [asyncio.create_task(ask_and_tell(f"r{number}")) for number in range(5)]
    await until(lambda: begun == {"r0", "r1"} and host.stats().queued == 3)
    os.kill(_pid(host), signal.SIGKILL)
    results = await asyncio.gather(*asked, return_exceptions=True)
    kinds = [result.kind if isinstance(result, InferenceError) else "served" for result in results]
    assert kinds == ["crashed", "crashed", "served", "served", "served"]
    assert "SIGKILL" in str(results[0])
    assert events.kinds() == ["activated", "crashed", "restarted"]
    assert host.stats().restarts == 1


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
async def test_a_request_of_which_nothing_was_told_is_begun_once_more(
    how: signal.Signals, host_of: HostFactory, artifact: Make, events: Events
) -> None:
    host = await _serving(host_of(hang_s=1.0), artifact(token_s=0.5))
    asked = [asyncio.create_task(answer(host, ask("w", f"r{number}", max_tokens=2))) for number in range(2)]
    gone = asyncio.create_task(answer(host, ask("w", "gone", max_tokens=2)))
    await until(lambda: host.stats().active == 2)
    os.kill(_pid(host), how)
    gone.cancel()
    results = await asyncio.gather(*asked)
    assert [done.completion_tokens for _, done in results] == [2, 2]
    assert events.kinds() == ["activated", "crashed", "restarted"]
    await until(lambda: host.stats().active == host.stats().queued == 0, "nothing is computed for one who is gone")


async def test_a_request_that_kills_each_worker_is_begun_twice_and_no_more(
    host_of: HostFactory, artifact: Make, events: Events
) -> None:
    host = await _serving(host_of(), artifact())
    with pytest.raises(InferenceError, match="SIGSEGV"):
        await answer(host, ask("[crash@0]"))
    await until(lambda: events.kinds().count("restarted") == 2)
    assert events.kinds().count("crashed") == 2
    assert (await answer(host, ask("again")))[0].startswith("again")


async def test_a_crash_in_native_code_is_reported_by_its_signal(
    host_of: HostFactory, artifact: Make, events: Events
) -> None:
    host = await _serving(host_of(), artifact())
    with pytest.raises(InferenceError, match="SIGSEGV"):
        await answer(host, ask("[crash@2]"))
    await until(lambda: "restarted" in events.kinds())
    assert events[1].code is FailureCode.RUNTIME_CRASHED
    assert (await answer(host, ask("again")))[0].startswith("again")


@pytest.mark.parametrize("how", ["stopped", "stuck"])
async def test_a_hang_is_noticed_and_ended(how: str, host_of: HostFactory, artifact: Make, events: Events) -> None:
    host = await _serving(host_of(hang_s=1.0), artifact(token_s=0.02))
    told: set[str] = set()

    async def ask_and_tell() -> None:
        async for event in host.generate(ask("[hang@3]" if how == "stuck" else "w", max_tokens=500)):
            told.add(event.id)

    asked = asyncio.create_task(ask_and_tell())
    if how == "stopped":
        await until(lambda: told)
        os.kill(_pid(host), signal.SIGSTOP)
    with pytest.raises(InferenceError) as caught:
        await asked
    assert caught.value.kind == "timeout"
    await until(lambda: "restarted" in events.kinds())
    assert events[1].code is FailureCode.RUNTIME_HUNG
    assert (await answer(host, ask("again")))[0].startswith("again")


async def test_a_slow_model_is_no_hang(host_of: HostFactory, artifact: Make, events: Events) -> None:
    host = await _serving(host_of(hang_s=1.5), artifact(token_s=0.3))
    assert (await answer(host, ask("w", max_tokens=6)))[1].completion_tokens == 6
    await asyncio.sleep(1.8)  # idle is no hang either
    assert events.kinds() == ["activated"]


async def test_a_hang_is_noticed_by_the_pace_before_it_whatever_the_settings_allow(
    host_of: HostFactory, artifact: Make, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervision, "LEAST_HANG_S", 2.0)
    host = await _serving(host_of(hang_s=3600.0), artifact(token_s=0.02, load_s=0.5))
    assert (await answer(host, ask("w")))[1].completion_tokens == 8
    told: set[str] = set()

    async def ask_and_tell() -> None:
        async for event in host.generate(ask("w", max_tokens=500)):
            told.add(event.id)

    asked = asyncio.create_task(ask_and_tell())
    await until(lambda: told)
    os.kill(_pid(host), signal.SIGSTOP)
    with pytest.raises(InferenceError, match="no sign of life for"):
        await asked
    # The model counts as active, since its requests wait; whether it is ready is another question.
    assert host.active() is not None
    assert (host.stats().state, host.stats().reason[:20]) == ("restarting", "no sign of life for ")
    await until(lambda: host.stats().state == "serving")
    assert events.kinds() == ["activated", "crashed", "restarted"]


async def test_a_prompt_longer_than_all_before_it_may_take_longer(
    host_of: HostFactory, artifact: Make, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervision, "LEAST_HANG_S", 0.5)
    host = await _serving(host_of(), artifact(token_s=0.01))
    os.kill(_pid(host), signal.SIGSTOP)  # so that the silence is that of the prompt, not of a token after it
    asked = asyncio.create_task(answer(host, ask("a long prompt " * 30, max_tokens=4)))
    await asyncio.sleep(1.5)
    os.kill(_pid(host), signal.SIGCONT)
    assert (await asked)[1].completion_tokens == 4
    assert events.kinds() == ["activated"]


async def test_growth_past_the_limit_restarts_the_worker(host_of: HostFactory, artifact: Make, events: Events) -> None:
    host = await _serving(host_of(memory_limit_bytes=256 * MIB, recycle_grace_s=0.5), artifact(token_s=0.05))
    with pytest.raises(InferenceError):
        await answer(host, ask("[leak@0]", max_tokens=500))
    await until(lambda: "restarted" in events.kinds())
    assert events[1].code is FailureCode.RUNTIME_MEMORY
    assert "256 MiB" in events[1].message
    assert host.stats().memory_bytes < 200 * MIB


@pytest.mark.skipif(sys.platform == "win32", reason="the hard limit is POSIX")
async def test_the_hard_limit_stops_a_leak_by_itself(host_of: HostFactory, artifact: Make, events: Events) -> None:
    host = await _serving(host_of(memory_hard_limit_bytes=256 * MIB), artifact())
    with pytest.raises(InferenceError, match="MemoryError"):
        await answer(host, ask("[leak@0]", max_tokens=500))
    await until(lambda: "restarted" in events.kinds())


async def test_too_many_crashes_end_in_giving_up(host_of: HostFactory, artifact: Make, events: Events) -> None:
    host = await _serving(host_of(crash_limit=2, backoff_first_s=0.01), artifact())
    for number in range(3):
        with pytest.raises(InferenceError):
            await answer(host, ask("[crash@0]", f"r{number}"))
    await until(lambda: "gave_up" in events.kinds())
    assert host.active() is None
    assert host.stats().state == "failed"
    with pytest.raises(InferenceError, match="died 3 times") as caught:
        await answer(host, ask("x"))
    assert caught.value.kind == "unavailable"
    await host.activate(*artifact("other"))  # the daemon goes back to the previous artifact
    assert (await answer(host, ask("back")))[0].startswith("back")


async def test_a_full_queue_says_when_to_come_back(host_of: HostFactory, artifact: Make) -> None:
    host = await _serving(host_of(queue_limit=1, max_sequences=1), artifact(token_s=0.01))
    asked = [asyncio.create_task(answer(host, ask("w", f"r{number}"))) for number in range(2)]
    await until(lambda: host.stats().queued == 1)
    with pytest.raises(InferenceError) as caught:
        await answer(host, ask("w", "late"))
    assert caught.value.kind == "busy"
    assert caught.value.retry_after_s is not None
    await asyncio.gather(*asked)


async def test_closing_the_iterator_cancels_within_a_token(host_of: HostFactory, artifact: Make) -> None:
    host = await _serving(host_of(max_sequences=1), artifact(token_s=0.02))
    stream = host.generate(ask("w", "long", max_tokens=4000))
    async for event in stream:
        assert isinstance(event, TokenEvent)
        break
    begun = time.monotonic()
    await stream.aclose()  # type: ignore[attr-defined]
    await answer(host, ask("next", "next", max_tokens=1))
    assert time.monotonic() - begun < 40  # the whole answer takes 80


async def test_one_who_leaves_the_queue_is_never_begun(host_of: HostFactory, artifact: Make) -> None:
    host = await _serving(host_of(max_sequences=1), artifact(token_s=0.01))
    first = asyncio.create_task(answer(host, ask("w", "first", max_tokens=30)))
    await until(lambda: host.stats().active == 1)
    second = asyncio.create_task(answer(host, ask("[crash@0]", "second")))
    await until(lambda: host.stats().queued == 1)
    second.cancel()
    await first
    assert host.stats().queued == 0
    assert host.stats().restarts == 0


async def test_a_model_that_fails_its_probes_changes_nothing(host_of: HostFactory, artifact: Make) -> None:
    host = await _serving(host_of(), artifact())
    with pytest.raises(ProbeError, match=r"It is Lyon.*none of"):
        await host.prove(*artifact("wrong", answers={"France": "It is Lyon"}))
    assert (await answer(host, ask("same as before")))[0].startswith("same as before")


@pytest.mark.parametrize(
    ("behaviour", "code", "says"),
    [
        ({"load": "error"}, FailureCode.RUNTIME_LOAD, "no simulated model"),
        ({"load": "raise"}, FailureCode.RUNTIME_LOAD, "raise anything"),
        ({"load": "no space"}, FailureCode.STORE_DISK_FULL, "No space left"),
        ({"load": "crash"}, FailureCode.RUNTIME_CRASHED, "SIGSEGV"),
        ({"load": "hang"}, FailureCode.RUNTIME_LOAD, "did not load"),
        ({"crash_at": 1}, FailureCode.RUNTIME_CRASHED, "SIGSEGV"),
    ],
)
async def test_a_model_that_does_not_load_says_why(
    behaviour: dict[str, object],
    code: FailureCode,
    says: str,
    host_of: HostFactory,
    artifact: Make,
    events: Events,
    workers: Workers,
) -> None:
    host = host_of(load_timeout_s=1.5)
    with pytest.raises(RuntimeLoadError, match=says) as caught:
        await host.prove(*artifact(**behaviour))
    assert caught.value.code is code
    assert events == []
    assert workers() == []


async def test_a_probe_that_hangs_ends_by_its_timeout(host_of: HostFactory, artifact: Make) -> None:
    host = host_of(probe_timeout_s=0.5)
    with pytest.raises(RuntimeLoadError, match="not answered") as caught:
        await host.prove(*artifact(token_s=5.0))
    assert caught.value.code is FailureCode.RUNTIME_HUNG


async def test_no_runtime_for_the_artifact(host_of: HostFactory, artifact: Make) -> None:
    made = artifact()
    host = WorkerHost(render, registry={"other": RuntimeSpec("other", "x", "mlx")})
    with pytest.raises(RuntimeLoadError, match="no runtime here takes that") as caught:
        await host.prove(*made)
    assert caught.value.code is FailureCode.RUNTIME_MISSING
    absent = RuntimeSpec("absent", "x", "onnx_genai", ("no-such-package",), "onnx")
    with pytest.raises(RuntimeLoadError, match="no-such-package; install it with"):
        await WorkerHost(render, registry={"absent": absent}).prove(*made)


async def test_an_update_beside_the_old_model_fails_no_request(
    host_of: HostFactory, artifact: Make, workers: Workers
) -> None:
    host = await _serving(host_of(), artifact("old", token_s=0.005))
    new = artifact("new", token_s=0.005)
    stop = asyncio.Event()
    failures: list[BaseException] = []
    served = 0

    async def client(number: int) -> None:
        nonlocal served
        while not stop.is_set():
            try:
                await answer(host, ask("w", f"c{number}-{served}"))
                served += 1
            except InferenceError as error:
                failures.append(error)

    clients = [asyncio.create_task(client(number)) for number in range(4)]
    await asyncio.sleep(0.2)
    await host.prove(*new)
    await host.activate(*new)
    before = served
    await asyncio.sleep(0.2)
    stop.set()
    await asyncio.gather(*clients)
    assert failures == []
    assert served > before
    info = host.active()
    assert info is not None
    assert info.digest == new[0].digest
    await until(lambda: len(workers()) == 1)


async def test_an_answer_begun_on_the_old_model_is_ended_by_it(host_of: HostFactory, artifact: Make) -> None:
    host = await _serving(host_of(), artifact("old", token_s=0.01))
    long = asyncio.create_task(answer(host, ask("w", "long", max_tokens=60)))
    await until(lambda: host.stats().active == 1)
    await host.activate(*artifact("new"))
    assert not long.done()
    assert (await long)[1].completion_tokens == 60


async def test_without_memory_for_two_the_models_are_swapped(
    host_of: HostFactory, artifact: Make, events: Events
) -> None:
    old, new = artifact("old", memory_bytes=80 * MIB), artifact("new", need=150 * MIB, load_s=0.3)
    host = await _serving(host_of(free=100 * MIB), old)
    proving = asyncio.create_task(host.prove(*new))
    await until(lambda: host.stats().state == "swapping")
    with pytest.raises(InferenceError) as caught:
        await answer(host, ask("w"))
    assert caught.value.kind == "unavailable"
    assert caught.value.retry_after_s
    await proving
    await host.activate(*new)
    assert events.kinds() == ["activated", "swap_begun", "swap_ended", "activated"]
    assert (await answer(host, ask("w")))[1].completion_tokens == 8


@pytest.mark.parametrize("how", ["wrong answer", "discarded", "forgotten"])
async def test_a_swap_that_comes_to_nothing_is_undone(
    how: str, host_of: HostFactory, artifact: Make, events: Events
) -> None:
    old = artifact("old", memory_bytes=80 * MIB)
    host = await _serving(host_of(free=100 * MIB, swap_keep_s=0.2), old)
    new = artifact("new", need=150 * MIB, answers={"France": "Lyon" if how == "wrong answer" else "Paris"})
    if how == "wrong answer":
        with pytest.raises(ProbeError):
            await host.prove(*new)
    else:
        await host.prove(*new)
        if how == "discarded":
            await host.discard()
        await until(lambda: host.active() is not None)
    info = host.active()
    assert info is not None
    assert info.digest == old[0].digest
    assert (await answer(host, ask("w")))[1].completion_tokens == 8
    assert events.kinds() == ["activated", "swap_begun", "swap_ended"]


async def test_too_large_is_refused_with_the_figures(host_of: HostFactory, artifact: Make) -> None:
    host = host_of(free=100 * MIB)
    with pytest.raises(RuntimeLoadError, match="needs 500 MiB; 100 MiB available") as caught:
        await host.prove(*artifact(need=500 * MIB))
    assert caught.value.code is FailureCode.RUNTIME_MEMORY


async def test_a_proof_that_nobody_uses_is_dropped(host_of: HostFactory, artifact: Make, workers: Workers) -> None:
    host = host_of(proven_keep_s=0.3)
    await host.prove(*artifact())
    assert len(workers()) == 1
    await until(lambda: workers() == [])


async def test_runtimes_are_listed_with_the_reason_when_not_usable(tmp_path: Path) -> None:
    from agent.runtimes.host.settings import HostSettings

    registry = {
        "simulated": SPEC,
        "absent": RuntimeSpec("absent", "agent.none", "mlx", ("no-such-package",), "mlx"),
        "broken": RuntimeSpec("broken", "agent.no_such_module", "mlx"),
    }
    cache = tmp_path / "cache" / "runtimes.json"
    facts = await WorkerHost(render, HostSettings(cache_file=cache), registry=registry).runtimes()
    assert [fact.usable for fact in facts] == [True, False, False]
    assert facts[0].devices == ("CPU",)
    assert re.search(r"python\S* -m pip install 'phifleet-\S+\.whl\[mlx\]'", facts[1].reason)
    assert "no_such_module" in facts[2].reason
    with capture_logs() as logs:
        again = await WorkerHost(render, HostSettings(cache_file=cache), registry={"simulated": SPEC}).runtimes()
    assert again[0] == facts[0]
    assert "checking runtime" not in [line["event"] for line in logs]
    cache.write_text("{not json")
    assert (await WorkerHost(render, HostSettings(cache_file=cache), registry={"simulated": SPEC}).runtimes())[0].usable


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG")
def test_a_worker_leaves_with_its_parent(tmp_path: Path) -> None:
    program = """
import asyncio, sys
from agent.runtimes.host.supervisor import WorkerProcess
from tests.simulators.engine import SPEC
async def main():
    worker = await WorkerProcess.start(SPEC)
    print(worker.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not alive(child), "the worker leaves with its parent")


async def test_a_proven_worker_that_dies_before_its_time_is_loaded_again(
    host_of: HostFactory, artifact: Make, workers: Workers
) -> None:
    host = host_of()
    made = artifact()
    await host.prove(*made)
    workers()[0].kill()
    await asyncio.sleep(0.1)
    await host.activate(*made)
    assert (await answer(host, ask("w")))[1].completion_tokens == 8


@pytest.mark.skipif(sys.platform == "win32", reason="resource is POSIX")
@pytest.mark.parametrize(("threads", "says"), [(1, "cannot start a worker"), (0, "OSError")])
async def test_no_file_descriptor_for_a_new_worker_is_a_death_like_any_other(
    threads: int, says: str, host_of: HostFactory, artifact: Make, events: Events
) -> None:
    import resource

    host = await _serving(host_of(crash_limit=100, backoff_first_s=0.01, threads=threads), artifact())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (4, hard))  # those that are open stay open
    try:
        os.kill(_pid(host), signal.SIGKILL)
        await until(lambda: "crashed" in events.kinds())
        waiting = asyncio.create_task(answer(host, ask("still here", "waiting")))
        await until(lambda: events.kinds().count("crashed") > 2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert says in events[-1].message
    assert (await asyncio.wait_for(waiting, 10))[0].startswith("still here")


async def _swapping(host: WorkerHost, make: Make, workers: Workers) -> asyncio.Task[object]:
    """A proof of a model that takes long to load, in the place of one that takes longer still to come back."""
    await _serving(host, make("old", memory_bytes=80 * MIB, load_s=1.5))
    proving: asyncio.Task[object] = asyncio.create_task(host.prove(*make("new", need=150 * MIB, load_s=30.0)))
    await until(lambda: host.stats().state == "swapping")
    await until(lambda: len(workers()) == 1)
    await asyncio.sleep(0.2)
    return proving


@pytest.mark.parametrize("cancelled", [True, False])
async def test_closing_does_not_wait_for_a_proof_nor_bring_back_what_it_displaced(
    cancelled: bool, host_of: HostFactory, artifact: Make, workers: Workers
) -> None:
    host = host_of(free=100 * MIB)
    proving = await _swapping(host, artifact, workers)
    begun = time.monotonic()
    if cancelled:  # as the daemon does, before it closes the host
        proving.cancel()
        await asyncio.gather(proving, return_exceptions=True)
    await host.close()
    assert time.monotonic() - begun < 15  # loading takes 30
    with pytest.raises(asyncio.CancelledError):
        await proving
    assert workers() == []
    with pytest.raises(RuntimeLoadError, match="shutting down"):
        await host.prove(*artifact("late"))


async def test_after_a_cancelled_proof_the_model_comes_back_in_the_background(
    host_of: HostFactory, artifact: Make, workers: Workers
) -> None:
    host = host_of(free=100 * MIB)
    proving = await _swapping(host, artifact, workers)
    begun = time.monotonic()
    proving.cancel()
    await asyncio.gather(proving, return_exceptions=True)
    assert time.monotonic() - begun < 15  # loading takes 30
    assert host.active() is None
    await until(lambda: host.active() is not None)
    assert (await answer(host, ask("back")))[0].startswith("back")


async def test_a_proof_that_expires_while_another_begins_holds_nothing_up(
    host_of: HostFactory, artifact: Make, workers: Workers
) -> None:
    host = host_of(proven_keep_s=0.3, drain_timeout_s=20.0)
    await host.prove(*artifact("first"))
    second = artifact("second", load_s=0.2)
    await host._lock.acquire()  # something else is at work while the time runs out
    proving = asyncio.create_task(host.prove(*second))
    await asyncio.sleep(0.5)
    host._lock.release()
    begun = time.monotonic()
    await proving
    assert time.monotonic() - begun < 10  # draining takes 20
    await host.activate(*second)
    assert (await answer(host, ask("w")))[1].completion_tokens == 8


async def test_those_who_ask_at_once_share_one_check_of_each_runtime() -> None:
    host = WorkerHost(render, registry={"simulated": SPEC})
    with capture_logs() as logs:
        first, second = await asyncio.gather(host.runtimes(), host.runtimes())
    assert first == second
    checks = [line["runtime"] for line in logs if line["event"] == "checking runtime"]
    assert checks == ["simulated"]
