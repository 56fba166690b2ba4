"""A disk that refuses one call: each call of an operation in turn, so that no error path is left untried.

Calls of ``os`` and ``io`` are counted below one folder; the real ones do the work. One of them raises.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

#: What a failing, a full and an over-quota disk answer.
CODES = (errno.EIO, errno.ENOSPC, errno.EDQUOT)
_BY_PATH = ("open", "mkdir", "rename", "replace", "unlink", "rmdir", "stat", "scandir", "listdir", "chmod", "statvfs")
_BY_DESCRIPTOR = ("fsync", "fdatasync", "ftruncate", "posix_fallocate", "pwrite", "pread", "fstat", "lseek")


@dataclass
class FaultyDisk:
    """``calls`` are the names of those made so far; number ``fail_at`` raises ``code``."""

    folder: Path
    fail_at: int | None = None
    code: int = errno.EIO
    calls: list[str] = field(default_factory=list)

    def _is_here(self, target: object) -> bool:
        if isinstance(target, int):
            try:
                target = Path(f"/proc/self/fd/{target}").readlink()
            except OSError:
                return False
        if not isinstance(target, str | Path):
            return False
        return Path(target).is_relative_to(self.folder)

    def wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            wraps_a_descriptor = name == "io.open" and arguments and isinstance(arguments[0], int)
            if not arguments or wraps_a_descriptor or not self._is_here(arguments[0]):
                return real(*arguments, **more)
            self.calls.append(name)
            if len(self.calls) - 1 != self.fail_at:
                return real(*arguments, **more)
            raise OSError(self.code, os.strerror(self.code), None if isinstance(arguments[0], int) else arguments[0])

        return call


@contextmanager
def faulty(disk: FaultyDisk) -> Iterator[FaultyDisk]:
    """While it lasts, the disk counts, and refuses."""
    with mock.patch.object(io, "open", disk.wrap("io.open", io.open)):
        patches = [
            mock.patch.object(os, name, disk.wrap(name, getattr(os, name)))
            for name in (*_BY_PATH, *_BY_DESCRIPTOR)
            if hasattr(os, name)
        ]
        for patch in patches:
            patch.start()
        try:
            yield disk
        finally:
            for patch in patches:
                patch.stop()


def open_files() -> set[str]:
    """What is open below no matter which folder: compare before and after."""
    return {str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()}


def each_fault(
    folder: Path, prepare: Callable[[], Callable[[], object]]
) -> Iterator[tuple[str, int, BaseException | None]]:
    """Run the operation that ``prepare`` returns once for each of its calls, with the codes in turn.

    Yields the call that was refused, the code, and what the operation raised.
    """
    operation = prepare()
    with faulty(FaultyDisk(folder)) as counting:
        operation()
    assert counting.calls, "the operation does not use the disk"
    for number in range(len(counting.calls)):
        # In turn, not each at each call: which of them it is, one function tells for all.
        code = CODES[number % len(CODES)]
        operation = prepare()
        raised: BaseException | None = None
        with faulty(FaultyDisk(folder, number, code)) as disk:
            try:
                operation()
            except Exception as error:
                raised = error
        if number < len(disk.calls):
            yield disk.calls[number], code, raised
