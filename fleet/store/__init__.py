"""Artifacts that were built, behind a Protocol (``protocol``): a folder on this machine (``folder``)."""

from fleet.store.folder import FolderStore
from fleet.store.protocol import ArtifactReader, ArtifactStore, Listing, find

__all__ = ["ArtifactReader", "ArtifactStore", "FolderStore", "Listing", "find"]
