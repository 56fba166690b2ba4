"""What memory there is for a model, the limits of our own control group included."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """Bytes that can be had without swapping: the machine's, or what systemd's MemoryMax leaves if that is less."""
    free = int(psutil.virtual_memory().available)
    for room in _cgroup_rooms():
        free = min(free, room)
    return max(0, free)


def _cgroup_rooms() -> list[int]:
    """Room left in our control group and each above it (cgroup v2); file pages count as free."""
    try:
        line = Path("/proc/self/cgroup").read_text("utf-8").strip().splitlines()[-1]
        folder = _CGROUP / line.split("::", 1)[1].lstrip("/")
    except (OSError, IndexError):
        return []
    rooms = []
    while folder.is_relative_to(_CGROUP):
        with contextlib.suppress(OSError, ValueError, StopIteration):
            limit = int((folder / "memory.max").read_text("ascii"))
            used = int((folder / "memory.current").read_text("ascii"))
            stat = (folder / "memory.stat").read_text("ascii").splitlines()
            files = int(next(row for row in stat if row.startswith("inactive_file ")).split()[1])
            rooms.append(limit - used + files)
        if folder == _CGROUP:
            break
        folder = folder.parent
    return rooms


def read_ahead(folder: Path) -> int:
    """Bring a model's files into the page cache, so that loading it does not wait for the disk; bytes read."""
    total = 0
    buffer = bytearray(1 << 20)
    for path in sorted(folder.rglob("*")):
        with contextlib.suppress(OSError):
            if path.is_file():
                with path.open("rb", buffering=0) as file:
                    if hasattr(os, "posix_fadvise"):
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
                    while size := file.readinto(buffer):
                        total += size
    return total
