"""Sixteen clients for a minute while the model is updated twice and rolled back once."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from agent.contract.messages import State
from agent.core.health import percentile
from bench.figures import Figure
from tests.load import Load
from tests.models import built, sample_checkpoint
from tests.rig import Rig

CLIENTS, SECONDS, TOKENS = 16, 60.0, 24
Span = tuple[float, float]


def figures() -> list[Figure]:
    """Failed requests, and how much slower tokens come during a swap."""
    with Rig() as rig, tempfile.TemporaryDirectory() as folder:
        return asyncio.run(_measure(rig, Path(folder)))


async def _measure(rig: Rig, folder: Path) -> list[Figure]:
    artifact = built(sample_checkpoint())
    rig.take_over(artifact.manifest, artifact.files)
    variants = [rig.variant(artifact, name, folder) for name in ("second", "third")]
    rig.start_controller()
    rig.start_agent(PHIFLEET_AGENT_CANARY_INTERVAL_S="0")
    rig.order(artifact.manifest)
    reported = await asyncio.to_thread(rig.settled, 1)
    load = Load(str(reported.endpoint), artifact.manifest.model.name, CLIENTS, TOKENS)
    began = time.monotonic()
    running = asyncio.create_task(load.run())
    await asyncio.sleep(12)
    swaps: list[Span] = []
    for sequence, variant in enumerate(variants, start=2):
        started = time.monotonic()
        rig.order(variant)
        updated = await asyncio.to_thread(rig.settled, sequence)
        assert updated.state is State.COMMITTED, rig.logs()
        swaps.append((started, time.monotonic()))
    started = time.monotonic()
    command = [sys.executable, "-m", "agent", "--state-dir", str(rig.state_dir), "rollback"]
    await asyncio.to_thread(subprocess.run, command, check=True, stdout=subprocess.DEVNULL)
    await asyncio.to_thread(rig.until, lambda: _serves(rig, variants[0].digest), "the rollback")
    swaps.append((started, time.monotonic()))
    await asyncio.sleep(max(0.0, SECONDS - (time.monotonic() - began)))
    load.stop()
    await running
    return _figures(load, swaps)


def _serves(rig: Rig, digest: str) -> bool:
    reported = rig.reported()
    return bool(reported and reported.digest == digest)


def _figures(load: Load, swaps: list[Span]) -> list[Figure]:
    gaps = [gap for seen in load.seen for gap in seen.gaps_ms]
    before = [ms for when, ms in gaps if when < swaps[0][0]]
    during = [ms for when, ms in gaps if any(start <= when <= end for start, end in swaps)]
    calm, busy = percentile(before, 99) or 0.0, percentile(during, 99) or 0.0
    failed = [seen.error for seen in load.seen if seen.error]
    note = f"{len(load.seen)} requests, 2 updates, 1 rollback; swaps took " + ", ".join(
        f"{end - start:.1f} s" for start, end in swaps
    )
    return [
        Figure("failed requests under updates and rollback, 16 clients", len(failed), "requests", at_most=0, note=note),
        Figure("p99 time per token during a swap", busy, "ms", "before it", calm, busy / calm, at_most=3),
    ]
