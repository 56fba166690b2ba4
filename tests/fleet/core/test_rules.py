from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agent.contract.manifest import Precision, Target, Toolchain
from agent.contract.profile import Admission, Recipe
from fleet.core.phi_variants import find_variant
from fleet.core.plan_shape import ModelShape, shape_of
from fleet.core.rules import RULES, Case, refusals
from fleet.core.support import Status, cells
from fleet.profiles_loader import load_profile

#: model, toolchain, precision, target, options, context, profile, the rule that refuses or None
CASES: list[tuple[str, str, str, str, dict[str, Any], int, str | None, str | None]] = [
    ("phi-4-mini", "onnx_genai", "int4", "cpu", {}, 4096, None, None),
    ("phi-4-mini", "onnx_genai", "fp16", "cpu", {}, 4096, None, "fp16-onnx-cpu"),
    ("phi-4-mini", "onnx_genai", "bf16", "cpu", {}, 4096, None, "fp16-onnx-cpu"),
    ("phi-4-mini", "onnx_genai", "fp16", "cuda", {}, 4096, None, None),
    ("phi-4-mini", "onnx_genai", "fp32", "cuda", {}, 4096, None, "toolchain-target"),
    ("phi-4-mini", "onnx_genai", "int8", "dml", {}, 4096, None, "toolchain-target"),
    ("phi-4-mini", "onnx_genai", "int4", "qnn", {}, 4096, None, "toolchain-target"),
    ("phi-4-mini", "onnx_qnn", "int4", "qnn", {}, 4096, None, None),
    ("phi-4-mini", "onnx_qnn", "int8", "qnn", {}, 16384, "copilot-pc-qnn", None),
    ("phi-4-mini", "onnx_qnn", "int4", "qnn", {}, 16385, None, "qnn-context"),
    ("phi-4-mini", "onnx_qnn", "int4", "cpu", {}, 4096, None, "toolchain-target"),
    ("phi-4-mini", "onnx_qnn", "fp16", "qnn", {}, 4096, None, "toolchain-target"),
    ("phi-4-mini", "onnx_qnn", "int4", "qnn", {}, 4096, "ai-pc-npu", "accelerator"),
    ("phi-2", "onnx_qnn", "int4", "qnn", {}, 2048, None, "qnn-network"),
    ("phi-3.5-moe", "onnx_qnn", "int8", "qnn", {}, 4096, None, "qnn-network"),
    ("phi-4-mini", "openvino", "int4", "npu", {}, 4096, None, None),
    ("phi-4-mini", "openvino", "int4", "npu", {"symmetric": False}, 4096, None, "openvino-npu"),
    ("phi-4-mini", "openvino", "int4", "npu", {"ratio": 0.8}, 4096, None, "openvino-npu"),
    ("phi-4-mini", "openvino", "int4", "npu", {"group_size": 64}, 4096, None, "openvino-npu"),
    ("phi-4-mini", "openvino", "int4", "npu", {"group_size": -1}, 4096, None, None),
    ("phi-4-mini", "openvino", "int8", "npu", {}, 4096, None, "toolchain-target"),
    ("phi-4-mini", "openvino", "int4", "cpu", {"format": "gguf"}, 4096, None, "openvino-gguf"),
    ("phi-4-mini", "openvino", "int4", "cpu", {"group_size": 32, "symmetric": False}, 131072, None, None),
    ("phi-3-mini-4k", "mlx", "int4", "metal", {"awq": True}, 2047, None, "mlx-awq"),
    ("phi-4-mini", "mlx", "int4", "metal", {}, 4096, None, None),
    ("phi-4-mini", "mlx", "int4", "metal", {}, 4097, None, "longrope-mlx"),
    ("phi-4-mini", "llamacpp", "int4", "cpu", {}, 4096, None, None),
    ("phi-4-mini", "llamacpp", "int4", "cpu", {}, 8192, None, "longrope-llamacpp"),
    ("phi-4-mini", "onnx_genai", "int4", "cpu", {}, 8192, None, None),
    ("phi-3-mini-4k", "llamacpp", "int4", "cpu", {}, 4096, None, "sliding-window"),
    ("phi-3-mini-4k", "llamacpp", "int4", "cpu", {}, 2047, None, None),
    ("phi-3-mini-4k", "onnx_genai", "int4", "cpu", {}, 4096, None, None),
    ("phi-3-mini-4k", "onnx_genai", "int4", "cuda", {}, 4096, None, None),
    ("phi-3-mini-4k", "onnx_genai", "int4", "dml", {}, 4096, None, "sliding-window"),
    ("phi-3-mini-4k", "onnx_genai", "int4", "webgpu", {}, 4096, None, "sliding-window"),
    ("phi-3-mini-4k", "onnx_genai", "int4", "dml", {}, 2047, None, None),
    ("phi-3-mini-4k", "openvino", "int4", "cpu", {}, 4096, None, None),
    ("phi-4", "llamacpp", "int4", "cpu", {}, 16384, None, None),
    ("phi-3.5-moe", "onnx_genai", "int4", "cpu", {}, 4096, None, "phimoe-onnx"),
    ("phi-3.5-moe", "onnx_genai", "fp16", "cuda", {}, 4096, None, "phimoe-onnx"),
    ("phi-3.5-moe", "llamacpp", "int4", "cpu", {}, 4096, None, "phimoe-mixer"),
    ("phi-3.5-moe", "mlx", "int4", "metal", {}, 4096, None, "phimoe-mixer"),
    ("phi-3.5-moe", "openvino", "int4", "cpu", {}, 4096, None, None),
    ("phi-2", "onnx_genai", "int4", "cpu", {}, 2048, None, None),
    ("phi-2", "llamacpp", "int8", "cpu", {}, 2048, "iot-x86", "class-policy"),
    ("phi-2", "mlx", "fp16", "metal", {}, 2048, "ios-phone", "class-policy"),
    ("phi-2", "llamacpp", "int8", "cpu", {}, 2048, "ai-pc-cpu", None),
    ("phi-2", "openvino", "int4", "npu", {}, 2048, "ai-pc-igpu", "accelerator"),
]  # fmt: skip


def shape(name: str) -> ModelShape:
    variant = find_variant(name)
    assert variant is not None
    return variant.shape


@pytest.mark.parametrize("row", CASES, ids=lambda row: " ".join(str(part) for part in row if part not in ({}, None)))
def test_the_linter(row: tuple[str, str, str, str, dict[str, Any], int, str | None, str | None]) -> None:
    model, toolchain, precision, target, options, context, profile, rule = row
    recipe = Recipe(
        toolchain=Toolchain(toolchain), precision=Precision(precision), target=Target(target), options=options
    )
    found = refusals(Case(shape(model), recipe, context, load_profile(profile) if profile else None))
    assert [one.rule for one in found][:1] == ([rule] if rule else [])
    for one in found:
        assert one.reason
        assert one.source


def test_every_rule_has_a_case() -> None:
    tested = {row[-1] for row in CASES}
    elsewhere = {"licence", "int4-hardware", "multimodal", "group-size"}
    assert {rule.name for rule in RULES} - tested == elsewhere


def test_a_licence_that_the_profile_does_not_admit_refuses_every_recipe() -> None:
    profile = load_profile("iot-x86")
    for admitted, rules in (((), []), (("mit",), []), (("apache-2.0",), ["licence"])):
        strict = profile.model_copy(update={"admission": Admission(licenses=admitted)})
        for recipe in profile.recipes:
            assert [one.rule for one in refusals(Case(shape("phi-2"), recipe, 2048, strict))] == rules


def test_int4_is_refused_where_the_hardware_has_none() -> None:
    old = load_profile("iot-arm64").model_copy(update={"arch": "armv7l"})
    for recipe in old.recipes:
        assert [one.rule for one in refusals(Case(shape("phi-2"), recipe, 2048, old))] == ["int4-hardware"]


@pytest.mark.parametrize("architecture", ["Phi3VForCausalLM", "Phi4MMForCausalLM", "Phi4MultimodalForCausalLM"])
@pytest.mark.parametrize("toolchain", Toolchain)
def test_multimodal_checkpoints_are_refused(architecture: str, toolchain: Toolchain) -> None:
    config = dict(find_variant("phi-4-mini").config) | {"architectures": [architecture]}  # type: ignore[union-attr]
    model = shape_of(config, name="phi-4-multimodal")
    target = Target.QNN if toolchain is Toolchain.ONNX_QNN else Target.CPU
    recipe = Recipe(toolchain=toolchain, precision=Precision.INT4, target=target)
    assert [one.rule for one in refusals(Case(model, recipe, 4096))] == ["multimodal"]


@pytest.mark.parametrize(("group", "rules"), [(32, []), (64, ["group-size"]), (128, ["group-size"])])
@pytest.mark.parametrize(("toolchain", "target"), [("mlx", "metal"), ("openvino", "cpu")])
def test_groups_divide_rows(group: int, rules: list[str], toolchain: str, target: str) -> None:
    """Those of every published Phi do; a network of one's own need not."""
    config = dict(find_variant("phi-4-mini").config) | {"intermediate_size": 8192 + 32}  # type: ignore[union-attr]
    recipe = Recipe(toolchain=toolchain, precision="int4", target=target, options={"group_size": group})
    assert [one.rule for one in refusals(Case(shape_of(config, name="mine"), recipe, 4096))] == rules


@pytest.mark.parametrize(("precision", "rules"), [("int4", ["group-size"]), ("int8", [])])
def test_rows_divide_into_the_blocks_that_an_npu_has(precision: str, rules: list[str]) -> None:
    config = dict(find_variant("phi-4-mini").config) | {"intermediate_size": 8192 + 32}  # type: ignore[union-attr]
    recipe = Recipe(toolchain="onnx_qnn", precision=precision, target="qnn")
    assert [one.rule for one in refusals(Case(shape_of(config, name="mine"), recipe, 4096))] == rules


LETTERS: dict[str, str] = {
    "W": Status.WORKS, "B": Status.BUILDS,
    "t": "toolchain-target", "h": "fp16-onnx-cpu", "o": "phimoe-onnx", "m": "phimoe-mixer",
    "q": "qnn-network",
}  # fmt: skip


def test_every_cell_of_the_matrix_says_what_is_written_down() -> None:
    written: dict[tuple[str, ...], tuple[str, int]] = {}
    for line in Path(__file__).with_name("cells.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            variant, toolchain, target, *letters, tokens = line.split()
            for precision, letter in zip(Precision, letters, strict=True):
                holds = int(tokens) if letter in "WB" else 0
                written[variant, toolchain, target, precision] = (LETTERS[letter], holds)
    found = list(cells())
    assert len(found) == len(written) == 455
    assert {
        (one.variant.name, one.toolchain, one.target, one.precision): (
            one.rule if one.status is Status.REFUSED else one.status, one.context,
        )
        for one in found
    } == written  # fmt: skip
    assert all(one.why for one in found if one.status is Status.REFUSED)
