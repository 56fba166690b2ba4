"""The matrices of a network that is made ready, quantized and in the order in which the graphs want them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from agent.contract.static_graph import StaticRope
from fleet.core.rules import QNN_BLOCK
from fleet.toolchains.qnn.graph import LayerWeights, Weight
from fleet.toolchains.qnn.network import LayerRanges, heads_of, rotated
from fleet.toolchains.recovery.gptq import Grid, Quantized, fit_scales, round_to

if TYPE_CHECKING:
    from torch import Tensor


def grid_of(bits: int, columns: int) -> Grid:
    """Return what the weights of a row of so many can be: positive scales, of blocks at 4 bits, of the row at 8."""
    return Grid(bits, QNN_BLOCK if bits == 4 else columns, "expanded")


class Matrices:
    """Quantizes what a loaded model has, or takes from ``recovered`` what is quantized already.

    ``bits_of`` says how many bits the matrix of a name has; ``recovered`` has matrices by that name, which is that in
    the checkpoint, outputs by inputs.
    """

    def __init__(self, model: Any, bits_of: Callable[[str], int], recovered: Mapping[str, Quantized]) -> None:
        self._model, self._bits_of, self._recovered = model, bits_of, recovered
        self._heads, self._rotary = heads_of(model), rotated(model)

    def layer(self, number: int, ranges: LayerRanges, hidden_scale: float) -> LayerWeights:
        """Return the matrices of a layer, whose hidden states are held ``hidden_scale`` times as large."""
        import torch

        layer, name = self._model.model.layers[number], f"model.layers.{number}"
        fused = self._quantized(f"{name}.self_attn.qkv_proj.weight", layer.self_attn.qkv_proj.weight)
        both = self._quantized(f"{name}.mlp.gate_up_proj.weight", layer.mlp.gate_up_proj.weight)
        heads = self._heads
        rows = torch.arange(fused.q.shape[0])
        queries, keys, values = heads.split(rows)
        half = both.q.shape[0] // 2
        order = _order(heads.size, self._rotary)
        out_sizes, down_sizes = (one.sizes().numpy() for one in (ranges.attention, ranges.down))
        return LayerWeights(
            # The scores' scale is in the queries: it changes the numbers of rows, and no rounded value.
            queries=_weight(_rows(fused, _reordered(queries, heads.size, order)), heads.size**-0.5),
            keys=_weight(_rows(fused, _reordered(keys, heads.size, order))),
            values=_weight(_rows(fused, values)),
            out=_weight(
                self._quantized(f"{name}.self_attn.o_proj.weight", layer.self_attn.o_proj.weight), 1 / out_sizes
            ),
            gate=_weight(_rows(both, torch.arange(half))),
            up=_weight(_rows(both, torch.arange(half, 2 * half))),
            down=_weight(self._quantized(f"{name}.mlp.down_proj.weight", layer.mlp.down_proj.weight), 1 / down_sizes),
            out_sizes=out_sizes * hidden_scale,
            down_sizes=down_sizes * hidden_scale,
        )

    def head(self) -> Weight:
        """Return the last matrix."""
        return _weight(self._quantized("lm_head.weight", self._model.lm_head.weight))

    def _quantized(self, name: str, weights: Tensor) -> Quantized:
        import torch

        if name in self._recovered:
            return self._recovered[name]
        grid = grid_of(self._bits_of(name), weights.shape[1])
        return fit_scales(weights.data, torch.ones(weights.shape[1]), grid)


def embedding(model: Any, bits: int, group: int) -> tuple[bytes, bytes]:
    """Return the embedding's values and its float16 scales, as ``StaticEmbedding`` describes them."""
    import numpy as np
    import torch

    table = model.model.embed_tokens.weight.data
    grid = Grid(bits, group, "symmetric")
    found = fit_scales(table, torch.ones(table.shape[1]), grid)
    found.scale = found.scale.half().float()
    found.scale = torch.where(found.scale.abs() < 1e-7, torch.full_like(found.scale, 1e-7).half().float(), found.scale)
    round_to(table, grid, found)
    q = found.q.numpy()
    values = q[:, 0::2] | (q[:, 1::2] << 4) if bits == 4 else (q.astype(np.int16) - 128).astype(np.int8)
    return values.tobytes(), found.scale.numpy().astype(np.float16).tobytes()


def rope(model: Any, context: int) -> StaticRope:
    """Return the rotary positions of a loaded model, for sequences of up to ``context`` tokens."""
    import torch

    config, heads = model.config, heads_of(model)
    body = model.model.rotary_emb
    own = tuple(float(one) for one in body.inv_freq)
    short, long, factor, original = own, own, float(getattr(body, "attention_scaling", 1.0)), context
    if body.rope_type == "longrope":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        parameters = config.rope_parameters
        original = int(parameters["original_max_position_embeddings"])
        make: Callable[..., tuple[Tensor, float]] = ROPE_INIT_FUNCTIONS["longrope"]
        (shorts, factor), (longs, _) = (make(config, torch.device("cpu"), seq_len=n) for n in (original, original + 1))
        short, long = tuple(map(float, shorts)), tuple(map(float, longs))
    still = (0.0,) * (heads.size // 2 - len(own))
    return StaticRope(short=short + still, long=long + still, original_context=original, factor=factor)


def _order(size: int, rotary: int) -> list[int]:
    """The elements of a head so that the one that is ``size / 2`` further is an element's pair.

    Those that are not rotated stand in the same places of both halves.
    """
    half, rest = rotary // 2, (size - rotary) // 2
    first = [*range(half), *range(rotary, rotary + rest)]
    return [*first, *range(half, rotary), *range(rotary + rest, size)]


def _reordered(rows: Tensor, size: int, order: list[int]) -> Tensor:
    return rows.reshape(-1, size)[:, order].reshape(-1)


def _rows(of: Quantized, rows: Tensor) -> Quantized:
    return Quantized(of.q[rows], of.scale[rows], of.zero[rows])


def _weight(found: Quantized, times: Any = 1.0) -> Weight:
    """Inputs by outputs, as a product of rows wants it; ``times`` is for all outputs, or for each."""
    import numpy as np

    groups = found.scale.shape[1]
    middle = int(found.zero.flatten()[0])
    values = np.ascontiguousarray((found.q.numpy().astype(np.int16) - middle).astype(np.int8).T)
    if groups == 1:
        return Weight(values, (found.scale[:, 0].numpy() * times).astype(np.float32))
    steps, scale = _steps(found.scale)
    return Weight(values, (scale.numpy() * times).astype(np.float32), np.ascontiguousarray(steps.numpy().T))


def _steps(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return what whole multiples of which number the scales of each row are: the grid made them so."""
    import torch

    from fleet.toolchains.recovery.gptq import STEPS

    best = torch.full((len(scales),), float("inf"))
    unit = torch.ones(len(scales))
    largest = scales.amax(1)
    for top in range(STEPS, 0, -1):  # the largest may itself be less than the most
        trial = largest / top
        multiple = (scales / trial[:, None]).round().clamp(1, STEPS)
        error = (multiple * trial[:, None] - scales).abs().amax(1) / largest
        better = error < best - 1e-6
        best, unit = torch.where(better, error, best), torch.where(better, trial, unit)
    return (scales / unit[:, None]).round().clamp(1, STEPS).to(torch.uint8), unit
