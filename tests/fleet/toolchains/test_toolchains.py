"""Every toolchain for real, on the tiny checkpoint: built, loaded in its own runtime, built again to the same bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.contract.manifest import Precision, Target, Toolchain
from agent.contract.profile import DeviceClass, Recipe
from fleet.core.plan_size import ggml_type, predicted_bytes
from fleet.errors import BuildError, ProfileError
from fleet.home import Home
from fleet.profiles_loader import load_profile
from fleet.toolchains.build.build import build
from fleet.toolchains.checkpoint.checkpoint_shape import read_shape
from fleet.toolchains.drivers.onnx_graph import OnnxGraph
from fleet.toolchains.quality import quality
from tests.models import EVERYTHING, Built, built, checkpoint, few_texts, slow

T, P, D = Toolchain, Precision, Target
TEXT = {"calibration": few_texts()}

#: Name: toolchain, precision, target, options, and what the manifest's recipe must say that came of it.
RECIPES: dict[str, tuple[Toolchain, Precision, Target, dict[str, Any], dict[str, Any]]] = {
    "onnx int8": (T.ONNX_GENAI, P.INT8, D.CPU, {}, {"products": {"int8": 11}}),
    "onnx fp32": (T.ONNX_GENAI, P.FP32, D.CPU, {}, {}),
    "onnx mixed": (
        T.ONNX_GENAI,
        P.INT4,
        D.CPU,
        {"algorithm": "k_quant", "mixed": "layers"},
        {"products": {"int4": 8, "int8": 3}},
    ),
    "onnx recovered": (T.ONNX_GENAI, P.INT4, D.CPU, {"recover": True, **TEXT}, {"recovered": 11}),
    "onnx asymmetric, recovered": (
        T.ONNX_GENAI,
        P.INT4,
        D.CPU,
        {"recover": True, "algorithm": "rtn", "symmetric": False, **TEXT},
        {"recovered": 11},
    ),
    "onnx fp16 for cuda": (T.ONNX_GENAI, P.FP16, D.CUDA, {}, {}),
    "onnx within a budget": (T.ONNX_GENAI, P.INT4, D.CPU, {"budget": 6, **TEXT}, {"budget": 6}),
    "onnx within a budget, recovered": (
        T.ONNX_GENAI,
        P.INT4,
        D.CPU,
        {"budget": 5.5, "recover": True, **TEXT},
        {"recovered": 11},
    ),
    "onnx int4 for directml, recovered": (T.ONNX_GENAI, P.INT4, D.DML, {"recover": True, **TEXT}, {"recovered": 15}),
    "onnx int4 for webgpu": (T.ONNX_GENAI, P.INT4, D.WEBGPU, {}, {"products": {"int4": 11}}),
    "gguf q4_k_m": (T.LLAMACPP, P.INT4, D.CPU, {}, {"fallback_tensors": 8}),
    "gguf iq4_nl, calibrated": (
        T.LLAMACPP,
        P.INT4,
        D.CPU,
        {"type": "IQ4_NL", "embedding_type": "Q5_0", "tensor_types": {"ffn_down": "Q5_1"}, **TEXT},
        {},
    ),
    "gguf int8": (T.LLAMACPP, P.INT8, D.CPU, {}, {}),
    "gguf bf16": (T.LLAMACPP, P.BF16, D.CPU, {}, {}),
    "gguf fp32": (T.LLAMACPP, P.FP32, D.CPU, {}, {}),
    "openvino int4": (T.OPENVINO, P.INT4, D.CPU, {}, {}),
    "openvino awq": (T.OPENVINO, P.INT4, D.CPU, {"awq": True, **TEXT}, {}),
    "openvino scale estimation": (T.OPENVINO, P.INT4, D.CPU, {"scale_estimation": True, **TEXT}, {}),
    "openvino gptq": (T.OPENVINO, P.INT4, D.CPU, {"gptq": True, **TEXT}, {}),
    "openvino lora": (T.OPENVINO, P.INT4, D.CPU, {"lora_correction": True, **TEXT}, {}),
    "openvino half of it": (T.OPENVINO, P.INT4, D.CPU, {"ratio": 0.5, **TEXT}, {}),
    "openvino recovered": (T.OPENVINO, P.INT4, D.CPU, {"recover": True, **TEXT}, {"recovered": 8}),
    "openvino recovered in whole rows": (
        T.OPENVINO,
        P.INT4,
        D.CPU,
        {"recover": True, "group_size": -1, **TEXT},
        {"recovered": 8},
    ),
    "openvino within a budget": (T.OPENVINO, P.INT4, D.CPU, {"budget": 4.7, **TEXT}, {"budget": 4.7}),
    "openvino within a budget, recovered": (
        T.OPENVINO,
        P.INT4,
        D.CPU,
        {"budget": 5.5, "recover": True, **TEXT},
        {"recovered": 9},
    ),
    "openvino symmetric, recovered": (
        T.OPENVINO,
        P.INT4,
        D.CPU,
        {"recover": True, "symmetric": True, **TEXT},
        {"recovered": 8},
    ),
    "openvino int4 for an npu": (T.OPENVINO, P.INT4, D.NPU, {"group_size": -1}, {}),
    "openvino int8": (T.OPENVINO, P.INT8, D.CPU, {}, {}),
    "openvino fp16": (T.OPENVINO, P.FP16, D.GPU, {}, {}),
    "mlx int4": (T.MLX, P.INT4, D.METAL, {}, {}),
    "mlx mixed": (T.MLX, P.INT4, D.METAL, {"mixed": "mixed_4_6"}, {}),
    "mlx recovered": (
        T.MLX,
        P.INT4,
        D.METAL,
        {"recover": True, "bits_of": {"embed_tokens": 5}, **TEXT},
        {"recovered": 9},
    ),
    "mlx within a budget": (T.MLX, P.INT4, D.METAL, {"budget": 5.5, **TEXT}, {"budget": 5.5}),
    "mlx within a budget, recovered": (
        T.MLX,
        P.INT4,
        D.METAL,
        {"budget": 5.5, "recover": True, **TEXT},
        {"recovered": 9},
    ),
    "llamacpp within a budget": (T.LLAMACPP, P.INT4, D.CPU, {"budget": 5.5, **TEXT}, {"budget": 5.5}),
    "mlx int8": (T.MLX, P.INT8, D.METAL, {}, {}),
    "mlx fp16": (T.MLX, P.FP16, D.METAL, {}, {}),
}


#: Options that are the libraries' own, in one place of the driver, and combinations of what others have alone.
RARE = {
    "openvino awq",
    "openvino scale estimation",
    "openvino gptq",
    "openvino lora",
    "openvino recovered in whole rows",
    "openvino symmetric, recovered",
    "mlx within a budget, recovered",
    "onnx within a budget",
    "openvino within a budget",
    "onnx int4 for webgpu",
}


def _built(folder: Path, name: str) -> Built:
    toolchain, precision, target, options, _ = RECIPES[name]
    return built(folder, toolchain, precision, target, **options)


@pytest.mark.toolchain
@pytest.mark.parametrize("name", [slow(name) if name in RARE else name for name in RECIPES])
def test_it_builds_loads_and_generates(tiny_dir: Path, name: str) -> None:
    # ``build`` fails when the artifact's own runtime cannot load it and generate, where that can run here.
    manifest = _built(tiny_dir, name).manifest
    for key, value in RECIPES[name][4].items():
        assert manifest.recipe[key] == value
    recipe = Recipe(toolchain=manifest.toolchain, precision=manifest.precision, target=manifest.target)
    assert manifest.size == pytest.approx(predicted_bytes(read_shape(tiny_dir), recipe, manifest.recipe), rel=0.05)
    if manifest.toolchain is T.OPENVINO and manifest.precision is P.INT4 and "budget" not in RECIPES[name][3]:
        small = "i4" if manifest.recipe["symmetric"] else "u4"
        assert manifest.recipe["weights"][small] > (70_000 if manifest.recipe["ratio"] == 1 else 20_000)


@pytest.mark.toolchain
def test_no_option_is_ignored(tiny_dir: Path) -> None:
    """What an option changes is bytes: an artifact for each recipe, and no two with the same weights."""
    made: dict[frozenset[str], str] = {}
    for name in [name for name in RECIPES if EVERYTHING or name not in RARE]:
        files = _built(tiny_dir, name).manifest.files
        weights = frozenset(file.sha256 for file in files if file.path.endswith((".gguf", ".data", ".bin", "tensors")))
        assert weights, [file.path for file in files]
        assert weights not in made, f"{name} is the same as {made[weights]}"
        made[weights] = name


@pytest.fixture(scope="module")
def untied(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with a last product of its own, as the Phis but Phi-4-mini have."""
    from safetensors.numpy import load_file, save_file

    folder = Path(shutil.copytree(tiny_dir, tmp_path_factory.mktemp("untied") / "untied"))
    weights = load_file(folder / "model.safetensors")
    head = np.random.default_rng(0).normal(0, 0.02, weights["model.embed_tokens.weight"].shape)
    save_file(weights | {"lm_head.weight": head.astype(np.float32)}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}), encoding="utf-8")
    return folder


@pytest.mark.toolchain
@pytest.mark.parametrize("recover", [True, slow(False)], ids=["recovered", "rounded"])
@pytest.mark.parametrize("toolchain", [T.ONNX_GENAI, T.OPENVINO])
def test_a_budget_has_a_grid_for_the_embedding_and_for_the_last_product(
    untied: Path, tmp_path: Path, toolchain: Toolchain, recover: bool
) -> None:
    """Two matrices of the same shape: one that took the other's place would answer with noise."""
    options = {"budget": 5.2, "recover": recover, **TEXT}
    recipe = Recipe(toolchain=toolchain, precision=P.INT4, target=D.CPU, options=options)
    manifest = build(checkpoint(untied), load_profile("iot-x86"), recipe, Home(tmp_path))
    files = tmp_path / "artifacts" / manifest.id / "files"
    lost = quality.measure(
        untied, files, manifest, eval_text=Path(few_texts()), cache=tmp_path / "references", threads=2, foreign=False
    )
    assert lost.quality.kl_divergence < 0.05
    assert sum(manifest.recipe["allocated"]["grids"].values()) == 10
    assert manifest.size == pytest.approx(predicted_bytes(read_shape(untied), recipe, manifest.recipe), rel=0.05)


@pytest.mark.toolchain
@pytest.mark.parametrize("precision", [slow(P.INT4), P.INT8])
def test_an_embedding_of_its_own_is_quantized_by_itself(untied: Path, tmp_path: Path, precision: Precision) -> None:
    """At eight bits in any case: in FP32, as the builder leaves it, it is a tenth and more of a Phi at INT4."""
    recipe = Recipe(toolchain=T.ONNX_GENAI, precision=precision, target=D.CPU)
    profile = load_profile("iot-x86").model_copy(update={"device_class": DeviceClass.AI_PC})
    manifest = build(checkpoint(untied), profile, recipe, Home(tmp_path))
    files = tmp_path / "artifacts" / manifest.id / "files"
    lost = quality.measure(
        untied, files, manifest, eval_text=Path(few_texts()), cache=tmp_path / "references", threads=2, foreign=False
    )
    assert lost.quality.kl_divergence < (0.1 if precision is P.INT4 else 0.01)
    assert manifest.size == pytest.approx(predicted_bytes(read_shape(untied), recipe, manifest.recipe), rel=0.05)
    graph = OnnxGraph(files / "model.onnx")
    assert graph.embedding() is None, "no FP32 is left"


@pytest.mark.toolchain
@pytest.mark.parametrize("bits_of", [{"lm_head": 6}, {"embed_tokens": 5}], ids=str)
def test_a_recovery_uses_the_bits_of_each_matrix(untied: Path, tmp_path: Path, bits_of: dict[str, int]) -> None:
    import mlx.core as mx

    options = {"recover": True, "bits_of": bits_of, **TEXT}
    recipe = Recipe(toolchain=T.MLX, precision=P.INT4, target=D.METAL, options=options)
    manifest = build(checkpoint(untied), load_profile("mac-mlx"), recipe, Home(tmp_path))
    assert manifest.recipe["recovered"] == 9
    shape = read_shape(untied)
    assert manifest.size == pytest.approx(predicted_bytes(shape, recipe, manifest.recipe), rel=0.05)
    arrays = mx.load(str(tmp_path / "artifacts" / manifest.id / "files" / "model.safetensors"))
    parts = (arrays[f"lm_head.{part}"] for part in ("weight", "scales", "biases"))
    values = mx.dequantize(*parts, group_size=64, bits=bits_of.get("lm_head", 4))
    groups = np.array(values.astype(mx.float32)).reshape(-1, 64)[:2000]
    levels = max(len(np.unique(group)) for group in groups)
    assert levels > 16 if "lm_head" in bits_of else levels <= 16


#: Checkpoint, and options: each way to give single tensors a type.
TYPES: dict[str, tuple[str, dict[str, Any]]] = {
    "a pattern": ("tiny_dir", {"tensor_types": {"ffn_down": "Q8_0", "ffn": "Q5_0"}}),
    "a pattern whose blocks are too long": ("tiny_dir", {"tensor_types": {"ffn_down": "Q6_K"}}),
    "the embedding, which is the last product too": ("tiny_dir", {"embedding_type": "Q4_0"}),
    "the last product, which is the embedding too": ("tiny_dir", {"output_type": "Q6_K"}),
    "that, and a pattern": ("tiny_dir", {"output_type": "Q8_0", "tensor_types": {"token_embd": "Q5_0"}}),
    "the embedding beside a pattern": ("untied", {"embedding_type": "Q4_0", "tensor_types": {"output|embd": "Q5_0"}}),
    "both": ("untied", {"embedding_type": "Q4_0", "output_type": "Q5_1", "tensor_types": {"attn": "Q8_0"}}),
}


@pytest.mark.toolchain
@pytest.mark.parametrize("name", [name if name in ("that, and a pattern", "both") else slow(name) for name in TYPES])
def test_llama_cpp_gives_each_tensor_the_type_that_the_plan_says(
    request: pytest.FixtureRequest, tmp_path: Path, name: str
) -> None:
    from gguf import GGUFReader

    folder: Path = request.getfixturevalue(TYPES[name][0])
    recipe = Recipe(toolchain=T.LLAMACPP, precision=P.INT4, target=D.CPU, options=TYPES[name][1])
    model = checkpoint(folder)
    made = build(model, load_profile("iot-x86"), recipe, Home(tmp_path))
    file = tmp_path / "artifacts" / made.id / "files" / "model.gguf"
    written = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors}
    edges = [model.shape.embedding, *([model.shape.output] if model.shape.output else [])]
    for matrix in [*edges, *model.shape.linears()]:
        place = "" if matrix.layer is None else f"blk.{matrix.layer}."
        found = written[f"{place}{matrix.name}.weight"]
        assert found == ggml_type(matrix, model.shape, "Q4_K_M", recipe.options), matrix


UNUSED = {
    "mlx": (T.MLX, P.INT4, D.METAL, {"bits_of": {"lm_hed": 5}}, r"like lm_hed; there are .*embed_tokens"),
    "llama.cpp": (T.LLAMACPP, P.INT4, D.CPU, {"tensor_types": {"ffn_dwn": "Q8_0"}}, "ffn_dwn; there are .*ffn_down"),
    "llama.cpp, of a type that is given": (
        T.LLAMACPP,
        P.INT4,
        D.CPU,
        {"embedding_type": "Q4_0", "tensor_types": {"token_embd": "Q8_0"}},
        "token_embd; there are .*ffn_down",
    ),
    "llama.cpp, of vectors": (
        T.LLAMACPP,
        P.INT4,
        D.CPU,
        {"tensor_types": {"norm": "Q8_0"}},
        "named like norm; there are attn_output, attn_qkv, ffn_down, ffn_up, token_embd$",
    ),
    "llama.cpp, behind another": (
        T.LLAMACPP,
        P.INT4,
        D.CPU,
        {"tensor_types": {"ffn": "Q5_0", "ffn_down": "Q8_0"}},
        "before ffn_down take all that it matches",
    ),
}


@pytest.mark.toolchain
@pytest.mark.parametrize("toolchain", UNUSED)
def test_a_name_that_no_tensor_has_is_told(tiny_dir: Path, tmp_path: Path, toolchain: str) -> None:
    name, precision, target, options, message = UNUSED[toolchain]
    recipe = Recipe(toolchain=name, precision=precision, target=target, options=options)
    with pytest.raises(ProfileError, match=message):
        build(checkpoint(tiny_dir), load_profile("iot-x86"), recipe, Home(tmp_path))


@pytest.mark.toolchain
@pytest.mark.parametrize("name", ["gguf iq4_nl, calibrated", "openvino recovered", "mlx recovered", "onnx recovered"])
def test_built_again_it_is_the_same_bytes(
    tiny_dir: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")  # torch sums as on a processor without wide vectors
    toolchain, precision, target, options, _ = RECIPES[name]
    recipe = Recipe(toolchain=toolchain, precision=precision, target=target, options=options)
    again = build(checkpoint(tiny_dir), load_profile("iot-x86"), recipe, Home(tmp_path), threads=1)
    first = _built(tiny_dir, name).manifest
    assert (again.id, again.digest) == (first.id, first.digest)


def test_an_option_that_the_builder_ignored_is_a_defect_and_found(tiny_artifact: Built) -> None:
    graph = OnnxGraph(tiny_artifact.files / "model.onnx")
    asked = {"algorithm": "default", "block_size": 32, "accuracy_level": 4, "symmetric": True, "mixed": None}
    assert graph.check(4, asked) == {"products": {"int4": 11}}
    for change in (
        {"algorithm": "rtn"},
        {"block_size": 64},
        {"accuracy_level": 0},
        {"symmetric": False},
        {"mixed": "last"},
    ):
        with pytest.raises(BuildError, match="ignored an option"):
            graph.check(4, asked | change)
    with pytest.raises(BuildError, match="ignored an option"):
        graph.check(8, asked)


def test_what_the_builder_stamps_in_is_taken_out(tiny_artifact: Built) -> None:
    import onnx

    proto = onnx.load(str(tiny_artifact.files / "model.onnx"), load_external_data=False)
    assert proto.producer_version == tiny_artifact.manifest.versions["onnxruntime-genai"]
