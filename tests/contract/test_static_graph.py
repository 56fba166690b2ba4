"""The arithmetic that agent and fleet share around an NPU's graphs: tables of numbers, and what a token may see."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from agent.contract.static_graph import StaticEmbedding, StaticModel, StaticSequence, embedded


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_the_table_are_what_was_quantized(bits: int) -> None:
    draw = np.random.default_rng(bits)
    numbers = draw.integers(-8, 8, (10, 16)) if bits == 4 else draw.integers(-128, 128, (10, 16))
    scales = draw.uniform(0.01, 1, (10, 2)).astype(np.float16)
    values = (
        (numbers[:, 0::2] + 8 | numbers[:, 1::2] + 8 << 4).astype(np.uint8)
        if bits == 4
        else numbers.astype(np.int8).view(np.uint8)
    )
    table = StaticEmbedding(values="v", scales="s", bits=bits, group=8, times=3.0)
    found = embedded(table, 16, values, scales, [7, 0, 7])
    assert found.dtype == np.float32
    expected = 3.0 * numbers * np.repeat(scales.astype(np.float32), 8, axis=1)
    assert np.allclose(found, expected[[7, 0, 7]])


@pytest.mark.parametrize("window", [None, 3])
def test_a_token_sees_what_is_before_it_and_no_further_than_a_sliding_window(window: int | None) -> None:
    model = StaticModel.model_validate(
        {
            "context": 16, "window": 4, "layers": 1, "hidden": 8, "kv_heads": 1, "head_size": 4, "vocabulary": 32,
            "hidden_by": -64.0, "ends": [2], "sliding_window": window,
            "rope": {"short": [1, 0.1], "long": [1, 0.1], "original_context": 16},
            "sizes": "z", "embedding": {"values": "e", "scales": "s", "bits": 8, "group": 8},
            "parts": [{"first": 0, "last": 1, "window": "w", "token": "t"}], "head": "h",
        }
    )  # fmt: skip
    masks: list[Any] = []

    def run(graph: str, feeds: Any) -> dict[str, Any]:
        masks.append(feeds["mask"])
        size = feeds["hidden"].shape[1]
        keys, values = np.zeros((1, 1, 4, size), np.uint8), np.zeros((1, 1, size, 4), np.uint8)
        return {"output": feeds["hidden"], "keys_0": keys, "values_0": values}

    sequence = StaticSequence(
        model, lambda tokens: np.zeros((len(tokens), 8), np.float32), run, np.ones(16, np.float32)
    )
    for piece in ([1] * 4, [1] * 4, [1]):
        sequence.advance(piece)
    # The last of the second window stands at 7; of what is held it sees the first four, and the new ones up to itself.
    seen = np.flatnonzero(masks[1][0, 0, 3] == 0)
    assert list(seen) == ([0, 1, 2, 3, 12, 13, 14, 15] if window is None else [13, 14, 15])
    assert list(np.flatnonzero(masks[2][0, 0, 0] == 0)) == ([*range(8), 15] if window is None else [6, 7, 15])
    assert set(np.unique(masks[1])) == {-64.0, 0.0}
