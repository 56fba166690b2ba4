"""The artifacts that were built: ``<home>/artifacts/<id>/manifest.json`` and ``files/`` beside it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from agent.contract.base import MalformedMessageError
from agent.contract.manifest import Manifest
from agent.platform.files import write_atomic
from fleet.errors import BuildError, UsageError
from fleet.home import Home

#: Prefix of folders that are being made; nobody looks into them.
HALF_MADE = ".building-"


@dataclass(frozen=True, slots=True)
class Listing:
    """What is there; ``damaged`` says of each folder that is none why."""

    manifests: tuple[Manifest, ...]
    damaged: tuple[str, ...]


def files_of(home: Home, artifact: str) -> Path:
    """The folder with the artifact's files, which a manifest's paths are relative to."""
    return home.artifacts / artifact / "files"


def find(home: Home, artifact: str) -> Manifest | None:
    """The manifest of the artifact with this id, or None.

    Raises:
        BuildError: it is there and cannot be read, or a file has another length than was built.
    """
    folder = home.artifacts / artifact
    if not folder.exists():
        return None
    manifest = _read(folder / "manifest.json")
    _check_lengths(home, manifest)
    return manifest


def load(home: Home, wanted: str) -> Manifest:
    """By id, by digest, or by a beginning of either (of at least 4 characters) that only one has.

    Raises:
        UsageError: none has it, or several.
    """
    manifests = list_artifacts(home).manifests
    exact = [one for one in manifests if wanted in (one.id, one.digest)]
    if exact:
        return exact[0]
    near = [
        one for one in manifests if len(wanted) >= 4 and (one.id.startswith(wanted) or one.digest.startswith(wanted))
    ]
    if len(near) == 1:
        return near[0]
    if near:
        raise UsageError(f"several artifacts begin with {wanted}: {', '.join(one.id for one in near)}")
    there = ", ".join(one.id for one in manifests) or "none yet; `phifleet build` makes one"
    raise UsageError(f"no artifact is named {wanted}; there are: {there}")


def list_artifacts(home: Home) -> Listing:
    """Every artifact, sorted by id."""
    manifests, damaged = [], []
    folders = sorted(home.artifacts.iterdir()) if home.artifacts.is_dir() else []
    for folder in folders:
        if folder.name.startswith(HALF_MADE) or not folder.is_dir():
            continue
        try:
            manifests.append(_read(folder / "manifest.json"))
        except BuildError as error:
            damaged.append(str(error))
    return Listing(tuple(manifests), tuple(damaged))


def save_manifest(home: Home, manifest: Manifest) -> None:
    """Replace the manifest of an artifact that is there, for example with its measured quality."""
    write_atomic(home.artifacts / manifest.id / "manifest.json", manifest.to_json())


def validate(home: Home, manifest: Manifest) -> None:
    """Compare the files on disk with the manifest, byte for byte.

    Raises:
        BuildError: a file is missing, has another length or other bytes.
    """
    _check_lengths(home, manifest)
    folder = files_of(home, manifest.id)
    for entry in manifest.files:
        with (folder / entry.path).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                raise BuildError(f"{folder / entry.path} is not what was built; {_again(folder)}")


def _check_lengths(home: Home, manifest: Manifest) -> None:
    folder = files_of(home, manifest.id)
    for entry in manifest.files:
        path = folder / entry.path
        if not path.is_file():
            raise BuildError(f"{path} is missing; {_again(folder)}")
        if (size := path.stat().st_size) != entry.size:
            raise BuildError(f"{path} has {size} bytes, its manifest says {entry.size}; {_again(folder)}")


def _again(files: Path) -> str:
    return f"remove {files.parent} and build it again"


def _read(path: Path) -> Manifest:
    try:
        return Manifest.from_json(path.read_bytes())
    except OSError as error:
        raise BuildError(
            f"{path}: cannot be read: {error.strerror or error}; remove its folder and build again"
        ) from None
    except MalformedMessageError as error:
        raise BuildError(f"{path}: {error}; remove its folder and build again") from None
