"""Compiles static graphs for Qualcomm's HTP with ``onnxruntime-qnn``, which brings the compiler and its simulator.

No Qualcomm machine is needed, and none of Qualcomm's libraries goes into what comes out: a small graph around a
binary that the device's driver loads.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agent.platform.parents import die_with_parent
from fleet.errors import BuildError
from fleet.toolchains.progress import Progress, ProgressCallback

#: Generation of the HTP to a SoC of it, by Qualcomm's numbers: the compiler wants both.
SOC_OF = {68: 30, 73: 60, 75: 57, 79: 69, 81: 88}
_EP = "QNN"
_ATTEMPTS = 4
#: The compiler writes into the padding of its tiles what memory held before. glibc fills memory with zeros when it is
#: asked for and this is set, so that the same graph gives the same bytes on a busy machine too.
_ENVIRONMENT = {"MALLOC_PERTURB_": "255"}
#: Before the reason, on standard output.
_SAID = "refused: "


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

    A single graph has a binary of its own. Beside the binary is a small graph for each, of the same name. All is
    compiled twice and compared: the same bytes twice are what a digest stands for.

    ``done`` is the share of all compilations that are over, for ``progress``.

    Raises:
        BuildError: the compiler refuses, and the log says why; or it never gives the same twice.
    """
    first = _compiled(graphs, scratch / "0", arch=arch, progress=progress, done=done)
    for attempt in range(1, _ATTEMPTS):
        second = _compiled(graphs, scratch / str(attempt), arch=arch, progress=progress, done=done)
        if [(one.name, one.read_bytes()) for one in first] == [(one.name, one.read_bytes()) for one in second]:
            for made in first:
                shutil.move(made, out / made.name)
            return
        first = second
    names = ", ".join(graph.name for graph in graphs)
    raise BuildError(f"the HTP's compiler gave another binary of {names} each of {_ATTEMPTS} times; build it again")


def _compiled(
    graphs: Sequence[Path], scratch: Path, *, arch: int, progress: ProgressCallback, done: float
) -> list[Path]:
    """In a process of its own: the compiler numbers the graphs of a process, and the numbers are in the binary."""
    progress(Progress("compiling for the NPU", done, graphs[0].stem))
    scratch.mkdir()
    command = [sys.executable, "-m", __name__, str(os.getpid()), str(arch), str(scratch), *map(str, graphs)]
    ended = subprocess.run(
        command, env=os.environ | _ENVIRONMENT, stdout=subprocess.PIPE, text=True, errors="replace", check=False
    )
    if ended.returncode:
        said = next((line for line in ended.stdout.splitlines() if line.startswith(_SAID)), "").removeprefix(_SAID)
        reason = said or f"it ended with status {ended.returncode}; the log says more"
        raise BuildError(f"the HTP's compiler refuses {', '.join(one.name for one in graphs)}: {reason[:300]}")
    return sorted(scratch.iterdir())


def main(arch: int, scratch: Path, graphs: Sequence[Path]) -> None:
    """Compile graphs into ``scratch``; whatever the library raises is the reason."""
    import onnxruntime as ort
    import onnxruntime_qnn as qnn

    device, sessions, shared = provider(), [], "1" if len(graphs) > 1 else "0"
    for number, graph in enumerate(graphs):
        options = ort.SessionOptions()
        options.log_severity_level = 3
        last = "1" if number == len(graphs) - 1 else "0"
        for key, value in {
            "session.disable_cpu_ep_fallback": "1",
            "ep.context_enable": "1",
            "ep.context_embed_mode": "0",
            "ep.context_file_path": str(scratch / f"{graph.stem}.onnx"),
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
        # By its name alone: what a graph is called in the binary is a hash of the path that it is opened by.
        with contextlib.chdir(graph.parent):
            sessions.append(ort.InferenceSession(graph.name, options))


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    try:
        main(int(sys.argv[2]), Path(sys.argv[3]), [Path(one) for one in sys.argv[4:]])
    except Exception as error:  # the library raises its own classes, and RuntimeError
        sys.stdout.write(f"\n{_SAID}{' '.join(str(error).split())}\n")
        sys.stdout.flush()
        os._exit(1)
    os._exit(0)  # native destructors crash now and then, after everything is done
