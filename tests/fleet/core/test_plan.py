from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.contract.manifest import Precision, Target, Toolchain
from agent.contract.profile import Recipe
from fleet.cli.plan import resolver
from fleet.core.phi_variants import VARIANTS, find_variant
from fleet.core.plan import as_json, candidates, first_legal, judge
from fleet.core.plan_memory import MIB, memory_need
from fleet.core.plan_shape import ModelShape, shape_of
from fleet.core.plan_size import predicted_bytes
from fleet.core.rules import BUILDS
from fleet.errors import ModelError, ProfileError
from fleet.profiles_loader import load_profile

RECIPES = [
    Recipe(toolchain=toolchain, precision=precision, target=target)
    for toolchain, targets in BUILDS.items()
    for target, precisions in targets.items()
    for precision in precisions
]


def shape(name: str) -> ModelShape:
    variant = find_variant(name)
    assert variant is not None
    return variant.shape


#: As the model cards have it, in billions.
PARAMETERS = {
    "phi-2": 2.78, "phi-3-mini-4k": 3.82, "phi-3-mini-128k": 3.82, "phi-3.5-mini": 3.82, "phi-4": 14.66,
    "phi-4-mini": 3.84, "phi-3.5-moe": 41.9,
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_the_shapes_have_as_many_weights_as_the_published_models(variant: Any) -> None:
    assert variant.shape.parameters / 1e9 == pytest.approx(PARAMETERS[variant.name], rel=0.005)


#: Sizes of files that are published, in GB: the hub's GGUF of Phi-4-mini and Phi-4, and of Phi-3-mini-4k.
PUBLISHED = [
    ("phi-4-mini", "llamacpp", "int4", {"type": "Q4_K_M"}, 2.49),
    ("phi-4-mini", "llamacpp", "int8", {}, 4.08),
    ("phi-4", "llamacpp", "int4", {"type": "Q4_K_M"}, 9.05),
    ("phi-4", "llamacpp", "int8", {}, 15.58),
    ("phi-3-mini-4k", "llamacpp", "int4", {"type": "Q4_K_M"}, 2.39),
    ("phi-3-mini-4k", "llamacpp", "int8", {}, 4.06),
]


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: " ".join(map(str, row)))
def test_predicted_sizes_are_those_of_published_files(row: tuple[str, str, str, dict[str, Any], float]) -> None:
    model, toolchain, precision, options, gigabytes = row
    recipe = Recipe(toolchain=Toolchain(toolchain), precision=Precision(precision), target=Target.CPU, options=options)
    assert predicted_bytes(shape(model), recipe) / 1e9 == pytest.approx(gigabytes, rel=0.01)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda one: f"{one.toolchain} {one.precision} {one.target}")
def test_size_grows_with_the_model_and_with_the_precision(recipe: Recipe) -> None:
    small, large = predicted_bytes(shape("phi-4-mini"), recipe), predicted_bytes(shape("phi-4"), recipe)
    assert 0 < small < large
    bits = {Precision.INT4: 4, Precision.INT8: 8, Precision.FP16: 16, Precision.BF16: 16, Precision.FP32: 32}
    assert large / shape("phi-4").parameters * 8 == pytest.approx(bits[recipe.precision], rel=0.5)


@given(
    st.sampled_from(RECIPES), st.integers(1, 48), st.integers(1, 8), st.integers(1, 4),
    st.sampled_from([64, 80, 96, 128]), st.integers(1, 400), st.booleans(),
)  # fmt: skip
def test_any_network_has_a_size_and_a_memory(
    recipe: Recipe, layers: int, kv_heads: int, ratio: int, head: int, vocabulary: int, tied: bool
) -> None:
    config = {
        "architectures": ["Phi3ForCausalLM"], "hidden_size": kv_heads * ratio * head, "num_hidden_layers": layers,
        "intermediate_size": 4 * head, "num_attention_heads": kv_heads * ratio, "num_key_value_heads": kv_heads,
        "vocab_size": 512 * vocabulary, "max_position_embeddings": 4096, "tie_word_embeddings": tied,
    }  # fmt: skip
    model = shape_of(config, name="any")
    size = predicted_bytes(model, recipe)
    need = memory_need(model, recipe, size, 2048)
    assert size > model.parameters * 0.4
    assert need.at_context(2048) > size
    assert need.at_context(2048) > need.at_context(1024)


@given(
    st.sampled_from([recipe for recipe in RECIPES if recipe.precision is Precision.INT4]),
    st.dictionaries(
        st.sampled_from(["group_size", "block_size", "ratio", "type", "mixed", "bits_of", "tensor_types", "awq",
                         "embedding_type", "calibration", "recover", "symmetric", "colour"]),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
        | st.lists(st.integers(), max_size=2)
        | st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3)),
        max_size=3,
    ),
)  # fmt: skip
def test_whatever_a_profile_asks_for_is_planned_or_refused(recipe: Recipe, options: dict[str, Any]) -> None:
    model = shape("phi-4-mini")
    asked = recipe.model_copy(update={"options": options})
    found = judge(model, load_profile("ai-pc-cpu"), asked, resolver(model, "phi-4-mini"))
    assert found.size_bytes > 0
    if "colour" in options:
        assert not found.legal


def test_mlx_on_a_cpu_holds_scales_and_offsets_in_float32() -> None:
    model = shape("phi-4-mini")
    on = {
        target: memory_need(model, Recipe(toolchain="mlx", precision="int4", target=target), 10**9, 1)
        for target in (Target.CPU, Target.METAL)
    }
    more = on[Target.CPU].weights_bytes - on[Target.METAL].weights_bytes
    assert more == model.parameters // 64 * (4 + 4 - 2 - 2)
    assert on[Target.CPU].kv_bytes_per_token == 2 * on[Target.METAL].kv_bytes_per_token


def test_configs_of_transformers_5_are_read_as_the_hubs_are() -> None:
    hub = shape("phi-4-mini")
    variant = find_variant("phi-4-mini")
    assert variant is not None
    config = {name: value for name, value in variant.config.items() if name not in ("rope_scaling", "torch_dtype")}
    config |= {
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 4096,
            "partial_rotary_factor": 0.75, "short_factor": [], "long_factor": [],
        },
        "dtype": "bfloat16",
    }  # fmt: skip
    assert replace(shape_of(config, name="phi-4-mini"), license="mit") == hub
    assert hub.longrope
    assert hub.original_context == 4096
    assert hub.sliding_window is None


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"model_type": "gemma"}, "gemma"),
        ({"architectures": ["Phi3ForCausalLM"], "hidden_size": 64}, "size"),
        ({"architectures": ["Phi3ForCausalLM"], "hidden_size": "wide"}, "size"),
    ],
)
def test_what_is_no_phi_is_named(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        shape_of(config, name="x")


def test_a_budget_that_is_too_small_is_refused_with_the_figures() -> None:
    profile = load_profile("iot-x86").model_copy(update={"memory_bytes": 2 * 2**30, "disk_bytes": 3 * 2**30})
    found = judge(shape("phi-4-mini"), profile, profile.recipes[0])
    assert [one.rule for one in found.refusals] == ["memory-budget", "disk-budget"]
    assert "2048 MiB" in found.refusals[0].reason
    assert f"{found.peak_memory_bytes / MIB:.0f} MiB" in found.refusals[0].reason


def test_the_context_is_what_the_model_has() -> None:
    found = candidates(shape("phi-2"), load_profile("iot-x86"))
    assert {one.context for one in found} == {2048}
    assert all("shorter than the profile's 4096" in one.notes[0] for one in found)


def test_a_toolchains_own_refusal_is_one_of_the_plan() -> None:
    def resolve(recipe: Recipe) -> dict[str, Any]:
        raise ProfileError(f"{recipe.toolchain} has no option x")

    profile = load_profile("iot-x86")
    found = candidates(shape("phi-4-mini"), profile, resolve)
    assert found[0].refusals[0].rule == "toolchain-options"
    with pytest.raises(ProfileError, match=r"iot-x86: no toolchain can give.*\n.*llamacpp int4 cpu .*: .*no option x"):
        first_legal(found)


def test_the_first_legal_recipe_is_taken_and_everything_is_json() -> None:
    found = candidates(shape("phi-2"), load_profile("copilot-pc-qnn"))
    assert not found[0].legal
    assert first_legal(found).recipe.toolchain is Toolchain.LLAMACPP
    rows = json.loads(json.dumps([as_json(one) for one in found]))
    assert [row["legal"] for row in rows] == [False, True, True]
    assert rows[0]["refusals"][0]["source"]


def test_embeddings_are_counted_once_where_they_are_shared() -> None:
    model = shape("phi-4-mini")
    for recipe in RECIPES:
        apart = predicted_bytes(replace(model, tied=False), recipe)
        assert predicted_bytes(model, recipe) <= apart
