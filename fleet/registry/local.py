"""Artifacts that were built here, by digest: what the chunk server cuts its chunks from."""

from __future__ import annotations

from pathlib import Path

from agent.contract.manifest import Manifest
from fleet.home import Home
from fleet.toolchains.artifacts import files_of, list_artifacts

Found = tuple[Manifest, Path]
"""A manifest and the folder of its files."""


class LocalArtifacts:
    """Looks in the folder again at every miss, since builds go on while the controller runs."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._known: dict[str, Found] = {}

    def by_digest(self, digest: str) -> Found | None:
        """The artifact with this content, or None."""
        found = self._known.get(digest)
        if found is not None and found[1].is_dir():
            return found
        manifests = list_artifacts(self._home).manifests
        self._known = {manifest.digest: (manifest, files_of(self._home, manifest.id)) for manifest in manifests}
        return self._known.get(digest)
