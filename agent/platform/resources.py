"""What a process may take of its machine, the limits of its own control group included. Shared with fleet/."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


def available_bytes(cgroups: Path = _CGROUPS, own: Path = _OWN_CGROUP) -> int:
    """Return the bytes that can be had without swapping.

    The machine's, or what a container's limit or systemd's MemoryMax leaves
    if that is less. The paths are those of Linux; elsewhere they are not there."""
    return max(0, min([int(psutil.virtual_memory().available), *_rooms(cgroups, own)]))


def _rooms(cgroups: Path, own: Path) -> list[int]:
    """Room left in our control group and each above it (cgroup v2); file pages count as free."""
    try:
        line = own.read_text("utf-8").strip().splitlines()[-1]
        folder = cgroups / line.split("::", 1)[1].lstrip("/")
    except (OSError, IndexError):
        return []
    rooms = []
    while folder.is_relative_to(cgroups):
        with contextlib.suppress(OSError, ValueError, StopIteration):
            limit = int((folder / "memory.max").read_text("ascii"))
            used = int((folder / "memory.current").read_text("ascii"))
            stat = (folder / "memory.stat").read_text("ascii").splitlines()
            files = int(next(row for row in stat if row.startswith("inactive_file ")).split()[1])
            rooms.append(limit - used + files)
        if folder == cgroups:
            break
        folder = folder.parent
    return rooms
