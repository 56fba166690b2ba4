"""Files that are there as a whole or not at all, and the disk's refusals in the agent's own words."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from agent.contract.failures import FailureCode
from agent.errors import StoreError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def store_errors(doing: str, path: Path) -> Iterator[None]:
    """Turn an ``OSError`` into a ``StoreError`` that says what was being done, where, and what to do."""
    try:
        yield
    except OSError as error:
        raise explained(error, doing, path) from error


def explained(error: OSError, doing: str, path: Path) -> StoreError:
    """The ``StoreError`` for an ``OSError``; a full disk has a code of its own."""
    text = f"cannot {doing} {path}: {error.strerror or error}"
    if error.errno not in _FULL:
        return StoreError(text)
    return StoreError(f"{text}; {free_text(path)}; free space or enlarge the disk", FailureCode.STORE_DISK_FULL)


def free_bytes(path: Path) -> int:
    """Bytes that this process may still write on the disk of ``path`` or of its nearest folder that exists."""
    folder = path
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def free_text(path: Path) -> str:
    """For an error's text."""
    try:
        return f"{mebibytes(free_bytes(path))} free there"
    except OSError:
        return "free space unknown"


def mebibytes(count: int) -> str:
    """For people."""
    return f"{count / 1048576:.1f} MiB"


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``; durable when this returns, and never half of it.

    Raises:
        agent.errors.StoreError: the disk refuses; the old file is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    with store_errors("write", path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Make a file's bytes durable.

    Raises:
        OSError: the disk refuses.
    """
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the platform lets one: Windows does not open folders."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reserve(descriptor: int, size: int) -> None:
    """Make a file ``size`` bytes long, and the disk promise the room where the platform can.

    Raises:
        OSError: no room.
    """
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENODEV):
                raise
        else:
            return
    os.ftruncate(descriptor, size)


_seek_and_write = threading.Lock()


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """All of ``data`` at ``offset``, from any thread.

    Raises:
        OSError: the disk refuses.
    """
    view = memoryview(data)
    while view:
        if hasattr(os, "pwrite"):
            written = os.pwrite(descriptor, view, offset)
        else:  # Windows
            with _seek_and_write:
                os.lseek(descriptor, offset, os.SEEK_SET)
                written = os.write(descriptor, view)
        view = view[written:]
        offset += written


def is_hole(descriptor: int, offset: int, size: int) -> bool:
    """Whether the file system knows that nothing was ever written in this range; False where it cannot tell."""
    if not hasattr(os, "SEEK_DATA"):
        return False
    try:
        return os.lseek(descriptor, offset, os.SEEK_DATA) >= offset + size
    except OSError as error:
        return error.errno == errno.ENXIO
