"""A checkpoint comes out of an OCI image layout byte for byte, or a sentence says what is wrong with the layout."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fleet.errors import ModelError, StoreError
from fleet.export.oci_layout import WEIGHT, Layer, unpack_layout, write_layout
from fleet.toolchains.checkpoint.checkpoint_files import local_path
from fleet.toolchains.checkpoint.oci_source import from_layout

FILES = {"config.json": b"{}", "model.safetensors": b"weights", "more/tokenizer.json": b"tokens"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    layers = []
    for name, content in FILES.items():
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        layers.append(Layer(name, path, WEIGHT, len(content), hashlib.sha256(content).hexdigest()))
    (tmp_path / "layout").mkdir()
    config = {"descriptor": {}, "config": {}}
    write_layout(tmp_path / "layout", layers, config, tag="phi-4", annotations={})
    return tmp_path / "layout"


def blob(layout: Path, content: bytes) -> dict[str, Any]:
    digest = hashlib.sha256(content).hexdigest()
    (layout / "blobs" / "sha256" / digest).write_bytes(content)
    return {"digest": f"sha256:{digest}", "size": len(content)}


def put_manifest(layout: Path, layers: Any, *, tag: str = "phi-4", keep: bool = False) -> None:
    """Replace the layout's manifest, as another tool would have written it; with ``keep``, one more."""
    index = json.loads((layout / "index.json").read_bytes())
    manifest = blob(layout, json.dumps({"schemaVersion": 2, "layers": layers}).encode())
    one = manifest | {"annotations": {"org.opencontainers.image.ref.name": tag}}
    index["manifests"] = [*(index["manifests"] if keep else ()), one]
    (layout / "index.json").write_text(json.dumps(index))


def archive(files: dict[str, bytes], mode: str, *, linked: str | None = None) -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode=mode) as made:  # type: ignore[call-overload]  # the mode is a parameter here
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            made.addfile(entry, io.BytesIO(content))
        if linked:
            entry = tarfile.TarInfo("config.json")
            entry.type, entry.linkname = tarfile.SYMTYPE, linked
            made.addfile(entry)
    return written.getvalue()


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("suffix", ["", ":phi-4"])
def test_a_checkpoint_is_what_was_packed_and_is_named_by_its_tag_or_folder(layout: Path, suffix: str) -> None:
    found = local_path(f"oci-layout:{layout}{suffix}")
    assert content_of(found) == FILES
    assert found.name == ("phi-4" if suffix else "layout")
    assert from_layout(f"{layout}{suffix}") == found


@pytest.mark.parametrize("kind", ["tar", "tar+gzip"])
def test_layers_in_archives_are_unpacked(layout: Path, kind: str) -> None:
    packed = blob(layout, archive(FILES, "w" if kind == "tar" else "w:gz"))
    put_manifest(layout, [packed | {"mediaType": f"application/vnd.cncf.model.weight.v1.{kind}"}])
    assert content_of(from_layout(str(layout))) == FILES


def test_a_file_named_by_a_title_alone_as_other_tools_do_is_taken(layout: Path) -> None:
    one = blob(layout, b"{}") | {"mediaType": "x/y", "annotations": {"org.opencontainers.image.title": "config.json"}}
    put_manifest(layout, [one])
    assert content_of(from_layout(str(layout))) == {"config.json": b"{}"}


def test_of_several_models_the_one_is_taken_whose_tag_is_named(layout: Path) -> None:
    one = blob(layout, b"other") | {"annotations": {"org.cncf.model.filepath": "config.json"}}
    put_manifest(layout, [one], tag="phi-5", keep=True)
    with pytest.raises(ModelError, match="holds several models; name the tag of one: phi-4, phi-5"):
        from_layout(str(layout))
    assert content_of(from_layout(f"{layout}:phi-5")) == {"config.json": b"other"}
    assert content_of(from_layout(f"{layout}:phi-4")) == FILES
    with pytest.raises(ModelError, match="has no tag phi-6; there are phi-4, phi-5"):
        from_layout(f"{layout}:phi-6")


def test_a_layout_that_changed_under_the_same_tag_is_unpacked_anew(layout: Path) -> None:
    before = from_layout(f"{layout}:phi-4")
    put_manifest(layout, [blob(layout, b"new") | {"annotations": {"org.cncf.model.filepath": "config.json"}}])
    after = from_layout(f"{layout}:phi-4")
    assert content_of(before) == FILES and content_of(after) == {"config.json": b"new"}


def named(name: Any) -> Callable[[Path], None]:
    def spoil(layout: Path) -> None:
        put_manifest(layout, [blob(layout, b"x") | {"annotations": {"org.cncf.model.filepath": name}}])

    return spoil


def with_layer(**descriptor: Any) -> Callable[[Path], None]:
    return lambda layout: put_manifest(layout, [blob(layout, b"x") | descriptor])


def with_archive(content: bytes) -> Callable[[Path], None]:
    def spoil(layout: Path) -> None:
        put_manifest(layout, [blob(layout, content) | {"mediaType": "application/vnd.cncf.model.weight.v1.tar"}])

    return spoil


def each_blob(change: Callable[[Path], object]) -> Callable[[Path], None]:
    def spoil(layout: Path) -> None:
        for path in (layout / "blobs" / "sha256").iterdir():
            change(path)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda layout: (layout / "oci-layout").unlink(), "is no OCI image layout"),
        (lambda layout: (layout / "index.json").unlink(), r"index\.json: cannot be read: No such file"),
        (lambda layout: (layout / "index.json").write_bytes(b"[" * 100_000), r"index\.json: is no JSON"),
        (lambda layout: (layout / "index.json").write_bytes(b"[]"), "must hold a JSON object"),
        (lambda layout: (layout / "index.json").write_bytes(b"{}"), "has no manifest"),
        (lambda layout: (layout / "index.json").write_bytes(b" " * (5 << 20)), "which no manifest has"),
        (lambda layout: (layout / "index.json").write_bytes(b'{"manifests": [3, {}]}'), "a digest is ''"),
        (each_blob(lambda path: path.unlink()), "cannot be read: No such file.*copy the layout again"),
        (each_blob(lambda path: path.write_bytes(b"other")), "has other bytes than its name says"),
        (lambda layout: put_manifest(layout, []), "lists no layers"),
        (lambda layout: put_manifest(layout, "layers"), "lists no layers"),
        (lambda layout: put_manifest(layout, [3]), "a digest is ''"),
        (with_layer(digest="sha256:../../../../../../etc/hostname"), "64 hexadecimal digits were expected"),
        (with_layer(digest="sha512:" + "0" * 128), "64 hexadecimal digits were expected"),
        (with_layer(mediaType="application/vnd.cncf.model.weight.v1.tar+zstd"), "compressed with zstd"),
        (with_layer(mediaType="application/x"), "says no file name"),
        (with_layer(annotations=[]), "says no file name"),
        (named("../config.json"), "is no path inside a folder"),
        (named("/etc/passwd"), "is no path inside a folder"),
        (named("a/../../b"), "is no path inside a folder"),
        (named("c:\\x"), "is no path inside a folder"),
        (named("a\0b"), "is no path inside a folder"),
        (named("."), "is no path inside a folder"),
        (named(3), "says no file name"),
        (with_archive(b"no archive"), "cannot be unpacked"),
        (with_archive(archive({"../out": b"x"}, "w")), "cannot be unpacked"),
        (with_archive(archive({}, "w", linked="/etc/hostname")), "cannot be unpacked"),
    ],
)  # fmt: skip
def test_a_layout_that_is_damaged_or_hostile_is_refused_and_leaves_nothing(
    layout: Path, cache: Path, spoil: Callable[[Path], object], words: str
) -> None:
    spoil(layout)
    with pytest.raises(ModelError, match=words):
        from_layout(str(layout))
    assert not cache.exists() or content_of(cache) == {}
    assert not (layout.parent / "out").exists()


def test_an_index_in_an_index_is_followed_and_not_for_ever(layout: Path, tmp_path: Path) -> None:
    inner = (layout / "index.json").read_bytes()
    kind = {"mediaType": "application/vnd.oci.image.index.v1+json"}
    for depth in range(5):
        outer = json.dumps({"manifests": [blob(layout, inner) | kind]}).encode()
        (layout / "index.json").write_bytes(outer)
        if depth < 3:
            unpack_layout(layout, "phi-4", tmp_path / str(depth))
            assert content_of(tmp_path / str(depth)) == FILES
        inner = outer
    with pytest.raises(StoreError, match="has no tag phi-4"):
        unpack_layout(layout, "phi-4", tmp_path / "deep")


@pytest.mark.parametrize("text", ["nowhere", "nowhere:tag", "~nobody-of-that-name/x"])
def test_a_layout_that_is_not_there_is_told(text: str) -> None:
    with pytest.raises(ModelError, match=r"pass oci-layout:DIR or oci-layout:DIR:TAG|nobody"):
        local_path(f"oci-layout:{text}")
