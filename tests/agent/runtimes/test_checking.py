"""A runtime that cannot be checked is not usable, and says why; its check leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest

from agent.runtimes.host.checking import Checker, _answer, read_cache, write_cache
from agent.runtimes.host.child import ChildProcess
from agent.runtimes.protocol.registry import RuntimeSpec
from tests.waiting import until


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}")

    def make(source: str) -> RuntimeSpec:
        (tmp_path / "checked.py").write_text(source)
        return RuntimeSpec("checked", "checked", "onnx_genai")

    return make


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("import os, signal\nos.kill(os.getpid(), signal.SIGRTMIN + 2)\n", r"SIGRTMIN\+2"),
        ("import os\nos._exit(3)\n", "exit status 3"),
        ("import sys\nsys.stderr.write('no driver\\n'); sys.stderr.flush()\nimport os; os._exit(1)\n", "no driver"),
        ("raise OSError('libcuda.so is missing')\n", "libcuda.so is missing"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
async def test_whatever_a_check_ends_with_is_a_reason(module, source: str, says: str):
    fact = await Checker(60.0).fact(module(source))
    assert not fact.usable
    assert re.search(says, fact.reason), fact.reason


@pytest.mark.parametrize("output", [b"[]", b"7", b'{"devices": 7, "version": "1"}', b'{"devices": []}', b"null"])
def test_an_answer_that_is_none_is_a_reason(output: bytes):
    assert "unexpected answer" in _answer(b"noise\n" + output, (), 0)["error"]


async def test_a_check_that_takes_too_long_is_ended(module):
    fact = await Checker(1.0).fact(module("import time\ntime.sleep(600)\n"))
    assert not fact.usable and "took longer than 1 s" in fact.reason


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is POSIX")
async def test_a_check_whose_child_keeps_its_output_open_is_answered(module, tmp_path: Path):
    source = (
        "import os, time\n"
        "child = os.fork()\n"
        "if child == 0:\n    time.sleep(600)\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child))\n"
        "os._exit(4)\n"
    )
    try:
        fact = await asyncio.wait_for(Checker(60.0).fact(module(source)), 30)
        assert "exit status 4" in fact.reason
    finally:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


async def test_no_process_to_be_had_is_a_reason(module, monkeypatch: pytest.MonkeyPatch):
    async def refuse(*_: object, **__: object) -> ChildProcess:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(ChildProcess, "start", refuse)
    fact = await Checker(60.0).fact(module(""))
    assert "Resource temporarily unavailable" in fact.reason


def test_a_cache_that_cannot_be_kept_is_no_failure(tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("[1]")
    assert read_cache(file) == {}
    assert read_cache(None) == {}
    write_cache(None, {"a": 1})
    write_cache(file / "below a file", {"a": 1})
    write_cache(tmp_path / "new" / "cache.json", {"a": 1})
    assert json.loads((tmp_path / "new" / "cache.json").read_text()) == {"a": 1}


async def test_a_child_takes_its_input_and_is_let_go_twice():
    pipe = asyncio.subprocess.PIPE
    script = "import sys; print(sys.stdin.readline().upper())"
    child = await ChildProcess.start("echo", [sys.executable, "-c", script], stdin=pipe, stdout=pipe, stderr=pipe)
    child.write_input(b"hello\n")
    assert await child.ended(30) == 0
    await child.drained(10)
    assert bytes(child.output).strip() == b"HELLO"
    child.close()
    child.close()
    child.kill()
    await until(child.exited.done)
