"""Turns what a toolchain prints into progress, while it still goes to the log."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO

from fleet.toolchains.progress import Progress, ProgressCallback


@dataclass(frozen=True, slots=True)
class Watch:
    """A line that matches ``pattern`` means ``phase``; its group 1 counts up to ``total``, or to its group 2."""

    pattern: re.Pattern[str]
    phase: str
    total: int = 0

    def read(self, line: str) -> Progress | None:
        """Return the progress that ``line`` tells, or None."""
        match = self.pattern.search(line)
        if match is None:
            return None
        total = int(match[2]) if len(match.groups()) > 1 else self.total
        if not total:
            return Progress(self.phase)
        return Progress(self.phase, min(1.0, (int(match[1]) + 1) / total))


class _Tee(io.TextIOBase):
    def __init__(self, log: TextIO, watches: Sequence[Watch], progress: ProgressCallback) -> None:
        self._log, self._watches, self._progress, self._rest = log, watches, progress, ""

    def write(self, text: str) -> int:
        self._log.write(text)
        *lines, self._rest = re.split(r"[\r\n]", self._rest[-4096:] + text)
        for line in lines:
            for watch in self._watches:
                if found := watch.read(line):
                    self._progress(found)
                    break
        return len(text)

    def flush(self) -> None:
        self._log.flush()

    def fileno(self) -> int:
        return self._log.fileno()

    def isatty(self) -> bool:
        return False

    def writable(self) -> bool:
        return True


@contextmanager
def watching(watches: Sequence[Watch], progress: ProgressCallback) -> Iterator[None]:
    """Within it, what Python code prints is read by ``watches``; the first that matches a line tells the progress."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Tee(before[0], watches, progress), _Tee(before[1], watches, progress)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
