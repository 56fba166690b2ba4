from __future__ import annotations

import re
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from agent.contract.manifest import Precision
from agent.contract.profile import DeviceClass, DeviceProfile
from fleet.cli.profiles import check_command
from fleet.core.phi_variants import find_variant
from fleet.core.plan import candidates
from fleet.core.profiles import parse_profile
from fleet.errors import ProfileError
from fleet.profiles_loader import list_profiles, load_profile, profile_paths

ALL = list_profiles()
BY_NAME = pytest.mark.parametrize("profile", ALL, ids=lambda profile: profile.name)
TEXT = profile_paths()["iot-x86"].read_text(encoding="utf-8")

WRONG = [
    ('arch = "x86_64"', 'arch = "arm64"', ["arch", "'aarch64'", "'any'"]),
    ("system = ", 'system = "beos" #', ["system", "'linux'", "'any'"]),
    ('device_class = "iot"', 'device_class = "iott"', ["device_class", "'iot'", "'mobile'", "'server'"]),
    ("memory_bytes =", "memory_byte =", ["memory_bytes is missing", "memory_byte is unknown", "did you mean"]),
    ('toolchain = "llamacpp"', 'toolchain = "llama"', ["recipes.0.toolchain", "'llamacpp'", "'mlx'"]),
    ('precision = "int4"', 'precision = "int3"', ["recipes.0.precision", "'int4'", "'fp32'"]),
    ('target = "cpu"', 'target = "cuda"', ["recipe target cuda", "accelerators"]),
    ("context = 4096", 'context = "long"', ["context", "'long'"]),
    ("context = 4096", "context = 0", ["context", "greater than 0"]),
    ("ttft_ms_p95 =", "ttft =", ["health.ttft is unknown", "ttft_ms_p95"]),
    ("error_rate_max = 0.05", "error_rate_max = 5", ["health.error_rate_max", "1"]),
    ("name = ", "name = = ", ["not TOML", "line"]),
    ('name = "iot-x86"', 'name = "IoT x86"', ["name", "IoT x86"]),
]


@BY_NAME
def test_a_profile_is_named_after_its_file_and_gives_a_reason_for_each_field(profile: DeviceProfile) -> None:
    path = profile_paths()[profile.name]
    lines = path.read_text(encoding="utf-8").splitlines()
    assert tomllib.loads("\n".join(lines))["name"] == profile.name == path.stem
    for before, line in pairwise(lines):
        field = re.match(r"(\w+) = ", line)
        inside_a_recipe = field and field[1] in ("toolchain", "precision", "target", "options", "description", "name")
        if field and not inside_a_recipe:
            assert before.startswith("#"), f"{path.name}: {line} has no reason above it"
        if line == "[[recipes]]":
            assert before.startswith("#"), f"{path.name}: a recipe has no reason above it"


@BY_NAME
def test_mobile_and_iot_devices_get_int4_and_nothing_else(profile: DeviceProfile) -> None:
    if profile.device_class in (DeviceClass.MOBILE, DeviceClass.IOT):
        assert {recipe.precision for recipe in profile.recipes} == {Precision.INT4}


@BY_NAME
def test_every_profile_has_a_plan_for_a_phi_of_four_billion_weights(profile: DeviceProfile) -> None:
    variant = find_variant("phi-4-mini")
    assert variant is not None
    found = candidates(variant.shape, profile)
    assert any(one.legal for one in found), [one.refusals for one in found]


def test_the_classes_of_the_documents_are_there() -> None:
    wanted = {
        "raspberry-pi-5", "iot-arm64", "iot-x86", "android-phone", "ios-phone", "jetson-orin", "ai-pc-npu",
        "ai-pc-igpu", "ai-pc-cpu", "ai-pc-directml", "copilot-pc-qnn", "mac-mlx", "cuda-workstation", "x86-server",
    }  # fmt: skip
    assert {profile.name for profile in ALL} == wanted


@pytest.mark.parametrize(("old", "new", "said"), WRONG, ids=[new for _, new, _ in WRONG])
def test_a_wrong_field_is_named_with_its_file_and_what_is_allowed(old: str, new: str, said: list[str]) -> None:
    assert old in TEXT
    with pytest.raises(ProfileError) as caught:
        parse_profile(TEXT.replace(old, new, 1), "mine.toml")
    assert str(caught.value).startswith("mine.toml: ")
    for part in said:
        assert part in str(caught.value)


def test_an_unknown_name_is_answered_with_near_ones_and_all() -> None:
    with pytest.raises(ProfileError, match=r"Did you mean raspberry-pi-5.*ai-pc-cpu.*x86-server"):
        load_profile("rasberry-pi5")
    with pytest.raises(ProfileError, match=r"'zzzz'\. Profiles: ai-pc-cpu"):
        load_profile("zzzz")
    with pytest.raises(ProfileError, match=r"nowhere/mine\.toml: cannot be read"):
        load_profile("nowhere/mine.toml")


def test_a_file_of_the_operators_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(TEXT.replace("iot-x86", "mine"), encoding="utf-8")
    assert load_profile(path).name == "mine"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ProfileError, match="UTF-8"):
        load_profile(str(path))


@given(st.text(max_size=200))
def test_no_text_makes_anything_but_a_profile_or_a_profile_error(text: str) -> None:
    with pytest.raises(ProfileError):
        parse_profile(text, "any.toml")


LINES = TEXT.splitlines()


@given(st.integers(0, len(LINES) - 1), st.sampled_from(['"x"', "-1", "nan", "[]", "{ a = 1 }", "true", "1e400", ""]))
def test_any_value_in_any_place_is_read_or_refused(at: int, value: str) -> None:
    changed = [line if i != at else re.sub(r"= .*", f"= {value}", line) for i, line in enumerate(LINES)]
    try:
        parse_profile("\n".join(changed), "any.toml")
    except ProfileError as error:
        assert "any.toml" in str(error)


def _check(file: Path) -> Result:
    return CliRunner().invoke(check_command, [str(file)], catch_exceptions=False)


@BY_NAME
def test_what_comes_with_phifleet_passes_its_own_check(profile: DeviceProfile) -> None:
    checked = _check(profile_paths()[profile.name])
    assert f"profile {profile.name} is valid" in checked.output
    assert "no Phi can have" not in checked.output


def test_the_check_knows_the_toolchains_options_and_what_no_phi_can_have(tmp_path: Path) -> None:
    file = tmp_path / "box.toml"
    file.write_text(TEXT + '\n[[recipes]]\ntoolchain = "llamacpp"\nprecision = "int4"\ntarget = "cpu"\n'
                    'options = { kind = "Q4_0" }\n')  # fmt: skip
    with pytest.raises(ProfileError, match=r"box.toml: recipe llamacpp int4 cpu \(kind=Q4_0\): .*no option kind"):
        _check(file)
    file.write_text(TEXT + '\n[[recipes]]\ntoolchain = "onnx_genai"\nprecision = "fp16"\ntarget = "cpu"\n')
    assert "no Phi can have onnx_genai fp16 cpu: " in _check(file).output
