"""Three controllers on PostgreSQL and mosquitto, killed and cut off in turn while a rollout is under way."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from pydantic import SecretStr

from agent.contract import topics
from agent.contract.messages import Desired, SignedDesired
from agent.link import LinkSettings, Message, MqttLink
from fleet.core.rollout_spec import RolloutSpec, Wave
from fleet.core.rollouts import STATES
from fleet.demo.processes import Process
from fleet.demo.simulator import Behaviour, SimulatedDevice
from fleet.demo.story import OTHER_PROFILE, SLOW_PROFILE, make_artifact, simulated
from fleet.home import Home
from fleet.operations.deploy import DeployOptions, deploy
from fleet.operations.fleet import Fleet
from fleet.operations.rollouts import start_rollout
from fleet.profiles_loader import load_profile
from fleet.registry import Actor
from fleet.registry.rollouts import read
from fleet.settings import FleetSettings
from fleet.trust.repository import Repository
from tests.fleet.registry.conftest import fresh_postgresql, postgresql
from tests.simulators.broker import have_mosquitto, mosquitto
from tests.simulators.proxy import Proxy, proxy

__all__ = ["fresh_postgresql", "postgresql"]  # fixtures

#: A thousand were run as well; some dozens show the same in the time that a suite has.
DEVICES = int(os.environ.get("THREE_CONTROLLERS_DEVICES", "60"))
PATIENCE_S = 240.0

pytestmark = [
    pytest.mark.skipif(not have_mosquitto(), reason="mosquitto is not installed"),
    pytest.mark.timeout(900),
]


class Controllers:
    """Each connects to the broker through a proxy of its own."""

    def __init__(self, home: Path, database: str, proxies: list[Proxy], folder: Path) -> None:
        self._home, self._database, self._proxies, self._folder = home, database, proxies, folder
        self.processes = [self._start(number) for number in range(len(proxies))]

    def _start(self, number: int) -> Process:
        environment = {"PHIFLEET_BROKER": self._proxies[number].url, "PHIFLEET_DATABASE": self._database}
        arguments = ["fleet", "--home", str(self._home), "serve"]
        return Process(f"controller {number}", arguments, self._folder / f"serve-{number}.log", environment)

    def kill(self, number: int) -> None:
        os.kill(self.processes[number].pid, signal.SIGKILL)
        self.processes[number].stop()
        self.processes[number] = self._start(number)

    def cut_off(self, number: int, seconds: float) -> None:
        one = self._proxies[number]
        one.refusing = True
        one.cut()
        time.sleep(seconds)
        one.refusing = False

    def stop(self) -> None:
        for process in self.processes:
            process.stop()


@contextmanager
def orders_seen(url: str) -> Iterator[list[tuple[str, Desired]]]:
    """Every order that any controller publishes, in the order in which the broker passes them on."""
    seen: list[tuple[str, Desired]] = []
    loop, stop, ready = asyncio.new_event_loop(), asyncio.Event(), threading.Event()

    def note(message: Message) -> None:
        found = topics.parse_device(message.topic)
        if found is not None and message.payload:
            seen.append(
                (found[0], Desired.from_json(base64.b64decode(SignedDesired.from_json(message.payload).payload)))
            )

    async def run() -> None:
        async with MqttLink(LinkSettings(url, "observer")) as link:
            await link.wait_connected(10)
            await link.subscribe(f"{topics.PREFIX}/devices/+/desired", note)
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),), daemon=True)
    thread.start()
    assert ready.wait(20)
    try:
        yield seen
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(20)


def test_whatever_happens_to_each_of_them_the_fleet_ends_where_it_should(tmp_path: Path, fresh_postgresql: str) -> None:
    with contextlib.ExitStack() as stack:
        broker = stack.enter_context(mosquitto(tmp_path / "broker", general="max_queued_messages 0"))
        proxies = [stack.enter_context(proxy(broker.host, broker.port)) for _ in range(3)]
        settings = FleetSettings(
            home=tmp_path / "home", broker=broker.url, database=SecretStr(fresh_postgresql), order_validity_s=86400
        )
        Repository(Home(settings.home)).init()
        old, new = (make_artifact(Home(settings.home), name) for name in ("phi-old", "phi-new"))
        fleet = stack.enter_context(Fleet(settings))
        behaviour = Behaviour(seed=5, interval_s=2.0, change_s=4.0, machine={SLOW_PROFILE: "aarch64"})
        devices = []
        for number in range(DEVICES):
            profile = SLOW_PROFILE if number % 2 else OTHER_PROFILE
            name = f"sim-{number:04}"
            fleet.registry.devices.add(name, load_profile(profile), None, _actor())
            devices.append(SimulatedDevice(name, profile, behaviour))
        seen = stack.enter_context(orders_seen(broker.url))
        controllers = Controllers(settings.home, fresh_postgresql, proxies, tmp_path)
        stack.callback(controllers.stop)
        stack.enter_context(simulated(settings, devices))

        def all_run() -> bool:
            for process in controllers.processes:
                process.check()
            return True

        def over() -> bool:
            return STATES[read(fleet.registry.rollouts.get("autumn")).state].final

        def serving(digest: str) -> int:
            return sum((row.reported or {}).get("digest") == digest for row in fleet.registry.devices.all())

        connected = lambda: sum(row.online and row.facts is not None for row in fleet.registry.devices.all())  # noqa: E731
        _wait(lambda: all_run() and connected() == DEVICES, "all are connected")
        deploy(fleet, [old], fleet.registry.devices.all(), DeployOptions(probation_s=0.5), _actor())
        _wait(lambda: serving(old.digest) == DEVICES, "all serve the old model")
        waves = (Wave(percent=20), Wave(percent=50), Wave(percent=100))
        spec = RolloutSpec(
            selector="has profile", artifacts=(new.digest,), waves=waves, bake_s=4.0, probation_s=0.5, gate=None,
            concurrency=max(8, DEVICES // 8),
        )  # fmt: skip
        start_rollout(fleet, "autumn", spec, _actor())
        for number in range(3):
            assert not over(), "it was over before each had its turn"
            controllers.kill(number)
            time.sleep(1.0)
            assert not over(), "it was over before each had its turn"
            controllers.cut_off(number, 2.0)
        _wait(over, "the rollout is over")
        ended = read(fleet.registry.rollouts.get("autumn"))
        _wait(lambda: serving(new.digest) == DEVICES, "all serve the new model")
        assert ended.state == "completed", ended.reason
        assert fleet.registry.audit.broken() == []
        _check_orders(fleet, list(seen))
        for log in tmp_path.glob("serve-*.log"):
            assert "Traceback" not in log.read_text()


def _check_orders(fleet: Fleet, seen: list[tuple[str, Desired]]) -> None:
    by_device: defaultdict[str, list[Desired]] = defaultdict(list)
    for device, order in seen:
        assert order.device == device
        by_device[device].append(order)
    assert len(by_device) == DEVICES
    for device, orders in by_device.items():
        sequences = [order.sequence for order in orders]
        assert sequences == sorted(sequences), f"{device}: an older order came after a newer one: {sequences}"
        ids = {(order.sequence, order.deployment) for order in orders}
        assert len({number for number, _ in ids}) == len(ids), f"{device} got two orders with one sequence number"
        history = fleet.registry.deployments.history(device)
        assert ids == {(row.sequence, row.id) for row in history}, f"{device}: what was recorded is what was published"


def _wait(condition: Callable[[], bool], what: str) -> None:
    """Each look reads every device: not more often than a person would."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"waited {PATIENCE_S:g} s in vain until {what}"
        time.sleep(0.3)


def _actor() -> Actor:
    return Actor("test", datetime.now(UTC))
