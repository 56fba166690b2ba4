"""Makes deltas: an artifact told against another one that devices have. They lie beside it, and are served as it is."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from agent.contract.chunk_index import INDEX_FILE, Layout, packed_record
from agent.contract.delta import PIECES_FILE, WHOLE, piece_of
from agent.contract.manifest import Delta, Manifest
from agent.platform.files import reason, sync_folder, sync_tree
from agent.platform.open_files import BaseFiles
from fleet.errors import StoreError, UsageError
from fleet.store.folder import FolderStore
from fleet.store.half_made import half_made

#: An artifact keeps the newest ones.
KEPT_DELTAS = 4
#: With more of the artifact's bytes it saves too little to be worth its room, from a base and without one.
MOST_SHARE, MOST_COMPRESSED = 0.9, 0.95
#: Chunks that are compressed at once, for all threads together.
_BATCH = 64


def make_delta(
    store: FolderStore, manifest: Manifest, base: Manifest | None, *,
    threads: int = 1, progress: Callable[[float], None] = lambda share: None,
) -> Manifest:  # fmt: skip
    """Tell ``manifest`` against ``base``; returns it with the delta, as it is in the store from now on.

    Without a base its chunks are compressed alone. Both are read and compared with their manifests first: a delta from
    other bytes would be of no use to any device.

    Raises:
        UsageError: they are the same, or the delta would save next to nothing, with the figures.
        StoreError: the bytes of one are not what was built, or the disk refuses; nothing has changed then.
    """
    if base is not None and manifest.digest == base.digest:
        raise UsageError(f"{manifest.id} is the same artifact; name the one that devices have now")
    for one in filter(None, (manifest, base)):
        store.verify(one)
    try:
        with half_made(store.root, "delta") as half:
            files = half / "delta" / "files"
            files.mkdir(parents=True)
            digest, size, whole = hashlib.sha256(), 0, 0
            with (files / PIECES_FILE).open("wb") as pieces, (files.parent / INDEX_FILE).open("wb") as index:
                for piece, chunk_bytes in _pieces(store, manifest, base, threads, progress):
                    pieces.write(piece)
                    index.write(packed_record(piece))
                    digest.update(piece)
                    size += len(piece)
                    whole += chunk_bytes if piece == WHOLE else 0
            delta = Delta(
                base=base.id if base else None, base_digest=base.digest if base else None,
                digest=digest.hexdigest(), size=size, whole_bytes=whole,
            )  # fmt: skip
            _refuse_unless_it_saves(manifest, delta)
            sync_tree(half / "delta")
            return _put_in_place(store, manifest, delta, half / "delta")
    except OSError as error:
        raise StoreError(f"the delta cannot be written in {store.root}: {reason(error, store.root)}") from None


def _refuse_unless_it_saves(manifest: Manifest, delta: Delta) -> None:
    if delta.wire_bytes <= (MOST_COMPRESSED if delta.base is None else MOST_SHARE) * manifest.size:
        return
    hint = "Deltas help where the same recipe quantized the same model, trained on a little" if delta.base else ""
    raise UsageError(
        f"{manifest.id} {delta.name} takes {delta.wire_bytes / 1e6:.1f} MB of {manifest.size / 1e6:.1f} MB "
        f"({delta.wire_bytes / manifest.size:.0%}): devices may as well fetch it whole. {hint}".rstrip()
    )


def _put_in_place(store: FolderStore, manifest: Manifest, delta: Delta, made: Path) -> Manifest:
    others = [one for one in manifest.deltas if one.base_digest != delta.base_digest]
    kept = others[-(KEPT_DELTAS - 1) :]
    target = store.delta(manifest, delta.base_digest)
    target.parent.mkdir(exist_ok=True)
    if target.exists():
        shutil.rmtree(target)
    made.rename(target)
    sync_folder(target.parent)
    with_delta = manifest.model_copy(update={"deltas": (*kept, delta)})
    store.save_manifest(with_delta)
    for gone in others[: -(KEPT_DELTAS - 1)]:
        shutil.rmtree(store.delta(manifest, gone.base_digest), ignore_errors=True)
    return with_delta


def _pieces(
    store: FolderStore, manifest: Manifest, base: Manifest | None, threads: int, progress: Callable[[float], None]
) -> Iterator[tuple[bytes, int]]:
    """Yield each chunk's piece, and the chunk's size in bytes, 0 for a repeat, which is not sent."""
    layout = Layout(manifest.files, store.index(manifest))
    new, old = store.open(manifest.digest), BaseFiles(store.files((base or manifest).id), base, manifest)
    if new is None:
        raise StoreError(f"{manifest.id} is not in {store.root} any more")
    seen: set[bytes] = set()

    def pairs() -> Iterator[tuple[bytes, bytes] | None]:
        for number in range(len(layout)):
            if layout.digest(number) in seen:  # devices ask for the first of equal chunks alone
                yield None
                continue
            seen.add(layout.digest(number))
            place, size = layout.place(number), layout.sizes[number]
            yield new.read(place.file, place.offset, size), old.read(place.file, place.offset, size)

    try:
        with ThreadPoolExecutor(threads) as pool:
            source, done = pairs(), 0
            while batch := list(islice(source, _BATCH)):
                yield from pool.map(lambda pair: (piece_of(*pair), len(pair[0])) if pair else (WHOLE, 0), batch)
                done += len(batch)
                progress(done / len(layout))
    finally:
        new.close()
        old.close()
