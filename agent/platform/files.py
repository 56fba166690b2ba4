"""Files that are whole or absent, also after a power cut, and one answer to "is the disk full?". Shared with fleet/.

A file is replaced by a temporary file in the same folder, fsync, rename, and fsync of the folder.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

PRIVATE = 0o600
PUBLIC = 0o644

_PREFIX = ".new-"
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
#: The operating system's words for a full disk, which native libraries hand on without its number.
_NO_SPACE = os.strerror(errno.ENOSPC)


def is_disk_full(error: BaseException) -> bool:
    """Return whether the disk, or this user's share of it, is full: by number, or by the system's words where a library
    hands on no number."""
    return (isinstance(error, OSError) and error.errno in _FULL) or _NO_SPACE in str(error)


def reason(error: OSError, folder: Path) -> str:
    """Why nothing could be written in ``folder``, and what to do where the disk is full."""
    if is_disk_full(error):
        return f"the disk of {folder} is full; make room there, or name a folder on another one"
    return error.strerror or str(error)


def explained(error: OSError, folder: Path) -> str:
    """Return the error with the file that it names; where the disk is full, also what to do."""
    return reason(error, folder) if is_disk_full(error) else str(error)


def sha256_of(path: Path) -> str:
    """Return the file's digest, in hex.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, data: bytes, mode: int = PUBLIC) -> None:
    """Replace ``path``; a crash leaves the old file or the new one. The mode holds from the first byte on.

    Raises:
        OSError: the disk refuses; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=_PREFIX)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        set_mode(Path(temporary), mode)
        Path(temporary).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(temporary).unlink()
        raise
    sync_folder(path.parent)


def set_mode(path: Path, mode: int) -> None:
    """Let others do what ``mode`` says.

    FAT and exFAT have no modes, and refuse most; what others may do there is said where it is mounted.

    Raises:
        PermissionError: others may do something, where nobody else may do anything.
        OSError: the disk refuses otherwise.
    """
    try:
        path.chmod(mode)
    except PermissionError:
        if not mode & 0o077:
            raise


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process had begun to write; only for whoever holds the lock of ``folder``."""
    for path in folder.glob(f"{_PREFIX}*"):
        path.unlink(missing_ok=True)


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


def sync_tree(folder: Path) -> None:
    """Make every file and folder below ``folder`` durable, and itself."""
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


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
    """Return whether the file system knows that nothing was ever written in this range; False where it cannot tell."""
    if not hasattr(os, "SEEK_DATA"):
        return False
    try:
        return os.lseek(descriptor, offset, os.SEEK_DATA) >= offset + size
    except OSError as error:
        return error.errno == errno.ENXIO
