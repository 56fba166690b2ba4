"""What a benchmark reports: a ratio against a peer of the same run, or an absolute figure with its target."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil


@dataclass(frozen=True, slots=True)
class Figure:
    """``ours`` in ``unit``; ``ratio`` is ours to the peer's. ``at_least`` or ``at_most`` is the target, if any."""

    name: str
    ours: float
    unit: str
    peer: str = ""
    theirs: float | None = None
    ratio: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    note: str = ""

    @property
    def judged(self) -> float:
        """What the target is about: the ratio where there is a peer, else the figure itself."""
        return self.ratio if self.ratio is not None else self.ours

    @property
    def holds(self) -> bool | None:
        """Whether the target is met; None without one."""
        if self.at_least is not None:
            return self.judged >= self.at_least
        if self.at_most is not None:
            return self.judged <= self.at_most
        return None


def table(figures: Sequence[Figure]) -> str:
    """As a Markdown table."""
    rows = ["| what | ours | peer | ratio | target | holds |", "|---|---|---|---|---|---|"]
    for figure in figures:
        theirs = "" if figure.theirs is None else f"{figure.theirs:.4g} {figure.unit} ({figure.peer})"
        ratio = "" if figure.ratio is None else f"{figure.ratio:.3f}"
        target = f">= {figure.at_least:g}" if figure.at_least is not None else ""
        target = f"<= {figure.at_most:g}" if figure.at_most is not None else target
        holds = {True: "yes", False: "no", None: ""}[figure.holds]
        rows.append(f"| {figure.name} | {figure.ours:.4g} {figure.unit} | {theirs} | {ratio} | {target} | {holds} |")
        if figure.note:
            rows.append(f"| ... {figure.note} | | | | | |")
    return "\n".join(rows)


def save(name: str, figures: Sequence[Figure]) -> Path:
    """As JSON, with the machine it was measured on, under bench/results/."""
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    machine = {
        "system": platform.platform(),
        "python": platform.python_version(),
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    rows = [asdict(figure) | {"holds": figure.holds} for figure in figures]
    path.write_text(json.dumps({"machine": machine, "figures": rows}, indent=2) + "\n", encoding="utf-8")
    return path
