"""The deployment's memory across restarts and power cuts: one document, replaced as a whole."""

from __future__ import annotations

import hashlib
from pathlib import Path

import structlog

from agent.store.files import store_errors, write_atomically

_log = structlog.get_logger(component=__name__)


class FileJournal:
    """Implements ``agent.core.ports.Journal``. The first line of the file is the SHA-256 of the rest."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self) -> bytes | None:
        """Return what was saved last, or None. A damaged file is set aside as ``<name>.damaged`` and counts as None."""
        with store_errors("read", self._path):
            try:
                stored = self._path.read_bytes()
            except FileNotFoundError:
                return None
        digest, end, document = stored.partition(b"\n")
        if end and digest == _digest(document):
            return document
        self._set_aside()
        return None

    def save(self, document: bytes) -> None:
        """Durable when this returns.

        Raises:
            agent.errors.StoreError: the disk refuses; what was saved before is still there.
        """
        with store_errors("create", self._path.parent):
            self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path, _digest(document) + b"\n" + document)

    def _set_aside(self) -> None:
        aside = self._path.with_name(self._path.name + ".damaged")
        with store_errors("set aside", self._path):
            self._path.replace(aside)
        _log.error("journal damaged", path=str(self._path), kept_as=str(aside))


def _digest(document: bytes) -> bytes:
    return hashlib.sha256(document).hexdigest().encode()
