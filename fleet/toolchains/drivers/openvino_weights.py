"""Puts quantized weights into OpenVINO's graphs: in the place of those that NNCF compressed, or of whole ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fleet.errors import BuildError
from fleet.toolchains.recovery.gptq import Grid
from fleet.toolchains.recovery.recovery import EMBEDDING, OUTPUT

if TYPE_CHECKING:
    from fleet.toolchains.recovery.gptq import Quantized

_KINDS = {"u4": "asymmetric", "i4": "symmetric"}


class Constants:
    """The compressed weights of a model, scale and zero point beside them.

    Their shape is (rows, groups, weights of a group), or (rows, columns) where a group is a whole row.
    """

    def __init__(self, model: Any) -> None:
        nodes = (node for node in model.get_ops() if node.get_type_name() == "Constant")
        self._nodes = {node.get_friendly_name(): node for node in nodes}

    def grid_of(self, name: str) -> Grid | None:
        """Return how the weight of this name in the checkpoint was compressed; None where it was not to 4 bits."""
        node = self._nodes.get(f"self.{name}")
        kind = _KINDS.get(node.get_element_type().get_type_name()) if node else None
        return Grid(4, int(tuple(node.get_output_shape(0))[-1]), kind) if node and kind else None

    def replace(self, name: str, matrix: Quantized) -> None:
        """Put a quantized matrix in the place of NNCF's.

        Raises:
            BuildError: it has another shape.
        """
        rows, groups = matrix.scale.shape
        columns = matrix.q.shape[1]
        whole_rows = len(self._nodes[f"self.{name}"].get_output_shape(0)) == 2
        shape = (rows, columns) if whole_rows else (rows, groups, columns // groups)
        beside = (*shape[:-1], 1)
        signed = self._nodes[f"self.{name}"].get_element_type().get_type_name() == "i4"
        q = matrix.q.numpy()
        # Two's complement in four bits is the unsigned value with its top bit turned over.
        self._put(f"self.{name}", q ^ 8 if signed else q, shape)
        if not signed:
            self._put(f"self.{name}/zero_point", matrix.zero.round().numpy(), beside)
        self._put(f"self.{name}/scale", matrix.scale.numpy(), beside)

    def _put(self, name: str, values: Any, shape: tuple[int, ...]) -> None:
        old = self._nodes.get(name)
        if old is None or tuple(old.get_output_shape(0)) != shape:
            found = "none" if old is None else tuple(old.get_output_shape(0))
            raise BuildError(f"{name}: NNCF has a constant of shape {found}, the recovered one is {shape}")
        kind = old.get_element_type()
        new = _constant(name, values, kind, shape)
        old.output(0).replace(new.output(0))
        self._nodes[name] = new


def compress(model: Any, matrices: Mapping[str, Quantized], grids: Mapping[str, Grid]) -> None:
    """Put these matrices, on their grids, in the place of the model's whole ones: as NNCF does, unpacked where read.

    Raises:
        BuildError: the model has no such matrix, or one of another shape.
    """
    import openvino
    from openvino import opset13 as ops

    whole = {node.get_friendly_name(): node for node in model.get_ops() if node.get_type_name() == "Constant"}
    for name, matrix in matrices.items():
        # The embedding's constant is read by the last product too, where the two are one matrix.
        inside = f"self.{EMBEDDING if name == OUTPUT and f'self.{OUTPUT}' not in whole else name}"
        old, grid = whole.get(inside), grids[name]
        rows, columns = matrix.q.shape
        if old is None or tuple(old.get_output_shape(0)) != (rows, columns):
            found = "none" if old is None else tuple(old.get_output_shape(0))
            raise BuildError(f"{inside}: OpenVINO's graph has {found}, the checkpoint {(rows, columns)}")
        groups = columns // grid.group
        grouped = (rows, columns) if groups == 1 else (rows, groups, grid.group)
        beside = (*grouped[:-1], 1)
        kind, half = openvino.Type.u4 if grid.bits == 4 else openvino.Type.u8, openvino.Type.f16
        weights = _constant(inside, matrix.q.numpy(), kind, grouped)
        zeros = _constant(f"{inside}/zero_point", matrix.zero.round().numpy(), kind, beside)
        scales = _constant(f"{inside}/scale", matrix.scale.numpy(), half, beside)
        even = ops.subtract(ops.convert(weights, half), ops.convert(zeros, half))
        values = ops.multiply(even, scales)
        if groups > 1:
            values = ops.reshape(values, [rows, columns], special_zero=False)
        old.output(0).replace(ops.convert(values, old.get_output_element_type(0)).output(0))


def _constant(name: str, values: Any, kind: Any, shape: tuple[int, ...]) -> Any:
    import numpy as np
    import openvino
    from openvino.op import Constant

    if kind.get_type_name() in _KINDS:
        flat = values.astype(np.uint8).ravel()
        if flat.size % 2:
            flat = np.append(flat, np.uint8(0))
        # Into memory of its own: a tensor made of a packed array lies in that array without keeping it.
        tensor = openvino.Tensor(kind, openvino.Shape(shape))
        tensor.data[:] = flat[0::2] | (flat[1::2] << 4)
    else:
        tensor = openvino.Tensor(np.ascontiguousarray(values.astype(kind.to_dtype()).reshape(shape)))
    new = Constant(tensor)
    new.set_friendly_name(name)
    return new
