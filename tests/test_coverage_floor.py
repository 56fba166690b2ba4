"""The ratchet itself: what is below a floor is named, and nothing else."""

from __future__ import annotations

from tests.coverage_floor import by_package, shortfalls

FLOORS = {"lines": 90, "branches": {"agent/core": 95, "fleet/core": 95}}


def file(statements: int, run: int, branches: int, branches_run: int) -> dict[str, dict[str, int]]:
    summary = {
        "num_statements": statements, "covered_lines": run, "num_branches": branches, "covered_branches": branches_run,
    }  # fmt: skip
    return {"summary": summary}


def test_a_package_is_judged_by_its_branches_and_the_whole_by_its_lines():
    files = {
        "agent/core/a.py": file(10, 10, 20, 19),
        "fleet/core/b.py": file(10, 10, 20, 18),
        "agent/cli/c.py": file(5, 0, 2, 0),
    }
    found = by_package(files, FLOORS["branches"])  # type: ignore[arg-type]
    assert round(found["all"].lines, 1) == 80.0
    assert shortfalls(found, FLOORS) == [
        "all: 80.0% of lines, and the floor is 90%",
        "fleet/core: 90.0% of branches, and the floor is 95%",
    ]


def test_what_holds_every_floor_is_silent():
    files = {"agent/core/a.py": file(10, 9, 20, 19), "fleet/core/b.py": file(10, 10, 0, 0)}
    assert shortfalls(by_package(files, FLOORS["branches"]), FLOORS) == []  # type: ignore[arg-type]
