"""`phifleet simulate`: a rollout that stops itself, over a real broker, controller and database."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from agent.contract.base import canonical_json
from agent.contract.messages import Facts, HealthReport, Presence, Reported, SignedDesired, State
from fleet.demo.simulator import Behaviour, SimulatedDevice, Slow
from fleet.demo.story import SLOW_PROFILE, tell
from tests.simulators.clock import FakeClock
from tests.simulators.repository import make_desired, make_manifest, ref

NOW = datetime(2026, 11, 25, tzinfo=UTC)


def test_a_variant_that_is_a_fifth_slower_on_one_profile_is_stopped_and_taken_back(tmp_path: Path):
    said: list[str] = []
    ended = tell(tmp_path, 120, 0.2, seed=2, say=said.append)
    assert ended.rollout.state == "taken_back"
    assert ended.rollout.wave == 0, "in its first wave"
    assert ended.on_the_old_model == 120
    assert any(text.startswith(SLOW_PROFILE) and "slower per token" in text for text in ended.findings)
    assert not any("Traceback" in line for line in (tmp_path / "serve.log").read_text().splitlines())


def order(device: str, sequence: int) -> bytes:
    import base64

    clock = FakeClock(NOW)
    desired = make_desired(clock, ref(make_manifest()), device=device, sequence=sequence)
    payload = base64.b64encode(desired.to_json()).decode()
    signed = SignedDesired(
        payload=payload, payloadType="application/vnd.phifleet.desired.v1+json", signatures=[{"sig": ""}]
    )
    return canonical_json(signed.model_dump(mode="json"))


def test_a_simulated_device_says_what_an_agent_says():
    device = SimulatedDevice("sim-1", "iot-x86", Behaviour(change_s=6.0, interval_s=10.0))
    assert [type(message) for message in device.hello(NOW)] == [Presence, Facts, Reported]
    device.ordered(order("sim-1", 3), 0.0)
    device.ordered(order("sim-1", 2), 0.0)
    device.ordered(order("sim-2", 9), 0.0)
    device.ordered(b"no order", 0.0)
    reported = [message for second in range(40) for message in device.step(NOW, float(second))]
    states = [message.state for message in reported if isinstance(message, Reported)]
    assert states[0] is State.RESOLVING and states[-1] is State.COMMITTED and len(states) == 7
    last = reported[-1]
    assert isinstance(last, Reported) and last.sequence == 3 and last.digest == make_manifest().digest
    counters = [message.boot.counter for message in reported if message.boot]
    assert counters == sorted(set(counters)), "each is newer than the one before"


def test_what_is_drawn_is_drawn_again_by_the_same_seed_and_slow_is_slower():
    def median(slow: tuple[Slow, ...], seed: int = 4) -> float:
        device = SimulatedDevice("sim-1", "iot-x86", Behaviour(seed=seed, slow=slow, change_s=0.1))
        device.ordered(order("sim-1", 1), 0.0)
        for second in range(30):
            device.step(NOW, float(second))
        reports = [one for second in range(100, 2000, 10) for one in device.health(NOW, float(second))]
        figures = sorted(one.tpot_ms_p50 or 0 for one in reports if isinstance(one, HealthReport))
        return figures[len(figures) // 2]

    assert median(()) == median(())
    slower = median((Slow("sample", "iot-x86", 0.5), Slow("sample", "other", 5.0)))
    assert slower / median(()) == pytest.approx(1.5, rel=0.02)


def test_devices_that_fail_say_why():
    device = SimulatedDevice("sim-1", "iot-x86", Behaviour(failing=1.0, change_s=1.0))
    device.ordered(order("sim-1", 1), 0.0)
    reported = [message for second in range(40) for message in device.step(NOW, float(second))]
    last = reported[-1]
    assert isinstance(last, Reported) and last.state is State.FAILED
    assert last.failure is not None and json.loads(last.to_json())["failure"]["message"]


def test_what_cannot_be_simulated_is_refused():
    command = [sys.executable, "-m", "fleet", "--home", "/nowhere", "simulate"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (2, "") and "/nowhere holds no fleet" in done.stderr
