"""What the person at the device can do: status, logs, chat, pause, rollback; with the agent running and without."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.contract.messages import State
from tests.models import Built
from tests.rig import Rig


def agent(rig: Rig, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "agent", "--state-dir", str(rig.state_dir), *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, input=text, timeout=60)


@pytest.fixture
def rig(sample_artifact: Built, tiny_artifact: Built) -> Iterator[Rig]:
    with Rig() as rig:
        for each in (sample_artifact, tiny_artifact):
            rig.take_over(each.manifest, each.files)
        yield rig


def test_a_day_at_the_device(rig: Rig, sample_artifact: Built, tiny_artifact: Built):
    before = agent(rig, "status")
    assert before.returncode == 3
    assert "no agent answers" in before.stdout

    rig.start_controller()
    rig.start_agent()
    rig.order(tiny_artifact.manifest)
    assert rig.settled(1).state is State.COMMITTED
    nothing = agent(rig, "rollback")
    assert nothing.returncode == 1
    assert "nothing" in nothing.stderr or "no artifact before" in nothing.stderr

    rig.order(sample_artifact.manifest)
    assert rig.settled(2).state is State.COMMITTED
    told = json.loads(agent(rig, "status", "--json").stdout)
    assert told["state"] == "committed"
    assert told["serving"]["artifact"] == sample_artifact.manifest.id
    assert told["connected"] is True

    said = agent(rig, "chat", "What is the capital of France?")
    assert "Paris" in said.stdout
    assert "tokens/s" in said.stderr
    two = agent(rig, "chat", text="What is the capital of France?\n\nThank you.\n")
    assert two.returncode == 0
    assert "Paris" in two.stdout

    assert agent(rig, "pause").returncode == 0
    rig.order(tiny_artifact.manifest)
    rig.until(lambda: "order held" in agent(rig, "logs").stdout, "the order to be held")
    reported = rig.until(lambda: (found := rig.reported()) and found.paused and found, "the pause to be reported")
    assert reported.sequence == 2
    rig.kill(rig.agent)
    rig.start_agent()
    rig.until(lambda: json.loads(agent(rig, "status", "--json").stdout).get("paused"), "the pause to survive a restart")
    assert agent(rig, "resume").returncode == 0
    assert rig.settled(3).digest == tiny_artifact.manifest.digest

    assert sample_artifact.manifest.id in agent(rig, "rollback").stdout
    rig.until(lambda: (found := rig.reported()) and found.state is State.ROLLED_BACK, "the rollback")
    rig.until(lambda: (found := rig.reported()) and found.digest == sample_artifact.manifest.digest, "the old model")
    second = rig.reported().deployment  # type: ignore[union-attr]
    lines = agent(rig, "logs", "-n", "500", "--deployment", second).stdout.splitlines()
    assert lines
    assert {json.loads(line)["deployment"] for line in lines} == {second}


def test_control_is_for_the_agents_own_user_alone(rig: Rig):
    rig.start_agent()
    path = rig.state_dir / "control.json"
    rig.until(path.exists, "the agent")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text(json.dumps(json.loads(path.read_text()) | {"token": "guessed"}))
    refused = agent(rig, "rollback")
    assert refused.returncode == 1
    assert "token" in refused.stderr


@pytest.mark.parametrize("command", ["rollback", "pause", "resume", "chat", "logs"])
def test_without_an_agent_each_command_says_what_to_do(rig: Rig, command: str):
    done = agent(rig, command)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert str(rig.state_dir) in done.stderr


def test_a_second_agent_on_the_same_folder_is_refused(rig: Rig):
    rig.start_agent()
    rig.until((rig.state_dir / "control.json").exists, "the agent")
    second = agent(rig, "run", "--bundle", str(rig.bundle), "--port", "0")
    assert second.returncode == 1
    assert second.stderr.startswith("error: another agent runs")
    assert (rig.state_dir / "control.json").exists()
    assert agent(rig, "status").returncode == 0


def test_a_state_folder_that_cannot_be_made_is_said(rig: Rig, tmp_path: Path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    command = [sys.executable, "-m", "agent", "run", "--state-dir", str(blocked / "state"), "--bundle", str(rig.bundle)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert str(blocked) in done.stderr
    assert "Traceback" not in done.stderr
