"""Which runtimes there are, by name; what is installed of them, and why the others are not usable.

Nothing native is imported here: packages are asked for their version by their metadata, and whether they really work
is found out by a worker (``agent.runtimes.engines.worker --check``) with a timeout, once for each set of versions.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from typing import cast

from agent.core.inference import Capabilities
from agent.platform.packages import install_command
from agent.runtimes.protocol.engine import Runtime


@dataclass(frozen=True, slots=True)
class RuntimeSpec:
    """A runtime that may be there. ``module`` has a ``RUNTIME``; ``packages`` are distributions, the main one first.

    ``sequences``: answers at once that suit it, where nothing else is set: more where it batches them.
    """

    name: str
    module: str
    toolchain: str
    packages: tuple[str, ...] = ()
    extra: str = ""
    sequences: int = 4

    @property
    def slots(self) -> int:
        """Answers at once where nothing else is set: those that suit it, and one for short requests alone."""
        return self.sequences + (self.sequences > 1)


REGISTRY: Mapping[str, RuntimeSpec] = {
    spec.name: spec
    for spec in (
        RuntimeSpec(
            "onnx_genai",
            "agent.runtimes.engines.onnx_genai",
            "onnx_genai",
            ("onnxruntime-genai", "onnxruntime"),
            "onnx",
            8,
        ),
        RuntimeSpec(
            "openvino_genai", "agent.runtimes.engines.openvino_genai", "openvino", ("openvino-genai",), "openvino", 8
        ),
        RuntimeSpec("llamacpp", "agent.runtimes.engines.llamacpp", "llamacpp", ("llama-cpp-python",), "llamacpp", 8),
        RuntimeSpec("mlx", "agent.runtimes.engines.mlx", "mlx", ("mlx-lm", "mlx"), "mlx", 8),
        # One sequence at a time goes through a static graph.
        RuntimeSpec(
            "onnx_qnn",
            "agent.runtimes.engines.onnx_qnn",
            "onnx_qnn",
            ("onnxruntime-qnn", "onnxruntime", "tokenizers"),
            "qnn",
            2,
        ),
    )
}

#: Flavours of a package that provide the same module: any of them will do.
FLAVOURS: Mapping[str, tuple[str, ...]] = {
    "onnxruntime-genai": ("onnxruntime-genai-cuda", "onnxruntime-genai-directml", "onnxruntime-genai-qnn"),
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino"),
}


def versions(spec: RuntimeSpec) -> dict[str, str] | None:
    """Installed version of each of its packages, or None when one is missing."""
    found = {}
    for package in spec.packages:
        version = _version(package)
        if version is None:
            return None
        found[package] = version
    return found


def missing(spec: RuntimeSpec) -> str:
    """Why it is not usable, and what to do, when ``versions`` is None."""
    absent = [package for package in spec.packages if _version(package) is None]
    advice = f"; install it with: {install_command(spec.extra)}" if spec.extra else ""
    return f"not installed: {', '.join(absent)}{advice}"


def _version(package: str) -> str | None:
    for name in (package, *FLAVOURS.get(package, ())):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def features(spec: RuntimeSpec) -> Capabilities:
    """Return what a model has in that runtime where nothing is set otherwise; imports its module."""
    return replace(resolve(spec.module).features, max_sequences=spec.slots)


def resolve(module: str) -> Runtime:
    """Return the runtime in ``module``; in the worker only.

    Raises:
        ImportError: no such module.
        AttributeError: it has no ``RUNTIME``.
    """
    return cast(Runtime, importlib.import_module(module).RUNTIME)
