"""Artifacts that were built here, by digest: what the chunk server cuts its chunks from."""

from __future__ import annotations

from pathlib import Path

from agent.contract.manifest import Manifest
from fleet.home import Home
from fleet.store.folder import files_of, list_artifacts

Found = tuple[Manifest, Path]
"""A manifest and the folder of its files."""


class LocalArtifacts:
    """Looks again when the folder has changed: builds go on while the controller runs, and wants cost no reads."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._known: dict[str, Found] = {}
        self._changed_ns = -1

    def by_digest(self, digest: str) -> Found | None:
        """The artifact with this content, or None."""
        changed_ns = self._folder_changed_ns()
        if changed_ns != self._changed_ns:
            manifests = list_artifacts(self._home).manifests
            self._known = {manifest.digest: (manifest, files_of(self._home, manifest.id)) for manifest in manifests}
            self._changed_ns = changed_ns
        return self._known.get(digest)

    def _folder_changed_ns(self) -> int:
        try:
            return self._home.artifacts.stat().st_mtime_ns
        except FileNotFoundError:
            return 0
