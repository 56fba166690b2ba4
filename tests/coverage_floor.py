"""Prints what the last whole run of the tests covered, and fails below the floors in ``pyproject.toml``.

python -m tests.coverage_floor
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


@dataclass(slots=True)
class Covered:
    """Statements and branches, and how many of them ran."""

    statements: int = 0
    statements_run: int = 0
    branches: int = 0
    branches_run: int = 0

    def add(self, summary: Mapping[str, int]) -> None:
        self.statements += summary["num_statements"]
        self.statements_run += summary["covered_lines"]
        self.branches += summary.get("num_branches", 0)
        self.branches_run += summary.get("covered_branches", 0)

    @property
    def lines(self) -> float:
        return 100.0 * self.statements_run / self.statements if self.statements else 100.0

    @property
    def branch_share(self) -> float:
        return 100.0 * self.branches_run / self.branches if self.branches else 100.0


def by_package(files: Mapping[str, Mapping[str, Any]], packages: Iterable[str]) -> dict[str, Covered]:
    """Sums a package, and of everything under ``all``."""
    found: defaultdict[str, Covered] = defaultdict(Covered)
    for name, file in files.items():
        path = Path(name).as_posix()
        found["all"].add(file["summary"])
        for package in packages:
            if path.startswith(f"{package}/"):
                found[package].add(file["summary"])
    return dict(found)


def shortfalls(found: Mapping[str, Covered], floors: Mapping[str, Any]) -> list[str]:
    """Each floor that is not held, in words."""
    short = []
    if found["all"].lines < floors["lines"]:
        short.append(f"all: {found['all'].lines:.1f}% of lines, and the floor is {floors['lines']}%")
    for package, floor in floors["branches"].items():
        share = found.get(package, Covered()).branch_share
        if share < floor:
            short.append(f"{package}: {share:.1f}% of branches, and the floor is {floor}%")
    return short


def main() -> int:
    """The table to standard output; 1 where a floor is not held."""
    floors = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["phifleet"]["coverage"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "coverage.json"
        command = [sys.executable, "-m", "coverage", "json", "--quiet", "--ignore-errors", "-o", str(report)]
        subprocess.run(command, check=True, cwd=ROOT)
        files = json.loads(report.read_text(encoding="utf-8"))["files"]
    found = by_package(files, floors["branches"])
    print(f"{'covered':<18} lines  branches")
    for package, covered in sorted(found.items()):
        print(f"{package:<18} {covered.lines:5.1f}% {covered.branch_share:7.1f}%")
    short = shortfalls(found, floors)
    for line in short:
        print(f"below the floor: {line}")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
