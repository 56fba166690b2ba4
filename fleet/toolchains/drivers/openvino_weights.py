"""Replaces INT4 constants in a model that NNCF compressed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fleet.errors import BuildError
from fleet.toolchains.recovery.gptq import Grid

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
        import numpy as np
        import openvino
        from openvino.op import Constant

        old = self._nodes.get(name)
        if old is None or tuple(old.get_output_shape(0)) != shape:
            found = "none" if old is None else tuple(old.get_output_shape(0))
            raise BuildError(f"{name}: NNCF has a constant of shape {found}, the recovered one is {shape}")
        kind = old.get_element_type()
        if kind.get_type_name() in _KINDS:
            flat = values.astype(np.uint8).ravel()
            # Into memory of its own: a tensor made of a packed array lies in that array without keeping it.
            tensor = openvino.Tensor(kind, openvino.Shape(shape))
            tensor.data[:] = flat[0::2] | (flat[1::2] << 4)
        else:
            tensor = openvino.Tensor(values.astype(kind.to_dtype()).reshape(shape))
        new = Constant(tensor)
        new.set_friendly_name(name)
        old.output(0).replace(new.output(0))
        self._nodes[name] = new
