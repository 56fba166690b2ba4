from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fleet.core.phi_variants import VARIANTS, find_variant
from fleet.core.plan_shape import NetworkConfig, shape_of
from fleet.errors import ModelError

VARIANT = find_variant("phi-4-mini")
assert VARIANT is not None
CONFIG = dict(VARIANT.config)
INTEGER, TOO_LARGE = "valid integer", "less than or equal to"

REFUSED: tuple[tuple[str, Any, str], ...] = (
    ("hidden_size", None, INTEGER),
    ("hidden_size", "3072", INTEGER),
    ("hidden_size", 10**400, TOO_LARGE),
    ("hidden_size", 3073, "num_attention_heads: .* must divide hidden_size, 3073"),
    ("intermediate_size", float("nan"), INTEGER),
    ("intermediate_size", 8192.5, INTEGER),
    ("num_hidden_layers", -3, "greater than 0"),
    ("num_hidden_layers", True, INTEGER),
    ("num_hidden_layers", 10**6, TOO_LARGE),
    ("num_attention_heads", 0, "greater than 0"),
    ("num_key_value_heads", 7, "must divide num_attention_heads, 24"),
    ("num_key_value_heads", [8], INTEGER),
    ("head_dim", float("inf"), INTEGER),
    ("vocab_size", 0, "greater than 0"),
    ("max_position_embeddings", None, INTEGER),
    ("max_position_embeddings", "131072", INTEGER),
    ("max_position_embeddings", 0, "greater than 0"),
    ("sliding_window", -1, "greater than 0"),
    ("rope_scaling", "longrope", "valid dictionary"),
    ("rope_scaling", {"type": ["su"]}, r"rope_scaling\.type: .*valid string"),
    ("rope_scaling", {"original_max_position_embeddings": "4k"}, r"rope_scaling\.original_max_position_embeddings"),
    ("rope_parameters", [], "valid dictionary"),
    ("partial_rotary_factor", float("nan"), "finite number"),
    ("partial_rotary_factor", 4.0, TOO_LARGE),
    ("num_local_experts", -1, "greater than or equal to 0"),
    ("tie_word_embeddings", "yes", "valid boolean"),
    ("torch_dtype", 16, "valid string"),
)


@pytest.mark.parametrize(("field", "value", "said"), REFUSED, ids=lambda value: f"{value!r:.30}")
def test_a_wrong_size_is_refused_with_file_field_and_what_was_found(field: str, value: Any, said: str) -> None:
    with pytest.raises(ModelError, match=rf"^here/config\.json: .*{said}.*; correct the file") as refused:
        shape_of(CONFIG | {field: value}, name="x", origin="here/config.json")
    assert field in str(refused.value)


@pytest.mark.parametrize("field", [name for name, one in NetworkConfig.model_fields.items() if one.is_required()])
def test_a_size_that_is_missing_is_named(field: str) -> None:
    config = {name: value for name, value in CONFIG.items() if name != field}
    with pytest.raises(ModelError, match=rf"{field}: is missing"):
        shape_of(config, name="x")


@pytest.mark.parametrize(
    ("architectures", "said"),
    [
        ("Phi3ForCausalLM", "garbled: architectures is 'Phi3ForCausalLM', where a list"),
        ({"0": "Phi3ForCausalLM"}, "garbled: architectures is {'0': 'Phi3ForCausalLM'}, where a list"),
        ([5], r"garbled: architectures is \[5\], where a list"),
        (5, "garbled: architectures is 5, where a list"),
        ([], "unnamed, model_type 'phi3'"),
    ],
)
def test_architectures_that_are_no_list_of_names_are_shown(architectures: Any, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        shape_of(CONFIG | {"architectures": architectures}, name="x")


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_published_configs_may_leave_out_what_has_a_default(variant: Any) -> None:
    silent = dict.fromkeys(("head_dim", "num_local_experts", "sliding_window", "rope_scaling", "dtype"))
    bare = shape_of(silent | dict(variant.config), name=variant.name)
    assert replace(bare, license=variant.shape.license) == variant.shape
