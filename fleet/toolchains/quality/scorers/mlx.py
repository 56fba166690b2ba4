"""MLX models in mlx-lm.

On a Linux CPU, MLX multiplies matrices at about 3 GFLOP/s, so that scoring would take half an hour. There, and
there alone, the products of weights are computed by NumPy on the same dequantized weights, inside MLX's own model; a
short sequence is first put through MLX's own kernels, and both must agree.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from fleet.errors import BuildError
from fleet.toolchains.drivers.mlx import widen_quantized
from fleet.toolchains.quality.divergence import compare
from fleet.toolchains.quality.scorers import Opened, Timing

_SAMPLE_TOKENS = 12
#: Mean KL divergence, nats. MLX's CPU kernels sum float16 products in float16, which costs 0.004; Metal's do not. Wrong
#: weights would cost a hundred times as much.
_AGREE_WITHIN = 0.02


class Mlx:
    """A model, lazily evaluated."""

    def __init__(self, opened: Opened) -> None:
        import mlx.core as mx
        from mlx_lm.utils import load_model

        self._mx = mx
        self._model, _ = load_model(opened.path)
        widen_quantized(self._model)
        self._slow = not mx.metal.is_available()

    def generate(self, prompt: Sequence[int], tokens: int) -> Timing:
        """Greedily, with MLX's cache."""
        from mlx_lm.models.cache import make_prompt_cache

        cache = make_prompt_cache(self._model)
        began = time.perf_counter()
        token = self._next(prompt, cache)
        first = time.perf_counter()
        for _ in range(tokens - 1):
            token = self._next([token], cache)
        each = (time.perf_counter() - first) / (tokens - 1)
        return Timing((first - began) * 1e3, each * 1e3)

    def prepare_logits(self) -> None:
        """Where MLX has no fast kernels: put NumPy's matrix product in."""
        if not self._slow:
            return
        ids = list(range(100, 100 + _SAMPLE_TOKENS))
        own = self.logits(ids, 1)
        _multiply_by_numpy(self._model)
        difference = float(compare(own, self.logits(ids, 1), ids[1:]).divergence.mean())
        if difference > _AGREE_WITHIN:
            raise BuildError(f"MLX's own kernels and its weights in NumPy differ: KL divergence {difference:.3g}")

    def logits(self, ids: Sequence[int], start: int) -> Any:
        """In one pass."""
        import numpy as np

        found = self._model(self._mx.array([list(ids)]))[0, start - 1 : len(ids) - 1]
        return np.array(found.astype(self._mx.float32))

    def _next(self, ids: Sequence[int], cache: Any) -> int:
        logits = self._model(self._mx.array([list(ids)]), cache=cache)[0, -1]
        token: Any = self._mx.argmax(logits).tolist()
        return int(token)


def _multiply_by_numpy(model: Any) -> None:
    import mlx.core as mx
    from mlx import nn
    from mlx.utils import tree_map

    class Product(nn.Module):  # type: ignore[misc]  # mlx ships no types
        """A linear layer, summed in float32 as Metal does, its result in the model's own type."""

        def __init__(self, weight: Any, bias: Any = None) -> None:
            super().__init__()
            self._columns, self._bias = _numpy(weight).T, None if bias is None else _numpy(bias)

        def __call__(self, inputs: Any) -> Any:
            found = _numpy(inputs) @ self._columns
            return mx.array(found if self._bias is None else found + self._bias).astype(inputs.dtype)

        def as_linear(self, inputs: Any) -> Any:
            return self(inputs)

    class Lookup(Product):
        """An embedding; tied models use it for the output too."""

        def __init__(self, rows: Any, weight: Any) -> None:
            super().__init__(weight)
            self.rows = rows

        def __call__(self, inputs: Any) -> Any:
            return self.rows[inputs]

        def as_linear(self, inputs: Any) -> Any:
            return super().__call__(inputs)

    def replace(layer: Any) -> Any:
        if isinstance(layer, (nn.Embedding, nn.QuantizedEmbedding)):
            return Lookup(_weights(layer).astype(_dtype(layer)), _weights(layer))
        if isinstance(layer, (nn.Linear, nn.QuantizedLinear)):
            return Product(_weights(layer), layer.get("bias"))
        return layer

    layers = tree_map(replace, model.leaf_modules(), is_leaf=nn.Module.is_module)
    model.update_modules(layers)
    mx.eval(model.parameters())


def _weights(layer: Any) -> Any:
    """In float32, as kernels take them."""
    import mlx.core as mx

    if "scales" not in layer:
        return layer.weight.astype(mx.float32)
    scales, biases = layer.scales.astype(mx.float32), layer.get("biases")
    biases = None if biases is None else biases.astype(mx.float32)
    return mx.dequantize(layer.weight, scales, biases, group_size=layer.group_size, bits=layer.bits, mode=layer.mode)


def _dtype(layer: Any) -> Any:
    return (layer.scales if "scales" in layer else layer.weight).dtype


def _numpy(array: Any) -> Any:
    import mlx.core as mx
    import numpy as np

    return np.array(array.astype(mx.float32), copy=False)


def load(opened: Opened) -> Mlx:
    """Open a model folder."""
    return Mlx(opened)
