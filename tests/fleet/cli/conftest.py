from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import structlog

from fleet.cli.main import run
from tests.fleet.world import World, make_world


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Phifleet:
    """Calls the command as a shell would, in this process."""

    home: Path
    capture: pytest.CaptureFixture[str]

    def __call__(self, *arguments: str) -> Result:
        self.capture.readouterr()
        code = run(["--home", str(self.home), *arguments])
        out, err = self.capture.readouterr()
        assert "Traceback" not in out + err
        return Result(code, out, err)


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No settings of the person who runs the tests, and a terminal wide enough for every table."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("COLUMNS", "240")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    for name in ("PHIFLEET_HOME", "PHIFLEET_CONFIG", "PHIFLEET_BROKER", "PHIFLEET_SERVER"):
        monkeypatch.delenv(name, raising=False)
    yield
    structlog.reset_defaults()


@pytest.fixture
def phifleet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Phifleet:
    return Phifleet(tmp_path / "home", capsys)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A home with a repository and an artifact, as `phifleet init` and `phifleet build` leave it."""
    made = make_world(tmp_path / "home")
    yield made
    made.registry.close()
