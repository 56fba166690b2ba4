"""Builds after an earlier artifact: the widths that it has, so that what differs is what training changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from agent.contract.manifest import Precision, Target, Toolchain
from agent.contract.profile import Recipe
from fleet.core.allocation import named
from fleet.errors import BuildError, UsageError
from fleet.home import Home
from fleet.profiles_loader import load_profile
from fleet.store import FolderStore
from fleet.store.deltas import make_delta
from fleet.toolchains.build.build import build, plan_build
from tests.models import built, checkpoint, few_texts, slow

TEXT = {"calibration": few_texts()}


@pytest.fixture(scope="module")
def tuned(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint after training on: each weight of its products has moved by some thousandths."""
    folder = tmp_path_factory.mktemp("tuned") / "tiny"
    shutil.copytree(tiny_dir, folder)
    draw = np.random.default_rng(3)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, values in tensors.items():
            if name.startswith("model.layers") and values.ndim == 2:
                moved = values.astype(np.float32)
                moved += draw.normal(0, 0.005 * moved.std(), moved.shape).astype(np.float32)
                tensors[name] = moved.astype(values.dtype)
        save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.mark.toolchain
@pytest.mark.parametrize(
    "toolchain", [Toolchain.LLAMACPP, Toolchain.ONNX_GENAI, slow(Toolchain.OPENVINO), slow(Toolchain.MLX)]
)
def test_it_has_the_widths_of_the_artifact_before_and_a_small_delta(
    tiny_dir: Path, tuned: Path, tmp_path: Path, toolchain: Toolchain
) -> None:
    recipe = Recipe(toolchain=toolchain, precision=Precision.INT4, target=Target.CPU, options={"budget": 5.0, **TEXT})
    profile, home = load_profile("iot-x86"), Home(tmp_path)
    before = build(checkpoint(tiny_dir), profile, recipe, home)
    after = build(checkpoint(tuned), profile, recipe, home, after=before)
    widths = named(before.recipe["allocated"]["matrices"])
    assert named(after.recipe["allocated"]["matrices"]) == widths and len(widths) > 8
    assert after.recipe["after"] == before.id
    assert after.id != plan_build(checkpoint(tuned), profile, recipe).id
    assert plan_build(checkpoint(tuned), profile, recipe, before).id == after.id
    store = FolderStore(home.artifacts)
    delta = make_delta(store, after, before).deltas[0]
    assert delta.wire_bytes < 0.35 * after.size


@pytest.mark.toolchain
def test_an_artifact_of_another_model_is_none_to_build_after(tiny_dir: Path, tmp_path: Path) -> None:
    recipe = Recipe(
        toolchain=Toolchain.LLAMACPP, precision=Precision.INT4, target=Target.CPU, options={"budget": 5.0, **TEXT}
    )
    before = built(tiny_dir, Toolchain.LLAMACPP, Precision.INT4, Target.CPU, budget=5.0, **TEXT).manifest
    groups = dict(before.recipe["allocated"]["matrices"])
    kind, names = next(iter(groups.items()))
    other = before.model_copy(
        update={
            "recipe": before.recipe | {"allocated": {"matrices": groups | {kind: [*names, "blk.99.attn_qkv.weight"]}}}
        }
    )
    with pytest.raises(
        BuildError, match=r"has a matrix blk\.99\.attn_qkv\.weight, and 1 differ in all: it is of another"
    ):
        build(checkpoint(tiny_dir), load_profile("iot-x86"), recipe, Home(tmp_path), after=other)
    assert not list((tmp_path / "artifacts").iterdir())


def test_what_cannot_be_built_after_is_told_before_anything_is_built(tiny_dir: Path) -> None:
    model, profile = checkpoint(tiny_dir), load_profile("iot-x86")
    plain = built(tiny_dir, Toolchain.ONNX_GENAI, Precision.INT4, Target.CPU).manifest
    recipe = Recipe(toolchain=Toolchain.ONNX_GENAI, precision=Precision.INT4, target=Target.CPU)
    assert plan_build(model, profile, recipe, plain).id == plan_build(model, profile, recipe).id, "no budget, no widths"
    budget = recipe.model_copy(update={"options": {"budget": 5.0, **TEXT}})
    with pytest.raises(UsageError, match="does not say which width each matrix has: it was built without a budget"):
        plan_build(model, profile, budget, plain)
    with pytest.raises(
        UsageError, match=r"is onnx_genai int4 cpu, and the recipe llamacpp int4 cpu: choose the same one"
    ):
        plan_build(model, profile, budget.model_copy(update={"toolchain": Toolchain.LLAMACPP}), plain)


def test_the_widths_of_a_manifest_are_json(tiny_dir: Path) -> None:
    """As they stand in a manifest they come back the same, whatever made them."""
    made = built(tiny_dir, Toolchain.LLAMACPP, Precision.INT4, Target.CPU, budget=5.0, **TEXT).manifest
    groups = made.recipe["allocated"]["matrices"]
    assert json.loads(json.dumps(groups)) == groups
    assert sum(made.recipe["allocated"]["types"].values()) == len(named(groups))
