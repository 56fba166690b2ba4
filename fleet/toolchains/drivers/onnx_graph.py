"""Looks at what the model builder wrote, proves that its options took effect, and replaces weights in place."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from fleet.errors import BuildError
from fleet.toolchains.recovery.gptq import nearest
from fleet.toolchains.recovery.recovery import EMBEDDING, OUTPUT

if TYPE_CHECKING:
    from fleet.toolchains.recovery.gptq import Grid, Quantized

_LAYER = re.compile(r"/model/layers\.(\d+)/(attn|mlp)/(\w+_proj)/MatMul")
#: As the builder orders the nodes of a layer, and the checkpoint the rows.
_ATTENTION = ("q_proj", "k_proj", "v_proj")
_GATED = ("gate_proj", "up_proj")
#: ``onnx.TensorProto`` FLOAT and FLOAT16.
_SCALES = {1: "<f4", 10: "<f2"}
_PARTS = {"attn": "self_attn", "mlp": "mlp"}
#: Weights begin at multiples of the first, which vector instructions want, and those of a mebibyte and more at
#: multiples of the second, so that every system can map them.
_ALIGNED, _MAPPED, _LARGE = 64, 65536, 1 << 20


@dataclass(frozen=True, slots=True)
class Product:
    """One ``MatMulNBits`` node; ``weight``, ``scales`` and ``zeros`` are names of initializers, zeros may be empty."""

    name: str
    bits: int
    block: int
    accuracy: int
    rows: int
    columns: int
    weight: str
    scales: str
    zeros: str


class OnnxGraph:
    """``model.onnx`` without its weights, which stay in the file beside it."""

    def __init__(self, path: Path) -> None:
        import onnx

        self._path = path
        self._proto: Any = onnx.load(str(path), load_external_data=False)

    def unstamp(self) -> None:
        """The builder stamps the git commit of the folder it is installed in: keep its version alone."""
        self._proto.producer_version = version("onnxruntime-genai")
        self._path.write_bytes(self._proto.SerializeToString(deterministic=True))

    def kv_element_bytes(self) -> float:
        """Of one element of the KV cache.

        Raises:
            BuildError: there is none.
        """
        import onnx

        sizes = {onnx.TensorProto.FLOAT: 4.0, onnx.TensorProto.FLOAT16: 2.0, onnx.TensorProto.BFLOAT16: 2.0}
        for value in self._proto.graph.input:
            if value.name.startswith("past_key_values"):
                return sizes.get(value.type.tensor_type.elem_type, 1.0)
        raise BuildError(f"{self._path}: the builder wrote a model without a KV cache")

    def products(self) -> Iterator[Product]:
        """Yield every quantized matrix product, in graph order."""
        yield from map(_product, self._products())

    def plain_products(self) -> int:
        """Matrix products with a weight that is not quantized."""
        weights = {tensor.name for tensor in self._proto.graph.initializer}
        return sum(node.op_type == "MatMul" and node.input[1] in weights for node in self._proto.graph.node)

    def check(self, bits: int, options: dict[str, Any]) -> dict[str, Any]:
        """Compare the graph with what was asked for; what was found, for the manifest.

        The builder accepts names of options that it does not know, and ignores them.

        Raises:
            BuildError: an option did not take effect.
        """
        products = list(self.products())
        by_bits = {product.bits for product in products}
        mixed = bool(options.get("mixed"))
        wrong = []
        if not products or self.plain_products():
            wrong.append(f"{self.plain_products()} products are not quantized, {len(products)} are")
        if by_bits - {bits, 8} or (mixed and 8 not in by_bits) or (not mixed and by_bits != {bits}):
            wrong.append(f"bits are {self.widths()}")
        for product in products:
            if product.block != options["block_size"] or product.accuracy != options["accuracy_level"]:
                wrong.append(f"{product.name} has block {product.block} and accuracy level {product.accuracy}")
                break
        if any(bool(product.zeros) == options["symmetric"] for product in products) and not self._always_zeros(options):
            wrong.append("symmetric is not what was asked for")
        named = any(re.search(r"_Q\dG\d+$", product.weight) for product in products)
        if named != (options["algorithm"] != "default"):
            wrong.append(f"the algorithm {options['algorithm']} was not used")
        if wrong:
            raise BuildError(f"the model builder ignored an option: {'; '.join(wrong)}")
        return {"products": self.widths()}

    def widths(self) -> dict[str, int]:
        """How many products there are of each width."""
        counts = Counter(product.bits for product in self.products())
        return {f"int{bits}": count for bits, count in sorted(counts.items())}

    @staticmethod
    def _always_zeros(options: dict[str, Any]) -> bool:
        return bool(options["algorithm"] == "k_quant")

    def replace(self, found: Mapping[str, Quantized], grids: Mapping[str, Grid]) -> int:
        """Put quantized matrices in the place of the builder's; how many products took one.

        ``found`` and their ``grids`` are by names in the checkpoint. A last product that is the embedding too is looked
        up in as well.

        Raises:
            BuildError: a matrix has no place, or another shape.
        """
        new: dict[str, Any] = {}
        done = 0
        filled: dict[str, int] = {}  # rows of a fused matrix that products before this one have taken
        for node in self._products():
            product = _product(node)
            name = _source_of(product.name)
            matrix = found.get(name)
            if matrix is None:
                continue
            begin = filled.get(name, 0)
            filled[name] = begin + product.rows
            rows = slice(begin, begin + product.rows)
            new |= self._requantize(node, product, matrix, grids[name], rows)
            done += 1
        for name, matrix in found.items():
            if name in filled and filled[name] != len(matrix.q):
                raise BuildError(f"{name}: the model builder has {filled[name]} rows, the checkpoint {len(matrix.q)}")
        if own := found.get(EMBEDDING):
            new |= self._own_embedding(own, grids[EMBEDDING])
            filled[EMBEDDING] = len(own.q)
        if absent := sorted(set(found) - set(filled)):
            raise BuildError(f"the model builder left no place for {', '.join(absent[:3])}")
        self._store(new)
        return done

    def embedding(self) -> Any:
        """The embedding that the builder left unquantized, shape (words, columns); None where it is the last product's.

        Mapped, not read.
        """
        import numpy as np

        gather = self._lookup()
        if gather.op_type != "Gather":
            return None
        place = self._place(gather.input[0])
        where = _where(place)
        kind = {1: np.float32, 10: np.float16}[place.data_type]
        return np.memmap(self._data, kind, "r", offset=where.offset, shape=tuple(place.dims))

    def quantize_embedding(self, grid: Grid, *, tied: bool) -> None:
        """Look rows up in quantized weights: in the last product's where the two are one matrix, else in its own.

        A no-op where it is so already, and where rows do not divide into the grid's groups.
        """
        import numpy as np
        import torch

        values = self.embedding()
        if values is None or (not tied and values.shape[1] % grid.group):
            return
        if tied:
            self._share(next(one for one in self.products() if one.name.startswith("/lm_head/")))
            self._store({})
            return
        self._store(self._own_embedding(nearest(torch.from_numpy(np.array(values)), grid), grid))

    # --- nodes ---

    def _products(self) -> Iterator[Any]:
        return (node for node in self._proto.graph.node if node.op_type == "MatMulNBits")

    def _lookup(self) -> Any:
        """The node that looks the embedding up."""
        for node in self._proto.graph.node:
            if node.name.startswith("/model/embed_tokens/Gather"):
                return node
        raise BuildError(f"{self._path}: the builder wrote a model without an embedding")

    def _requantize(self, node: Any, product: Product, matrix: Quantized, grid: Grid, rows: slice) -> dict[str, Any]:
        """Make the node a product with these rows of the matrix; its new initializers."""
        columns = product.columns
        if matrix.q.shape[1] != columns:
            raise BuildError(f"{product.name}: the model builder has rows of {columns}, not of {matrix.q.shape[1]}")
        arrays = _arrays(matrix, grid, rows, _SCALES[self._place(product.scales).data_type])
        arrays[0] = arrays[0].reshape(product.rows, columns // grid.group, grid.group * grid.bits // 8)
        names = (product.weight, product.scales, product.zeros or f"{product.weight}_zeros")[: len(arrays)]
        del node.input[1:]
        node.input.extend(names)
        _set(node, bits=grid.bits, block_size=grid.group)
        if self._lookup().op_type == "GatherBlockQuantized" and product.name.startswith("/lm_head/"):
            self._share(_product(node))
        return dict(zip(names, arrays, strict=True))

    def _own_embedding(self, matrix: Quantized, grid: Grid) -> dict[str, Any]:
        """Look rows up in this matrix; its initializers."""
        gather = self._lookup()
        weight = gather.input[0]
        names = (f"{weight}_Q{grid.bits}", f"{weight}_scales", f"{weight}_zeros")
        arrays = _arrays(matrix, grid, slice(None), _SCALES[self._place(weight).data_type])
        self._look_up(gather, names[: len(arrays)], gather.input[1], grid.bits, grid.group)
        return dict(zip(names, arrays, strict=False))

    def _share(self, product: Product) -> None:
        """Look rows up in the weights of this product, whose blocks are rows of their own there."""
        import numpy as np
        import onnx

        gather = self._lookup()
        graph = self._proto.graph
        ids = gather.input[1]
        flat, shape = "/model/embed_tokens/Reshape", "/model/embed_tokens/shape"
        for old in [node for node in graph.node if node.name == flat]:
            graph.node.remove(old)
        for old in [tensor for tensor in graph.initializer if tensor.name == shape]:
            graph.initializer.remove(old)
        row = product.columns * product.bits // 8
        graph.initializer.append(onnx.numpy_helper.from_array(np.array([product.rows, row]), shape))
        node = onnx.helper.make_node("Reshape", [product.weight, shape], [f"{flat}/output_0"], name=flat)
        graph.node.insert(list(graph.node).index(gather), node)
        weights = [f"{flat}/output_0", product.scales, *([product.zeros] if product.zeros else [])]
        self._look_up(gather, weights, ids, product.bits, product.block)

    @staticmethod
    def _look_up(gather: Any, weights: Sequence[str], ids: str, bits: int, block: int) -> None:
        gather.op_type, gather.domain = "GatherBlockQuantized", "com.microsoft"
        del gather.input[:]
        gather.input.extend([weights[0], ids, *weights[1:]])
        _set(gather, bits=bits, block_size=block, gather_axis=0, quantize_axis=1)

    # --- weights ---

    @property
    def _data(self) -> Path:
        return self._path.with_name(f"{self._path.name}.data")

    def _place(self, name: str) -> Any:
        for tensor in self._proto.graph.initializer:
            if tensor.name == name:
                return tensor
        raise BuildError(f"{self._path}: the builder wrote no {name}")

    def _store(self, new: Mapping[str, Any]) -> None:
        """Write the weights that a node reads: those in ``new`` as they are there, others as they were."""
        import onnx

        graph = self._proto.graph
        read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
        tensors = {tensor.name: tensor for tensor in graph.initializer if tensor.name in read}
        for name, array in new.items():
            kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            tensors[name] = onnx.TensorProto(name=name, data_type=kind, dims=array.shape)
        made = self._data.with_suffix(".new")
        with self._data.open("rb") as old, made.open("wb") as out:
            for name, tensor in tensors.items():
                if name not in new and tensor.data_location != onnx.TensorProto.EXTERNAL:
                    continue
                was = _where(tensor) if name not in new else None
                length = was.length if was else new[name].nbytes
                out.write(bytes(-out.tell() % (_MAPPED if length >= _LARGE else _ALIGNED)))
                _external(tensor, self._data.name, out.tell(), length)
                if was:
                    old.seek(was.offset)
                    _copy(old, out, was.length)
                else:
                    out.write(new[name].tobytes())
        made.replace(self._data)
        del graph.initializer[:]
        graph.initializer.extend(tensors.values())


def _source_of(product: str) -> str:
    """Return the name that the weight has in a checkpoint, which fuses q, k, v and gate, up, in this order of rows."""
    if product.startswith("/lm_head/"):
        return OUTPUT
    match = _LAYER.match(product)
    if match is None:
        return ""
    layer, block, part = match.groups()
    fused = "qkv_proj" if part in _ATTENTION else "gate_up_proj" if part in _GATED else part
    return f"model.layers.{layer}.{_PARTS[block]}.{fused}.weight"


def _product(node: Any) -> Product:
    of = {attribute.name: attribute.i for attribute in node.attribute}
    return Product(
        node.name, of.get("bits", 4), of["block_size"], of.get("accuracy_level", 0), of["N"], of["K"],
        node.input[1], node.input[2], node.input[3] if len(node.input) > 3 else "",
    )  # fmt: skip


def _set(node: Any, **values: int) -> None:
    """Attributes of a node, those of the same names replaced."""
    import onnx

    kept = [attribute for attribute in node.attribute if attribute.name not in values]
    del node.attribute[:]
    node.attribute.extend([*kept, *(onnx.helper.make_attribute(name, value) for name, value in values.items())])


def _arrays(matrix: Quantized, grid: Grid, rows: slice, kind: str) -> list[Any]:
    """Weights, scales, and where the grid has them zero points, as the kernels read them: a row of each for each row.

    A symmetric grid's zero is the middle, which kernels take where none is given.
    """
    import numpy as np

    arrays = [_packed(matrix.q[rows].numpy(), grid.bits), matrix.scale[rows].numpy().astype(kind)]
    if grid.kind != "symmetric":
        arrays.append(_packed(matrix.zero[rows].round().numpy().astype(np.uint8), grid.bits))
    return arrays


def _packed(values: Any, bits: int) -> Any:
    """Two 4-bit values a byte, the first in the low half; rows padded to whole bytes."""
    import numpy as np

    if bits == 8:
        return values
    if values.shape[1] % 2:
        values = np.pad(values, ((0, 0), (0, 1)))
    return (values[:, 0::2] | (values[:, 1::2] << 4)).astype(np.uint8)


@dataclass(frozen=True, slots=True)
class _Where:
    offset: int
    length: int


def _where(tensor: Any) -> _Where:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if "length" not in entries:
        raise BuildError(f"{tensor.name}: the model builder wrote it into the graph, not into the file of weights")
    return _Where(int(entries.get("offset", 0)), int(entries["length"]))


def _external(tensor: Any, location: str, offset: int, length: int) -> None:
    import onnx

    del tensor.external_data[:]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.append(onnx.StringStringEntryProto(key=key, value=value))


def _copy(source: BinaryIO, target: BinaryIO, length: int) -> None:
    while length:
        piece = source.read(min(length, 1 << 20))
        if not piece:
            raise BuildError("the model builder wrote fewer weights than its graph names")
        target.write(piece)
        length -= len(piece)
