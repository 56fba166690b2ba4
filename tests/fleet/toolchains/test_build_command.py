"""``phifleet build`` and ``phifleet sample-model`` as an operator types them."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from agent.contract.manifest import Manifest, Toolchain
from fleet.cli.build import build, describe_sample, sample_model
from fleet.errors import BuildError, ModelError, ProfileError, UsageError
from fleet.export.export import Papers, export
from fleet.export.oci_layout import WEIGHT, Layer, write_layout
from fleet.home import Home
from fleet.profiles_loader import profile_paths
from fleet.store import FolderStore
from fleet.toolchains.checkpoint.sample_model import SampleReport
from fleet.toolchains.drivers.llamacpp import LlamaCpp
from tests.models import Built


@dataclass(frozen=True)
class Context:
    home: Home


@pytest.fixture
def home(tiny_artifact: Built, tmp_path: Path) -> Home:
    """With the tiny ONNX artifact in it, so that nothing is built."""
    place = Home(tmp_path / "home")
    shutil.copytree(tiny_artifact.files.parent, place.artifacts / tiny_artifact.manifest.id)
    return place


def test_it_tells_what_was_there_already(home: Home, tiny_dir: Path, tiny_artifact: Built) -> None:
    arguments = ["--model", str(tiny_dir), "--profile", "iot-x86", "--toolchain", "onnx_genai", "--no-measure"]
    text = CliRunner().invoke(build, arguments, obj=Context(home), catch_exceptions=False)
    assert text.exit_code == 0 and text.stdout.startswith(f"already built {tiny_artifact.manifest.id}: 6.1 MB")
    answer = CliRunner().invoke(build, [*arguments, "--json"], obj=Context(home), catch_exceptions=False)
    found = json.loads(answer.stdout)
    assert (found["id"], found["reused"]) == (tiny_artifact.manifest.id, True)
    assert (found["bytes"], found["kl_divergence"]) == (tiny_artifact.manifest.size, None)
    assert set(found) >= set(Manifest.model_fields) - {"chat", "size", "foreign", "index", "deltas"}, (
        "every figure of the manifest"
    )
    assert found["model"] == tiny_artifact.manifest.model.name, "as it was in 0.1"
    assert found["source"] == tiny_artifact.manifest.model.model_dump(mode="json")
    assert [set(one) for one in found["files"]] == [{"path", "size", "sha256"}] * len(tiny_artifact.manifest.files)


def test_the_first_recipe_that_this_machine_can_build_is_taken_and_those_before_it_are_told(
    home: Home, tiny_dir: Path, tiny_artifact: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaCpp, "packages", ("llama-of-tomorrow",))
    arguments = ["--model", str(tiny_dir), "--profile", "iot-x86", "--no-measure", "--json"]
    answer = CliRunner().invoke(build, arguments, obj=Context(home), catch_exceptions=False)
    assert json.loads(answer.stdout)["id"] == tiny_artifact.manifest.id
    assert "llamacpp int4 cpu (budget=5.25, calibration=bundled): not taken: toolchain llamacpp needs" in answer.stderr
    monkeypatch.undo()
    needs = {Toolchain.LLAMACPP: 2**34, Toolchain.ONNX_GENAI: 2**30}
    need = property(lambda plan: needs[plan.recipe.toolchain])
    monkeypatch.setattr("fleet.toolchains.build.build.BuildPlan.peak_memory_bytes", need)
    monkeypatch.setattr("fleet.cli.build.available_bytes", lambda: 2**33)
    answer = CliRunner().invoke(build, arguments, obj=Context(home), catch_exceptions=False)
    assert json.loads(answer.stdout)["id"] == tiny_artifact.manifest.id
    assert "takes about 16.0 GiB of memory, and 8.0 GiB are available" in answer.stderr


def test_a_licence_that_was_added_to_the_checkpoints_card_reaches_what_was_built_before(
    home: Home, tiny_dir: Path, tiny_artifact: Built, tmp_path: Path
) -> None:
    """The card is no input of the build; without this, an artifact would be refused for ever."""
    assert tiny_artifact.manifest.model.license == "unknown"
    model = Path(shutil.copytree(tiny_dir, tmp_path / "tiny-phi"))
    (model / "README.md").write_text("---\nlicense: mit\n---\n")
    arguments = ["--model", str(model), "--profile", "iot-x86", "--toolchain", "onnx_genai", "--no-measure", "--json"]
    answer = CliRunner().invoke(build, arguments, obj=Context(home), catch_exceptions=False)
    found = json.loads(answer.stdout)
    assert (found["reused"], found["source"]["license"]) == (True, "mit")
    kept = FolderStore(home.artifacts).get(tiny_artifact.manifest.id)
    assert kept is not None and kept.model.license == "mit" and kept.digest == tiny_artifact.manifest.digest


def test_a_licence_that_the_profile_does_not_admit_is_refused_before_anything_is_built(
    home: Home, tiny_dir: Path, tmp_path: Path
) -> None:
    profile = tmp_path / "strict.toml"
    text = (Path(__file__).parents[3] / "profiles" / "iot-x86.toml").read_text()
    profile.write_text(text + '\n[admission]\nlicenses = ["MIT", "Apache-2.0"]\n')
    arguments = ["--model", str(tiny_dir), "--profile", str(profile), "--no-measure"]
    answer = CliRunner().invoke(build, arguments, obj=Context(home))
    assert isinstance(answer.exception, ProfileError)
    assert "its checkpoint names no licence (`license:` at the head of README.md)" in str(answer.exception)


def test_a_checkpoint_in_an_oci_layout_is_built_as_its_folder_is(
    home: Home, tiny_dir: Path, tiny_artifact: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    layers = [
        Layer(path.name, path, WEIGHT, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(tiny_dir.iterdir())
    ]
    (tmp_path / "layout").mkdir()
    write_layout(tmp_path / "layout", layers, {"descriptor": {}, "config": {}}, tag="v1", annotations={})
    model = f"oci-layout:{tmp_path / 'layout'}:v1"
    arguments = ["--model", model, "--profile", "iot-x86", "--toolchain", "onnx_genai", "--no-measure", "--json"]
    answer = CliRunner().invoke(build, arguments, obj=Context(home), catch_exceptions=False)
    found = json.loads(answer.stdout)
    assert (found["id"], found["reused"]) == (tiny_artifact.manifest.id, True), "the same checkpoint, the same id"


def test_an_artifact_in_an_oci_layout_is_no_checkpoint(
    home: Home, tiny_artifact: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    export(FolderStore(home.artifacts), tiny_artifact.manifest, tmp_path / "out", Papers(oci=True))
    arguments = ["--model", f"oci-layout:{tmp_path / 'out'}", "--profile", "iot-x86"]
    answer = CliRunner().invoke(build, arguments, obj=Context(home))
    assert isinstance(answer.exception, ModelError) and "phifleet artifacts import" in str(answer.exception)


@pytest.mark.toolchain
def test_the_loss_goes_into_the_manifest_and_names_the_best(home: Home, tiny_dir: Path, tiny_artifact: Built) -> None:
    arguments = ["--model", str(tiny_dir), "--profile", "iot-x86", "--toolchain", "onnx_genai", "--best"]
    answer = CliRunner().invoke(build, arguments, obj=Context(home), catch_exceptions=False)
    manifest = FolderStore(home.artifacts).get(tiny_artifact.manifest.id)
    assert manifest is not None and manifest.quality is not None and manifest.speed is not None
    assert manifest.digest == tiny_artifact.manifest.digest, "measuring changes no file"
    assert "KL divergence" in answer.stdout
    least = min(
        FolderStore(home.artifacts).list().manifests, key=lambda one: one.quality.kl_divergence if one.quality else 9
    )
    assert f"best for iot-x86: {least.id} (" in answer.stderr
    assert answer.stderr.count(": done\n") == 4, "the checkpoint, the one that was not there, and measuring both"
    # No terminal: a line for each phase, so that a log tells where a build of an hour stands.
    for recipe in ("onnx_genai int4 cpu", "onnx_genai int4 cpu (budget=5.1, calibration=bundled, recover=True)"):
        assert f" measuring iot-x86 {recipe}: measuring the loss\n" in answer.stderr


@pytest.mark.toolchain
def test_best_tells_every_failed_build_and_every_profile_without_one(
    home: Home, tiny_dir: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_dir, tmp_path / "model"))
    (model / "tokenizer.json").write_text('{"version": "1.0"}')
    arguments = ["--model", str(model), "--profile", "iot-x86", "--profile", "raspberry-pi-5", "--best"]
    answer = CliRunner().invoke(build, [*arguments, "--toolchain", "llamacpp"], obj=Context(home))
    assert isinstance(answer.exception, BuildError)
    assert answer.stderr.count("error: llamacpp did not convert") == 2, "one of three is raised, the others told"
    for profile in ("iot-x86", "raspberry-pi-5"):
        assert f"error: no artifact was built for profile {profile}" in answer.stderr


@pytest.mark.toolchain
def test_recipes_that_differ_in_options_only_have_numbers(tiny_dir: Path, tmp_path: Path) -> None:
    home, mine = Home(tmp_path / "home"), tmp_path / "mine.toml"
    text = profile_paths()["iot-x86"].read_text(encoding="utf-8")
    recipe = '[[recipes]]\ntoolchain = "llamacpp"\nprecision = "int4"\ntarget = "cpu"\noptions = { type = "%s" }\n'
    recipes = recipe % "Q4_K_M" + recipe % "Q4_0"
    mine.write_text(text[: text.index("[[recipes]]")] + recipes + text[text.index("[health]") :], encoding="utf-8")
    arguments = ["--model", str(tiny_dir), "--profile", str(mine), "--no-measure", "--recipe", "2"]
    CliRunner().invoke(build, arguments, obj=Context(home), catch_exceptions=False)
    assert [made.recipe["type"] for made in FolderStore(home.artifacts).list().manifests] == ["Q4_0"]


@pytest.mark.toolchain
def test_what_cannot_be_measured_here_is_built_and_said(tiny_dir: Path, tmp_path: Path) -> None:
    home, mine = Home(tmp_path / "home"), tmp_path / "mine.toml"
    text = profile_paths()["cuda-workstation"].read_text(encoding="utf-8")
    recipe = '[[recipes]]\ntoolchain = "onnx_genai"\nprecision = "bf16"\ntarget = "cuda"\n\n'
    mine.write_text(text[: text.index("[[recipes]]")] + recipe + text[text.index("[health]") :], encoding="utf-8")
    answer = CliRunner().invoke(
        build, ["--model", str(tiny_dir), "--profile", str(mine)], obj=Context(home), catch_exceptions=False
    )
    assert answer.exit_code == 0
    assert "not measured: ONNX Runtime has no BF16 kernels for a CPU" in answer.stderr
    assert [made.quality for made in FolderStore(home.artifacts).list().manifests] == [None]


@pytest.mark.parametrize(("arguments", "error", "message"), [
    (["--profile", "iot-x86", "--best", "--no-measure"], UsageError, "leave --no-measure out"),
    (["--profile", "no-such"], ProfileError, "no profile is named 'no-such'"),
    (["--profile", "iot-x86", "--toolchain", "mlx"], ProfileError, "has no recipe for mlx; it has 1: llamacpp int4"),
    (["--profile", "iot-x86", "--recipe", "99"], ProfileError, "has no recipe 99; it has 1: llamacpp int4 cpu"),
    (["--profile", "iot-x86", "--recipe", "1", "--all"], UsageError, "names one recipe of one profile: leave out"),
    (["--profile", "iot-x86", "--profile", "ios-phone", "--recipe", "1"], UsageError, "name one --profile"),
    (["--profile", "iot-x86", "--model", "/nowhere"], ModelError, "does not exist"),
    (["--profile", "iot-x86", "--model", "phi-4-mini"], ModelError, "on the hub it is microsoft/Phi-4-mini-instruct"),
    (["--profile", "iot-x86", "--eval-text", "/nowhere"], UsageError, "cannot be read"),
])  # fmt: skip
def test_what_is_wrong_is_said(
    home: Home, tiny_dir: Path, arguments: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        CliRunner().invoke(build, ["--model", str(tiny_dir), *arguments], obj=Context(home), catch_exceptions=False)


def test_the_sample_says_what_it_is(tmp_path: Path) -> None:
    report = SampleReport(
        folder=tmp_path, name="smollm2-135m-phi", source="SmolLM2", license="apache-2.0", parameters=134_515_008,
        bytes=541_608_117, layers=30, hidden=576, vocabulary=49152, context=8192, logits_difference=0.0,
        answer="The capital of France is Paris.", seconds=9.0,
    )  # fmt: skip
    text = "\n".join(describe_sample(report))
    assert "134.5 million weights" in text and "source's: 0" in text and "Paris" in text


def test_the_sample_never_overwrites(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UsageError, match="not an empty folder"):
        CliRunner().invoke(sample_model, [str(tmp_path)], catch_exceptions=False)
