"""Many orders in quick succession: two steps, or a step and a collection, never work on the files at once."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from agent.contract.manifest import Manifest
from agent.contract.messages import Progress
from agent.core.ports import ProgressHandler, Stop
from tests.agent.daemon.world import NEW, OLD, OTHER, Device, order
from tests.simulators.device import SimStore, SimTransfer


class Files:
    """Who is at work on them. Two overlap when both have the same artifact, or one has all of them (no digest)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.users: list[tuple[str, str]] = []
        self.overlaps: list[tuple[tuple[str, str], ...]] = []
        self.uses = 0

    @contextmanager
    def used_by(self, name: str, digest: str = "") -> Iterator[None]:
        user = name, digest
        with self._lock:
            # The model that serves may be read back while a step brings another one.
            if any(not digest or other in ("", digest) for _, other in self.users):
                self.overlaps.append((*self.users, user))
            self.users.append(user)
            self.uses += 1
        try:
            yield
        finally:
            with self._lock:
                self.users.remove(user)


class SlowStore(SimStore):
    """Its calls block a thread for a while, whoever waits for them."""

    files: Files

    def verify(self, digest: str, stop: Stop = lambda: False) -> None:
        with self.files.used_by("verify", digest):
            time.sleep(0.02)
            super().verify(digest, stop)

    def collect(self, keep: Sequence[str], spare: Sequence[str] = ()) -> int:
        with self.files.used_by("collect"):
            time.sleep(0.02)
            return super().collect(keep, spare)


class SlowTransfer(SimTransfer):
    """Writes in a thread, which it waits for when it is cancelled; a second cancellation would cut that wait short."""

    files: Files

    def _write(self, digest: str) -> None:
        with self.files.used_by("fetch", digest):
            time.sleep(0.03)

    async def fetch(self, manifest: Manifest, *, on_progress: ProgressHandler, **limits: object) -> Progress:
        if manifest.digest not in self.store.complete:
            writing = asyncio.get_running_loop().run_in_executor(None, self._write, manifest.digest)
            try:
                await asyncio.shield(writing)
            except asyncio.CancelledError:
                await asyncio.wait([writing])
                raise
        return await super().fetch(manifest, on_progress=on_progress, **limits)  # type: ignore[arg-type]


def slow_device() -> tuple[Device, Files]:
    files = Files()
    store = SlowStore()
    store.files = files
    device = Device(store=store)
    device.transfer = SlowTransfer(store)
    device.transfer.files = files
    return device, files


@pytest.mark.parametrize("seed", range(8))
async def test_two_steps_never_work_on_the_files_at_once(seed: int):
    draw = random.Random(seed)
    device, files = slow_device()
    async with device.boot():
        for sequence in range(1, 25):
            manifests = draw.sample([OLD, NEW, OTHER], k=draw.randint(1, 2))
            device.deployer.orders.take(order(sequence, *manifests, deadline_s=draw.choice([0.03, 60.0])))
            await asyncio.sleep(draw.choice([0.0, 0.0, 0.005, 0.02, 0.05]))
            if draw.random() < 0.2 and device.deployer.deployment.underway:
                device.deployer.roll_back("the person at the device changed their mind")
        await device.settled(24)
    assert files.users == []
    assert files.overlaps == []
    assert files.uses > 4


async def test_the_end_of_the_agent_waits_for_the_thread_of_a_step():
    device, files = slow_device()
    async with device.boot():
        device.deployer.orders.take(order(1, NEW))
        while not files.users:
            await asyncio.sleep(0.001)
    assert files.users == []
