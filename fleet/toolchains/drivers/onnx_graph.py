"""Looks at what the model builder wrote, proves that its options took effect, and replaces weights in place."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleet.errors import BuildError

if TYPE_CHECKING:
    from fleet.toolchains.recovery.gptq import Quantized

_LAYER = re.compile(r"/model/layers\.(\d+)/(attn|mlp)/(\w+_proj)/MatMul")
#: As the builder orders the nodes of a layer, and the checkpoint the rows.
_ATTENTION = ("q_proj", "k_proj", "v_proj")
_GATED = ("gate_proj", "up_proj")
#: ``onnx.TensorProto`` FLOAT and FLOAT16.
_SCALES = {1: "<f4", 10: "<f2"}
_PARTS = {"attn": "self_attn", "mlp": "mlp"}


@dataclass(frozen=True, slots=True)
class Product:
    """One ``MatMulNBits`` node; ``weight``, ``scales`` and ``zeros`` are names of initializers, zeros may be empty."""

    name: str
    bits: int
    block: int
    accuracy: int
    rows: int
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
        for node in self._proto.graph.node:
            if node.op_type == "MatMulNBits":
                of = {attribute.name: attribute.i for attribute in node.attribute}
                zeros = node.input[3] if len(node.input) > 3 else ""
                yield Product(
                    node.name, of.get("bits", 4), of["block_size"], of.get("accuracy_level", 0), of["N"],
                    node.input[1], node.input[2], zeros,
                )  # fmt: skip

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
        by_bits = Counter(product.bits for product in products)
        mixed = bool(options.get("mixed"))
        wrong = []
        if not products or self.plain_products():
            wrong.append(f"{self.plain_products()} products are not quantized, {len(products)} are")
        if set(by_bits) - {bits, 8} or (mixed and not by_bits[8]) or (not mixed and set(by_bits) != {bits}):
            wrong.append(f"bits are {dict(by_bits)}")
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
        return {"products": {f"int{key}": count for key, count in sorted(by_bits.items())}}

    @staticmethod
    def _always_zeros(options: dict[str, Any]) -> bool:
        return bool(options["algorithm"] == "k_quant")

    def replace(self, found: dict[str, Quantized]) -> int:
        """Put quantized matrices in the place of the builder's; how many products took one.

        Raises:
            BuildError: a matrix has no place, or another shape.
        """
        import numpy as np

        places = {tensor.name: tensor for tensor in self._proto.graph.initializer}
        data = np.memmap(self._path.with_name("model.onnx.data"), np.uint8, "r+")
        done = 0
        filled: dict[str, int] = {}  # rows of a fused matrix that products before this one have taken
        for product in self.products():
            name = _source_of(product.name)
            matrix = found.get(name)
            if matrix is None:
                continue
            begin = filled.get(name, 0)
            filled[name] = begin + product.rows
            part = slice(begin, begin + product.rows)
            q = matrix.q[part].numpy()
            _write(data, places[product.weight], _packed(q))
            scales = places[product.scales]
            _write(data, scales, matrix.scale[part].numpy().astype(_SCALES[scales.data_type]))
            if product.zeros:
                zeros = matrix.zero[part].round().to(matrix.q.dtype).numpy()
                _write(data, places[product.zeros], _packed(zeros))
            done += 1
        data.flush()
        if absent := sorted(set(found) - set(filled)):
            raise BuildError(f"the model builder left no place for {', '.join(absent[:3])}")
        return done


def _source_of(product: str) -> str:
    """Return the name that the weight has in a checkpoint, which fuses q, k, v and gate, up, in this order of rows."""
    if product.startswith("/lm_head/"):
        return "lm_head.weight"
    match = _LAYER.match(product)
    if match is None:
        return ""
    layer, block, part = match.groups()
    fused = "qkv_proj" if part in _ATTENTION else "gate_up_proj" if part in _GATED else part
    return f"model.layers.{layer}.{_PARTS[block]}.{fused}.weight"


def _packed(values: Any) -> Any:
    """Two 4-bit values a byte, the first in the low half; rows padded to whole bytes."""
    import numpy as np

    if values.shape[1] % 2:
        values = np.pad(values, ((0, 0), (0, 1)))
    return (values[:, 0::2] | (values[:, 1::2] << 4)).astype(np.uint8)


def _write(data: Any, place: Any, values: Any) -> None:
    import numpy as np

    where = {entry.key: entry.value for entry in place.external_data}
    raw = np.frombuffer(values.tobytes(), np.uint8)
    if not where or int(where["length"]) != raw.size:
        raise BuildError(f"{place.name}: the builder reserved {where.get('length', 'no')} bytes, {raw.size} are needed")
    offset = int(where.get("offset", 0))
    data[offset : offset + raw.size] = raw
