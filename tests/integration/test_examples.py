"""The programs in examples/, run as a reader would run them, against a device that serves the sample model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.contract.messages import State
from tests.models import Built
from tests.rig import Rig

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def rig(sample_artifact: Built) -> Iterator[Rig]:
    with Rig() as rig:
        rig.take_over(sample_artifact.manifest, sample_artifact.files)
        rig.start_controller()
        rig.start_agent()
        rig.order(sample_artifact.manifest)
        assert rig.settled(1).state is State.COMMITTED
        yield rig


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def endpoint(rig: Rig) -> str:
    reported = rig.reported()
    assert reported is not None
    return f"{reported.endpoint}/v1"


def test_the_conversation_streams_an_answer_and_its_figures(rig: Rig):
    done = run("chat.py", "--endpoint", endpoint(rig), "What is the capital of France?")
    assert "Paris" in done.stdout
    assert "tokens in" in done.stderr


def test_the_extraction_always_has_the_form_that_was_asked_for(rig: Rig):
    done = run("extract.py", "--endpoint", endpoint(rig), "The boiler in hall 3 is at 71 degrees.")
    found = json.loads(done.stdout)
    assert set(found) == {"place", "quantity", "value"}
    assert isinstance(found["value"], int)


def test_any_mqtt_client_can_read_how_inference_runs(rig: Rig):
    done = run("watch_fleet.py", "--broker", rig.broker_url, "--reports", "2")
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all(line.startswith(rig.device) and "tokens/s" in line for line in lines)


def test_every_example_is_described_and_run_here():
    programs = {path.name for path in EXAMPLES.glob("*.py")}
    described = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    own = Path(__file__).read_text(encoding="utf-8")
    assert programs
    assert all(f"({name})" in described and f'"{name}"' in own for name in programs)
