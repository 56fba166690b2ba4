"""Makes a Phi-3's network ready for integers: the same function, with numbers that quantize well, and their ranges.

Three changes keep every output as it was. A norm's gains go into the matrices that read it, so that the norm has none.
The channels of the values are brought to one size, since the cache has one scale for all of them: what a channel is
divided by, the matrix after the attention multiplies. The same for the keys, whose pairs under the rotation share a
factor, with the queries. (SmoothQuant, Xiao et al., ICML 2023, moves sizes in this way.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fleet.toolchains.progress import Progress, ProgressCallback

if TYPE_CHECKING:
    from torch import Tensor

#: Sequences of calibration text that are looked at, each of so many tokens.
SEQUENCES = 24
#: How far beyond what was seen an activation may go. It costs a 16-bit number a third of a bit.
_MARGIN = 1.25
#: The cache has 8 bits, and its channels are of one size: none to give away.
_CACHE_MARGIN = 1.0


@dataclass(slots=True)
class Range:
    """The smallest and the largest number seen."""

    low: float = 0.0
    high: float = 0.0

    def see(self, values: Tensor) -> None:
        """Widen it."""
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))

    def wider(self, margin: float) -> Range:
        """Return it with room."""
        return Range(self.low * margin, self.high * margin)


@dataclass(frozen=True, slots=True)
class Heads:
    """How the rows of a fused matrix of queries, keys and values are divided."""

    queries: int
    keys: int
    size: int

    @property
    def group(self) -> int:
        """Heads of queries for each of keys."""
        return self.queries // self.keys

    def split(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values along the last axis."""
        import torch

        parts = torch.split(fused, [self.queries * self.size, self.keys * self.size, self.keys * self.size], dim=-1)
        return parts[0], parts[1], parts[2]


class Channels:
    """The largest number seen of each channel, whichever its sign."""

    def __init__(self) -> None:
        self._largest: Tensor | None = None

    def see(self, values: Tensor) -> None:
        """Widen it."""
        import torch

        found = values.reshape(-1, values.shape[-1]).abs().amax(0)
        self._largest = found if self._largest is None else torch.maximum(self._largest, found)

    def sizes(self) -> Tensor:
        """Return them, with room; none is 0.

        Raises:
            ValueError: nothing was seen.
        """
        if self._largest is None:
            raise ValueError("nothing was seen")
        largest = self._largest * _MARGIN
        return largest.clamp_min(float(largest.max()) * 1e-4 + 1e-9)


@dataclass(slots=True)
class LayerRanges:
    """Of every tensor between the nodes of one layer that is quantized.

    ``scores`` are before the mask, ``queries`` are scaled. ``attention`` and ``down`` are what the layer adds to the
    hidden states: their channels differ by a thousand times, so each has a size of its own.
    """

    first_norm: Range = field(default_factory=Range)
    queries: Range = field(default_factory=Range)
    keys: Range = field(default_factory=Range)
    values: Range = field(default_factory=Range)
    scores: Range = field(default_factory=Range)
    attended: Range = field(default_factory=Range)
    attention: Channels = field(default_factory=Channels)
    second_norm: Range = field(default_factory=Range)
    gate: Range = field(default_factory=Range)
    up: Range = field(default_factory=Range)
    activated: Range = field(default_factory=Range)
    product: Range = field(default_factory=Range)
    down: Channels = field(default_factory=Channels)


@dataclass(slots=True)
class Ranges:
    """Of the whole network."""

    layers: list[LayerRanges]
    hidden: Range = field(default_factory=Range)
    last_norm: Range = field(default_factory=Range)
    logits: Range = field(default_factory=Range)


def heads_of(model: Any) -> Heads:
    """Return the division of a loaded model's fused matrix."""
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Heads(config.num_attention_heads, config.num_key_value_heads, size)


def rotated(model: Any) -> int:
    """Return how many elements of a head are rotated: the first ones."""
    return 2 * int(model.model.rotary_emb.inv_freq.shape[0])


def fold_gains(model: Any) -> None:
    """Put the norms' gains into the matrices that read them; the last matrix is no longer the embedding's."""
    import torch

    body = model.model
    for layer in body.layers:
        for norm, reader in (
            (layer.input_layernorm, layer.self_attn.qkv_proj),
            (layer.post_attention_layernorm, layer.mlp.gate_up_proj),
        ):
            reader.weight.data.mul_(norm.weight.data[None])
            norm.weight.data.fill_(1)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.data * body.norm.weight.data[None], False)
    body.norm.weight.data.fill_(1)


def equalise(model: Any, ids: Tensor, progress: ProgressCallback) -> None:
    """Bring the channels of keys and of values to one size, as they are on the tokens ``ids``."""
    heads, rotary = heads_of(model), rotated(model)
    largest = [_Largest(heads, rotary) for _ in model.model.layers]
    with _watched(
        [(layer.self_attn.qkv_proj, None, one) for layer, one in zip(model.model.layers, largest, strict=True)]
    ):
        _run(model, ids, progress, "looking at keys and values")
    for layer, seen in zip(model.model.layers, largest, strict=True):
        fused, out = layer.self_attn.qkv_proj.weight.data, layer.self_attn.o_proj.weight.data
        q, k, v = (part.T for part in heads.split(fused.T))  # views: rows of the fused matrix
        key = _evened(seen.keys)  # (heads of keys, size)
        k.div_(key.reshape(-1, 1))
        q.mul_(key.repeat_interleave(heads.group, dim=0).reshape(-1, 1))
        value = _evened(seen.values)
        v.div_(value.reshape(-1, 1))
        out.mul_(value.repeat_interleave(heads.group, dim=0).reshape(1, -1))


def _evened(sizes: Tensor) -> Tensor:
    """Return what each channel is divided by; 1 in the middle."""
    sizes = sizes.clamp_min(float(sizes.max()) * 1e-3 + 1e-9)
    found: Tensor = sizes / sizes.log().mean().exp()
    return found


class _Largest:
    """The largest of each channel of keys, where pairs under the rotation count as one, and of values."""

    def __init__(self, heads: Heads, rotary: int) -> None:
        import torch

        self._heads, self._half = heads, rotary // 2
        self.keys, self.values = torch.zeros(heads.keys, heads.size), torch.zeros(heads.keys, heads.size)

    def __call__(self, fused: Tensor) -> None:
        import torch

        heads, half = self._heads, self._half
        _, keys, values = heads.split(fused.reshape(-1, fused.shape[-1]))
        keys = keys.reshape(-1, heads.keys, heads.size).abs()
        pair = torch.hypot(keys[..., :half], keys[..., half : 2 * half])
        keys = torch.cat([pair, pair, keys[..., 2 * half :]], dim=-1).amax(0)
        self.keys = torch.maximum(self.keys, keys)
        self.values = torch.maximum(self.values, values.reshape(-1, heads.keys, heads.size).abs().amax(0))


def observe(model: Any, ids: Tensor, progress: ProgressCallback) -> Ranges:
    """Return the ranges of all that the graphs compute, on the tokens ``ids``, with some room."""
    ranges = Ranges([LayerRanges() for _ in model.model.layers])
    heads = heads_of(model)
    watches: list[tuple[Any, Callable[[Tensor], None] | None, Callable[[Tensor], None] | None]] = []
    for layer, found in zip(model.model.layers, ranges.layers, strict=True):
        watches += [
            (layer.input_layernorm, ranges.hidden.see, found.first_norm.see),
            (layer.self_attn.o_proj, found.attended.see, found.attention.see),
            (layer.post_attention_layernorm, ranges.hidden.see, found.second_norm.see),
            (layer.mlp.gate_up_proj, None, _gated(found)),
            (layer.mlp.down_proj, found.product.see, found.down.see),
        ]
    watches.append((model.model.norm, ranges.hidden.see, ranges.last_norm.see))
    watches.append((model.lm_head, None, ranges.logits.see))
    with _watched(watches), _attention_watched(model, ranges.layers, heads):
        _run(model, ids, progress, "looking at the activations")
    for found in ranges.layers:
        for name in LayerRanges.__slots__:
            margin = _CACHE_MARGIN if name in ("keys", "values") else _MARGIN
            if isinstance(seen := getattr(found, name), Range):
                setattr(found, name, seen.wider(margin))
    ranges.last_norm, ranges.logits = ranges.last_norm.wider(_MARGIN), ranges.logits.wider(_MARGIN)
    return ranges


def _gated(found: LayerRanges) -> Callable[[Tensor], None]:
    def see(both: Tensor) -> None:
        import torch

        gate, up = both.chunk(2, dim=-1)
        found.gate.see(gate)
        found.up.see(up)
        found.activated.see(torch.nn.functional.silu(gate))

    return see


@contextmanager
def _attention_watched(model: Any, layers: Sequence[LayerRanges], heads: Heads) -> Iterator[None]:
    """Queries and keys after the rotation, and their products, which no module of their own shows."""
    import torch
    from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

    def look(found: LayerRanges) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            q, k, v = heads.split(module.qkv_proj(hidden))
            rows = hidden.shape[1]
            q = q.reshape(-1, rows, heads.queries, heads.size).transpose(1, 2) * heads.size**-0.5
            k = k.reshape(-1, rows, heads.keys, heads.size).transpose(1, 2)
            cos, sin = kwargs["position_embeddings"]
            turned, keys = apply_rotary_pos_emb(q, k, cos, sin)
            # Before and after: the graph has one scale for both.
            for values in (q, turned):
                found.queries.see(values)
            for values in (k, keys):
                found.keys.see(values)
            found.values.see(v)
            grouped = turned.reshape(-1, heads.keys, heads.group * rows, heads.size)
            found.scores.see(torch.matmul(grouped, keys.transpose(2, 3)))

        return hook

    handles = [
        layer.self_attn.register_forward_pre_hook(look(found), with_kwargs=True)
        for layer, found in zip(model.model.layers, layers, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _watched(
    watches: Sequence[tuple[Any, Callable[[Tensor], None] | None, Callable[[Tensor], None] | None]],
) -> Iterator[None]:
    """Call for what goes into a module, and for what comes out of it."""

    def first(value: Any) -> Tensor:
        found: Tensor = value[0] if isinstance(value, tuple) else value
        return found

    def hook(before: Callable[[Tensor], None] | None, after: Callable[[Tensor], None] | None) -> Callable[..., None]:
        def call(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            if before is not None:
                before(args[0] if args else kwargs["hidden_states"])
            if after is not None:
                after(first(out))

        return call

    handles = [module.register_forward_hook(hook(before, after), with_kwargs=True) for module, before, after in watches]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run(model: Any, ids: Tensor, progress: ProgressCallback, phase: str) -> None:
    import torch

    rows = ids[:: max(1, len(ids) // SEQUENCES)][:SEQUENCES]
    with torch.inference_mode():
        for at, row in enumerate(rows):
            progress(Progress(phase, at / len(rows)))
            model(row[None], use_cache=False)
