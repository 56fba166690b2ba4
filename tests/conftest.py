"""For all tests."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

from tests.models import CACHE

# How long an example takes is up to the machine, and says nothing about the code.
settings.register_profile("phifleet")
settings.load_profile("phifleet")

#: What a whole run keeps in its cache, and has in its temporary folder at a time; as measured, and half as much again.
CACHE_BYTES, TEMPORARY_BYTES = 4_700_000_000, 1_200_000_000


def pytest_sessionstart(session: pytest.Session) -> None:
    """A full disk is told before the first test of all, not by the last ones."""
    if session.config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return
    kept = sum(path.stat().st_size for path in CACHE.rglob("*") if path.is_file())
    needs = {Path(tempfile.gettempdir()): TEMPORARY_BYTES, CACHE.parents[1]: max(0, CACHE_BYTES - kept)}
    for folder, needed in needs.items():
        free = shutil.disk_usage(folder).free
        if free < needed:
            figures = f"{needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
            pytest.exit(f"all tests together need {figures} in {folder}; make room, or name some tests", returncode=4)
