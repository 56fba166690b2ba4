"""Hardware facts: what the device is, as far as it tells without special rights."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import psutil

from agent.contract.messages import Facts, RuntimeFact
from agent.platform.files import free_bytes


def collect(
    device: str, profile: str, version: str, folder: Path, runtimes: Sequence[RuntimeFact], at: datetime
) -> Facts:
    """Return the facts message; ``folder`` is where artifacts go, so its file system counts. It need not exist yet."""
    memory = psutil.virtual_memory()
    return Facts(
        device=device,
        profile=profile,
        agent_version=version,
        system=f"{platform.system()} {platform.release()}",
        machine=platform.machine(),
        cpu=cpu_name(),
        cpu_count=os.cpu_count() or 1,
        memory_total_bytes=memory.total,
        memory_available_bytes=memory.available,
        disk_free_bytes=free_bytes(folder),
        runtimes=tuple(runtimes),
        at=at,
    )


def cpu_name() -> str:
    """As the processor calls itself, or the architecture."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


#: Above it a sensor is broken: a driver that fails reports 65261.85, say.
_HOTTEST_C = 1000.0


def temperature_c() -> float | None:
    """Return the hottest sensor in degrees Celsius, where the host has any."""
    sensors = getattr(psutil, "sensors_temperatures", None)  # Linux and FreeBSD only
    if sensors is None:
        return None
    readings = [
        entry.current
        for entries in sensors().values()
        for entry in entries
        if entry.current and entry.current < _HOTTEST_C
    ]
    return max(readings, default=None)


def throttled() -> bool | None:
    """Return whether the kernel throttled a core for heat since it booted, where it counts that (x86 Linux)."""
    counters = list(Path("/sys/devices/system/cpu").glob("cpu*/thermal_throttle/core_throttle_count"))
    if not counters:
        return None
    return any(int(counter.read_text() or 0) > 0 for counter in counters)
