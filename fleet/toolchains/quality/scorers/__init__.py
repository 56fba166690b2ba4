"""One file a runtime: load an artifact, time it, and give the logits of a token sequence. Used in child processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from agent.contract.manifest import Target, Toolchain
from fleet.errors import BuildError
from fleet.toolchains.drivers.registry import driver_of


@dataclass(frozen=True, slots=True)
class Timing:
    """Of one greedy generation: milliseconds to the first token, and between the later ones."""

    ttft_ms: float
    tpot_ms: float


@dataclass(frozen=True, slots=True)
class Opened:
    """What a scorer opens: ``path`` is what the runtime opens, ``context`` in tokens."""

    path: Path
    target: Target
    context: int
    threads: int


class Scorer(Protocol):
    """A loaded artifact."""

    def generate(self, prompt: Sequence[int], tokens: int) -> Timing:
        """Add ``tokens`` tokens greedily, past any end-of-text, after ``prompt``; give each call another prompt."""
        ...

    def prepare_logits(self) -> None:
        """Called once between timing and scoring: free or load what scoring needs otherwise."""
        ...

    def logits(self, ids: Sequence[int], start: int) -> Any:
        """Teacher-forced, float32, shape ``[len(ids) - start, vocabulary]``: row i predicts ``ids[start + i]``."""
        ...


_MODULES = {
    Toolchain.ONNX_GENAI: "onnx_genai",
    Toolchain.OPENVINO: "openvino",
    Toolchain.LLAMACPP: "llamacpp",
    Toolchain.MLX: "mlx",
    Toolchain.ONNX_QNN: "onnx_qnn",
}


def open_scorer(toolchain: Toolchain, opened: Opened) -> Scorer:
    """Load an artifact in its own runtime.

    Raises:
        BuildError: the runtime is not installed, or the artifact does not load.
    """
    try:
        module = import_module(f"{__name__}.{_MODULES[toolchain]}")
        scorer: Scorer = module.load(opened)
    except ModuleNotFoundError as error:
        extra = driver_of(toolchain).extra
        raise BuildError(f"measuring {toolchain} needs {error.name}: install phifleet[{extra}]") from None
    return scorer
