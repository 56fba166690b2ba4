from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet.toolchains.drivers import process
from fleet.toolchains.drivers.mlx_weights import packed, replace
from fleet.toolchains.drivers.onnx_graph import _packed
from fleet.toolchains.recovery import recovery
from fleet.toolchains.recovery.gptq import (
    LEAST_SQUARES_BYTES,
    STEPS,
    Grid,
    Quantized,
    _rows_at_once,
    fit_scales,
    quantize,
)

torch.set_num_threads(1)  # small steps: a second thread costs more than it does

GRIDS = (
    Grid(4, 16, "symmetric"),
    Grid(4, 16, "asymmetric"),
    Grid(4, 32, "affine"),
    Grid(5, 32, "affine"),
    Grid(4, 16, "expanded"),
    Grid(8, 64, "expanded"),
)


def _loss(weights: torch.Tensor, gram: torch.Tensor, found: Quantized) -> float:
    difference = weights - found.dequantized()
    return float(((difference @ gram) * difference).sum())


def _problem(seed: int, rows: int = 48, columns: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=draw) / columns**0.5
    inputs = torch.randn(512, columns, generator=draw) * torch.rand(columns, generator=draw) @ mix
    return torch.randn(rows, columns, generator=draw) * 0.05, inputs.T @ inputs


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_looking_at_the_inputs_loses_less_than_half_of_rounding(grid: Grid) -> None:
    weights, gram = _problem(1)
    plain = fit_scales(weights, torch.ones(64), grid)
    assert _loss(weights, gram, quantize(weights, gram, grid)) < 0.5 * _loss(weights, gram, plain)


@settings(max_examples=12)
@given(st.integers(0, 2**31), st.sampled_from(GRIDS), st.sampled_from([0.0, 1e-20, 1.0, 1e4]))
def test_whatever_the_weights_the_result_is_on_the_grid(seed: int, grid: Grid, size: float) -> None:
    weights, gram = _problem(seed, rows=8)
    weights = weights * size
    weights[0] = 0
    gram[:, 3] = gram[3] = 0  # an input that is never there
    found = quantize(weights, gram, grid)
    assert found.q.shape == weights.shape and int(found.q.max()) <= grid.top
    assert torch.isfinite(found.scale).all() and torch.isfinite(found.zero).all()
    if grid.kind == "symmetric":
        assert (found.zero == 8).all()
    if grid.kind == "expanded":
        assert (found.zero == 2 ** (grid.bits - 1)).all() and (found.scale > 0).all()
        units = found.scale.amin(1, keepdim=True)
        whole = [found.scale / (units / least) for least in range(1, STEPS + 1)]
        off = torch.stack([(one - one.round()).abs().amax(1) for one in whole]).amin(0)
        assert off.max() < 1e-3, "each is a whole multiple of one number of the row"
    if grid.kind == "asymmetric":
        assert (found.zero == found.zero.round()).all() and found.zero.min() >= 0 and found.zero.max() <= grid.top
    assert (weights - found.dequantized()).abs().max() <= weights.abs().max() + 1e-6


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rows_are_quantized_some_at_a_time_and_come_out_the_same(grid: Grid) -> None:
    weights, gram = _problem(3, rows=_rows_at_once(64, grid) + 48)
    whole, rest = quantize(weights, gram, grid), quantize(weights[-48:], gram, grid)
    for name in ("q", "scale", "zero"):
        assert len(getattr(whole, name)) == len(weights)
        assert torch.equal(getattr(whole, name)[-48:], getattr(rest, name))


@given(st.integers(1, 8192), st.sampled_from([16, 32, 64]), st.sampled_from(["symmetric", "affine"]))
def test_the_least_squares_of_the_rows_at_a_time_fit_what_they_may_take(groups: int, group: int, kind: str) -> None:
    rows = _rows_at_once(groups * group, Grid(4, group, kind))
    unknowns = groups * (2 if kind == "affine" else 1)
    assert rows % 16 == 0 and (rows == 16 or 8 * rows * unknowns**2 <= LEAST_SQUARES_BYTES)


@given(st.integers(2, 8), st.integers(0, 2**31))
def test_bits_are_packed_as_mlx_unpacks_them(bits: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 2**bits, (3, 64)).astype(np.uint8)
    words = packed(values, bits)
    assert words.dtype == np.dtype("<u4") and words.shape == (3, 64 * bits // 32)
    stream = [int.from_bytes(row.tobytes(), "little") for row in words]
    assert [[(row >> (bits * i)) & (2**bits - 1) for i in range(64)] for row in stream] == values.tolist()


def test_mlx_reads_what_was_put_in_its_matrix_s_place(tmp_path: Path) -> None:
    import mlx.core as mx

    weights, gram = _problem(2)
    kinds = ("weight", "scales", "biases")
    there = mx.quantize(mx.random.normal(weights.shape).astype(mx.float16), 32, 4)
    mx.save_safetensors(
        str(tmp_path / "model.safetensors"), {f"a.{kind}": one for kind, one in zip(kinds, there, strict=True)}
    )
    found = quantize(weights, gram, Grid(4, 32, "affine"))
    found.scale = found.scale.T.contiguous().T  # as it may lie in memory
    assert replace(tmp_path, {"a.weight": found}) == 1
    read = mx.load(str(tmp_path / "model.safetensors"))
    values = mx.dequantize(*(read[f"a.{kind}"] for kind in kinds), group_size=32, bits=4)
    assert np.allclose(np.array(values, dtype=np.float32), found.dequantized().numpy(), atol=2e-3)


def test_a_last_product_in_another_file_than_the_embedding_is_no_tied_one(tmp_path: Path) -> None:
    import mlx.core as mx

    weights, gram = _problem(4)
    found = quantize(weights, gram, Grid(4, 32, "affine"))
    kinds = ("weight", "scales", "biases")
    for number, name in enumerate(("model.embed_tokens", "lm_head"), 1):
        there = mx.quantize(mx.random.normal(weights.shape).astype(mx.float16), 32, 4)
        arrays = {f"{name}.{kind}": one for kind, one in zip(kinds, there, strict=True)}
        mx.save_safetensors(str(tmp_path / f"model-0000{number}-of-00002.safetensors"), arrays)
    before = mx.load(str(tmp_path / "model-00001-of-00002.safetensors"))["model.embed_tokens.weight"]
    mx.eval(before)
    assert replace(tmp_path, {"lm_head.weight": found}) == 1
    after = mx.load(str(tmp_path / "model-00001-of-00002.safetensors"))["model.embed_tokens.weight"]
    assert mx.array_equal(after, before)
    read = mx.load(str(tmp_path / "model-00002-of-00002.safetensors"))
    values = mx.dequantize(*(read[f"lm_head.{kind}"] for kind in kinds), group_size=32, bits=4)
    assert np.allclose(np.array(values, dtype=np.float32), found.dequantized().numpy(), atol=2e-3)


@given(st.integers(1, 9), st.integers(0, 2**31))
def test_two_values_a_byte_and_rows_padded_to_bytes(columns: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 16, (4, columns)).astype(np.uint8)
    found = _packed(values, 4)
    assert found.shape == (4, (columns + 1) // 2)
    unpacked = np.stack([found & 15, found >> 4], axis=2).reshape(4, -1)[:, :columns]
    assert (unpacked == values).all()


THREADS = """
import hashlib, torch
from transformers import Phi3Config, Phi3ForCausalLM
from fleet.toolchains.recovery import recovery
from fleet.toolchains.drivers import process
from fleet.toolchains.recovery.gptq import Grid
config = Phi3Config(hidden_size=576, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=9,
                    num_key_value_heads=3, vocab_size=512, pad_token_id=0)
wanted = recovery.Wanted(lambda name: Grid(4, 32, "symmetric"))
for threads in (1, 2, 3):
    torch.manual_seed(0)
    recovery.use_threads(threads)
    with torch.inference_mode():
        model, ids = Phi3ForCausalLM(config).eval(), torch.randint(0, 512, (8, 128))
        found = recovery._Walk(model, ids, wanted, lambda step: None).run()
    parts = [part.numpy().tobytes() for one in found.values() for part in (one.q, one.scale)]
    print(hashlib.sha256(b"".join(parts)).hexdigest())
"""


def test_recovered_weights_do_not_depend_on_the_number_of_threads() -> None:
    """LAPACK shares matrices of this size out, and its sums came out in another order for each number of threads."""
    told = subprocess.run(
        [sys.executable, "-c", THREADS],
        env=os.environ | process.ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert len(told) == 3 and len(set(told)) == 1


def test_the_layers_run_by_parts_are_the_layers() -> None:
    """What the walk carries on is what the quantized model computes, and matrices are quantized as they run."""
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model, ids = Phi3ForCausalLM(config).eval(), torch.randint(0, 128, (6, 32))
    with torch.inference_mode():
        walk = recovery._Walk(model, ids, recovery.Wanted(lambda name: Grid(4, 32, "symmetric")), lambda step: None)
        found = walk.run()
        states = list(model.model.embed_tokens(ids).split(4))
        for layer in model.model.layers:
            states = [walk._through(layer, part) for part in states]
    assert torch.equal(torch.cat(states), torch.cat(walk._rounded))
    order = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]
    assert list(found) == [f"model.layers.{layer}.{name}.weight" for layer in (0, 1) for name in order]
