"""An artifact as a folder for others, and back: its files, and whatever of the paper trail is asked for."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from agent.contract.base import MalformedMessageError
from agent.contract.chunk_index import INDEX_FILE, with_index, without_index
from agent.contract.manifest import ArtifactFile, Manifest, Precision, Toolchain
from agent.platform.files import reason, set_mode, sync_folder, sync_tree
from fleet.core.licenses import UNKNOWN, spdx
from fleet.errors import StoreError, UsageError
from fleet.export.bom import bill_of_materials
from fleet.export.card import model_card
from fleet.export.oci_layout import DOC, WEIGHT, WEIGHT_CONFIG, Layer, find_file, unpack_layout, write_layout
from fleet.export.signing import SIGNATURE, public_key, sign_folder
from fleet.store.folder import FolderStore
from fleet.store.half_made import half_made

#: In the exported folder, beside the artifact's own files. A manifest of ours is not called manifest.json there,
#: a name that hubs and registries use.
MANIFEST = "phifleet-manifest.json"
BOM = "bom.cdx.json"
CARD = "README.md"
PUBLIC_KEY = "model-signing.pub"
#: Folder of the model in an export.
MODEL = "model"

_COPY = 8 * 1024 * 1024
_DOCS = {BOM, CARD, SIGNATURE, MANIFEST}
_WEIGHTS = (".gguf", ".safetensors", ".data", ".bin", ".onnx", ".npz")
_FORMATS = {
    Toolchain.ONNX_GENAI: "onnx", Toolchain.OPENVINO: "openvino", Toolchain.LLAMACPP: "gguf",
    Toolchain.MLX: "safetensors", Toolchain.ONNX_QNN: "onnx",
}  # fmt: skip
#: As ModelPack spells them; it has no name for four bits.
_PRECISIONS = {
    Precision.INT4: "int4", Precision.INT8: "int8", Precision.FP16: "float16", Precision.BF16: "bfloat16",
    Precision.FP32: "float32",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Papers:
    """What accompanies the files. ``key`` is the private key of the signature; None: no signature."""

    bom: bool = False
    card: bool = False
    key: Path | None = None
    oci: bool = False


@dataclass(frozen=True, slots=True)
class Exported:
    """``tag`` and ``digest`` are those of the OCI layout, where there is one."""

    folder: Path
    files: tuple[str, ...]
    tag: str | None = None
    digest: str | None = None


def export(store: FolderStore, manifest: Manifest, folder: Path, papers: Papers) -> Exported:
    """Write the artifact into ``folder``, which appears when it is complete.

    ``folder/model`` holds the artifact's files, its manifest, and the papers; with ``papers.oci`` the folder is an OCI
    image layout as well.

    Raises:
        UsageError: the folder is there and not empty, an artifact's file has the name of a paper, or the key is none.
        StoreError: the artifact's bytes are not what was built, or the disk refuses.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there already, and is not an empty folder; name a new one")
    taken = sorted(_DOCS & {file.path for file in manifest.files})
    if taken:
        raise UsageError(f"{manifest.id} has files named {', '.join(taken)}, as papers are; it cannot be exported")
    public = public_key(papers.key) if papers.key else None
    try:
        with beside(folder.resolve()) as half:
            exported = _write(store, manifest, half, papers)
            if public is not None:
                (half / PUBLIC_KEY).write_bytes(public)
            sync_tree(half)
            if folder.is_dir():
                folder.rmdir()
            set_mode(half, 0o755)
            half.rename(folder)
            sync_folder(folder.resolve().parent)
    except OSError as error:
        raise StoreError(f"{folder} cannot be written: {reason(error, folder.parent)}") from None
    return Exported(folder, *exported)


def _write(
    store: FolderStore, manifest: Manifest, half: Path, papers: Papers
) -> tuple[tuple[str, ...], str | None, str | None]:
    model = half / MODEL
    layers = [copied(store.files(manifest.id), file, model) for file in manifest.files]
    index = store.index(manifest)
    # Whole by itself: who reads an export needs no other file to know its chunks.
    whole = without_index(manifest, index) if index else manifest
    documents = {MANIFEST: whole.model_copy(update={"deltas": ()}).to_json()}
    if papers.bom:
        documents[BOM] = bill_of_materials(manifest)
    if papers.card:
        documents[CARD] = model_card(manifest)
    for name, raw in documents.items():
        (model / name).write_bytes(raw)
    names = list(documents)
    if papers.key:
        names.append(sign_folder(model, papers.key).name)
    layers += [_document(model / name) for name in names]
    listed = tuple(sorted(layer.name for layer in layers))
    if not papers.oci:
        return listed, None, None
    digest = write_layout(half, layers, _config(manifest), tag=manifest.id, annotations=_annotations(manifest))
    return listed, manifest.id, digest


def import_artifact(store: FolderStore, source: Path, tag: str | None = None) -> tuple[Manifest, bool]:
    """Take the artifact in an export (a folder, or an OCI layout) into the store; whether it was there already.

    Every file is compared with the manifest, and nothing that the manifest does not list is taken.

    Raises:
        StoreError: no export, or its files are not what its manifest says; nothing is taken then.
    """
    try:
        with half_made(store.root, "import") as half:
            folder = _opened(source, tag, half / "unpacked")
            manifest = _manifest_in(folder)
            if (found := store.get(manifest.id)) is not None:
                return _same(found, manifest), True
            made = half / "artifact"
            for file in manifest.files:
                copied(folder, file, made / "files")
            manifest, index = with_index(manifest)
            if index is not None:
                (made / INDEX_FILE).write_bytes(index)
            (made / "manifest.json").write_bytes(manifest.to_json())
            sync_tree(made)
            made.rename(store.folder(manifest.id))
            sync_folder(store.root)
    except OSError as error:
        raise StoreError(f"{source} cannot be imported: {reason(error, store.root)}") from None
    return manifest, False


def exported_manifest(source: Path) -> Manifest:
    """Return the manifest of an exported artifact, from the folder or from the layout's own blob.

    Raises:
        StoreError: it is no exported artifact, or its manifest cannot be read.
    """
    for folder in (source, source / MODEL):
        if (folder / MANIFEST).is_file():
            return _manifest_in(folder)
    return _manifest_at(find_file(source, None, MANIFEST))


def _opened(source: Path, tag: str | None, scratch: Path) -> Path:
    """Return the folder with the manifest: ``source``, its ``model``, or what its OCI layout holds."""
    for folder in (source, source / MODEL):
        if tag is None and (folder / MANIFEST).is_file():
            return folder
    if (source / "oci-layout").is_file():
        unpack_layout(source, tag, scratch)
        return scratch
    raise StoreError(f"{source}: is no exported artifact: there is neither {MANIFEST} nor an OCI image layout in it")


def _manifest_in(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not path.is_file():
        raise StoreError(f"{folder}: holds no {MANIFEST}: it was not exported by phifleet, or is a checkpoint, which "
                         "`phifleet build --model` takes")  # fmt: skip
    return _manifest_at(path)


def _manifest_at(path: Path) -> Manifest:
    try:
        return Manifest.from_json(path.read_bytes())
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror or error}") from None
    except MalformedMessageError as error:
        raise StoreError(f"{path}: {error}; export it again") from None


def _same(found: Manifest, manifest: Manifest) -> Manifest:
    if found.digest != manifest.digest:
        raise StoreError(
            f"there is an artifact {found.id} already with other bytes (digest {found.digest[:12]}, not "
            f"{manifest.digest[:12]}); remove its folder first if the other one is wanted"
        )
    return found


def copied(source: Path, file: ArtifactFile, folder: Path) -> Layer:
    """Copy one of the artifact's files, and compare it with the manifest on the way.

    Raises:
        StoreError: the bytes are others, or the file is missing.
    """
    place = folder / PurePosixPath(file.path)
    place.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    origin = source / PurePosixPath(file.path)
    try:
        opened = origin.open("rb")
    except OSError as error:
        raise StoreError(f"{origin}: cannot be read: {error.strerror or error}") from None
    with opened, place.open("wb") as written:
        while block := opened.read(_COPY):
            digest.update(block)
            written.write(block)
    if digest.hexdigest() != file.sha256:
        raise StoreError(f"{origin}: is not what its manifest says; it was damaged or changed after it was built")
    weights = place.suffix in _WEIGHTS
    return Layer(file.path, place, WEIGHT if weights else WEIGHT_CONFIG, file.size, file.sha256)


def _document(path: Path) -> Layer:
    raw = path.read_bytes()
    return Layer(path.name, path, DOC, len(raw), hashlib.sha256(raw).hexdigest())


def _config(manifest: Manifest) -> dict[str, Any]:
    """Return ModelPack's configuration, but for ``modelfs``. There is no time in it, so the same bytes come out."""
    model = manifest.model
    descriptor: dict[str, Any] = {
        "family": "phi",
        "name": manifest.id,
        "version": manifest.digest,
        "title": f"{model.name}, {manifest.precision}, {manifest.toolchain}",
        "revision": model.source_digest,
    }
    if (expression := spdx(model.license)) is not None:
        descriptor["licenses"] = [expression]
    return {
        "descriptor": descriptor,
        "config": {
            "architecture": "transformer",
            "format": _FORMATS[manifest.toolchain],
            "paramSize": _scaled(model.parameters),
            "precision": _PRECISIONS[manifest.precision],
            "capabilities": {"inputTypes": ["text"], "outputTypes": ["text"]},
        },
    }


def _annotations(manifest: Manifest) -> dict[str, str]:
    found = {
        "org.opencontainers.image.title": manifest.id,
        "org.opencontainers.image.version": manifest.digest,
        "org.opencontainers.image.base.name": manifest.model.name,
    }
    if manifest.model.license != UNKNOWN:
        found["org.opencontainers.image.licenses"] = spdx(manifest.model.license) or manifest.model.license
    return found


def _scaled(count: int) -> str:
    """``count`` as ModelPack wants it: at most one digit after the point, and a letter."""
    for factor, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= factor:
            return f"{count / factor:.1f}{letter}"
    return f"{count / 1000:.1f}K"


@contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """A folder beside the one that is to be made; removed unless it was renamed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    half = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield half
    finally:
        shutil.rmtree(half, ignore_errors=True)
