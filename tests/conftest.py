"""For all tests."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.models import CACHE, kept_bytes

# How long an example takes is up to the machine, and says nothing about the code.
settings.register_profile("phifleet", deadline=None)
settings.load_profile("phifleet")

#: What the tools of the tests keep there.
_OWN = {
    ".cache",
    ".coverage",
    ".hypothesis",
    ".import_linter_cache",
    ".mypy_cache",
    ".pytest_cache",
    ".ruff_cache",
    "dist",
}

#: What a whole run keeps in its cache, and has in its temporary folder at a time; as measured, and half as much again.
CACHE_BYTES, TEMPORARY_BYTES = 4_700_000_000, 1_200_000_000


_ROOT = Path(__file__).parents[1]

#: What takes longest begins first: a long file that begins last is waited for alone. The order of the arguments does
#: not say so, since pytest drops those that others contain.
_LONG = (
    "integration/test_first_light.py",
    "integration/test_demo.py",
    "integration/test_at_the_device.py",
    "fleet/trust/test_disk_faults.py",
    "integration/test_supervision.py",
    "integration/test_three_controllers.py",
    "fleet/operations/test_rollouts.py",
    "fleet/registry/test_registry.py",
    "agent/core/test_deployment.py",
    "integration/",
    "agent/store/test_fetch.py",
    "agent/daemon/test_agent.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; the others stay as they are."""

    def rank(item: pytest.Item) -> int:
        place = item.path.relative_to(_ROOT / "tests").as_posix()
        return next((number for number, long in enumerate(_LONG) if place.startswith(long)), len(_LONG))

    items.sort(key=rank)


@pytest.fixture(autouse=True)
def nothing_is_left_where_the_tests_were_started() -> Iterator[None]:
    """A command that writes into the current folder writes into a temporary one, or the repository fills with it."""
    before = {path.name for path in _ROOT.iterdir()}
    yield
    left = {path.name for path in _ROOT.iterdir() if not path.name.startswith(".coverage.")} - before - _OWN
    assert not left, f"left in the repository: {', '.join(sorted(left))}"


def pytest_sessionstart(session: pytest.Session) -> None:
    """A full disk is told before the first test of all, not by the last ones."""
    config = session.config
    named = config.args_source is not pytest.Config.ArgsSource.TESTPATHS
    if named or config.option.keyword or config.option.markexpr:
        return
    needed: dict[int, int] = {}
    folders = {Path(tempfile.gettempdir()): TEMPORARY_BYTES, CACHE.parents[1]: max(0, CACHE_BYTES - kept_bytes())}
    for folder, size in folders.items():
        disk = folder.stat().st_dev
        needed[disk] = needed.get(disk, 0) + size
        free = shutil.disk_usage(folder).free
        if free < needed[disk]:
            figures = f"{needed[disk] / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
            pytest.exit(f"all tests together need {figures} on the disk of {folder}; make room, or name some tests", 4)
