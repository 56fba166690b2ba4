"""The real program, with a simulated runtime, on a disk that is full or read-only: what serves goes on serving."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from agent.contract.manifest import Chat, Manifest
from agent.contract.messages import ArtifactRef, Desired, State
from agent.core.deployment import Deployment
from agent.store.artifacts import ArtifactStore
from agent.store.journal import FileJournal
from agent.trust.identity import enrol
from fleet.home import Home
from fleet.trust.repository import Repository
from tests.agent.trust.conftest import make_bundle
from tests.disk import MIB, small_disk
from tests.simulators.artifacts import make_artifact
from tests.simulators.clock import START, FakeClock
from tests.simulators.repository import make_repository
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"


def committed(state: Path, source: Path) -> Manifest:
    """An artifact that is complete on the disk, and a journal that says that it serves."""
    behaviour = json.dumps({"answers": {"France": "It is Paris"}}).encode()
    manifest = make_artifact(source, {"sim.json": behaviour}, "sim").model_copy(
        update={"chat": Chat(template=TEMPLATE), "context": 512}
    )
    store = ArtifactStore(state, reserve_bytes=0)
    partial = store.begin(manifest)
    for first in partial.table.unique():
        partial.write(first, behaviour)
    store.commit(partial)
    ref = ArtifactRef(id=manifest.id, digest=manifest.digest)
    order = Desired(
        device="pi-1",
        sequence=1,
        deployment="d1",
        issued_at=START,
        expires_at=START + timedelta(days=1),
        artifacts=(ref,),
    )
    deployment = Deployment(state=State.COMMITTED, desired=order, chosen=ref, committed=ref, newest_sequence=1)
    FileJournal(state / "journal").save(deployment.to_json())
    return manifest


class Running:
    """The agent's process."""

    def __init__(self, state: Path, log: Path, *arguments: str) -> None:
        self._log = log
        command = [sys.executable, "-m", "tests.simulators.agent", "run", "--state-dir", str(state), "--port", "0"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PHIFLEET_AGENT_HEALTH_INTERVAL_S": "0.2"}
        with log.open("wb") as sink:
            self.process = subprocess.Popen(
                [*command, "--broker", "mqtt://127.0.0.1:1", *arguments], cwd=ROOT, env=environment, stderr=sink
            )

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._log.read_text().splitlines() if line.startswith("{")]

    def logged(self, event: str) -> dict[str, Any] | None:
        assert self.process.poll() is None, self._log.read_text()
        return next((line for line in self.lines() if line["event"].startswith(event)), None)

    def answer(self) -> str:
        """What the model says over HTTP, once it does."""
        wait_until(lambda: self.logged("serving"), "the model to serve")
        line = self.logged("endpoint listens")
        assert line is not None
        body = {"model": "sim", "messages": [{"role": "user", "content": "What is the capital of France?"}]}
        request = urllib.request.Request(
            f"{line['url']}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as reply:
            text: str = json.load(reply)["choices"][0]["message"]["content"]
        return text

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@contextmanager
def running(state: Path, log: Path, *arguments: str) -> Iterator[Running]:
    agent = Running(state, log, *arguments)
    try:
        yield agent
    finally:
        if agent.process.poll() is None:
            agent.process.kill()
        agent.process.wait()


@contextmanager
def full(folder: Path) -> Iterator[Callable[[], None]]:
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (65536, 512, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    yield ballast.unlink


@contextmanager
def read_only(folder: Path) -> Iterator[Callable[[], None]]:
    def remount(mode: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{mode}", str(folder)], check=True)

    remount("ro")
    yield lambda: remount("rw")


@pytest.mark.parametrize("refusing", [full, read_only], ids=lambda function: function.__name__)
def test_the_model_on_the_disk_serves_and_the_rest_comes_when_there_is_room(
    tmp_path: Path, refusing: Callable[[Path], Any]
) -> None:
    clock = FakeClock()
    make_repository(tmp_path / "fleet", clock)
    with small_disk(tmp_path / "state", 4 * MIB) as state:
        enrol(make_bundle(Repository(Home(tmp_path / "fleet"), clock.now), clock.now()), state)
        committed(state, tmp_path / "source")
        with refusing(state) as make_room, running(state, tmp_path / "log") as agent:
            assert "Paris" in agent.answer()
            wait_until(lambda: agent.logged("optional job failed"), "the control port's failure to be logged")
            failed = agent.logged("optional job failed")
            assert failed is not None
            assert failed["job"] == "control"
            assert failed["retry_in_s"] > 0
            assert not (state / "control.json").exists()
            make_room()
            wait_until((state / "control.json").exists, "the control port to be there")
            assert "Paris" in agent.answer()
            assert agent.end() == 0
            assert '"stopped"' in (state / "logs" / "agent.log").read_text()
            assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_log_that_nobody_can_take_ends_nothing(tmp_path: Path) -> None:
    """Standard error is a file on the full disk, too."""
    clock = FakeClock()
    make_repository(tmp_path / "fleet", clock)
    with small_disk(tmp_path / "state", 4 * MIB) as state:
        enrol(make_bundle(Repository(Home(tmp_path / "fleet"), clock.now), clock.now()), state)
        committed(state, tmp_path / "source")
        (state / "log").touch()
        with full(state) as make_room, running(state, state / "log") as agent:
            agent.process.stderr = None
            for _ in range(3):
                with pytest.raises(subprocess.TimeoutExpired):
                    agent.process.wait(0.5)
            make_room()
            wait_until((state / "control.json").exists, "the control port to be there")
            assert agent.end() == 0


@pytest.mark.parametrize("refusing", [full, read_only], ids=lambda function: function.__name__)
def test_a_second_agent_is_refused_there_too(tmp_path: Path, refusing: Callable[[Path], Any]) -> None:
    clock = FakeClock()
    make_repository(tmp_path / "fleet", clock)
    with small_disk(tmp_path / "state", 4 * MIB) as state:
        enrol(make_bundle(Repository(Home(tmp_path / "fleet"), clock.now), clock.now()), state)
        with refusing(state), running(state, tmp_path / "log") as agent:
            wait_until(lambda: agent.logged("endpoint listens"), "the endpoint to listen")
            with running(state, tmp_path / "second") as second:
                assert second.process.wait(30) != 0
            text = (tmp_path / "second").read_text()
            assert "another agent runs with the state folder" in text
            assert "Traceback" not in text


def test_without_an_identity_a_full_disk_is_said_in_a_sentence(tmp_path: Path) -> None:
    clock = FakeClock()
    make_repository(tmp_path / "fleet", clock)
    bundle = tmp_path / "bundle.json"
    bundle.write_bytes(make_bundle(Repository(Home(tmp_path / "fleet"), clock.now), clock.now()).to_json())
    bundle.chmod(0o600)
    with small_disk(tmp_path / "state", MIB) as state, full(state):
        with running(state, tmp_path / "log", "--bundle", str(bundle)) as agent:
            assert agent.process.wait(30) != 0
        text = (tmp_path / "log").read_text()
        assert "identity cannot be written" in text
        assert "is full" in text
        assert "Traceback" not in text
