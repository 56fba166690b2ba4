"""Checkpoints that are not the network of their config.json: refused in `plan` and in `build`, or put right.

No toolchain is asked: one that is given a checkpoint without a tensor invents the numbers and says nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from agent.contract.manifest import Precision, Toolchain
from agent.contract.profile import Recipe
from fleet.core.checkpoint_tensors import Fusion, expected, read
from fleet.core.phi_variants import VARIANTS
from fleet.errors import ModelError
from fleet.home import Home
from fleet.profiles_loader import load_profile
from fleet.toolchains.build.build import build
from fleet.toolchains.checkpoint.checkpoint import inspect
from fleet.toolchains.checkpoint.checkpoint_shape import read_shape
from fleet.toolchains.checkpoint.torch_model import load_float32
from fleet.toolchains.checkpoint.whole import as_network
from tests.models import MINUTES, built, tiny_npu_artifact

WEIGHTS = "model.safetensors"
Tensors = dict[str, Any]
#: Whose builds of the joined checkpoint `make test-variants` has.
SLOW = (Toolchain.OPENVINO, Toolchain.ONNX_QNN)
#: Of the artifact for Qualcomm's NPU that the tests share, what is not the default.
OPTIONS_OF_THE_NPU = ("share_weights", "recover")


@pytest.fixture
def copy(tiny_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_dir, tmp_path / "model"))


def change(folder: Path, how: Callable[[Tensors], Tensors | None], file: str = WEIGHTS) -> None:
    tensors = load_file(folder / file)
    save_file(how(tensors) or tensors, folder / file, metadata={"format": "pt"})


def configure(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | changes), encoding="utf-8")


def apart(tensors: Tensors) -> Tensors:
    """As fine-tuning tools save them: q, k and v, gate and up."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith("qkv_proj.weight"):
            keys = (tensor.shape[0] - tensor.shape[1]) // 2
            cut = [tensor.shape[0] - 2 * keys, tensor.shape[0] - keys]
            for part, piece in zip("qkv", np.split(tensor, cut), strict=True):
                found[name.replace("qkv_proj", f"{part}_proj")] = np.ascontiguousarray(piece)
        elif name.endswith("gate_up_proj.weight"):
            for part, piece in zip(("gate", "up"), np.split(tensor, 2), strict=True):
                found[name.replace("gate_up_proj", f"{part}_proj")] = np.ascontiguousarray(piece)
        else:
            found[name] = tensor
    return found


def prefixed(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def without(*ends: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: one for name, one in tensors.items() if not name.endswith(ends)}


def with_adapter(tensors: Tensors) -> None:
    tensors["base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.weight"] = np.zeros((4, 8), np.float32)


def halved(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    (folder / WEIGHTS).unlink()
    save_file({name: tensors[name] for name in names[: len(names) // 2]}, folder / "model-00001-of-00002.safetensors")


def quantized(tensors: Tensors) -> None:
    name = "model.layers.0.mlp.down_proj"
    del tensors[f"{name}.weight"]
    tensors[f"{name}.qweight"], tensors[f"{name}.scales"] = np.zeros((4, 4), np.int32), np.zeros(4, np.float32)


def integers(tensors: Tensors) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)


def own_head(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1


def index_beside(folder: Path) -> None:
    names = load_file(folder / WEIGHTS)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, WEIGHTS)}))
    shutil.copy(folder / WEIGHTS, folder / "consolidated.safetensors")


def bin_alone(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK")


def byte_order_mark(folder: Path) -> None:
    path = folder / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a tensor is missing": (
        lambda folder: change(folder, without("layers.1.mlp.down_proj.weight")),
        r"1 of its \d+ tensors are missing: model\.layers\.1\.mlp\.down_proj\.weight; fetch the whole checkpoint",
    ),
    "many are missing": (
        lambda folder: change(folder, without("mlp.down_proj.weight", "o_proj.weight")),
        r"4 of its \d+ tensors are missing: model\.layers\.0\.mlp\.down_proj.* and 1 more; a part of the files",
    ),
    "half of the shards": (halved, r"tensors are missing: .*fetch the whole checkpoint"),
    "an adapter alone": (
        lambda folder: change(
            folder, lambda tensors: {f"base_model.model.{name}.lora_A.weight": one for name, one in tensors.items()}
        ),
        "it is an adapter and no model .*merge it into its base with PEFT's merge_and_unload",
    ),
    "an adapter among the weights": (lambda folder: change(folder, with_adapter), "an adapter is among its weights"),
    "an adapter beside the base": (
        lambda folder: save_file(
            {"base_model.model.x.lora_B.weight": np.zeros(2, np.float32)}, folder / "adapter_model.safetensors"
        ),
        r"an adapter is among its weights \(base_model\.model\.x\.lora_B\.weight\): merge it into the base, or move",
    ),
    "quantized by others": (
        lambda folder: change(folder, quantized),
        "it may be quantized already; take the checkpoint that this was made from",
    ),
    "whole numbers": (lambda folder: change(folder, integers), r"model\.norm\.weight is of I8.*quantized already"),
    "quantized, says the config": (
        lambda folder: configure(folder, quantization_config={"quant_method": "awq"}),
        "quantization_config: it is quantized",
    ),
    "a second copy": (
        lambda folder: shutil.copy(folder / WEIGHTS, folder / "consolidated.safetensors"),
        r"is in consolidated\.safetensors and model\.safetensors: a second copy of the weights\? Move one away",
    ),
    "a second copy beside an index": (index_beside, r"index\.json does not name consolidated\.safetensors"),
    "a matrix of another size": (
        lambda folder: configure(folder, intermediate_size=96),
        r"does not describe these weights: model\.layers\.0\.mlp\.gate_up_proj\.weight is \d+ x \d+ and should be 192",
    ),
    "fewer layers than weights": (
        lambda folder: configure(folder, num_hidden_layers=1),
        r"\d+ tensors are not of this network: model\.layers\.1\.",
    ),
    "more layers than weights": (
        lambda folder: configure(folder, num_hidden_layers=3),
        r"6 of its \d+ tensors are missing",
    ),
    "untied without a head": (
        lambda folder: configure(folder, tie_word_embeddings=False),
        r"lm_head\.weight is missing, .* or set tie_word_embeddings to true",
    ),
    "tied with a head of its own": (
        lambda folder: change(folder, own_head),
        r"config\.json ties the head .* set tie_word_embeddings to false",
    ),
    "q, k and v that do not add up": (
        lambda folder: change(folder, lambda t: {n: (o[:8] if ".k_proj." in n else o) for n, o in apart(t).items()}),
        "q, k, v or gate, up are apart, and do not add up",
    ),
    "rope of another kind": (
        lambda folder: configure(folder, rope_scaling={"type": "yarn", "factor": 4.0}),
        "rope_scaling is of type 'yarn'",
    ),
    "rope that is linear": (
        lambda folder: configure(folder, rope_scaling={"rope_type": "linear", "factor": 2.0}),
        "rope_scaling is of type 'linear'",
    ),
    "rope that is dynamic": (
        lambda folder: configure(folder, rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
        "of type 'dynamic'",
    ),
    "factors of another head": (
        lambda folder: configure(
            folder, rope_scaling={"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}
        ),
        r"short_factor has 1 factors, and \d+ pairs",
    ),
    "factors that are none": (
        lambda folder: configure(folder, rope_scaling={"type": "su", "short_factor": [0], "long_factor": "x"}),
        "short_factor must be a list of positive numbers",
    ),
    "another activation": (
        lambda folder: configure(folder, hidden_act="relu"),
        "hidden_act is 'relu', and a Phi3ForCausalLM",
    ),
    "biases": (
        lambda folder: configure(folder, attention_bias=True),
        "attention_bias is true, and a Phi-3 has no biases",
    ),
    "capped logits": (lambda folder: configure(folder, final_logit_softcapping=30.0), "final_logit_softcapping is set"),
    "no base of rope": (
        lambda folder: configure(folder, rope_theta=-1),
        "rope_theta is -1, and must be a number above 1",
    ),
    "a byte order mark": (byte_order_mark, "begins with a byte order mark"),
    "PyTorch files alone": (bin_alone, r"has no \*\.safetensors \(there are PyTorch \.bin files"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_not_whole_is_refused_by_name_in_plan_and_in_build(copy: Path, case: str):
    spoil, words = BROKEN[case]
    spoil(copy)
    for look in (read_shape, inspect):
        with pytest.raises(ModelError, match=f"(?s){words}"):
            look(copy)


SAME: dict[str, Callable[[Path], Any]] = {
    "q, k, v and gate, up apart": lambda folder: change(folder, apart),
    "a prefix of PEFT": lambda folder: change(folder, prefixed("base_model.model.")),
    "a prefix of a compiled model": lambda folder: change(folder, prefixed("_orig_mod.")),
    "both": lambda folder: change(folder, lambda tensors: prefixed("module.")(apart(tensors))),
    "a head that is the embedding": lambda folder: change(
        folder, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}
    ),
    "frequencies that were saved": lambda folder: change(
        folder, lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_what_is_exactly_the_same_network_is_put_right_byte_for_byte(
    tiny_dir: Path, copy: Path, tmp_path: Path, case: str
):
    SAME[case](copy)
    read_shape(copy)
    found = inspect(copy)
    with as_network(found, tmp_path / "scratch") as whole:
        tensors = load_file(whole.path / WEIGHTS)
        original = load_file(tiny_dir / WEIGHTS)
        extra = {"model.layers.0.self_attn.rotary_emb.inv_freq"} & set(tensors)
        assert set(tensors) - extra == set(original)
        assert all(np.array_equal(tensors[name], original[name]) for name in original)
        assert whole.facts.source_digest == found.facts.source_digest
        again = inspect(whole.path)
        assert again.reading.as_stored and again.shape.tied
    assert not (tmp_path / "scratch").exists() or not list((tmp_path / "scratch").iterdir()), "nothing is left"


@pytest.mark.toolchain
@pytest.mark.parametrize(
    "toolchain",
    [pytest.param(one, marks=[pytest.mark.variants, MINUTES] if one in SLOW else []) for one in Toolchain],
)
def test_every_toolchain_makes_the_same_bytes_of_what_was_joined(
    tiny_dir: Path, copy: Path, tmp_path: Path, toolchain: Toolchain
):
    """As of the checkpoint that had it in one piece: nothing was invented, dropped or put in another order."""
    plain = tiny_npu_artifact() if toolchain is Toolchain.ONNX_QNN else built(tiny_dir, toolchain, Precision.INT8)
    SAME["both"](copy)
    manifest = plain.manifest
    profile = load_profile("iot-x86").model_copy(update={"context": manifest.context})
    options = {name: value for name, value in manifest.recipe.items() if name in OPTIONS_OF_THE_NPU}
    recipe = Recipe(toolchain=toolchain, precision=manifest.precision, target=manifest.target, options=options)
    with as_network(inspect(copy), tmp_path / "scratch") as whole:
        joined = build(whole, profile, recipe, Home(tmp_path / "home"))
    assert {file.path: file.sha256 for file in joined.files} == {file.path: file.sha256 for file in manifest.files}


def test_a_whole_checkpoint_is_used_as_it_lies(copy: Path, tmp_path: Path):
    found = inspect(copy)
    with as_network(found, tmp_path / "scratch") as whole:
        assert whole is found
    assert not (tmp_path / "scratch").exists()


def test_no_code_of_a_checkpoint_is_run(copy: Path, tmp_path: Path):
    ran = tmp_path / "ran"
    (copy / "modeling_evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    configure(copy, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"})
    inspect(copy)
    load_float32(copy)
    assert not ran.exists()


def test_the_reference_is_never_read_with_an_invented_tensor(copy: Path):
    change(copy, without("layers.1.mlp.down_proj.weight"))
    with pytest.raises(ModelError, match=r"does not read it whole \(missing keys: model\.layers\.1\.mlp\.down_proj"):
        load_float32(copy)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_every_published_phi_is_its_own_list_of_tensors(variant: Any):
    shape, config = variant.shape, variant.config
    biases = {"attention_bias": bool(config.get("attention_bias")), "head_bias": bool(config.get("lm_head_bias"))}
    wanted = expected(shape, **biases)
    assert read(wanted, wanted, tied=shape.tied).as_stored
    vectors = sum(size[0] for size in wanted.values() if len(size) == 1)
    assert sum(int(np.prod(size)) for size in wanted.values()) == pytest.approx(shape.parameters, rel=1e-3)
    assert vectors < shape.parameters / 1000


WANTED = expected(VARIANTS[1].shape)


@given(
    st.sets(st.sampled_from(sorted(WANTED)), max_size=6), st.sets(st.text("abc.", min_size=1, max_size=12), max_size=3)
)
def test_every_difference_is_told(gone: set[str], added: set[str]):
    found = {name: size for name, size in WANTED.items() if name not in gone} | dict.fromkeys(added, (1,))
    reading = read(found, WANTED, tied=False)
    told = " ".join(reading.problems)
    assert bool(reading.problems) == bool(gone or added)
    assert not gone or any(name in told for name in gone)
    assert reading.fusions == ()


def test_parts_are_joined_in_the_order_of_the_network():
    name = "model.layers.0.self_attn.qkv_proj.weight"
    found = dict(WANTED)
    rows, columns = found.pop(name)
    parts = tuple(name.replace("qkv_proj", f"{part}_proj") for part in "qkv")
    for part in parts:
        found[part] = (rows // 3, columns)
    reading = read(found, WANTED, tied=False)
    assert reading.fusions == (Fusion(name, parts),) and not reading.problems
