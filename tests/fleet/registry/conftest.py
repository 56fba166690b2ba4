from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fleet.world import World, make_world
from tests.simulators.broker import free_port

_POSTGRES = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """A real server on loopback, for the whole run; skipped where none is installed."""
    if _POSTGRES is None:
        pytest.skip("PostgreSQL is not installed")
    pytest.importorskip("psycopg", reason="the extra phifleet[postgres] is not installed")
    port = free_port()
    # Not pytest's own folder: the server refuses to run as root, and another user may not look into that one.
    folder = Path(tempfile.mkdtemp(prefix="phifleet-pg-"))
    user: dict[str, object] = {}
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres")
        user = {"user": "postgres", "cwd": folder}
    data, options = folder / "data", f"-p {port} -h 127.0.0.1 -k {folder} -F"
    run = lambda *command: subprocess.run([*command], check=True, capture_output=True, timeout=60, **user)  # type: ignore[call-overload]  # noqa: E731
    try:
        run(_POSTGRES / "initdb", "-D", data, "-A", "trust", "-U", "phifleet", "--no-sync")
        run(_POSTGRES / "pg_ctl", "-D", data, "-w", "-l", folder / "log", "-o", options, "start")
        yield f"postgresql://phifleet@127.0.0.1:{port}/postgres"
        run(_POSTGRES / "pg_ctl", "-D", data, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def fresh_postgresql(postgresql: str) -> str:
    import psycopg

    with psycopg.connect(postgresql, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    return postgresql


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Everything is tested on both."""
    if request.param == "postgresql":
        return str(request.getfixturevalue("fresh_postgresql"))
    return f"sqlite:///{tmp_path / 'home' / 'fleet.db'}"


@pytest.fixture
def world(url: str, tmp_path: Path) -> Iterator[World]:
    made = make_world(tmp_path / "home", url)
    yield made
    made.registry.close()
