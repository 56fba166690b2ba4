from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from agent.contract.manifest import Precision, Target, Toolchain
from agent.contract.profile import Recipe
from fleet.core.plan_size import predicted_bytes
from fleet.errors import BuildError, ProfileError, UsageError
from fleet.home import Home
from fleet.profiles_loader import load_profile
from fleet.store import FolderStore, find
from fleet.store.half_made import HALF_MADE, half_made, sweep
from fleet.toolchains.build import build as building
from fleet.toolchains.checkpoint.checkpoint import inspect
from fleet.toolchains.progress import Progress
from tests.disk import MIB, small_disk
from tests.models import Built, checkpoint
from tests.waiting import alive, child_running, wait_until

INT4 = Recipe(toolchain=Toolchain.ONNX_GENAI, precision=Precision.INT4, target=Target.CPU)
PROFILE = load_profile("iot-x86")
CHILD = "fleet.toolchains.build.child"


def _child_of_this_process() -> psutil.Process | None:
    return child_running(psutil.Process(), CHILD)


def test_an_artifact_is_whole_and_speaks_in_its_runtime(sample_artifact: Built) -> None:
    manifest = sample_artifact.manifest
    FolderStore(sample_artifact.home.artifacts).verify(manifest)
    assert manifest.id.startswith("smollm2-135m-phi-onnx_genai-int4-cpu-")
    assert manifest.probes[0].expect == ("Paris",)
    assert 80e6 < manifest.size < 95e6
    assert manifest.memory.kv_bytes_per_token == 2 * 30 * 3 * 64 * 4  # float32 keys and values on the CPU
    assert manifest.context == PROFILE.context
    assert "onnxruntime-genai" in manifest.versions and manifest.recipe["block_size"] == 32
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in sample_artifact.files.iterdir())


def test_a_model_that_knows_nothing_is_not_expected_to(tiny_artifact: Built) -> None:
    assert tiny_artifact.manifest.probes[0].expect == ()


def test_what_was_built_is_not_built_again(tiny_artifact: Built, tiny_dir: Path) -> None:
    phases: list[Progress] = []
    again = building.build(checkpoint(tiny_dir), PROFILE, INT4, tiny_artifact.home, progress=phases.append)
    assert again == tiny_artifact.manifest
    assert [step.phase for step in phases] == ["already built"]


def test_two_builds_are_the_same_bytes_and_tell_their_progress(
    tiny_artifact: Built, tiny_dir: Path, tmp_path: Path
) -> None:
    phases: list[Progress] = []
    home = Home(tmp_path)
    again = building.build(checkpoint(tiny_dir), PROFILE, INT4, home, progress=phases.append)
    assert (again.id, again.digest) == (tiny_artifact.manifest.id, tiny_artifact.manifest.digest)
    told = list(dict.fromkeys(step.phase for step in phases))
    assert {"reading layers", "quantizing", "asking the artifact", "cutting into chunks"} <= set(told)
    assert list(home.logs.iterdir()) == [], "a log is kept on failure only"
    assert [path.name for path in home.artifacts.iterdir()] == [again.id]


def test_the_id_follows_every_input(tiny_dir: Path) -> None:
    model = checkpoint(tiny_dir)
    plain = building.plan_build(model, PROFILE, INT4).id
    other = INT4.model_copy(update={"options": {"block_size": 64}})
    assert building.plan_build(model, PROFILE, other).id != plain
    longer = PROFILE.model_copy(update={"context": 128})
    assert building.plan_build(model, longer, INT4).id != plain
    assert building.plan_build(model, PROFILE, INT4).id == plain


def test_a_toolchain_that_crashes_leaves_its_log_and_nothing_else(tiny_dir: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_dir, tmp_path / "model"))
    (model / "tokenizer.json").write_text('{"version": "1.0"}')
    home = Home(tmp_path / "home")
    with pytest.raises(BuildError) as caught:
        building.build(inspect(model), PROFILE, INT4, home)
    log = next(home.logs.iterdir())
    assert str(log) in str(caught.value) and "Traceback" in log.read_text()
    lines = str(caught.value).split("\n")
    assert lines[-2].startswith("  | "), "the message has the tail of the log"
    assert lines[-1] == f"the whole log: {log}", "and its last line is ours"
    assert list(home.artifacts.iterdir()) == []


def test_a_toolchain_that_is_killed_is_told_from_one_that_fails(tiny_dir: Path, tmp_path: Path) -> None:
    home = Home(tmp_path)

    def kill(step: Progress) -> None:
        if step.phase == "loading the toolchain" and (child := _child_of_this_process()):
            child.kill()

    with pytest.raises(BuildError, match=r"killed by SIGKILL.*memory runs out; it held .* GiB"):
        building.build(checkpoint(tiny_dir), PROFILE, INT4, home, progress=kill)
    assert list(home.artifacts.iterdir()) == []


SCRIPT = """
import sys
from collections.abc import Iterator
from pathlib import Path
from tests.fleet.toolchains.test_build import INT4, PROFILE
from fleet.home import Home
from fleet.toolchains.build.build import build
from fleet.toolchains.checkpoint.checkpoint import inspect
tell = lambda step: print(step.phase, flush=True)
build(inspect(Path(sys.argv[1])), PROFILE, INT4, Home(Path(sys.argv[2])), progress=tell)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_an_interrupted_build_ends_its_child_and_is_cleaned_up(tiny_dir: Path, tmp_path: Path, name: str) -> None:
    root = str(Path(__file__).resolve().parents[3])
    parent = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tiny_dir), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, env=os.environ | {"PYTHONPATH": root},
    )  # fmt: skip
    assert parent.stdout is not None
    for line in parent.stdout:
        if line.startswith("loading"):
            break
    child = child_running(psutil.Process(parent.pid), CHILD)
    assert child is not None
    parent.send_signal(getattr(signal, name))
    parent.wait(30)
    parent.stdout.close()
    wait_until(lambda: not alive(child), "the child ends with its parent")
    home = Home(tmp_path)
    left = [path.name for path in home.artifacts.iterdir()]
    assert left == [] if name == "SIGINT" else left[0].startswith(HALF_MADE)
    sweep(home.artifacts)
    assert list(home.artifacts.iterdir()) == []
    assert FolderStore(home.artifacts).list().manifests == ()


def test_what_a_toolchain_cannot_build_is_refused_before_it_starts(tiny_dir: Path, tmp_path: Path) -> None:
    model = checkpoint(tiny_dir)
    for changes in ({"precision": Precision.FP16}, {"options": {"colour": "red"}}):
        with pytest.raises(ProfileError):
            building.build(model, PROFILE, INT4.model_copy(update=changes), Home(tmp_path))


@pytest.mark.parametrize(("toolchain", "target", "name", "table"), [
    (Toolchain.LLAMACPP, Target.CPU, "tensor_types", {"ffn_down": "Q8_0", "blk.0": "Q4_0"}),
    (Toolchain.MLX, Target.METAL, "bits_of", {"down_proj": 8, "layers.0": 3}),
])  # fmt: skip
def test_of_several_patterns_the_first_wins_so_their_order_is_in_the_id(
    tiny_dir: Path, tmp_path: Path, toolchain: Toolchain, target: Target, name: str, table: dict[str, Any]
) -> None:
    model, profile = checkpoint(tiny_dir), load_profile("mac-mlx")
    turned = dict(reversed(table.items()))
    recipes = [
        Recipe(toolchain=toolchain, precision=Precision.INT4, target=target, options={name: order})
        for order in (table, turned)
    ]
    one, other = (building.build(model, profile, recipe, Home(tmp_path)) for recipe in recipes)
    assert one.id != other.id and one.size > other.size
    assert one.recipe[name] == [list(pair) for pair in table.items()] == other.recipe[name][::-1]
    for made, recipe in zip((one, other), recipes, strict=True):
        assert made.size == pytest.approx(predicted_bytes(model.shape, recipe, made.recipe), rel=0.05)


def test_artifacts_are_found_by_id_digest_and_unambiguous_beginning(tiny_artifact: Built, tmp_path: Path) -> None:
    home = Home(tmp_path)
    there = home.artifacts / tiny_artifact.manifest.id
    shutil.copytree(tiny_artifact.files.parent, there)
    manifest = tiny_artifact.manifest
    for wanted in (manifest.id, manifest.digest, "tiny-phi", manifest.digest[:8]):
        assert find(FolderStore(home.artifacts), wanted) == manifest
    for wanted, says in (("ti", "too short to name an artifact"), ("absent", "no artifact is named")):
        with pytest.raises(UsageError, match=says):
            find(FolderStore(home.artifacts), wanted)


def test_a_damaged_artifact_is_named(tiny_artifact: Built, tiny_dir: Path, tmp_path: Path) -> None:
    home, manifest = Home(tmp_path), tiny_artifact.manifest
    folder = home.artifacts / manifest.id
    shutil.copytree(tiny_artifact.files.parent, folder)
    model = folder / "files" / "model.onnx"
    data = bytearray(model.read_bytes())
    data[100] ^= 1
    model.write_bytes(data)
    with pytest.raises(BuildError, match="is not what was built"):
        FolderStore(home.artifacts).verify(manifest)
    model.write_bytes(data[:-1])
    with pytest.raises(BuildError, match="its manifest says"):
        FolderStore(home.artifacts).get(manifest.id)
    model.unlink()
    with pytest.raises(BuildError, match="is missing"):
        FolderStore(home.artifacts).get(manifest.id)
    (folder / "manifest.json").write_text(json.dumps({"version": 1}))
    listing = FolderStore(home.artifacts).list()
    assert listing.manifests == () and "remove its folder and build it again" in listing.damaged[0]
    with pytest.raises(BuildError):
        FolderStore(home.artifacts).get(manifest.id)
    (folder / "manifest.json").unlink()
    with pytest.raises(BuildError, match="remove its folder"):
        building.build(checkpoint(tiny_dir), PROFILE, INT4, home)


def test_what_another_build_holds_is_not_swept(tmp_path: Path) -> None:
    home = Home(tmp_path)
    with half_made(home.artifacts, "one") as mine:
        left = home.artifacts / f"{HALF_MADE}left"
        left.mkdir()
        with half_made(home.artifacts, "two"):
            assert mine.is_dir()
            assert not left.exists()
    assert list(home.artifacts.iterdir()) == []


def test_a_disk_that_fills_up_on_the_way_is_named_and_left_as_it_was(tiny_dir: Path, tmp_path: Path) -> None:
    recipe = INT4.model_copy(update={"toolchain": Toolchain.LLAMACPP})
    # The artifact would fit; the unquantized GGUF, which is written before it, does not.
    with small_disk(tmp_path / "disk", 6 * MIB) as disk:
        home = Home(disk)
        with pytest.raises(BuildError, match=r"llamacpp did not convert: the disk is full \(OSError: "):
            building.build(checkpoint(tiny_dir), PROFILE, recipe, home)
        assert list(home.artifacts.iterdir()) == []
        assert list(home.logs.iterdir())


def test_a_disk_that_fills_up_in_native_code_is_named_too(tiny_dir: Path, tmp_path: Path) -> None:
    recipe = INT4.model_copy(update={"toolchain": Toolchain.LLAMACPP})
    unquantized = recipe.model_copy(update={"precision": Precision.FP32})
    whole = building.plan_build(checkpoint(tiny_dir), PROFILE, unquantized)
    # The unquantized GGUF fits, and not the quantized one beside it, whose writer has no words for it.
    with small_disk(tmp_path / "disk", whole.size_bytes + 2 * MIB) as disk:
        home = Home(disk)
        with pytest.raises(BuildError, match=r"the disk is full \(llama\.cpp's quantizer refused"):
            building.build(checkpoint(tiny_dir), PROFILE, recipe, home)
        assert list(home.artifacts.iterdir()) == []


def test_a_disk_without_room_is_named_before_anything_is_begun(tiny_dir: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 5 * MIB) as disk:
        home = Home(disk)
        with pytest.raises(BuildError, match=r"will take 6\.1 MB, and 5\.\d MB are free in .*artifacts; make room"):
            building.build(checkpoint(tiny_dir), PROFILE, INT4, home)
        assert list(home.artifacts.iterdir()) == []
        assert not home.logs.exists()


def test_the_sample_does_not_fit_a_full_disk(tmp_path: Path) -> None:
    from fleet.toolchains.checkpoint.sample_model import make_tiny

    with small_disk(tmp_path / "disk", 4 * MIB) as disk:
        with pytest.raises(BuildError, match=r"cannot write .*tiny: the disk of .* is full; make room"):
            make_tiny(disk / "tiny")
        assert list(disk.iterdir()) == []
