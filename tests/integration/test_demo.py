"""`phifleet demo` as a person types it: its answer, its object for machines, and that nothing stays behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.waiting import alive, wait_until

COMMAND = [sys.executable, "-m", "fleet", "demo"]


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(folder)}


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=False, env=environment(folder), capture_output=True, text=True, timeout=280)


def test_the_demo_answers_and_cleans_up(tmp_path: Path):
    done = run([*COMMAND, "--json"], tmp_path)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    told = json.loads(line)
    assert "Paris" in told["answer"]
    assert told["deployment"]["state"] == "committed"
    assert told["deployment"]["runtime"] == "onnx_genai"
    assert told["endpoint"].startswith("http://127.0.0.1:")
    assert told["artifact"]["toolchain"] == "onnx_genai"
    assert told["artifact"]["precision"] == "int4"
    # The bytes told are the bytes there were: what came over the link is the artifact.
    assert told["transfer"]["bytes"] >= told["artifact"]["bytes"] > 50e6
    assert told["transfer"]["seconds"] > 0
    assert all(told["health"][name] > 0 for name in ("ttft_ms", "tpot_ms", "tokens_per_s"))
    assert told["seconds"] > 0
    assert [each for each in tmp_path.iterdir() if each.name.startswith("phifleet-demo-")] == []


def test_kept_it_serves_the_page_and_its_link_signs_in_once(tmp_path: Path):
    said = tmp_path / "said"
    with said.open("wb") as output:
        demo = subprocess.Popen([*COMMAND, "--keep"], env=environment(tmp_path), stdout=output, stderr=output)
        try:
            wait_until(lambda: "#sign-in=" in said.read_text() or demo.poll() is not None, "the link is printed", 240)
            found = re.search(r"(http://127\.0\.0\.1:\d+)/#sign-in=(\S+)", said.read_text())
            assert found, said.read_text()
            root, code = found.groups()
            assert "<title>phifleet</title>" in httpx.get(f"{root}/").text
            answers = [httpx.post(f"{root}/api/v1/sign-in", json={"code": code}) for _ in range(2)]
            assert [one.status_code for one in answers] == [201, 401]
            headers = {"Authorization": f"Bearer {answers[0].json()['token']}"}
            shown = httpx.get(f"{root}/api/v1/overview", headers=headers).json()
            assert (shown["devices"], shown["presence"]) == (["demo-device"], ["online"])
        finally:
            demo.send_signal(signal.SIGINT)
            demo.wait(60)
    assert demo.returncode == 130
    assert [each for each in tmp_path.iterdir() if each.name.startswith("phifleet-demo-")] == []


@pytest.mark.parametrize(("number", "converting"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_interrupted_it_leaves_neither_processes_nor_files(tmp_path: Path, number: signal.Signals, converting: bool):
    with subprocess.Popen(COMMAND, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as demo:
        me = psutil.Process(demo.pid)
        begun = (lambda: me.children(recursive=True)) if converting else (lambda: list(tmp_path.iterdir()))
        wait_until(lambda: begun() or demo.poll() is not None, "it is at work", 120)
        time.sleep(0.5)
        children = me.children(recursive=True)
        demo.send_signal(number)
        output, _ = demo.communicate(timeout=60)
    assert demo.returncode == 130, output
    assert b"Traceback" not in output
    assert not any(alive(child) for child in children)
    assert [each for each in tmp_path.iterdir() if each.name.startswith("phifleet-demo-")] == []


def test_a_port_that_is_taken_is_said_before_anything_is_made(tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run([*COMMAND, "--port", port], tmp_path)
    assert done.returncode == 2
    assert f"port {port} is in use" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_broker_that_is_none_is_refused(tmp_path: Path):
    done = run([*COMMAND, "--broker", "http://x"], tmp_path)
    assert done.returncode == 2
    assert "mqtt://" in done.stderr
    assert "Traceback" not in done.stderr
