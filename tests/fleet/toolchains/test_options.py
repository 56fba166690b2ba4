"""What each toolchain takes and refuses, before anything is built."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent.contract.manifest import Precision, Target, Toolchain
from agent.contract.profile import Recipe
from fleet.cli.plan import resolver
from fleet.errors import BuildError, ProfileError, UsageError
from fleet.profiles_loader import load_profile, profile_paths
from fleet.toolchains.build import build as building
from fleet.toolchains.checkpoint.checkpoint_shape import read_shape
from fleet.toolchains.drivers.base import installed_versions
from fleet.toolchains.drivers.registry import DRIVERS, driver_of
from fleet.toolchains.quality import calibration
from tests.models import checkpoint

T, P, D = Toolchain, Precision, Target

REFUSED: dict[str, tuple[Toolchain, Precision, Target, dict[str, Any], str]] = {
    "FP16 ONNX on a CPU": (T.ONNX_GENAI, P.FP16, D.CPU, {}, "does not build fp16 for cpu"),
    "ONNX for an NPU": (T.ONNX_GENAI, P.INT4, D.NPU, {}, "does not build int4 for npu"),
    "an old name that the builder ignores": (
        T.ONNX_GENAI,
        P.INT4,
        D.CPU,
        {"int4_algo_config": "rtn"},
        "no option int4_algo",
    ),
    "a block size that is none": (T.ONNX_GENAI, P.INT4, D.CPU, {"block_size": 33}, "block_size cannot be 33"),
    "a number for a yes": (T.ONNX_GENAI, P.INT4, D.CPU, {"symmetric": 1}, "symmetric cannot be 1"),
    "asymmetric, laid out wrongly": (T.ONNX_GENAI, P.INT4, D.CPU, {"symmetric": False}, "take rtn or k_quant"),
    "recovery without a text": (T.ONNX_GENAI, P.INT4, D.CPU, {"recover": True}, "recover needs a calibration"),
    "a calibration that nothing reads": (T.ONNX_GENAI, P.INT4, D.CPU, {"calibration": "bundled"}, "set recover"),
    "a calibration that OpenVINO does not read": (
        T.OPENVINO,
        P.INT4,
        D.CPU,
        {"calibration": "bundled"},
        "nothing uses the calibration",
    ),
    "a calibration that MLX does not read": (T.MLX, P.INT4, D.CPU, {"calibration": "bundled"}, "set recover"),
    "nothing at INT4": (T.OPENVINO, P.INT4, D.CPU, {"ratio": 0.0}, "more than 0"),
    "recovery of mixed": (
        T.ONNX_GENAI,
        P.INT4,
        D.CPU,
        {"recover": True, "calibration": "bundled", "mixed": "last"},
        "not with mixed",
    ),
    "options of a float": (T.ONNX_GENAI, P.FP32, D.CPU, {"block_size": 32}, "has no option block_size; it has none"),
    "asymmetric for an NPU": (T.OPENVINO, P.INT4, D.NPU, {"symmetric": False}, "NPU compiles symmetric"),
    "groups for an NPU": (T.OPENVINO, P.INT4, D.NPU, {"group_size": 64}, "NPU compiles symmetric"),
    "a ratio for an NPU": (T.OPENVINO, P.INT4, D.NPU, {"ratio": 0.8}, "NPU compiles symmetric"),
    "a ratio past one": (T.OPENVINO, P.INT4, D.CPU, {"ratio": 1.5}, "ratio is a share"),
    "scale estimation without a text": (T.OPENVINO, P.INT4, D.CPU, {"scale_estimation": True}, "needs a calibration"),
    "GPTQ and LoRA": (
        T.OPENVINO,
        P.INT4,
        D.CPU,
        {"gptq": True, "lora_correction": True, "calibration": "bundled"},
        "exclude",
    ),
    "recovery and AWQ": (
        T.OPENVINO,
        P.INT4,
        D.CPU,
        {"recover": True, "awq": True, "calibration": "bundled"},
        "not go with awq",
    ),
    "OpenVINO in BF16": (T.OPENVINO, P.BF16, D.CPU, {}, "FP16 or FP32"),
    "a type that is none": (T.LLAMACPP, P.INT4, D.CPU, {"type": "Q5_K_M"}, "type cannot be 'Q5_K_M'"),
    "a pattern that is none": (T.LLAMACPP, P.INT4, D.CPU, {"tensor_types": {"(": "Q8_0"}}, "no regular expression"),
    "a tensor type that is none": (T.LLAMACPP, P.INT4, D.CPU, {"tensor_types": {"ffn": "Q9"}}, "no type is named 'Q9'"),
    "a type for what is one matrix": (
        T.LLAMACPP,
        P.INT4,
        D.CPU,
        {"embedding_type": "Q8_0", "output_type": "Q8_0"},
        "are one matrix in tiny-phi.*leave out output_type",
    ),
    "blocks longer than a row": (
        T.LLAMACPP,
        P.INT4,
        D.CPU,
        {"embedding_type": "Q6_K"},
        "Q6_K has blocks of 256 weights, into which rows of 64",
    ),
    "GGUF for DirectML": (T.LLAMACPP, P.INT4, D.DML, {}, "does not build for dml"),
    "MLX on CUDA": (T.MLX, P.INT4, D.CUDA, {}, "MLX runs on metal and cpu"),
    "a budget of no bits": (
        T.LLAMACPP,
        P.INT4,
        D.CPU,
        {"budget": 3, "calibration": "bundled"},
        "from 4.25 to 8.5, not 3",
    ),
    "a budget of text": (T.LLAMACPP, P.INT4, D.CPU, {"budget": "5"}, "budget cannot be '5'"),
    "a budget and a type": (
        T.LLAMACPP,
        P.INT4,
        D.CPU,
        {"budget": 5.2, "calibration": "bundled", "type": "Q4_0", "embedding_type": "Q8_0"},
        "leave out type, embedding_type",
    ),
    "a budget and bits": (
        T.MLX,
        P.INT4,
        D.CPU,
        {"budget": 5.2, "calibration": "bundled", "bits_of": {"embed": 5}},
        "leave out bits_of",
    ),
    "a budget without a text": (T.MLX, P.INT4, D.CPU, {"budget": 5.2}, "budget needs a calibration"),
    "bits that are none": (T.MLX, P.INT4, D.CPU, {"bits_of": {"embed": 7}}, "bits_of can be"),
    "mixed and bits": (T.MLX, P.INT4, D.CPU, {"mixed": "mixed_4_6", "bits_of": {"embed": 5}}, "mixed goes neither"),
    "groups that NNCF would change": (
        T.OPENVINO,
        P.INT4,
        D.CPU,
        {"group_size": 96},
        "rows of 64 and 128 weights do not divide into groups of 96; take -1 or 32 or 64",
    ),
    "recovery of rows that the builder pads": (
        T.ONNX_GENAI,
        P.INT4,
        D.CPU,
        {"recover": True, "calibration": "bundled", "block_size": 128},
        "rows of 64 weights do not divide into groups of 128; take 16 or 32 or 64",
    ),
    "rows that do not divide": (T.MLX, P.INT4, D.CPU, {"group_size": 128}, "do not divide into groups of 128"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_built_is_refused_by_name(tiny_dir: Path, case: str) -> None:
    toolchain, precision, target, options, message = REFUSED[case]
    recipe = Recipe(toolchain=toolchain, precision=precision, target=target, options=options)
    with pytest.raises(ProfileError, match=message):
        driver_of(toolchain).resolve(recipe, checkpoint(tiny_dir))


@pytest.mark.parametrize("profile", profile_paths())
def test_every_recipe_that_comes_with_phifleet_names_options_that_exist(profile: str) -> None:
    shape = read_shape("phi-4-mini")
    for recipe in load_profile(profile).recipes:
        if recipe.target is D.QNN:
            continue  # no toolchain here builds for it, and the plan says so
        assert set(recipe.options) <= set(resolver(shape, "phi-4-mini")(recipe))


def test_npu_defaults_are_what_an_npu_takes(tiny_dir: Path) -> None:
    recipe = Recipe(toolchain=T.OPENVINO, precision=P.INT4, target=D.NPU)
    options = resolver(read_shape("phi-4-mini"), "phi-4-mini")(recipe)
    assert (options["symmetric"], options["group_size"], options["ratio"]) == (True, 128, 1.0)
    options = driver_of(T.OPENVINO).resolve(recipe, checkpoint(tiny_dir))
    assert (options["symmetric"], options["group_size"]) == (True, -1), "rows of 64 weights"


def test_a_toolchain_that_is_not_installed_names_its_extra() -> None:
    class Absent(type(DRIVERS[T.MLX])):  # type: ignore[misc]  # the class of a driver
        packages = ("mlx-lm", "no-such-package")

    with pytest.raises(BuildError, match=r"needs no-such-package; install phifleet\[quantize\]"):
        installed_versions(Absent(), {})


def test_every_driver_says_what_it_needs(tiny_dir: Path) -> None:
    for name, driver in DRIVERS.items():
        assert driver.name is name and driver.extra and installed_versions(driver, {})
        recipe = Recipe(toolchain=name, precision=P.INT4, target=D.CPU)
        tiny = checkpoint(tiny_dir)
        large = replace(tiny, weights_bytes=10**11, facts=tiny.facts.model_copy(update={"parameters": 5 * 10**10}))
        assert driver.peak_memory_bytes(recipe, large) - driver.peak_memory_bytes(recipe, tiny) >= 10**11 // 2 - 10**7


def test_the_calibration_is_in_the_id_and_not_in_the_evaluation(tiny_dir: Path, tmp_path: Path) -> None:
    from fleet.toolchains.quality import evaluation

    model = checkpoint(tiny_dir)
    found = calibration.load("bundled", model.chat)
    chats = [text for text in found.texts if "<|im_start|>assistant" in text]
    assert len(chats) > 60 and len(found.texts) > len(chats) + 20, "chats and plain text"
    assert 0.4 < sum(map(len, chats)) / sum(map(len, found.texts)) < 0.7
    some = found.texts[::8]
    assert 0 < sum(text in chats for text in some) < len(some), "whoever reads some reads both"
    assert not any(prompt in text for prompt in evaluation.bundled().prompts for text in found.texts)
    own = tmp_path / "own.txt"
    own.write_text("words and more words " * 200)
    ids = set()
    for source in (None, "bundled", str(own)):
        recipe = Recipe(toolchain=T.LLAMACPP, precision=P.INT4, target=D.CPU, options={"calibration": source})
        ids.add(building.plan_build(model, load_profile("iot-x86"), recipe).id)
    assert len(ids) == 3


@pytest.mark.parametrize(("data", "message"), [
    (b"", "pass at least 2000 characters"), (b"\xff\xfe\x00" * 4000, "is not UTF-8"),
    (b"\0" * 4000, "characters of plain text"), (None, "cannot be read"),
])  # fmt: skip
def test_a_bad_calibration_text_is_refused(tiny_dir: Path, tmp_path: Path, data: bytes | None, message: str) -> None:
    path = tmp_path / "text"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UsageError, match=message):
        calibration.load(str(path), checkpoint(tiny_dir).chat)
