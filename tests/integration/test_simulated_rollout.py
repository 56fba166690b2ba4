"""`phifleet simulate`: a rollout that stops itself, over a real broker, controller and database."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from agent.contract.base import canonical_json
from agent.contract.messages import DeviceMessage, Facts, HealthReport, Presence, Reported, SignedDesired, State
from fleet.cli.simulate import _faults
from fleet.demo.simulator import Behaviour, Fault, FaultKind, SimulatedDevice, Slow
from fleet.demo.story import SLOW_PROFILE, tell
from fleet.errors import UsageError
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


def faulty(*faults: Fault, name: str = "sim-1", profile: str = "iot-x86") -> SimulatedDevice:
    """One that serves something and has begun at second 0."""
    device = SimulatedDevice(name, profile, Behaviour(change_s=0.1, interval_s=10.0, faults=faults))
    device.begin(0.0)
    device.hello(NOW)
    device.ordered(order(name, 1), -100.0)
    for second in range(-90, 0):
        device.step(NOW, float(second))
    return device


def said(device: SimulatedDevice, begin: int, end: int) -> list[DeviceMessage]:
    return [message for second in range(begin, end) for message in device.turn(NOW, float(second))]


def test_one_that_goes_offline_says_nothing_and_comes_back_as_a_new_run():
    device = faulty(Fault(kind=FaultKind.OFFLINE, at_s=100, for_s=50))
    before = said(device, 0, 100)
    assert {type(message) for message in before} == {HealthReport}
    (will,) = said(device, 100, 150)
    assert isinstance(will, Presence) and not will.online and will.boot and will.boot.counter is None
    back = said(device, 150, 200)
    assert [type(message) for message in back[:3]] == [Presence, Facts, Reported]
    assert back[0].boot and back[0].boot.number == will.boot.number + 1
    assert isinstance(back[2], Reported) and back[2].digest == make_manifest().digest, "it serves what it served"


def test_one_may_be_silent_or_flood_or_be_slow_or_have_a_clock_that_is_ahead():
    count = len(said(faulty(), 0, 200))
    assert said(faulty(Fault(kind=FaultKind.SILENT)), 0, 200) == []
    assert len(said(faulty(Fault(kind=FaultKind.FLOOD, percent=900)), 0, 200)) == pytest.approx(10 * count, rel=0.1)
    for fault, figure in ((Fault(kind=FaultKind.SLOW, percent=50), 1.5), (Fault(kind=FaultKind.SLOW, percent=0), 1.0)):
        plain, slow = (
            [one.tpot_ms_p50 or 0 for one in said(device, 0, 2000) if isinstance(one, HealthReport)]
            for device in (faulty(), faulty(fault))
        )
        assert sum(slow) / sum(plain) == pytest.approx(figure, rel=0.02)
    ahead = said(faulty(Fault(kind=FaultKind.FUTURE)), 0, 50)
    assert {one.at for one in ahead if isinstance(one, HealthReport)} == {NOW + timedelta(days=1)}


def test_orders_fail_while_the_fault_lasts():
    device = faulty(Fault(kind=FaultKind.FAILING, at_s=0, for_s=100, percent=100))
    device.ordered(order("sim-1", 2), 0.0)
    assert [one.state for one in said(device, 0, 50) if isinstance(one, Reported)][-1] is State.FAILED
    device.ordered(order("sim-1", 3), 200.0)
    assert [one.state for one in said(device, 200, 250) if isinstance(one, Reported)][-1] is State.COMMITTED


def test_a_fault_concerns_a_share_of_a_profile():
    fault = Fault(kind=FaultKind.SILENT, share=0.3, profile="iot-x86")
    quiet = sum(not said(faulty(fault, name=f"sim-{number}"), 0, 20) for number in range(200))
    assert 40 < quiet < 80
    assert all(said(faulty(fault, name=f"sim-{number}", profile="other"), 0, 20) for number in range(20))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[[fault]]\nkind = 'nonsense'", "fault.0.kind"),
        ("[[fault]]\nkind = 'slow'\nshare = 2", "fault.0.share"),
        ("[[fault]]\nkind = 'slow'\nwhen = 2", "fault.0.when"),
        ("[[fault", "cannot be read"),
        ("faults = 1", "faults"),
    ],
)
def test_a_file_of_faults_that_is_wrong_says_where(tmp_path: Path, text: str, why: str):
    file = tmp_path / "faults.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=why):
        _faults(file)


def test_faults_are_read_as_they_are_documented(tmp_path: Path):
    documented = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    file = tmp_path / "faults.toml"
    file.write_text(documented[documented.index("[[fault]]") :].partition("```")[0])
    assert [one.kind for one in _faults(file)] == [FaultKind.OFFLINE, FaultKind.SLOW]
    assert _faults(None) == ()
