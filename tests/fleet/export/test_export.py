from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from agent.contract.base import sha256_hex
from agent.contract.chunk_index import INDEX_FILE, MAX_LISTED_CHUNKS, with_index
from agent.contract.manifest import ArtifactFile, BuildSpeed, Manifest, ModelFacts, Quality
from fleet.errors import StoreError, UsageError
from fleet.export.bom import bill_of_materials
from fleet.export.card import model_card
from fleet.export.export import BOM, CARD, MANIFEST, MODEL, PUBLIC_KEY, Papers, export, import_artifact
from fleet.export.signing import SIGNATURE, signing_key
from fleet.home import Home
from fleet.store.folder import FolderStore
from tests.disk import small_disk
from tests.fleet.world import put_artifact
from tests.simulators.repository import make_manifest

MODEL_SIGNING = Path(sys.executable).parent / "model_signing"
QUALITY = Quality(
    kl_divergence=0.1234, kl_divergence_se=0.01, kl_divergence_p99=1.2, kl_divergence_p99_se=0.2, perplexity=8.0,
    perplexity_ratio=1.01, same_top_token=0.95, tokens=1000, evaluation="bundled/0123",
)  # fmt: skip
SPEED = BuildSpeed(machine="two cores", ttft_ms=12.5, tpot_ms=3.25, peak_memory_bytes=3 * 2**31)
RECIPE = {"calibration": "bundled/0123", "products": {"int4": 151, "int8": 1}, "block_size": 32, "mixed": None}
#: What nobody would name a model, and somebody will.
HOSTILE = '</script><img src=x onerror=alert(1)> | "quoted" \\ \n---\nlicense: mit\n# `head` 模型 [a](javascript:b)'


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def store(home: Home) -> FolderStore:
    return FolderStore(home.artifacts)


def measured(home: Home, **changes: Any) -> Manifest:
    return put_artifact(home, **({"quality": QUALITY, "speed": SPEED, "recipe": RECIPE} | changes))


def verified(folder: Path, public: Path) -> bool:
    """What the upstream command says of the signature."""
    command = [MODEL_SIGNING, "verify", "key", folder, "--signature", folder / SIGNATURE, "--public_key", public]
    return subprocess.run([str(one) for one in command], check=False, capture_output=True).returncode == 0


def problems(document: bytes) -> str | None:
    found = JsonStrictValidator(SchemaVersion.V1_6).validate_str(document.decode())
    return None if found is None else str(found)


def test_an_export_has_what_was_asked_for_and_nothing_else(home: Home, store: FolderStore, tmp_path: Path) -> None:
    manifest = measured(home)
    plain = export(store, manifest, tmp_path / "plain", Papers())
    assert plain.files == ("model.bin", MANIFEST)
    assert sorted(path.name for path in (tmp_path / "plain").rglob("*")) == [MODEL, "model.bin", MANIFEST]
    everything = Papers(bom=True, card=True, key=signing_key(home), oci=True)
    whole = export(store, manifest, tmp_path / "whole", everything)
    assert set(whole.files) == {"model.bin", MANIFEST, BOM, CARD, SIGNATURE}
    beside = {path.name for path in (tmp_path / "whole").iterdir()}
    assert beside == {MODEL, PUBLIC_KEY, "oci-layout", "index.json", "blobs"}
    assert Manifest.from_json((tmp_path / "whole" / MODEL / MANIFEST).read_bytes()) == manifest


def test_two_exports_have_the_same_bytes_but_for_the_signature(home: Home, store: FolderStore, tmp_path: Path) -> None:
    manifest = measured(home)
    one, other = (export(store, manifest, tmp_path / name, Papers(True, True, None, True)) for name in ("1", "2"))
    assert one.digest == other.digest


def test_a_large_artifact_is_exported_with_its_chunks_and_imported_with_its_index(
    home: Home, store: FolderStore, tmp_path: Path
) -> None:
    content = bytes(n % 251 for n in range(MAX_LISTED_CHUNKS + 1))
    chunks = tuple((1, sha256_hex(bytes([byte]))) for byte in content)
    file = ArtifactFile(path="model.bin", size=len(content), sha256=sha256_hex(content), chunks=chunks)
    whole = put_artifact(home, content, files=(file,))
    manifest, index = with_index(whole)
    assert index is not None
    (store.folder(manifest.id) / INDEX_FILE).write_bytes(index)
    store.save_manifest(manifest)
    export(store, manifest, tmp_path / "out", Papers())
    assert Manifest.from_json((tmp_path / "out" / MODEL / MANIFEST).read_bytes()) == whole
    other = FolderStore(Home(tmp_path / "other").artifacts)
    other.root.mkdir(parents=True)
    assert import_artifact(other, tmp_path / "out") == (manifest, False)
    other.verify(manifest)
    assert other.index(manifest) == index
    assert import_artifact(other, tmp_path / "out") == (manifest, True)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"quality": None, "speed": None},
        {"license": "mit OR apache-2.0"},
        {"license": "microsoft-research-license"},
        {"license": "unknown"},
        {"license": HOSTILE},
        {"name": HOSTILE, "architecture": HOSTILE},
        {"recipe": {HOSTILE: [HOSTILE, None, 2**63], "calibration": HOSTILE}},
        {"versions": {"Some_Package": "1.0+cpu"}},
    ],
    ids=str,
)
def test_the_bill_of_materials_is_valid_by_cyclonedx_own_strict_schema(changes: dict[str, Any]) -> None:
    manifest = make_manifest(
        b"weights", **({"quality": QUALITY, "speed": SPEED, "recipe": RECIPE} | changes_of(changes))
    )
    document = bill_of_materials(manifest)
    assert problems(document) is None
    assert document == bill_of_materials(manifest), "it holds no time and no chance"


def changes_of(changes: dict[str, Any]) -> dict[str, Any]:
    """Those of the model are a field of their own."""
    facts = {name: changes[name] for name in changes if name in ModelFacts.model_fields}
    model = make_manifest(b"weights").model.model_copy(update=facts)
    return {name: value for name, value in changes.items() if name not in facts} | {"model": model}


def test_the_validator_would_find_a_wrong_bill() -> None:
    document = json.loads(bill_of_materials(make_manifest(b"weights")))
    document["metadata"]["component"]["modelCard"]["speed"] = 1
    assert problems(json.dumps(document).encode()) is not None


def test_the_bill_says_loss_speed_licence_recipe_and_versions(home: Home) -> None:
    manifest = measured(home, model=make_manifest(b"w").model.model_copy(update={"license": "apache-2.0"}))
    document = json.loads(bill_of_materials(manifest))
    component = document["metadata"]["component"]
    metrics = {one["type"]: one for one in component["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]}
    assert metrics["kl_divergence"]["value"] == "0.1234"
    assert metrics["kl_divergence"]["confidenceInterval"] == {"lowerBound": "0.1038", "upperBound": "0.143"}
    assert metrics["tpot_ms"] == {"type": "tpot_ms", "value": "3.25", "slice": "two cores"}
    assert component["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    properties = {one["name"]: one["value"] for one in component["properties"]}
    assert properties["phifleet:recipe:products"] == '{"int4": 151, "int8": 1}'
    assert component["components"][0]["hashes"] == [{"alg": "SHA-256", "content": manifest.files[0].sha256}]
    packages = {one["name"]: one["purl"] for one in document["metadata"]["tools"]["components"]}
    assert packages == {name: f"pkg:pypi/{name}@{version}" for name, version in manifest.versions.items()}
    ancestor = component["pedigree"]["ancestors"][0]
    assert ancestor["version"] == manifest.model.source_digest


def test_a_card_shows_hostile_names_as_text(home: Home) -> None:
    from markdown_it import MarkdownIt

    facts = make_manifest(b"w").model.model_copy(update={"name": HOSTILE, "architecture": HOSTILE, "license": HOSTILE})
    recipe = {HOSTILE: HOSTILE}
    card = model_card(measured(home, model=facts, recipe=recipe)).decode()
    head, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert [line.partition(":")[0] for line in head.split("\n")] == [
        "license", "base_model", "base_model_relation", "library_name", "pipeline_tag", "tags",
    ]  # fmt: skip
    shown = MarkdownIt("commonmark", {"html": True}).enable("table").render(body)
    assert "<img" not in shown and "<script" not in shown and "<a " not in shown
    assert shown.count("<h1>") == 1 and shown.count("<table>") == 6


@pytest.mark.toolchain
def test_the_hubs_own_library_reads_the_card(home: Home) -> None:
    from huggingface_hub import ModelCard

    facts = make_manifest(b"w").model.model_copy(update={"license": "mit"})
    card = ModelCard(model_card(measured(home, model=facts)).decode())
    assert (card.data.license, card.data.base_model, card.data.pipeline_tag) == ("mit", facts.name, "text-generation")
    assert "0.1234 ± 0.0100" in card.text


def test_the_upstream_command_accepts_the_signature_and_nothing_that_was_changed(
    home: Home, store: FolderStore, tmp_path: Path
) -> None:
    papers = Papers(bom=True, card=True, key=signing_key(home))
    export(store, measured(home), tmp_path / "out", papers)
    model, public = tmp_path / "out" / MODEL, tmp_path / "out" / PUBLIC_KEY
    assert verified(model, public)
    other = Home(tmp_path / "other")
    export(store, measured(other), tmp_path / "foreign", Papers(key=signing_key(other)))
    assert not verified(model, tmp_path / "foreign" / PUBLIC_KEY)
    for change in (
        lambda: (model / "model.bin").write_bytes(b"weighty"),
        lambda: (model / BOM).write_bytes(b"{}"),
        lambda: (model / "more.bin").write_bytes(b"more"),
    ):
        before = {path: path.read_bytes() for path in model.iterdir()}
        change()
        assert not verified(model, public)
        for path in model.iterdir():
            path.write_bytes(before[path]) if path in before else path.unlink()
        assert verified(model, public)


def test_the_homes_key_is_made_once_and_is_private(home: Home) -> None:
    key = signing_key(home)
    made = key.read_bytes()
    assert signing_key(home).read_bytes() == made
    assert key.stat().st_mode & 0o777 == 0o600 and home.keys.stat().st_mode & 0o777 == 0o700


def pem(key: Any, encryption: KeySerializationEncryption | None = None) -> bytes:
    return bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption()))


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [
        (b"no key", 0o600, "is no private key in PEM"),
        (pem(rsa.generate_private_key(65537, 2048)), 0o600, "ECDSA key on P-256"),
        (pem(ec.generate_private_key(ec.SECP256K1())), 0o600, "ECDSA key on P-256"),
        (pem(ec.generate_private_key(ec.SECP256R1())), 0o644, "can be read by others"),
        (pem(ec.generate_private_key(ec.SECP256R1()), BestAvailableEncryption(b"x")), 0o600, "by a password"),
        (None, 0o600, "cannot be read: No such file"),
    ],
)
def test_a_key_that_cannot_sign_is_told_before_anything_is_written(
    home: Home, store: FolderStore, tmp_path: Path, content: bytes | None, mode: int, words: str
) -> None:
    key = tmp_path / "key.pem"
    if content is not None:
        key.write_bytes(content)
        key.chmod(mode)
    with pytest.raises(UsageError, match=words):
        export(store, measured(home), tmp_path / "out", Papers(key=key))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_in_use_is_left_alone(home: Home, store: FolderStore, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "mine").write_text("mine")
    with pytest.raises(UsageError, match="is not an empty folder"):
        export(store, measured(home), folder, Papers())
    assert [path.name for path in folder.iterdir()] == ["mine"]
    (folder / "mine").unlink()
    export(store, store.list().manifests[0], folder, Papers())
    assert (folder / MODEL / "model.bin").read_bytes() == b"weights"


def test_damaged_bytes_are_not_exported(home: Home, store: FolderStore, tmp_path: Path) -> None:
    manifest = measured(home)
    (store.files(manifest.id) / "model.bin").write_bytes(b"WEIGHTS")
    with pytest.raises(StoreError, match="is not what its manifest says"):
        export(store, manifest, tmp_path / "out", Papers(oci=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"], "nothing half-made is left"


def test_a_full_disk_is_told_and_leaves_nothing(home: Home, store: FolderStore, tmp_path: Path) -> None:
    manifest = measured(home, content=bytes(100_000))
    with small_disk(tmp_path / "disk", 64 * 1024) as disk:
        with pytest.raises(StoreError, match=r"cannot be written: .*(full|space)"):
            export(store, manifest, disk / "out", Papers())
        assert list(disk.iterdir()) == []


def copied_by_skopeo(layout: Path, tag: str, place: Path) -> Path:
    subprocess.run(
        ["skopeo", "copy", "--insecure-policy", f"oci:{layout}:{tag}", f"oci:{place}:{tag}"], check=True,
        capture_output=True,
    )  # fmt: skip
    return place


def test_an_oci_tool_copies_the_layout_and_another_home_takes_the_artifact_out_of_it(
    home: Home, store: FolderStore, tmp_path: Path
) -> None:
    manifest = measured(home)
    papers = Papers(bom=True, card=True, key=signing_key(home), oci=True)
    exported = export(store, manifest, tmp_path / "out", papers)
    copy = copied_by_skopeo(tmp_path / "out", manifest.id, tmp_path / "copy")
    inspected = subprocess.run(
        ["skopeo", "inspect", "--raw", f"oci:{copy}:{manifest.id}"], check=True, capture_output=True
    )
    document = json.loads(inspected.stdout)
    assert document["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert (copy / "blobs" / "sha256" / str(exported.digest).removeprefix("sha256:")).is_file(), "not one byte changed"
    other = FolderStore(tmp_path / "other" / "artifacts")
    assert import_artifact(other, copy) == (manifest, False)
    other.verify(manifest)
    assert import_artifact(other, copy) == (manifest, True)
    assert sorted(path.name for path in other.root.iterdir()) == [manifest.id]


#: Every field that ModelPack's schema of the configuration allows (docs/config.md); it allows no other.
_CONFIG = {
    "descriptor": {"createdAt", "authors", "family", "name", "docURL", "sourceURL", "datasetsURL", "version",
                   "revision", "vendor", "licenses", "title", "description"},
    "config": {"architecture", "format", "paramSize", "precision", "quantization", "capabilities"},
    "modelfs": {"type", "diffIds"},
}  # fmt: skip


def test_the_layouts_configuration_is_modelpacks(home: Home, store: FolderStore, tmp_path: Path) -> None:
    facts = make_manifest(b"w").model.model_copy(update={"license": "mit", "parameters": 3_821_079_552})
    exported = export(store, measured(home, model=facts), tmp_path / "out", Papers(oci=True))
    blobs = tmp_path / "out" / "blobs" / "sha256"
    document = json.loads((blobs / str(exported.digest).removeprefix("sha256:")).read_bytes())
    config = json.loads((blobs / document["config"]["digest"].removeprefix("sha256:")).read_bytes())
    assert set(config) == set(_CONFIG)
    assert all(set(config[name]) <= allowed for name, allowed in _CONFIG.items())
    assert config["descriptor"]["licenses"] == ["MIT"] and config["config"]["paramSize"] == "3.8B"
    assert config["modelfs"] == {"type": "layers", "diffIds": [one["digest"] for one in document["layers"]]}
    for layer in document["layers"]:
        assert (blobs / layer["digest"].removeprefix("sha256:")).stat().st_size == layer["size"]


def test_an_exported_folder_is_imported_without_what_its_manifest_does_not_list(
    home: Home, store: FolderStore, tmp_path: Path
) -> None:
    manifest = measured(home)
    export(store, manifest, tmp_path / "out", Papers(card=True))
    (tmp_path / "out" / MODEL / "more.bin").write_bytes(b"more")
    for number, source in enumerate((tmp_path / "out", tmp_path / "out" / MODEL)):
        other = FolderStore(tmp_path / f"other{number}" / "artifacts")
        import_artifact(other, source)
        assert [path.name for path in other.files(manifest.id).iterdir()] == ["model.bin"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda model: (model / "model.bin").write_bytes(b"WEIGHTS"), "is not what its manifest says"),
        (lambda model: (model / "model.bin").unlink(), "cannot be read: No such file"),
        (lambda model: (model / MANIFEST).write_bytes(b"{}"), f"{MANIFEST}: .*export it again"),
        (lambda model: (model / MANIFEST).unlink(), "is no exported artifact"),
        (shutil.rmtree, "is no exported artifact"),
    ],
)
def test_what_is_not_whole_is_not_imported(
    home: Home, store: FolderStore, tmp_path: Path, spoil: Callable[[Path], object], words: str
) -> None:
    export(store, measured(home), tmp_path / "out", Papers())
    spoil(tmp_path / "out" / MODEL)
    other = FolderStore(tmp_path / "other" / "artifacts")
    with pytest.raises(StoreError, match=words):
        import_artifact(other, tmp_path / "out")
    assert list(other.root.iterdir()) == []


def test_an_artifact_of_the_same_name_with_other_bytes_is_kept(home: Home, store: FolderStore, tmp_path: Path) -> None:
    manifest = measured(home)
    export(store, manifest, tmp_path / "out", Papers())
    other = Home(tmp_path / "other")
    kept = measured(other, content=b"others", id=manifest.id)
    with pytest.raises(StoreError, match=r"already with other bytes \(digest"):
        import_artifact(FolderStore(other.artifacts), tmp_path / "out")
    FolderStore(other.artifacts).verify(kept)


def test_a_link_beside_the_manifest_takes_no_file_of_the_machine(
    home: Home, store: FolderStore, tmp_path: Path
) -> None:
    """The bytes are compared with the manifest, so a link can bring in nothing but what was built."""
    export(store, measured(home), tmp_path / "out", Papers())
    place = tmp_path / "out" / MODEL / "model.bin"
    place.unlink()
    place.symlink_to("/etc/hostname")
    with pytest.raises(StoreError, match="is not what its manifest says"):
        import_artifact(FolderStore(tmp_path / "other" / "artifacts"), tmp_path / "out")
