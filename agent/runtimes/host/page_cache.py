"""The page cache."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


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
