"""Draws loss over size, a marker for each toolchain. The only place that imports matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from agent.contract.manifest import Manifest, Target, Toolchain
from fleet.core.frontier import frontier
from fleet.errors import UsageError
from fleet.toolchains import durable

_MARKERS = {Toolchain.ONNX_GENAI: "o", Toolchain.OPENVINO: "s", Toolchain.LLAMACPP: "^", Toolchain.MLX: "D"}
_LEAST_LOSS = 1e-6  # of FP32: a logarithmic axis has no zero


def draw(manifests: Sequence[Manifest], file: Path) -> tuple[Path, ...]:
    """Write ``file`` as PNG and as SVG, whatever its suffix; returns both paths. The same data give the same bytes.

    Raises:
        UsageError: matplotlib is missing, nothing was measured, or the folder cannot be written.
    """
    measured = [one for one in manifests if one.quality is not None]
    if not measured:
        raise UsageError("none of these artifacts has a measured loss; build them with their quality measured")
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise UsageError("drawing needs matplotlib: install phifleet[quantize]") from None
    mpl.rcParams["svg.hashsalt"] = "phifleet"
    figure = Figure(figsize=(9, 6), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for toolchain, marker in _MARKERS.items():
        own = [one for one in measured if one.toolchain is toolchain]
        sizes, losses = [one.size / 1e6 for one in own], [_loss(one) for one in own]
        errors = [one.quality.kl_divergence_se for one in own if one.quality]
        if own:
            axes.errorbar(sizes, losses, yerr=errors, fmt=marker, label=str(toolchain), capsize=2, markersize=7)
    edge = frontier(measured)
    axes.plot(
        [one.size / 1e6 for one in edge], [_loss(one) for one in edge], "--", color="0.6", zorder=0, label="frontier"
    )
    for at, one in enumerate(sorted(measured, key=_loss)):
        place = (7, -9 if at % 2 else 4)  # neighbours' labels above and below
        axes.annotate(_label(one), (one.size / 1e6, _loss(one)), textcoords="offset points", xytext=place, fontsize=7)
    axes.margins(x=0.12)
    axes.set(xlabel="size, MB", ylabel="loss: mean KL divergence to FP32, nats per token", yscale="log")
    axes.set_title(", ".join(sorted({one.model.name for one in measured})))
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    return tuple(_write(figure, file.with_suffix(f".{kind}"), kind) for kind in ("png", "svg"))


def _label(manifest: Manifest) -> str:
    """What tells it from the others: type or algorithm where the recipe has one, else precision and target."""
    recipe = manifest.recipe
    named = [str(recipe[name]) for name in ("type", "algorithm", "mixed") if isinstance(recipe.get(name), str)]
    named = [name for name in named if name != "default"]
    if manifest.target is not Target.CPU:
        named.append(str(manifest.target))
    if recipe.get("calibration"):
        named.append("calibrated")
    return " ".join([str(manifest.precision), *named])


def _loss(manifest: Manifest) -> float:
    return max(_LEAST_LOSS, manifest.quality.kl_divergence) if manifest.quality else float("nan")


def _write(figure: object, path: Path, kind: str) -> Path:
    data = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    figure.savefig(data, format=kind, metadata=metadata)  # type: ignore[attr-defined]  # a Figure; matplotlib is optional
    try:
        durable.write_bytes(path, data.getvalue())
    except OSError as error:
        raise UsageError(f"plot {path}: cannot be written: {error.strerror or error}") from None
    return path
