"""The disk's refusals in the store's own words."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from agent.contract.failures import FailureCode
from agent.errors import StoreError
from agent.platform import files


@contextlib.contextmanager
def store_errors(doing: str, path: Path) -> Iterator[None]:
    """Turn an ``OSError`` into a ``StoreError`` that says what was being done, where, and what to do."""
    try:
        yield
    except OSError as error:
        raise explained(error, doing, path) from error


def explained(error: OSError, doing: str, path: Path) -> StoreError:
    """Return the ``StoreError`` for an ``OSError``; a full disk has a code of its own."""
    text = f"cannot {doing} {path}: {error.strerror or error}"
    if not files.is_disk_full(error):
        return StoreError(text)
    return StoreError(f"{text}; {files.free_text(path)}; free space or enlarge the disk", FailureCode.STORE_DISK_FULL)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``; durable when this returns, and never half of it.

    Raises:
        agent.errors.StoreError: the disk refuses; the old file is still there.
    """
    with store_errors("write", path):
        files.write_atomic(path, data)
