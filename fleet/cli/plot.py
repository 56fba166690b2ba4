"""Draws loss over size, a marker for each toolchain. The only place that imports matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agent.contract.manifest import Manifest, Target, Toolchain
from agent.platform import files
from fleet.core.frontier import frontier
from fleet.errors import UsageError

_MARKERS = dict(zip(Toolchain, ("o", "s", "^", "D", "v"), strict=True))
_COLOURS = dict(zip(Toolchain, ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple"), strict=True))
_LEAST_LOSS = 1e-6  # of FP32: a logarithmic axis has no zero
#: Where a label may stand beside its point, in points: the nearest first.
_NEAR = 8
_PLACES = [(_NEAR, 0), (-_NEAR, 0), *((_NEAR + abs(up), up) for up in (9, -9, 18, -18, 27, -27, 36, 45, 54, 63, 72))]


def draw(manifests: Sequence[Manifest], file: Path) -> tuple[Path, ...]:
    """Write ``file`` as PNG and as SVG, with or without a suffix of these; returns both paths.

    The same data give the same bytes. All are artifacts of one model.

    Raises:
        UsageError: matplotlib is missing, nothing was measured, or the file cannot be written.
    """
    if not file.name or file.is_dir():
        raise UsageError(f"plot {file}: is a folder; name a file in it")
    if not file.parent.is_dir():
        raise UsageError(f"plot {file}: cannot be written: the folder {file.parent} does not exist; make it first")
    measured = [one for one in manifests if one.quality is not None]
    if not measured:
        raise UsageError("none of these artifacts has a measured loss; build them with their quality measured")
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise UsageError("drawing needs matplotlib: install phifleet[quantize]") from None
    mpl.rcParams |= {"svg.hashsalt": "phifleet", "svg.fonttype": "none"}  # the same names each time, and text as text
    figure = Figure(figsize=(9, 6), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for toolchain, marker in _MARKERS.items():
        own = [one for one in measured if one.toolchain is toolchain]
        sizes, losses = [one.size / 1e6 for one in own], [_loss(one) for one in own]
        errors = [one.quality.kl_divergence_se for one in own if one.quality]
        if own:
            axes.errorbar(
                sizes, losses, yerr=errors, fmt=marker, color=_COLOURS[toolchain], label=str(toolchain), capsize=2,
                markersize=7,
            )  # fmt: skip
    edge = frontier(measured)
    axes.plot(
        [one.size / 1e6 for one in edge], [_loss(one) for one in edge], "--", color="0.6", zorder=0, label="frontier"
    )
    axes.margins(x=0.12, y=0.12)
    axes.set(xlabel="size, MB", ylabel="loss: mean KL divergence to FP32, nats per token", yscale="log")
    axes.set_title(measured[0].model.name)
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    _name_points(figure, axes, measured)
    stem = file.stem if file.suffix.lower() in (".png", ".svg") else file.name
    return tuple(_write(figure, file.with_name(f"{stem}.{kind}"), kind) for kind in ("png", "svg"))


def _points(measured: Sequence[Manifest]) -> list[tuple[Manifest, str]]:
    """Artifacts that are the same point have one label, with their targets; the one of them that stands for all."""
    points: dict[tuple[Toolchain, str, str, str], list[Manifest]] = {}
    for one in sorted(measured, key=_loss):
        key = (one.toolchain, _label(one), f"{one.size / 1e6:.0f}", f"{_loss(one):.2g}")
        points.setdefault(key, []).append(one)
    targets = [sorted({str(one.target) for one in alike}) for alike in points.values()]
    return [
        (alike[0], _label(alike[0]) + ("" if names == [Target.CPU] else f", {' '.join(names)}"))
        for alike, names in zip(points.values(), targets, strict=True)
    ]


def _name_points(figure: Any, axes: Any, measured: Sequence[Manifest]) -> None:
    """A label where it covers no other; those far from their point have a line to it."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    inside = axes.get_window_extent()
    spots = axes.transData.transform([(one.size / 1e6, _loss(one)) for one in measured])
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in spots]  # markers, pixels
    for one, text in _points(measured):
        for turn, place in enumerate([*_PLACES, _PLACES[0]]):
            note = axes.annotate(
                text, (one.size / 1e6, _loss(one)), textcoords="offset points", xytext=place, fontsize=7,
                color=_COLOURS[one.toolchain],
                ha="left" if place[0] > 0 else "right", va="center",
                arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "0.6"} if abs(place[0]) > _NEAR else None,
            )  # fmt: skip
            note.set_in_layout(False)
            note.get_window_extent()  # puts the text where it goes, and counts the line in
            box = Text.get_window_extent(note)
            whole = inside.x0 < box.x0 and box.x1 < inside.x1 and inside.y0 < box.y0 and box.y1 < inside.y1
            if (whole and not any(box.overlaps(other) for other in taken)) or turn == len(_PLACES):
                taken.append(box)
                break
            note.remove()


def _label(manifest: Manifest) -> str:
    """Return what tells it from the others: type or algorithm where the recipe has one, else the precision."""
    recipe = manifest.recipe
    named = [str(recipe[name]) for name in ("type", "algorithm", "mixed") if isinstance(recipe.get(name), str)]
    named = [name for name in named if name != "default"]
    if recipe.get("recover"):
        named.append("recovered")
    elif recipe.get("calibration"):
        named.append("calibrated")
    return " ".join([str(manifest.precision), *named])


def _loss(manifest: Manifest) -> float:
    return max(_LEAST_LOSS, manifest.quality.kl_divergence) if manifest.quality else float("nan")


def _write(figure: object, path: Path, kind: str) -> Path:
    data = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    figure.savefig(data, format=kind, metadata=metadata)  # type: ignore[attr-defined]  # a Figure; matplotlib is optional
    try:
        files.write_atomic(path, data.getvalue())
    except OSError as error:
        raise UsageError(f"plot {path}: cannot be written: {error.strerror or error}") from None
    return path
