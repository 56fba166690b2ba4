"""Where the controller keeps its things: one folder, ``PHIFLEET_HOME``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Home:
    """The folders and files under one root; nothing here is created by naming it."""

    root: Path

    @property
    def keys(self) -> Path:
        """Private keys: root (to be taken offline), targets, snapshot, timestamp, director."""
        return self.root / "keys"

    @property
    def tuf(self) -> Path:
        """The TUF repository: metadata, and ``targets/``."""
        return self.root / "tuf"

    @property
    def ca(self) -> Path:
        """The device certificate authority."""
        return self.root / "ca"

    @property
    def artifacts(self) -> Path:
        """Built artifacts: ``<id>/manifest.json`` and ``<id>/files/``."""
        return self.root / "artifacts"

    @property
    def imports(self) -> Path:
        """Where artifacts are put that were exported elsewhere, a folder each, to be taken in from the page."""
        return self.root / "imports"

    @property
    def logs(self) -> Path:
        """Logs of builds that failed."""
        return self.root / "logs"

    @property
    def database(self) -> Path:
        """SQLite, unless the settings name another database."""
        return self.root / "fleet.db"
