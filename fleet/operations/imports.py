"""Artifacts that were built elsewhere and carried to the controller: from its folder ``imports`` into its store."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from agent.contract.manifest import Manifest
from agent.platform.files import reason
from fleet.errors import MissingError, StoreError
from fleet.export.export import exported_manifest, import_artifact
from fleet.operations.fleet import Fleet
from fleet.registry import Actor
from fleet.store.folder import FolderStore

#: Folders that are listed.
LISTED = 100


@dataclass(frozen=True, slots=True)
class Carried:
    """A folder in ``imports``; without a manifest ``problem`` says why. ``there``: the store has it already."""

    name: str
    manifest: Manifest | None = None
    there: bool = False
    problem: str | None = None


def list_carried(fleet: Fleet) -> list[Carried]:
    """Return what lies in the folder, by name. Bytes are looked at when one is taken in.

    Raises:
        StoreError: the folder, or the store, cannot be read.
    """
    known = {manifest.digest for manifest in fleet.artifacts.list().manifests}
    return [_carried(folder, known) for folder in _folders(fleet)[:LISTED]]


def take_in(fleet: Fleet, name: str, actor: Actor) -> Manifest:
    """Take the artifact in the folder called ``name`` into the store; every byte is compared with its manifest.

    Raises:
        MissingError: there is no such folder.
        StoreError: it holds no exported artifact, or other bytes than its manifest says; nothing is taken then.
    """
    found = next((folder for folder in _folders(fleet) if folder.name == name), None)
    if found is None:
        raise MissingError(f"{fleet.home.imports} holds no folder called {name}")
    manifest, there = import_artifact(FolderStore(fleet.home.artifacts), found)
    if not there:
        fleet.registry.audit.record(actor, "artifact.import", manifest.id, {"digest": manifest.digest})
    return manifest


def _folders(fleet: Fleet) -> list[Path]:
    try:
        return sorted(path for path in fleet.home.imports.iterdir() if path.is_dir() and path.name[0] != ".")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StoreError(f"{fleet.home.imports}: cannot be read: {reason(error, fleet.home.imports)}") from None


def _carried(folder: Path, known: set[str]) -> Carried:
    try:
        manifest = exported_manifest(folder)
    except StoreError as error:
        return Carried(folder.name, problem=str(error))
    return Carried(folder.name, manifest, manifest.digest in known)
