"""The controller with many devices: what it writes in a second of CPU, decides, finds, and reads after a restart.

Ingest is the recorder's own work, in one process, with the database that it commits to; its peer writes the same rows
with the driver alone, in the same batches, in turns. PostgreSQL is a server of its own on loopback, whose CPU is not
counted; SQLite's is.

    python -m bench.fleet [--devices 10000]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, insert, text

from agent.contract import topics
from agent.contract.messages import Boot, HealthReport, Presence, Reported
from agent.contract.messages import State as DeviceState
from agent.link import LinkSettings, MqttLink
from agent.platform import logs
from bench.figures import Figure, table
from fleet.core.rollout_events import Progress
from fleet.core.rollout_spec import Counts, RolloutSpec, Wave
from fleet.core.rollouts import Rollout, State, decide
from fleet.core.selectors import parse
from fleet.daemon.controller import Controller
from fleet.errors import FleetError
from fleet.operations.views import describe_fleet, fleet_view
from fleet.registry import Received, Recorder, Registry
from fleet.registry.models import DeviceRow, LabelRow
from tests.fleet.registry import conftest as databases
from tests.fleet.world import World, make_world
from tests.simulators.broker import have_mosquitto, mosquitto

DEVICES = 10_000
ROUNDS, BATCHES, BATCH = 5, 20, 500
#: As docs/mosquitto has it.
LIMITS = "max_queued_messages 10000\nmax_inflight_messages 200"


def figures(devices: int = DEVICES) -> list[Figure]:
    """All of them; those of PostgreSQL and mosquitto where these are installed."""
    logs.configure("error", "console")
    found = [_decide(), *_ingest("SQLite", 10_000, None)]
    with contextlib.suppress(FleetError, OSError), _postgresql() as url:
        found += _ingest("PostgreSQL", 5_000, url)
    found += _looking(devices)
    if have_mosquitto():
        found.append(asyncio.run(_restart(devices)))
    return found


@contextmanager
def _postgresql() -> Iterator[str]:
    server = databases.postgresql.__wrapped__()  # type: ignore[attr-defined] # the fixture's own function
    try:
        yield next(server)
    finally:
        with contextlib.suppress(StopIteration):
            next(server)


@contextmanager
def _world(devices: int, url: str | None = None) -> Iterator[World]:
    with tempfile.TemporaryDirectory(prefix="phifleet-bench-") as folder:
        world = make_world(Path(folder) / "home", url)
        rows: list[dict[str, Any]] = [
            {"id": f"sim-{number:06}", "profile": "iot-x86", "added_at": world.clock.now(), "cleared": False,
             "sequence": 0, "online": False, "agent_version": "", "malformed": 0,
             "labels": {"site": f"s{number % 2000}"}}
            for number in range(devices)
        ]  # fmt: skip
        labels = [{"device": row["id"], "name": "site", "value": row["labels"]["site"]} for row in rows]
        world.registry.record(lambda session: session.execute(insert(DeviceRow), rows) and None)
        world.registry.record(lambda session: session.execute(insert(LabelRow), labels) and None)
        try:
            yield world
        finally:
            world.registry.close()


def _ingest(name: str, target: float, url: str | None) -> list[Figure]:
    devices = 2000
    with _world(devices, url) as world:
        recorder = Recorder(world.registry)
        count = iter(range(10**9))

        def batch() -> list[Received]:
            found = []
            for _ in range(BATCH):
                number = next(count)
                device = f"sim-{number % devices:06}"
                at = world.clock.now() + timedelta(seconds=number / 100)
                boot = Boot(id="ab" * 8, number=1, counter=number)
                report = HealthReport(
                    device=device, at=at, window_s=30, requests=number % 7, tokens_per_s=60.0, ttft_ms_p50=100.0,
                    tpot_ms_p50=16.0, memory_bytes=2**31, digest="cd" * 32, boot=boot,
                )  # fmt: skip
                found.append(Received(topics.health(device), report.to_json(), at))
            return found

        bare = _bare(url)
        ours, theirs = [], []
        for _ in range(ROUNDS):
            made = [batch() for _ in range(BATCHES)]
            ours.append(_rate(lambda made=made: [recorder.record(one) for one in made]))
            theirs.append(_rate(lambda made=made: [bare(one) for one in made]))
    rate, peer = statistics.median(ours), statistics.median(theirs)
    spread = f"{min(ours):.0f} to {max(ours):.0f}; the peer {min(theirs):.0f} to {max(theirs):.0f}"
    return [
        Figure(f"health reports written in a second of CPU, {name}", rate, "messages/s", at_least=target, note=spread),
        Figure(f"... against the driver's executemany, {name}", rate, "messages/s", "executemany", peer, rate / peer),
    ]


def _rate(work: Callable[[], Any]) -> float:
    began = time.process_time()
    work()
    return BATCHES * BATCH / (time.process_time() - began)


def _bare(url: str | None) -> Callable[[list[Received]], None]:
    """What the database and its driver take for a row of each message: nothing is read, checked or decided."""
    folder = tempfile.mkdtemp(prefix="phifleet-bench-")
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:") if url else f"sqlite:///{folder}/bare.db")
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE IF EXISTS bare"))
        connection.execute(text("CREATE TABLE bare (device VARCHAR(63), at BIGINT, payload TEXT)"))

    def write(batch: list[Received]) -> None:
        rows = [
            {"device": one.topic, "at": int(one.at.timestamp() * 1000), "payload": one.payload.decode()}
            for one in batch
        ]
        with engine.begin() as connection:
            connection.execute(text("INSERT INTO bare VALUES (:device, :at, :payload)"), rows)

    return write


def _decide() -> Figure:
    spec = RolloutSpec(selector="has profile", artifacts=("ab" * 32,), waves=(Wave(percent=10), Wave(percent=100)))
    at = datetime(2026, 1, 1, tzinfo=UTC)
    rollout = Rollout(id="r", spec=spec, state=State.RUNNING, entered_at=at)
    event = Progress(counts=Counts(assigned=100_000, waiting=50_000, under_way=50_000))
    times = []
    for _ in range(2000):
        began = time.perf_counter()
        decide(rollout, event, at)
        times.append((time.perf_counter() - began) * 1e3)
    return Figure("a rollout decides about 100,000 devices (the core alone)", statistics.median(times), "ms", at_most=1)


def _looking(devices: int) -> list[Figure]:
    with _world(100_000) as world:
        times = []
        for number in range(100):
            selector = parse(f"label.site=s{number}")
            began = time.perf_counter()
            assert len(world.registry.inventory.select(selector)) == 50
            times.append((time.perf_counter() - began) * 1e3)
        selected = Figure(
            "50 of 100,000 devices by a label, p99, SQLite", statistics.quantiles(times, n=100)[98], "ms", at_most=20
        )
    with _world(devices) as world:
        began = time.process_time()
        describe_fleet(fleet_view(world.registry, world.clock.now()))
        whole = time.process_time() - began
    return [selected, Figure(f"status of {devices} devices", whole, "s of CPU", at_most=1)]


async def _restart(devices: int) -> Figure:
    """Seconds until a controller that starts knows what three retained messages a device say."""
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(_world(devices))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        broker = stack.enter_context(mosquitto(folder, general=LIMITS))
        async with MqttLink(LinkSettings(broker.url, "devices")) as link:
            await link.wait_connected(10)
            for start in range(0, devices, 500):
                names = [f"sim-{number:06}" for number in range(start, min(devices, start + 500))]
                await asyncio.gather(*(_retain(link, world, name) for name in names))
        stop = asyncio.Event()
        async with MqttLink(LinkSettings(broker.url, "controller", receive_maximum=BATCH)) as link:
            await link.wait_connected(10)
            controller = Controller(link, world.registry, world.repository, notify=lambda _: True)
            began = time.monotonic()
            task = asyncio.create_task(controller.run(stop))
            while await asyncio.to_thread(_known, world.registry) < devices and not task.done():  # noqa: ASYNC110
                await asyncio.sleep(0.5)
            seconds = time.monotonic() - began
            stop.set()
            await task
    return Figure(f"a controller that starts knows {3 * devices} retained messages", seconds, "s", at_most=60)


async def _retain(link: MqttLink, world: World, name: str) -> None:
    at = datetime.now(UTC)
    presence = Presence(device=name, online=True, at=at, agent_version="0.2.0")
    await link.publish(topics.presence(name), presence.to_json(), retain=True)
    facts = world.facts(name).model_copy(update={"at": at})
    await link.publish(topics.facts(name), facts.to_json(), retain=True)
    reported = Reported(device=name, sequence=0, deployment="", state=DeviceState.IDLE, at=at)
    await link.publish(topics.reported(name), reported.to_json(), retain=True)


def _known(registry: Registry) -> int:
    return sum(row.online and row.facts is not None and row.reported is not None for row in registry.devices.all())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=DEVICES)
    print(table(figures(parser.parse_args().devices)))
    sys.exit(0)
