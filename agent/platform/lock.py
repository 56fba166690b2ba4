"""One agent a state folder: two would take each other's place at the broker and write the same journal."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import IO

from agent.errors import ConfigError


def hold(folder: Path) -> IO[bytes]:
    """An exclusive lock on the folder, for as long as the file that is returned stays open; it ends with the process.

    Raises:
        ConfigError: another agent has it, or the folder cannot be written.
    """
    path = folder / "agent.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    except OSError as error:
        raise ConfigError(f"the state folder {folder} cannot be written: {error.strerror or error}") from error
    try:
        _lock(file.fileno())
    except OSError:
        file.close()
        raise ConfigError(
            f"another agent runs with the state folder {folder}; stop it, or name another with --state-dir"
        ) from None
    return file


if sys.platform == "win32":
    import msvcrt

    def _lock(handle: int) -> None:
        os.lseek(handle, 0, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
