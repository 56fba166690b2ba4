"""Compiles static graphs for Qualcomm's HTP with ``onnxruntime-qnn``, which brings the compiler and its simulator.

No Qualcomm machine is needed, and none of Qualcomm's libraries goes into what comes out: a small graph around a
binary that the device's driver loads.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fleet.errors import BuildError
from fleet.toolchains.progress import Progress, ProgressCallback

#: Generation of the HTP to a SoC of it, by Qualcomm's numbers: the compiler wants both.
SOC_OF = {68: 30, 73: 60, 75: 57, 79: 69, 81: 88}
_EP = "QNN"


def provider() -> Any:
    """Return the device of the plug-in, registered in this process.

    Raises:
        BuildError: it is not there.
    """
    import onnxruntime as ort
    import onnxruntime_qnn as qnn

    if not any(one.ep_name == _EP for one in ort.get_ep_devices()):
        ort.register_execution_provider_library(_EP, qnn.get_library_path())
    found = next((one for one in ort.get_ep_devices() if one.ep_name == _EP), None)
    if found is None:
        raise BuildError("onnxruntime-qnn offers no device here; its compiler runs on x86-64 Linux and on Windows")
    return found


def compile_graphs(
    graphs: Sequence[Path], out: Path, scratch: Path, *, arch: int, progress: ProgressCallback, done: float
) -> None:
    """Compile graphs into one binary in ``out`` in which they share their weights.

    A single graph has a binary of its own. Beside the binary is a small graph for each, of the same name.

    ``done`` is the share of all compilations that are over, for ``progress``.

    Raises:
        BuildError: the compiler refuses; the log says why.
    """
    import onnxruntime as ort
    import onnxruntime_qnn as qnn

    device, sessions, shared = provider(), [], "1" if len(graphs) > 1 else "0"
    for number, graph in enumerate(graphs):
        progress(Progress("compiling for the NPU", done, graph.stem))
        options = ort.SessionOptions()
        options.log_severity_level = 3
        last = "1" if number == len(graphs) - 1 else "0"
        wrapped = scratch / f"{graph.stem}.onnx"
        for key, value in {
            "session.disable_cpu_ep_fallback": "1",
            "ep.context_enable": "1",
            "ep.context_embed_mode": "0",
            "ep.context_file_path": str(wrapped),
            "ep.share_ep_contexts": shared,
            "ep.stop_share_ep_contexts": last if len(graphs) > 1 else "0",
        }.items():
            options.add_session_config_entry(key, value)
        settings = {
            "backend_path": qnn.get_qnn_htp_path(),
            "htp_arch": str(arch),
            "soc_model": str(SOC_OF[arch]),
            "enable_htp_weight_sharing": shared,
        }
        options.add_provider_for_devices([device], settings)
        try:
            # By its name alone: what a graph is called in the binary is a hash of the path that it is opened by.
            with contextlib.chdir(graph.parent):
                sessions.append(ort.InferenceSession(graph.name, options))
        except Exception as error:  # the library raises its own classes, and RuntimeError
            raise BuildError(f"the HTP's compiler refuses {graph.name}: {str(error)[:300]}") from None
    del sessions
    for made in sorted(scratch.iterdir()):
        shutil.move(made, out / made.name)
