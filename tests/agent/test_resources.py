"""How much memory may be taken, in control groups laid out as Linux does (cgroup v2)."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from agent.platform.resources import available_bytes

MIB = 1 << 20


@pytest.fixture
def cgroups(tmp_path: Path) -> Path:
    root = tmp_path / "cgroup"
    (root / "machine.slice" / "container").mkdir(parents=True)
    (tmp_path / "own").write_text("0::/machine.slice/container\n")
    return root


def limit(group: Path, limit: str, used: int, files: int = 0) -> None:
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon {used - files}\ninactive_file {files}\n")


def test_the_tightest_limit_on_the_way_up_counts_and_file_pages_are_free(cgroups: Path, tmp_path: Path) -> None:
    container = cgroups / "machine.slice" / "container"
    limit(container, str(100 * MIB), used=60 * MIB, files=20 * MIB)
    assert available_bytes(cgroups, tmp_path / "own") == 60 * MIB
    limit(cgroups / "machine.slice", str(100 * MIB), used=90 * MIB)
    assert available_bytes(cgroups, tmp_path / "own") == 10 * MIB
    limit(cgroups / "machine.slice", str(100 * MIB), used=110 * MIB)
    assert available_bytes(cgroups, tmp_path / "own") == 0


def test_without_a_limit_the_machine_s_memory_counts(cgroups: Path, tmp_path: Path) -> None:
    limit(cgroups / "machine.slice" / "container", "max", used=60 * MIB)
    for own in ("own", "absent"):
        found = available_bytes(cgroups, tmp_path / own)
        assert found == pytest.approx(psutil.virtual_memory().available, rel=0.2)
