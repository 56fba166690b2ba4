"""What decisions say at their edges: documents from tables, unknown fields, values that compare with nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fleet.core import support
from fleet.core.checkpoint_config import refusals
from fleet.core.evidence import Gate, detectable
from fleet.core.frontier import choose
from fleet.core.phi_variants import find_variant
from fleet.core.plan import candidates, first_legal
from fleet.core.plan_shape import ModelShape
from fleet.core.plan_size import ggml_type
from fleet.core.profiles import parse_profile
from fleet.core.rollout_spec import Wave
from fleet.core.selectors import SelectorError, matches, parse, unparse
from fleet.errors import ProfileError
from fleet.profiles_loader import load_profile, profile_paths
from tests.fleet.core.test_frontier import artifact, profile

TEXT = profile_paths()["iot-x86"].read_text(encoding="utf-8")


def shape(name: str) -> ModelShape:
    variant = find_variant(name)
    assert variant is not None
    return variant.shape


def test_the_matrix_of_the_documents_is_what_the_rules_say() -> None:
    document = Path(__file__).parents[3] / "docs" / "support-matrix.md"
    assert document.read_text("utf-8").endswith(support.markdown())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (TEXT.replace("[health]", "[health]\ncolour = 1"), "field health.colour is unknown (allowed here: "),
        (TEXT.replace("[[recipes]]", "[[recipes]]\nspeed = 1", 1), "field recipes.0.speed is unknown (allowed here: "),
        ("colour = 1\n" + TEXT, "field colour is unknown (allowed here: "),
    ],
)
def test_an_unknown_field_of_a_profile_is_named_with_those_that_there_are(text: str, says: str) -> None:
    with pytest.raises(ProfileError) as raised:
        parse_profile(text, "x.toml")
    assert says in str(raised.value)


def test_a_profile_without_recipes_has_nothing_to_build() -> None:
    with pytest.raises(ProfileError, match="the profile has no recipes"):
        first_legal(())


def test_a_model_whose_context_is_shorter_is_noted() -> None:
    wanted = load_profile("iot-x86").model_copy(update={"context": 8192})
    notes = [note for one in candidates(shape("phi-2"), wanted) for note in one.notes]
    assert "the model's context is 2048, shorter than the profile's 8192" in notes


def test_what_is_slow_on_the_build_machine_is_not_chosen() -> None:
    limits = load_profile("iot-x86").health.model_copy(update={"tokens_per_s_min": 50.0, "ttft_ms_p95": 10.0})
    chosen = choose([artifact(10, 0.01, tpot=1000.0)], profile(health=limits))
    said = " ".join(str(value) for value in vars_of(chosen))
    assert "1.0 tokens/s on the build machine are under 50" in said
    assert "20 ms to the first token on the build machine are past 10" in said


def vars_of(value: Any) -> list[Any]:
    return [getattr(value, name) for name in value.__dataclass_fields__]


@pytest.mark.parametrize(
    ("kind", "matrix", "calibrated", "expected"),
    [
        ("Q4_0", "ffn_down", True, "Q4_1"),
        ("Q4_0", "ffn_down", False, "Q4_0"),
        ("IQ4_NL", "ffn_down", False, "Q5_K"),
        ("IQ4_NL", "ffn_down", True, "IQ4_NL"),
        ("Q4_K_S", "ffn_down", False, "Q5_K"),
        ("Q4_K_S", "attn_qkv", False, "Q5_K"),
        ("Q4_K_M", "attn_qkv", False, "Q6_K"),
        ("IQ4_XS", "attn_qkv", False, "Q5_K"),
    ],
)
def test_early_layers_get_the_types_that_llama_cpp_gives_them(
    kind: str, matrix: str, calibrated: bool, expected: str
) -> None:
    model = shape("phi-4")  # four queries to each key
    first = next(one for one in model.linears() if one.name == matrix and one.layer == 0)
    options: dict[str, Any] = {"calibration": "text.txt"} if calibrated else {}
    assert ggml_type(first, model, kind, options) == expected


@pytest.mark.parametrize(
    ("wave", "text", "of_a_hundred"),
    [
        (Wave(devices=3), "3", 3),
        (Wave(percent=2.5), "2.5%", 2),
        (Wave(selector="label.ring=first"), "label.ring=first", None),
    ],
)
def test_a_wave_reads_as_it_is_written(wave: Wave, text: str, of_a_hundred: int | None) -> None:
    assert (str(wave), wave.take(100)) == (text, of_a_hundred)


@pytest.mark.parametrize(
    ("text", "facts", "meant"),
    [
        ("cpus>3", {"cpus": "many"}, False),  # a device says what is no number
        ("agent>=0.2", {"agent": "unknown"}, False),
        ("cpus=4", {"cpus": 4}, True),
        ("cpus!=4", {}, True),
        ("not (name=a or name=b)", {"name": "c"}, True),
        ("has label.site or (name=a and cpus<2)", {"name": "a", "cpus": 1}, True),
    ],
)
def test_what_compares_with_nothing_is_not_meant(text: str, facts: dict[str, Any], meant: bool) -> None:
    selector = parse(text)
    assert matches(selector, facts) is meant
    assert parse(unparse(selector)) == selector


def test_an_error_within_quotes_points_at_the_mark() -> None:
    with pytest.raises(SelectorError) as raised:
        parse('name=a "b"')
    assert str(raised.value).endswith('\n  name=a "b"\n         ^')


def test_what_few_devices_among_many_groups_can_show_is_nothing() -> None:
    assert detectable(8, Gate(), groups=10**6) is None
    assert detectable(3, Gate()) is None


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("mlp_bias", True, "mlp_bias is true, and no Phi has that"),
        ("qk_layernorm", True, "qk_layernorm is true, and no toolchain builds it"),
        ("rms_norm_eps", 0.0, "rms_norm_eps is 0.0, and must be a number above 0"),
        ("rope_theta", True, "rope_theta is True, and must be a number above 1"),
    ],
)
def test_a_network_that_nobody_builds_is_refused(field: str, value: Any, says: str) -> None:
    variant = find_variant("phi-4-mini")
    assert variant is not None
    assert says in list(refusals({**variant.config, field: value}, variant.shape))
    assert list(refusals({**variant.config, "rope_scaling": "longrope"}, variant.shape)) == []
