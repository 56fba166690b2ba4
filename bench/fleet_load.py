"""One controller with many devices for minutes: what it costs, how soon a report is seen, and a rollout over all.

Real broker (mosquitto with the documented limits), controller and SQLite; the devices are simulated, in a process of
their own. CPU and memory are the controller's, with the database in its process.

    python -m bench.fleet_load [--devices 10000]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import insert

from agent.contract import topics
from agent.contract.messages import Boot, HealthReport, Presence
from agent.link import LinkSettings, MqttLink
from agent.platform import logs
from bench.figures import Figure, table
from bench.fleet import DEVICES, LIMITS
from fleet.core.rollout_spec import RolloutSpec, Wave
from fleet.core.rollouts import STATES, State
from fleet.demo.processes import Process, running
from fleet.demo.story import make_artifact
from fleet.home import Home
from fleet.operations.deploy import DeployOptions, deploy
from fleet.operations.fleet import Fleet
from fleet.operations.rollouts import start_rollout
from fleet.registry import Actor
from fleet.registry.models import DeviceRow
from fleet.registry.rollouts import read
from fleet.settings import FleetSettings
from fleet.trust.repository import Repository
from tests.simulators.broker import mosquitto

INTERVAL_S, MEASURED_S, WAIT_S = 30, 60.0, 600.0
PROBES, FLOOD = 100, 1500
WAVES = tuple(Wave(percent=share) for share in (1, 9, 20, 30, 100))


@dataclass(frozen=True, slots=True)
class Stage:
    """A controller that runs, and devices that all serve a model."""

    fleet: Fleet
    controller: Process
    broker: str
    devices: int

    def until(self, condition: Any, what: str) -> float:
        """Wait; returns seconds."""
        began = time.monotonic()
        while not condition():
            self.controller.check()
            if time.monotonic() - began > WAIT_S:
                raise SystemExit(f"waited {WAIT_S:g} s in vain until {what}\n{self.controller.tail()}")
            time.sleep(1.0)
        return time.monotonic() - began

    def cpu_s(self) -> float:
        """Of the controller, since it began."""
        spent = psutil.Process(self.controller.pid).cpu_times()
        return float(spent.user + spent.system)

    def serving(self, digest: str) -> int:
        """How many devices serve it."""
        return sum((row.reported or {}).get("digest") == digest for row in self.fleet.registry.devices.all())


def figures(devices: int = DEVICES) -> list[Figure]:
    """All of them; a few minutes."""
    logs.configure("error", "console")
    with tempfile.TemporaryDirectory(prefix="phifleet-bench-") as folder, staged(Path(folder), devices) as stage:
        old, new = (make_artifact(stage.fleet.home, name) for name in ("phi-old", "phi-new"))
        actor = Actor("bench", datetime.now(UTC))
        rows = [row for row in stage.fleet.registry.devices.all() if row.id.startswith("sim-")]
        deploy(stage.fleet, [old], rows, DeployOptions(probation_s=1.0), actor)
        stage.until(lambda: stage.serving(old.digest) == devices, f"all serve {old.id}")
        time.sleep(INTERVAL_S)
        found = [*_steady(stage), *asyncio.run(_visible(stage))]
        print(table(found), flush=True)  # what follows takes minutes
        return [*found, _rollout(stage, new.digest)]


@contextlib.contextmanager
def staged(folder: Path, devices: int, api: str | None = None) -> Iterator[Stage]:
    """A controller with so many simulated devices that are connected; ``api``: host and port of its API."""
    with mosquitto(folder / "broker", general=LIMITS) as broker:
        settings = FleetSettings(home=folder / "home", broker=broker.url, api=api)
        Repository(Home(settings.home)).init()
        environment = {"PHIFLEET_HOME": str(settings.home), "PHIFLEET_BROKER": broker.url}
        if api is not None:
            environment["PHIFLEET_API"] = api
        with Fleet(settings) as fleet:
            now = datetime.now(UTC)
            rows: list[dict[str, Any]] = [
                {"id": f"sim-{number:04}", "profile": "iot-x86", "added_at": now, "cleared": False, "sequence": 0,
                 "online": False, "agent_version": "", "malformed": 0}
                for number in range(devices)
            ]  # fmt: skip
            rows += [rows[0] | {"id": f"probe-{number}"} for number in range(PROBES)]
            fleet.registry.record(lambda session: session.execute(insert(DeviceRow), rows) and None)
            serve = Process("controller", ["fleet", "serve"], folder / "serve.log", environment)
            drawn = ["fleet", "simulate", "--devices", str(devices), "--interval", str(INTERVAL_S)]
            with running(serve), running(Process("devices", drawn, folder / "devices.log", environment)):
                stage = Stage(fleet, serve, broker.url, devices)
                stage.until(lambda: _online(fleet) == devices, f"{devices} devices are connected")
                yield stage


def _online(fleet: Fleet) -> int:
    return sum(row.online for row in fleet.registry.devices.all())


def _steady(stage: Stage) -> list[Figure]:
    began, spent, most = time.monotonic(), stage.cpu_s(), 0
    while time.monotonic() - began < MEASURED_S:
        most = max(most, psutil.Process(stage.controller.pid).memory_info().rss)
        time.sleep(0.5)
    share = (stage.cpu_s() - spent) / (time.monotonic() - began)
    what = f"controller with {stage.devices} devices, health each {INTERVAL_S} s"
    return [
        Figure(f"{what}, CPU", 100 * share, "% of a core", at_most=30),
        Figure("... resident memory", most / 2**20, "MiB", at_most=300),
    ]


async def _visible(stage: Stage) -> list[Figure]:
    """Milliseconds from a report's publication until another process reads it in the database."""
    async with MqttLink(LinkSettings(stage.broker, "bench-probes")) as link:
        await link.wait_connected(10)
        quiet = [await _seen(stage, link, number, 1) for number in range(PROBES)]
        stop = threading.Event()
        flood = asyncio.create_task(_flood(link, stop))
        try:
            await asyncio.sleep(2.0)
            flooded = [await _seen(stage, link, number, 2) for number in range(PROBES)]
        finally:
            stop.set()
            sent = await flood
    return [
        _p99("a report is visible, p99", quiet),
        _p99(f"... while {sent:.0f} more reports a second come", flooded),
    ]


def _p99(what: str, times: list[float]) -> Figure:
    note = f"median {statistics.median(times):.0f}, slowest {max(times):.0f}"
    return Figure(what, statistics.quantiles(times, n=100)[98], "ms", at_most=1000, note=note)


async def _seen(stage: Stage, link: MqttLink, number: int, counter: int) -> float:
    device = f"probe-{number}"
    boot = Boot(id="ab" * 8, number=1, counter=counter)
    began = time.monotonic()
    message = Presence(device=device, online=counter % 2 == 1, agent_version=f"0.2.{counter}", boot=boot)
    await link.publish(topics.presence(device), message.to_json())
    while True:
        row = await asyncio.to_thread(stage.fleet.registry.devices.get, device)
        if row.agent_version == f"0.2.{counter}":
            return (time.monotonic() - began) * 1e3
        await asyncio.sleep(0.002)


async def _flood(link: MqttLink, stop: threading.Event) -> float:
    """Health of devices that nobody simulates; returns how many a second were sent."""
    began, count = time.monotonic(), 0
    while not stop.is_set():
        for _ in range(FLOOD // 20):
            count += 1
            device = f"probe-{count % PROBES}"
            boot = Boot(id="ab" * 8, number=1, counter=count)
            report = HealthReport(device=device, at=datetime.now(UTC), window_s=30, requests=5, boot=boot)
            await link.publish(topics.health(device), report.to_json(), qos=0)
        await asyncio.sleep(max(0.0, began + count / FLOOD - time.monotonic()))
    return count / (time.monotonic() - began)


def _rollout(stage: Stage, digest: str) -> Figure:
    spec = RolloutSpec(selector="name=sim-*", artifacts=(digest,), waves=WAVES, bake_s=2.0, probation_s=1.0)
    spent, began = stage.cpu_s(), time.monotonic()
    start_rollout(stage.fleet, "all", spec, Actor("bench", datetime.now(UTC)))

    def state() -> State:
        return read(stage.fleet.registry.rollouts.get("all")).state

    stage.until(lambda: STATES[state()].final, "the rollout is over")
    note = f"{state()} in {time.monotonic() - began:.0f} s, {stage.serving(digest)} devices changed"
    what = f"a rollout over {stage.devices} devices in {len(WAVES)} waves"
    return Figure(what, stage.cpu_s() - spent, "s of the controller's CPU", at_most=120, note=note)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=DEVICES)
    print(table(figures(parser.parse_args().devices)))
    sys.exit(0)
