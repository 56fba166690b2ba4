"""What an ONNX artifact says of itself: for targets that are not here, beside what a CPU can compute of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fleet.toolchains.drivers.onnx_graph import OnnxGraph


def look(folder: Path) -> dict[str, Any]:
    """``provider`` that genai_config.json names, and the ``weights`` of all matrix products, as precisions."""
    config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    providers = config["model"]["decoder"]["session_options"]["provider_options"]
    return {"provider": "".join(name for one in providers for name in one) or "cpu", "weights": _weights(folder)}


def _weights(folder: Path) -> list[str]:
    import onnx

    names = {onnx.TensorProto.FLOAT: "fp32", onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.BFLOAT16: "bf16"}
    graph = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph
    types = {tensor.name: names.get(tensor.data_type, "other") for tensor in graph.initializer}
    plain = {types[node.input[1]] for node in graph.node if node.op_type == "MatMul" and node.input[1] in types}
    return sorted(plain | {f"int{product.bits}" for product in OnnxGraph(folder / "model.onnx").products()})


def has_kernels(folder: Path) -> bool:
    """Whether ONNX Runtime can run it on a CPU. It looks for kernels after it has checked the graph and its types."""
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

    try:
        onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    except NoKernel:
        return False
    return True
