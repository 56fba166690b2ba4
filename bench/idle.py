"""The idle agent, nothing loaded: resident memory and CPU. Its broker is the embedded one."""

from __future__ import annotations

import time

import psutil

from bench.figures import Figure
from tests.rig import Rig

SETTLE_S, WATCH_S = 8.0, 30.0


def figures() -> list[Figure]:
    """Resident MiB (of the agent's process and its children), and percent of a core."""
    with Rig() as rig:
        agent = psutil.Process(rig.start_agent())
        time.sleep(SETTLE_S)
        family = [agent, *agent.children(recursive=True)]
        before = sum(sum(process.cpu_times()[:2]) for process in family)
        start = time.monotonic()
        time.sleep(WATCH_S)
        used = sum(sum(process.cpu_times()[:2]) for process in family) - before
        percent = 100 * used / (time.monotonic() - start)
        resident = sum(process.memory_info().rss for process in family) / 2**20
    return [
        Figure("idle agent, resident memory", resident, "MiB", at_most=72),
        Figure("idle agent, CPU", percent, "% of a core", at_most=0.5),
    ]
