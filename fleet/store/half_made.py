"""A folder to make an artifact in: it becomes one in one rename, and what a killed process leaves is removed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

#: Prefix of folders that are being made; nobody looks into them.
HALF_MADE = ".building-"


@contextmanager
def half_made(artifacts: Path, name: str) -> Iterator[Path]:
    """A folder in the store's own, locked as long as somebody works in it; what a killed one has left is removed."""
    artifacts.mkdir(parents=True, exist_ok=True)
    with FileLock(artifacts.parent / "build.lock"):  # else a folder could be swept before it is locked
        sweep(artifacts)
        folder = Path(tempfile.mkdtemp(prefix=f"{HALF_MADE}{name}-", dir=artifacts))
        mine = FileLock(folder / "lock")
        mine.acquire()
    try:
        yield folder
    finally:
        mine.release()
        shutil.rmtree(folder, ignore_errors=True)


def sweep(artifacts: Path) -> None:
    """Remove the folders that nobody works in any more."""
    for folder in artifacts.glob(f"{HALF_MADE}*"):
        try:
            with FileLock(folder / "lock", timeout=0):
                pass
        except Timeout:
            continue  # of a process that runs, here, in another container, or on another host of a shared disk
        shutil.rmtree(folder, ignore_errors=True)
