"""What share of a model its device computes, as the runtime itself tells it, so that no CPU takes over unseen.

The share counts nodes (ONNX Runtime) or layers (llama.cpp). A graph for a GPU keeps a few nodes on the CPU by design:
those that compute shapes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

#: ONNX Runtime's key of a session's options that makes it keep which provider took which node.
RECORD = "session.record_ep_graph_assignment_info"
_LAYER = re.compile(r"layer\s+(\d+) assigned to device ([^\s,]+)")


def asked(device: str, ask: Callable[[], float | None]) -> float | None:
    """Return what ``ask`` finds out by loading a model once more; None, and a line in the log, where that fails.

    A CPU is not asked: nothing is below it to fall back to.
    """
    if device == "CPU":
        return 1.0
    try:
        return ask()
    except Exception as error:  # native runtimes raise anything; it serves without this figure as well
        print(f"what {device} computes of the model is not known: {error}", flush=True)  # noqa: T201 - the daemon's log
        return None


def of_sessions(sessions: Iterable[Any], provider: str) -> float | None:
    """Return the share of nodes that ``provider`` took; the sessions were made with ``RECORD``.

    None: there are no nodes, or this ONNX Runtime is one from before 1.24, which does not tell.
    """
    here = total = 0
    for session in sessions:
        told = getattr(session, "get_provider_graph_assignment_info", tuple)
        for part in told():
            nodes = len(part.get_nodes())
            total += nodes
            here += nodes if part.ep_name == provider else 0
    return here / total if total else None


def of_graph(graph: Path, provider: str, threads: int) -> float | None:
    """Load a graph for this question alone, and drop it; None where this ONNX Runtime does not have the provider.

    For whoever does not own the session that serves, as with ONNX Runtime GenAI.
    """
    import onnxruntime as ort

    if provider not in ort.get_available_providers():
        return None
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry(RECORD, "1")
    return of_sessions([ort.InferenceSession(str(graph), options, providers=[provider])], provider)


def of_layers(lines: Iterable[str], device: str) -> float | None:
    """Return the share of layers on ``device`` by llama.cpp's log of a load; anything but CPU is any of its GPUs."""
    layers = {int(found[1]): found[2] for line in lines if (found := _LAYER.search(line))}
    if not layers:
        return None
    on_cpu: float = sum(name == "CPU" for name in layers.values()) / len(layers)
    return on_cpu if device == "CPU" else 1 - on_cpu


def of_devices(devices: Iterable[str], device: str) -> float | None:
    """Return the share of OpenVINO's execution devices that are ``device``, whichever of its kind (``GPU.0``)."""
    names = [name.split(".")[0].strip("()") for name in devices]
    return names.count(device) / len(names) if names else None
