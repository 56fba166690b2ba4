"""A folder as an OCI image layout that holds a model (CNCF ModelPack), written and read.

Sources: the OCI image layout specification 1.1 (https://github.com/opencontainers/image-spec/blob/main/image-layout.md)
and the ModelPack specification (https://github.com/modelpack/model-spec/blob/main/docs/spec.md). Layers are written as
they are, so that the digest of a layer is that of its file; those in archives are read, too, except with zstd.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from agent.platform.files import sha256_of
from fleet.errors import StoreError

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
MODEL_TYPE = "application/vnd.cncf.model.manifest.v1+json"
CONFIG_TYPE = "application/vnd.cncf.model.config.v1+json"
WEIGHT = "application/vnd.cncf.model.weight.v1.raw"
WEIGHT_CONFIG = "application/vnd.cncf.model.weight.config.v1.raw"
DOC = "application/vnd.cncf.model.doc.v1.raw"

_FILE_PATH = "org.cncf.model.filepath"
_FILE_METADATA = "org.cncf.model.file.metadata+json"
_TITLE = "org.opencontainers.image.title"
_REF_NAME = "org.opencontainers.image.ref.name"
#: A manifest or an index that is larger is none; it is read whole.
_MAX_DOCUMENT = 4 * 1024 * 1024
_INDEXES_DEEP = 3


@dataclass(frozen=True, slots=True)
class Layer:
    """One file of the model; ``name`` is its path in it, ``path`` where it lies, ``sha256`` in hexadecimal."""

    name: str
    path: Path
    media_type: str
    size: int
    sha256: str


def write_layout(
    folder: Path, layers: list[Layer], config: dict[str, Any], *, tag: str, annotations: Mapping[str, str]
) -> str:
    """Write the layout into ``folder``; ``config`` is ModelPack's without ``modelfs``. Returns the manifest's digest.

    A layer's bytes are linked where the disk can, so a layout beside its files takes no room.
    """
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    for layer in layers:
        _link(layer.path, blobs / layer.sha256)
    filesystem = {"type": "layers", "diffIds": [f"sha256:{layer.sha256}" for layer in layers]}
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": MODEL_TYPE,
        "config": _blob(blobs, _json(config | {"modelfs": filesystem}), CONFIG_TYPE),
        "layers": [_descriptor(layer) for layer in layers],
        "annotations": dict(annotations),
    }
    found = _blob(blobs, _json(manifest), MANIFEST_TYPE)
    named = found | {"artifactType": MODEL_TYPE, "annotations": {_REF_NAME: tag}}
    (folder / "oci-layout").write_bytes(_json({"imageLayoutVersion": "1.0.0"}))
    (folder / "index.json").write_bytes(_json({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [named]}))
    return str(found["digest"])


def model_digest(layout: Path, tag: str | None) -> str:
    """Return the digest of the manifest of the model under ``tag``, in hexadecimal, verified.

    Raises:
        StoreError: as ``unpack_layout``.
    """
    return _manifest_blob(layout, tag).name


def find_file(layout: Path, tag: str | None, name: str) -> Path:
    """Return the blob of the model's file called ``name``, verified.

    Raises:
        StoreError: as ``unpack_layout``, or the model has no such file as a layer of its own.
    """
    layers = _document(_manifest_blob(layout, tag)).get("layers")
    for layer in layers if isinstance(layers, list) else ():
        if isinstance(layer, dict) and _name(layer) == name:
            return _verified(layout, layer)
    raise StoreError(f"{layout}: its model has no file {name}")


def unpack_layout(layout: Path, tag: str | None, folder: Path) -> None:
    """Write the files of the model that ``layout`` holds under ``tag`` into ``folder``; every byte is verified.

    Raises:
        StoreError: no layout, several models and no tag, a blob is missing or is another, or a path leaves the folder.
    """
    manifest = _document(_manifest_blob(layout, tag))
    layers = manifest.get("layers")
    if not isinstance(layers, list) or not layers:
        raise StoreError(f"{layout}: its manifest lists no layers")
    folder.mkdir(parents=True, exist_ok=True)
    for number, layer in enumerate(layers):
        blob = _verified(layout, layer)
        media = str(layer.get("mediaType", ""))
        if media.endswith("+zstd"):
            raise StoreError(f"{layout}: layer {number} is compressed with zstd, which is not read; pack it as raw")
        if media.endswith((".tar", ".tar+gzip", ".tar.gzip")):
            _extract(blob, folder, layout)
            continue
        name = _name(layer)
        if name is None:
            raise StoreError(f"{layout}: layer {number} ({media}) says no file name ({_FILE_PATH} or {_TITLE})")
        place = _inside(folder, name, layout)
        place.parent.mkdir(parents=True, exist_ok=True)
        _link(blob, place)


def _manifest_blob(layout: Path, tag: str | None) -> Path:
    if not (layout / "oci-layout").is_file():
        raise StoreError(f"{layout}: is no OCI image layout: it has no file oci-layout")
    found = list(_manifests(layout, _document(layout / "index.json"), _INDEXES_DEEP))
    names = sorted(one.get("annotations", {}).get(_REF_NAME, "(no tag)") for one in found)
    if tag is not None:
        found = [one for one in found if one.get("annotations", {}).get(_REF_NAME) == tag]
    if not found:
        listed = f"tag {tag}; there are {', '.join(names)}" if tag is not None else "manifest"
        raise StoreError(f"{layout}: has no {listed}")
    if len({str(one.get("digest")) for one in found}) > 1:
        raise StoreError(f"{layout}: holds several models; name the tag of one: {', '.join(names)}")
    return _verified(layout, found[0])


def _manifests(layout: Path, index: dict[str, Any], deep: int) -> Iterator[dict[str, Any]]:
    for one in index.get("manifests") or ():
        if not isinstance(one, dict):
            continue
        if one.get("mediaType") == INDEX_TYPE and deep:
            yield from _manifests(layout, _document(_verified(layout, one)), deep - 1)
        else:
            yield one


def _document(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_DOCUMENT + 1)
        if len(raw) > _MAX_DOCUMENT:
            raise StoreError(f"{path}: has more than {_MAX_DOCUMENT} bytes, which no manifest has")
        value = json.loads(raw)
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path}: is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise StoreError(f"{path}: must hold a JSON object")
    return value


def _verified(layout: Path, descriptor: Any) -> Path:
    """Return where the blob lies, once its digest is found to be what the descriptor says."""
    digest = str(descriptor.get("digest", "")) if isinstance(descriptor, dict) else ""
    kind, _, value = digest.partition(":")
    if kind != "sha256" or len(value) != 64 or set(value) - set("0123456789abcdef"):  # hexadecimal digits
        raise StoreError(
            f"{layout}: a digest is {digest[:80]!r}, where sha256: and 64 hexadecimal digits were expected"
        )
    blob = layout / "blobs" / kind / value
    try:
        found = sha256_of(blob)
    except OSError as error:
        raise StoreError(f"{blob}: cannot be read: {error.strerror or error}; copy the layout again") from None
    if found != value:
        raise StoreError(f"{blob}: has other bytes than its name says; copy the layout again")
    return blob


def _name(layer: dict[str, Any]) -> str | None:
    annotations = layer.get("annotations")
    if not isinstance(annotations, dict):
        return None
    name = annotations.get(_FILE_PATH) or annotations.get(_TITLE)
    return name if isinstance(name, str) else None


def _inside(folder: Path, name: str, layout: Path) -> Path:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or "\0" in name or not path.parts:
        raise StoreError(f"{layout}: a layer's file is named {name[:80]!r}, which is no path inside a folder")
    return folder / path


def _extract(blob: Path, folder: Path, layout: Path) -> None:
    try:
        with tarfile.open(blob, "r:*") as archive:
            archive.extractall(folder, filter="data")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise StoreError(f"{layout}: the archive {blob.name[:12]} cannot be unpacked: {error}") from None


def _descriptor(layer: Layer) -> dict[str, Any]:
    metadata = {
        "name": layer.name, "mode": 0o644, "uid": 0, "gid": 0, "size": layer.size, "mtime": "1970-01-01T00:00:00Z",
        "typeflag": ord("0"),
    }  # fmt: skip
    return {
        "mediaType": layer.media_type,
        "digest": f"sha256:{layer.sha256}",
        "size": layer.size,
        "annotations": {_FILE_PATH: layer.name, _TITLE: layer.name, _FILE_METADATA: json.dumps(metadata)},
    }


def _blob(blobs: Path, raw: bytes, media_type: str) -> dict[str, Any]:
    digest = hashlib.sha256(raw).hexdigest()
    (blobs / digest).write_bytes(raw)
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(raw)}


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode()


def _link(source: Path, place: Path) -> None:
    if place.exists():  # two files with the same bytes are one blob
        return
    try:
        os.link(source, place)
    except OSError:
        shutil.copyfile(source, place)
