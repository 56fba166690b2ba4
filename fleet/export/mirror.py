"""Artifacts as a web server or an object store serves them to devices: DIGEST/PATH, file by file."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from agent.contract.manifest import Manifest
from agent.platform.files import reason, set_mode, sha256_of, sync_folder, sync_tree
from fleet.errors import StoreError
from fleet.export.export import beside, copied
from fleet.store.folder import FolderStore


def mirror(
    store: FolderStore, manifests: Iterable[Manifest], folder: Path, on_done: Callable[[Manifest, bool], None]
) -> None:
    """Write the artifacts into ``folder``, each complete or not at all; one that is whole there is left alone.

    ``on_done`` is told of each, and whether it was there already.

    Raises:
        StoreError: an artifact's bytes are not what was built, or the disk refuses.
    """
    for manifest in manifests:
        target = folder / manifest.digest
        try:
            there = _is_whole(manifest, target)
            if not there:
                with beside(target.resolve()) as half:
                    for file in manifest.files:
                        copied(store.files(manifest.id), file, half)
                    sync_tree(half)
                    set_mode(half, 0o755)  # for the web server's user, too
                    if target.exists():
                        shutil.rmtree(target)
                    half.rename(target)
                sync_folder(folder)
        except OSError as error:
            raise StoreError(f"{target} cannot be written: {reason(error, folder)}") from None
        on_done(manifest, there)


def _is_whole(manifest: Manifest, folder: Path) -> bool:
    try:
        return all(sha256_of(folder / PurePosixPath(file.path)) == file.sha256 for file in manifest.files)
    except (FileNotFoundError, NotADirectoryError):
        return False
