"""Files that are whole or not there, also after a power cut."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

#: The operating system's words for a full disk, which libraries hand on without its number.
_NO_SPACE = os.strerror(errno.ENOSPC)


def reason(error: OSError, folder: Path) -> str:
    """Why nothing could be written in ``folder``, and what to do where the disk is full."""
    if error.errno == errno.ENOSPC or _NO_SPACE in str(error):
        return f"the disk of {folder} is full; make room there, or name a folder on another one"
    return error.strerror or str(error)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace ``path`` atomically: temporary file beside it, fsync, replace, fsync the folder."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_tree(folder: Path) -> None:
    """fsync every file and folder below ``folder``, and itself."""
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """fsync a folder, where the system can (Windows cannot open one)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
