"""Writes the static graphs: plain ONNX, with a quantization between all nodes, whose weights lie in a file beside them.

The graphs of a window and of a token share that file. What the NPU does not have is avoided: a product of two computed
16-bit tensors (so keys and values have 8 bits), a lone scale for each head, and lengths that change.

Activations are uint16, but for the hidden states: some tokens have numbers there that are a thousand times those of all
others, and no scale holds both. They are floats, of 16 bits on the NPU, held small enough for the norm's squares.
Weights are int8 with a scale for each output, or int4 in blocks along the inputs whose scales are small whole multiples
of a number for each output: "blockwise expansion" to Qualcomm, and to ONNX a scale that is dequantized itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleet.toolchains.qnn.network import Heads, LayerRanges, Range

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: RMSNormalization came with it.
_OPSET = 23
_IR_VERSION = 11
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Weight:
    """A matrix, inputs by outputs. ``values``: int8 of that shape; at 4 bits from -8 to 7.

    ``scale`` has a number for each output. With ``steps``, uint8 of shape (blocks, outputs), a block's scale is that
    many times the output's.
    """

    values: NDArray[np.int8]
    scale: NDArray[np.float32]
    steps: NDArray[np.uint8] | None = None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Of one layer, queries scaled, elements of queries and keys ordered as the graph rotates them.

    What ``out`` and ``down`` give lies between -1 and 1; ``out_sizes`` and ``down_sizes``, float32 of shape (hidden,),
    are what each channel of it is multiplied by when it is added to the hidden states.
    """

    queries: Weight
    keys: Weight
    values: Weight
    out: Weight
    gate: Weight
    up: Weight
    down: Weight
    out_sizes: NDArray[np.float32]
    down_sizes: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the network and its graphs. ``tokens``: how many go through at once; ``context``: what they attend to."""

    hidden: int
    heads: Heads
    epsilon: float  # of the norms, for hidden states as they are held
    context: int
    tokens: int
    hidden_by: float


@dataclass(slots=True)
class WeightFile:
    """Where the weights of a part go: one file, in the order in which they are first used."""

    path: Path
    entries: dict[str, tuple[int, int]] = field(default_factory=dict)
    size: int = 0

    def place(self, name: str, raw: bytes) -> tuple[int, int]:
        """Write it once; returns its offset and length."""
        if name not in self.entries:
            with self.path.open("ab") as file:
                padding = -self.size % _ALIGNMENT
                file.write(bytes(padding) + raw)
            self.entries[name] = (self.size + padding, len(raw))
            self.size += padding + len(raw)
        return self.entries[name]


def layers_graph(
    path: Path, sizes: Sizes, weights: Sequence[tuple[int, LayerWeights, LayerRanges]], file: WeightFile
) -> None:
    """Write the graph of some layers: hidden states, positions, mask and cache in, hidden states and new cache out."""
    graph = _Graph(file)
    heads, size, context = sizes.heads, sizes.tokens, sizes.context
    graph.input("hidden", "FLOAT", [1, size, sizes.hidden])
    for name in ("cos", "sin"):
        graph.input(name, "FLOAT", [1, 1, size, heads.size])
    graph.input("mask", "FLOAT", [1, 1, size, context])
    hidden = "hidden"
    # LongRoPE multiplies them by a little more than 1.
    cos, sin = (graph.between(name, Range(-2, 2)) for name in ("cos", "sin"))
    mask = graph.between("mask", Range(sizes.hidden_by, 0))
    for number, layer, ranges in weights:
        hidden = _Layer(graph, sizes, number, layer, ranges).write(hidden, cos, sin, mask)
    graph.output(hidden, "output", "FLOAT", [1, size, sizes.hidden])
    graph.save(path)


def head_graph(path: Path, sizes: Sizes, head: Weight, norm: Range, logits: Range, file: WeightFile) -> None:
    """Write the graph of the last norm and the last matrix."""
    graph = _Graph(file)
    graph.input("hidden", "FLOAT", [1, sizes.tokens, sizes.hidden])
    found = graph.norm("hidden", sizes, norm)
    found = graph.product(found, "head", head, logits)
    graph.output(found, "logits", "FLOAT", [1, sizes.tokens, len(head.scale)])
    graph.save(path)


class _Layer:
    def __init__(self, graph: _Graph, sizes: Sizes, number: int, weights: LayerWeights, ranges: LayerRanges) -> None:
        self._graph, self._sizes, self._number = graph, sizes, number
        self._weights, self._ranges = weights, ranges

    def write(self, hidden: str, cos: str, sin: str, mask: str) -> str:
        graph, ranges, weights, number = self._graph, self._ranges, self._weights, self._number
        normed = graph.norm(hidden, self._sizes, ranges.first_norm)
        attended = self._attention(normed, cos, sin, mask)
        attention = graph.product(attended, f"{number}.out", weights.out, Range(-1, 1))
        middle = self._added(hidden, attention, "out")
        normed = graph.norm(middle, self._sizes, ranges.second_norm)
        gate = graph.product(normed, f"{number}.gate", weights.gate, ranges.gate)
        up = graph.product(normed, f"{number}.up", weights.up, ranges.up)
        share = graph.between(graph.node("Sigmoid", [gate]), Range(0, 1))
        activated = graph.between(graph.node("Mul", [gate, share]), ranges.activated)
        product = graph.between(graph.node("Mul", [activated, up]), ranges.product)
        down = graph.product(product, f"{number}.down", weights.down, Range(-1, 1))
        return self._added(middle, down, "down")

    def _added(self, hidden: str, change: str, name: str) -> str:
        """Return the hidden states after a change. They are floats, float16 on the NPU, and nothing between is not."""
        graph = self._graph
        # An input: the bytes of float constants changed from one compilation to the next, see ``compiling``.
        back = graph.input(f"{name}_sizes_{self._number}", "FLOAT", [1, 1, self._sizes.hidden])
        return graph.node("Add", [hidden, graph.node("Mul", [change, back])])

    def _attention(self, normed: str, cos: str, sin: str, mask: str) -> str:
        graph, ranges, heads, size = self._graph, self._ranges, self._sizes.heads, self._sizes.tokens
        queries = self._rotated(normed, "queries", heads.queries, ranges.queries, cos, sin)
        grouped = graph.shaped(queries, [heads.keys, 1, heads.group * size, heads.size], ranges.queries)
        keys = self._rotated(normed, "keys", heads.keys, ranges.keys, cos, sin)
        all_keys = self._cached("keys", graph.node("Transpose", [keys], perm=[1, 0, 3, 2]), ranges.keys, axis=3)
        values = self._split(normed, "values", heads.keys, ranges.values)
        turned = graph.node("Transpose", [values], perm=[1, 0, 2, 3])
        all_values = self._cached("values", turned, ranges.values, axis=2)
        scores = graph.between(graph.node("MatMul", [grouped, all_keys]), ranges.scores)
        apart = graph.shaped(scores, [heads.keys, heads.group, size, self._sizes.context], ranges.scores)
        masked = Range(ranges.scores.low + self._sizes.hidden_by, ranges.scores.high)
        apart = graph.between(graph.node("Add", [apart, mask]), masked)
        shares = graph.between(graph.node("Softmax", [apart], axis=-1), Range(0, 1))
        shares = graph.shaped(shares, [heads.keys, 1, heads.group * size, self._sizes.context], Range(0, 1))
        found = graph.between(graph.node("MatMul", [shares, all_values]), ranges.attended)
        found = graph.shaped(found, [1, heads.queries, size, heads.size], ranges.attended)
        found = graph.between(graph.node("Transpose", [found], perm=[0, 2, 1, 3]), ranges.attended)
        return graph.shaped(found, [1, size, heads.queries * heads.size], ranges.attended)

    def _split(self, normed: str, name: str, count: int, within: Range) -> str:
        """Return queries, keys or values, shape (1, heads, tokens, head)."""
        graph, sizes = self._graph, self._sizes
        found = graph.product(normed, f"{self._number}.{name}", getattr(self._weights, name), within)
        found = graph.shaped(found, [1, sizes.tokens, count, sizes.heads.size], within)
        return graph.between(graph.node("Transpose", [found], perm=[0, 2, 1, 3]), within)

    def _rotated(self, normed: str, name: str, count: int, within: Range, cos: str, sin: str) -> str:
        graph, size = self._graph, self._sizes.heads.size
        apart = self._split(normed, name, count, within)
        # A number that is rotated is never larger than its pair, nor is either part of the sum.
        most = max(-within.low, within.high) * 2**0.5
        even = Range(-most, most)
        halves = [
            graph.between(graph.node("Slice", [apart, *graph.ends(at, at + size // 2, axis=3)]), within)
            for at in (size // 2, 0)
        ]
        swapped = graph.between(graph.node("Concat", halves, axis=3), within)
        along = graph.between(graph.node("Mul", [apart, cos]), even)
        across = graph.between(graph.node("Mul", [swapped, sin]), even)
        return graph.between(graph.node("Add", [along, across]), within)

    def _cached(self, name: str, new: str, within: Range, axis: int) -> str:
        """Put what is held before what is new, both of 8 bits; what is new leaves the graph."""
        graph, heads, sizes = self._graph, self._sizes.heads, self._sizes
        held, new_shape = [heads.keys, 1, heads.size, heads.size], [heads.keys, 1, heads.size, heads.size]
        held[axis], new_shape[axis] = sizes.context - sizes.tokens, sizes.tokens
        past = graph.input(f"past_{name}_{self._number}", "UINT8", held)
        scale = graph.scale(within, bits=8)
        quantized = graph.node("QuantizeLinear", [new, *scale], out=f"{name}_{self._number}")
        graph.result(quantized, "UINT8", new_shape)
        both = [graph.node("DequantizeLinear", [one, *scale]) for one in (past, quantized)]
        return graph.between(graph.node("Concat", both, axis=axis), within, bits=8)


class _Graph:
    """Nodes, constants, and the quantizations between them."""

    def __init__(self, file: WeightFile) -> None:
        self._file = file
        self._nodes: list[Any] = []
        self._constants: dict[str, Any] = {}
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []

    def node(self, kind: str, inputs: Sequence[str], *, out: str = "", **attributes: Any) -> str:
        """Add a node; returns the name of its output."""
        from onnx import helper

        name = out or f"t{len(self._nodes)}"
        self._nodes.append(
            helper.make_node(kind, list(inputs), [name], name=f"{kind}_{len(self._nodes)}", **attributes)
        )
        return name

    def input(self, name: str, kind: str, shape: Sequence[int]) -> str:
        """Add an input."""
        from onnx import TensorProto, helper

        self._inputs.append(helper.make_tensor_value_info(name, getattr(TensorProto, kind), shape))
        return name

    def result(self, name: str, kind: str, shape: Sequence[int]) -> None:
        """Let a tensor leave the graph under its own name."""
        from onnx import TensorProto, helper

        self._outputs.append(helper.make_tensor_value_info(name, getattr(TensorProto, kind), shape))

    def output(self, tensor: str, name: str, kind: str, shape: Sequence[int]) -> None:
        """Let the tensor that was written last leave the graph under a new name."""
        last = self._nodes[-1]
        if last.output[0] != tensor:
            raise ValueError(f"{tensor} is not what was written last")
        last.output[0] = name
        self.result(name, kind, shape)

    def scale(self, within: Range, *, bits: int = 16) -> tuple[str, str]:
        """Return the names of a scale and a zero point for numbers in this range; zero is among them."""
        import numpy as np

        low, high = min(within.low, 0.0), max(within.high, 0.0)
        top = 2**bits - 1
        step = max((high - low) / top, 1e-9)
        kind = np.uint8 if bits == 8 else np.uint16
        # By their values: the same scale is one constant, and an NPU moves data between equal scales for nothing.
        zero = round(-low / step)
        name = f"scale{bits}_{np.float32(step)!r}_{zero}"
        return self.constant(name, np.array(step, np.float32)), self.constant(f"{name}_zero", np.array(zero, kind))

    def between(self, tensor: str, within: Range, *, bits: int = 16) -> str:
        """Quantize and dequantize; returns the name of what the next node reads."""
        scale = self.scale(within, bits=bits)
        return self.node("DequantizeLinear", [self.node("QuantizeLinear", [tensor, *scale]), *scale])

    def shaped(self, tensor: str, shape: Sequence[int], within: Range) -> str:
        """Return it in another shape."""
        import numpy as np

        wanted = self.constant(f"shape_{'_'.join(map(str, shape))}", np.array(shape, np.int64))
        return self.between(self.node("Reshape", [tensor, wanted]), within)

    def ends(self, begin: int, end: int, axis: int) -> list[str]:
        """Return the constants that a Slice wants."""
        import numpy as np

        return [self.constant(f"at_{value}", np.array([value], np.int64)) for value in (begin, end, axis)]

    def norm(self, tensor: str, sizes: Sizes, within: Range) -> str:
        """Return it normalized, without gains, which the next matrix has."""
        import numpy as np

        ones = self.constant("gains", np.ones(sizes.hidden, np.float32))
        found = self.node("RMSNormalization", [tensor, ones], axis=-1, epsilon=sizes.epsilon)
        return self.between(found, within)

    def product(self, tensor: str, name: str, weight: Weight, within: Range) -> str:
        """Return the tensor times a matrix."""
        return self.between(self.node("MatMul", [tensor, self._weight(name, weight)]), within)

    def _weight(self, name: str, weight: Weight) -> str:
        import numpy as np

        scale = self.constant(f"{name}.scale", weight.scale)
        if weight.steps is None:
            values = self._outside(name, "INT8", weight.values.shape, weight.values.tobytes())
            zero = self.constant(f"{name}.zero", np.zeros(len(weight.scale), np.int8))
            return self.node("DequantizeLinear", [values, scale, zero], axis=1)
        values = self._outside(name, "INT4", weight.values.shape, _packed(weight.values))
        steps = self._outside(f"{name}.steps", "UINT8", weight.steps.shape, weight.steps.tobytes())
        zero = self.constant(f"{name}.zero", np.zeros(len(weight.scale), np.uint8))
        blocks = self.node("DequantizeLinear", [steps, scale, zero], axis=1)
        none = self._outside(f"{name}.none", "INT4", weight.steps.shape, bytes((weight.steps.size + 1) // 2))
        size = weight.values.shape[0] // weight.steps.shape[0]
        return self.node("DequantizeLinear", [values, blocks, none], axis=0, block_size=size)

    def constant(self, name: str, values: Any) -> str:
        """Add a constant, once."""
        from onnx import numpy_helper

        if name not in self._constants:
            self._constants[name] = numpy_helper.from_array(values, name)
        return name

    def _outside(self, name: str, kind: str, shape: Sequence[int], raw: bytes) -> str:
        """Add a constant whose bytes are in the file."""
        from onnx import StringStringEntryProto, TensorProto

        offset, length = self._file.place(name, raw)
        tensor = TensorProto(name=name, data_type=getattr(TensorProto, kind), dims=list(shape))
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self._file.path.name), ("offset", str(offset)), ("length", str(length))):
            tensor.external_data.append(StringStringEntryProto(key=key, value=value))
        self._constants[name] = tensor
        return name

    def save(self, path: Path) -> None:
        """Write it."""
        from onnx import helper

        graph = helper.make_graph(self._nodes, path.stem, self._inputs, self._outputs, list(self._constants.values()))
        opsets = [helper.make_opsetid("", _OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="phifleet")
        path.write_bytes(model.SerializeToString(deterministic=True))


def _packed(values: NDArray[np.int8]) -> bytes:
    """Two numbers in a byte, the first in its low half."""
    flat = values.reshape(-1).view("uint8") & 15
    return bytes((flat[0::2] | (flat[1::2] << 4)).astype("uint8").tobytes())
