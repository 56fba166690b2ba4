"""A worker's death is booked whatever it died of, and ending one takes no longer than its bound."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from agent.contract.failures import FailureCode
from agent.core.inference import InferenceError
from agent.errors import RuntimeLoadError
from agent.runtimes.host import supervisor
from agent.runtimes.host.child import ChildProcess, describe_exit
from agent.runtimes.host.settings import HostEvent
from agent.runtimes.host.supervisor import Death, WorkerProcess
from agent.runtimes.protocol import wire
from agent.runtimes.protocol.engine import LoadOptions, ModelSource
from agent.runtimes.protocol.registry import RuntimeSpec
from tests.agent.runtimes.conftest import Artifact, Events, HostFactory, answer, ask
from tests.simulators.engine import SPEC
from tests.waiting import until

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
#: Those that end a process by default, and are not stopping or ignored ones; 32 and 33 are glibc's own.
REAL_TIME = range(34, 65)


def _source(made: Artifact) -> ModelSource:
    return ModelSource(made[1])


@POSIX
@pytest.mark.parametrize("number", REAL_TIME)
async def test_every_real_time_signal_is_a_death_with_a_name(number: int):
    child = await ChildProcess.start(
        "signalled", [sys.executable, "-S", "-c", f"import os; os.kill(os.getpid(), {number})"]
    )
    assert await child.ended(30) == -number
    child.close()
    assert "SIG" in describe_exit(-number)


@POSIX
@pytest.mark.parametrize("number", [34, 35, 50, 63, 64, signal.SIGUSR2, signal.SIGKILL])
async def test_a_worker_that_ends_by_any_signal_is_buried(number: int):
    worker = await WorkerProcess.start(SPEC)
    os.kill(worker.pid, number)
    death = await asyncio.wait_for(asyncio.shield(worker.died), 30)
    assert death.code is FailureCode.RUNTIME_CRASHED
    assert "killed by SIG" in death.message
    begun = time.monotonic()
    await asyncio.wait_for(worker.kill(), 30)
    assert time.monotonic() - begun < supervisor.KILL_TIMEOUT_S


@POSIX
async def test_a_model_whose_worker_ends_by_a_real_time_signal_is_restarted(
    host_of: HostFactory, artifact: Callable[..., Artifact], events: Events
):
    host = host_of()
    await host.activate(*artifact(token_s=0.01))
    told: set[str] = set()

    async def ask_and_tell() -> None:
        async for event in host.generate(ask("w", max_tokens=500)):
            told.add(event.id)

    asked = asyncio.create_task(ask_and_tell())
    await until(lambda: told, "the answer to begin: one that has not is begun once more")
    assert host._active is not None
    os.kill(host._active.worker.pid, signal.SIGRTMIN + 1)
    with pytest.raises(InferenceError, match=r"SIGRTMIN\+1"):
        await asked
    await until(lambda: "restarted" in events.kinds())
    assert (await answer(host, ask("again", "again")))[0].startswith("again")


@given(st.integers(-(2**33), 2**33))
def test_every_exit_status_has_words(status: int):
    assert describe_exit(status).startswith(("killed by ", "exit status "))


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, "exit status 0"),
        (255, "exit status 255"),
        (256, "exit status 0x00000100"),
        (0xC0000005, "exit status 0xC0000005 (access violation)"),
        (3221226505, "exit status 0xC0000409 (stack buffer overrun or abort)"),
        (-9999, "killed by signal 9999"),
    ],
)
def test_words_of_an_exit_status(status: int, words: str):
    assert describe_exit(status) == words


@POSIX
async def test_a_process_that_the_worker_forked_does_not_hide_its_death(tmp_path, monkeypatch):
    pid_file = tmp_path / "pid"
    (tmp_path / "forking.py").write_text(
        "import os, time\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    time.sleep(600)\n"
        f"open({str(pid_file)!r}, 'w').write(str(child))\n"
        "os._exit(7)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}")
    worker = await WorkerProcess.start(RuntimeSpec("forking", "forking", "onnx_genai"))
    try:
        death = await asyncio.wait_for(asyncio.shield(worker.died), 30)
        assert "exit status 7" in death.message
        await asyncio.wait_for(worker.kill(), 5)
    finally:
        os.kill(int(pid_file.read_text()), signal.SIGKILL)


async def test_a_process_that_does_not_end_is_booked_within_the_bound(monkeypatch):
    monkeypatch.setattr(supervisor, "KILL_TIMEOUT_S", 0.3)
    monkeypatch.setattr(ChildProcess, "kill", lambda self: None)  # as one in an uninterruptible wait behaves
    worker = await WorkerProcess.start(SPEC)
    pid = worker.pid
    worker._child.write_input(b"there is no pipe for it")
    begun = time.monotonic()
    await asyncio.wait_for(worker.kill(), 20)
    assert time.monotonic() - begun < 10
    death = await worker.died
    monkeypatch.undo()
    os.kill(pid, signal.SIGKILL if sys.platform != "win32" else signal.SIGTERM)
    assert death.code is FailureCode.RUNTIME_HUNG
    assert "has not ended" in death.message
    await until(worker._child.exited.done)


async def test_a_reader_that_raises_costs_neither_the_others_nor_the_death():
    worker = await WorkerProcess.start(SPEC)
    received: list[object] = []

    def bad(_event: object) -> None:
        raise KeyError("whoever asked has a fault")

    worker._sinks = {"bad": bad, "good": received.append}
    with capture_logs() as logs:
        await asyncio.wait_for(worker.kill(Death(FailureCode.RUNTIME_HUNG, "it hangs")), 30)
    assert worker.died.result().message == "it hangs"
    assert [error.kind for error in received if isinstance(error, InferenceError)] == ["timeout"]
    assert "request not notified" in [line["event"] for line in logs]


async def test_a_fault_while_a_message_is_handled_ends_the_worker_with_a_reason(monkeypatch):
    def broken(self: WorkerProcess, message: wire.Wire) -> None:
        raise KeyError("our own fault")

    monkeypatch.setattr(WorkerProcess, "_handle", broken)
    worker = await WorkerProcess.start(SPEC)  # its Hello is the message
    death = await asyncio.wait_for(asyncio.shield(worker.died), 30)
    assert death.code is FailureCode.INTERNAL
    assert "our own fault" in death.message
    await worker.kill()


async def test_noise_on_the_socket_ends_the_worker_with_a_reason(artifact: Callable[..., Artifact]):
    worker = await WorkerProcess.start(SPEC)
    original = worker._handle
    worker._handle = lambda message: original(wire.decode(b"no JSON"))  # type: ignore[method-assign]
    with pytest.raises(RuntimeLoadError, match="broke its protocol"):
        await worker.load(_source(artifact()), LoadOptions(), 30.0)
    await worker.kill()


async def test_a_code_that_the_worker_invents_is_a_failed_load(artifact: Callable[..., Artifact]):
    worker = await WorkerProcess.start(SPEC)
    await until(lambda: worker._writer is not None)
    worker._loaded.set_result(wire.LoadFailed("no.such.code", "it does not load"))
    with pytest.raises(RuntimeLoadError, match="does not load") as caught:
        await worker.load(_source(artifact()), LoadOptions(), 30.0)
    assert caught.value.code is FailureCode.RUNTIME_LOAD
    assert not worker.alive


async def test_one_that_is_gone_takes_nothing_and_says_so():
    worker = await WorkerProcess.start(SPEC)
    counting = asyncio.create_task(worker.count_tokens("never answered before a model is loaded"))
    await asyncio.sleep(0)
    await worker.kill()
    with pytest.raises(InferenceError, match="has ended"):
        await counting
    with pytest.raises(InferenceError, match="has ended"):
        await worker.count_tokens("late")
    refused: list[object] = []
    worker.submit(ask("late"), refused.append)
    assert isinstance(refused[0], InferenceError)
    worker.cancel("late")
    assert worker.memory_bytes() == 0
    assert worker.silent_s() == 0.0
    await worker.close()


async def test_whoever_listens_may_fail_and_the_model_serves_on(
    host_of: HostFactory, artifact: Callable[..., Artifact], events: Events
):
    host = host_of()

    def raising(event: HostEvent) -> None:
        events.append(event)
        raise RuntimeError("the listener has a fault")

    await host.activate(*artifact())
    assert host._active is not None
    host._active._on_event = raising
    host._active.worker._child.kill()
    await until(lambda: "restarted" in events.kinds())
    assert (await answer(host, ask("again")))[0].startswith("again")


async def test_supervision_that_fails_leaves_nobody_waiting(
    host_of: HostFactory, artifact: Callable[..., Artifact], events: Events, monkeypatch
):
    host = host_of(max_sequences=1)
    await host.activate(*artifact(token_s=0.02))
    server = host._active
    assert server is not None
    running = asyncio.create_task(answer(host, ask("w", "running", max_tokens=100)))
    await until(lambda: host.stats().active == 1)
    waiting = asyncio.create_task(answer(host, ask("w", "waiting")))
    await until(lambda: host.stats().queued == 1)

    def broken() -> float:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(server.worker, "silent_s", broken)
    with pytest.raises(InferenceError, match="supervision") as caught:
        await waiting
    assert caught.value.kind == "unavailable"
    assert host.active() is None
    assert events[-1].code is FailureCode.INTERNAL
    await running


@POSIX
async def test_output_is_kept_in_bounds_and_broken_lines_are_cut():
    script = (
        "import os; os.write(2, b'x' * 100_000); os.write(2, b'\\n\\xff\\xfe last\\n'); os.write(1, b'y' * 3_000_000)"
    )
    pipe = asyncio.subprocess.PIPE
    child = await ChildProcess.start("loud", [sys.executable, "-c", script], stdout=pipe, stderr=pipe)
    assert await child.ended(30) == 0
    await child.drained(10)
    assert len(child.output) == 1 << 20
    assert all(len(line) <= 500 for line in child.last_lines)
    assert child.last_lines[-1].endswith("last")
    child.close()


async def test_output_that_cannot_be_logged_does_not_hide_a_death(monkeypatch):
    """The log may be on a full disk, or its pipe broken, just when a worker writes its last words."""

    def refuse(self: ChildProcess, raw: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ChildProcess, "_line", refuse)
    faults: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: faults.append(context["exception"]))
    worker = await WorkerProcess.start(RuntimeSpec("none", "tests.no_such_module", "onnx_genai"))
    death = await asyncio.wait_for(asyncio.shield(worker.died), 30)
    assert "exit status 1" in death.message
    await asyncio.wait_for(worker.kill(), 5)
    assert faults, "the module that does not exist was written about"
