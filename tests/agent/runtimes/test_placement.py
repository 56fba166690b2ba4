"""What share of a model its device computes: from the runtimes' own words, with a real fallback to a CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from agent.runtimes.engines.onnx_qnn import RUNTIME as QNN
from agent.runtimes.engines.placement import RECORD, of_devices, of_graph, of_layers, of_sessions
from tests.agent.runtimes.conftest import tiny_artifact_of


def _graph() -> bytes:
    """Three nodes, of which an NPU takes two: where values are not zero hangs on the values."""
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["y"]),
        helper.make_node("NonZero", ["y"], ["where"]),
        helper.make_node("Relu", ["y"], ["z"]),
    ]
    weight = helper.make_tensor("weight", TensorProto.FLOAT, [8, 8], np.eye(8, dtype=np.float32).ravel())
    made = helper.make_graph(
        nodes,
        "part",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 8])],
        [
            helper.make_tensor_value_info("z", TensorProto.FLOAT, [4, 8]),
            helper.make_tensor_value_info("where", TensorProto.INT64, [2, None]),
        ],
        [weight],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)])
    model.ir_version = 10
    return bytes(onnx.ModelProto.SerializeToString(model))


def _session(*, on_npu: bool) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(RECORD, "1")
    if on_npu:
        import onnxruntime_qnn as qnn

        assert QNN.check().devices == ("SIMULATOR",)  # and the plug-in is registered
        device = next(one for one in ort.get_ep_devices() if one.ep_name == "QNN")
        options.add_provider_for_devices([device], {"backend_path": qnn.get_qnn_htp_path()})
    return ort.InferenceSession(_graph(), options)


def test_nodes_that_fall_back_to_the_cpu_are_counted() -> None:
    npu, cpu = _session(on_npu=True), _session(on_npu=False)
    assert of_sessions([npu], "QNN") == pytest.approx(2 / 3)
    assert of_sessions([npu, cpu], "QNN") == pytest.approx(2 / 6)
    assert of_sessions([cpu], "CPUExecutionProvider") == 1.0
    assert of_sessions([], "QNN") is None


def test_a_graph_is_asked_without_the_session_that_serves() -> None:
    graph = tiny_artifact_of("onnx_genai").files / "model.onnx"
    assert of_graph(graph, "CPUExecutionProvider", 1) == 1.0
    assert of_graph(graph, "CUDAExecutionProvider", 1) is None, "a provider that this ONNX Runtime has not"


LAYERS = {
    "all on the GPU": (["CUDA0", "CUDA0", "CUDA0"], "CUDA", 1.0),
    "over two GPUs": (["CUDA0", "CUDA1", "CUDA1"], "CUDA", 1.0),
    "too little memory for all": (["CPU", "CUDA0", "CUDA0", "CUDA0"], "CUDA", 0.75),
    "no driver: everything on the CPU": (["CPU", "CPU"], "CUDA", 0.0),
    "for the CPU": (["CPU", "CPU"], "CPU", 1.0),
    "a log without such lines": ([], "CUDA", None),
}


@pytest.mark.parametrize("case", LAYERS)
def test_layers_are_where_llamacpp_says(case: str) -> None:
    devices, asked, share = LAYERS[case]
    lines = [f"load_tensors: layer {at:3d} assigned to device {name}, is_swa = 0\n" for at, name in enumerate(devices)]
    assert of_layers(["llama_model_loader: loaded\n", *lines, *lines], asked) == share


def test_openvino_names_the_devices_that_execute() -> None:
    import openvino

    model = tiny_artifact_of("openvino_genai").files / "openvino_model.xml"
    executing = openvino.Core().compile_model(str(model), "CPU").get_property("EXECUTION_DEVICES")
    assert of_devices(executing, "CPU") == 1.0
    assert of_devices(["GPU.0", "(CPU)"], "GPU") == 0.5
    assert of_devices([], "GPU") is None
