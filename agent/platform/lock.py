"""One agent a state folder: two would take each other's place at the broker and write the same journal.

The folder itself is locked where the platform can, which needs no room on its disk: a device with a full or read-only
disk still serves the model that is there. The file ``agent.lock`` is locked beside it, for platforms that cannot.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from agent.errors import UnavailableError

_HELD = frozenset({errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK})


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """An exclusive lock on the folder, until the context ends or the process does.

    Raises:
        UnavailableError: another agent has it, or the folder can neither be made nor locked; says why.
    """
    handles: list[int] = []
    try:
        _take(folder, handles)
        yield
    finally:
        for handle in handles:
            os.close(handle)


def _take(folder: Path, handles: list[int]) -> None:
    refusals: list[tuple[str, OSError]] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # it may be there even so
        refusals.append(("made", error))
    locked = False
    for path, flags in ((folder, os.O_RDONLY), (folder / "agent.lock", os.O_RDWR | os.O_CREAT)):
        if path is folder and os.name == "nt":
            continue
        try:
            handles.append(os.open(path, flags, 0o644))
            _lock(handles[-1])
            locked = True
        except OSError as error:
            if error.errno in _HELD and error.filename is None:  # of the lock, not of the opening
                raise UnavailableError(
                    f"another agent runs with the state folder {folder}; stop it, or name another with --state-dir"
                ) from None
            refusals.append(("locked", error))
    if not locked:
        what, first = refusals[0]
        raise UnavailableError(f"the state folder {folder} cannot be {what}: {first.strerror or first}") from first


if sys.platform == "win32":
    import msvcrt

    def _lock(handle: int) -> None:
        os.lseek(handle, 0, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
