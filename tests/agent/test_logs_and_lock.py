"""Logging and the lock of the state folder on disks that refuse."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import structlog

from agent.errors import ConfigError
from agent.platform import facts, lock, logs
from tests.simulators.faulty_disk import CODES, FaultyDisk, faulty, open_files


@pytest.fixture(autouse=True)
def _structlog_as_before() -> Iterator[None]:
    before = structlog.get_config()
    yield
    structlog.configure(**before)
    logging.getLogger().handlers.clear()


def held_by_another(folder: Path) -> bool:
    """Whether another process is refused."""
    code = f"from pathlib import Path; from agent.platform import lock; lock.hold(Path({str(folder)!r})).__enter__()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 or "another agent runs" in done.stderr, done.stderr
    return done.returncode != 0


def test_a_folder_is_held_until_the_context_ends(tmp_path: Path) -> None:
    before = open_files()
    with lock.hold(tmp_path / "state"):
        assert held_by_another(tmp_path / "state")
        with pytest.raises(ConfigError, match="another agent runs"), lock.hold(tmp_path / "state"):
            pass
    assert not held_by_another(tmp_path / "state")
    assert open_files() <= before


@pytest.mark.parametrize("code", [*CODES, errno.EROFS])
@pytest.mark.parametrize("call", [0, 1, 2, 3])
def test_a_disk_that_refuses_the_lock_file_is_locked_even_so(tmp_path: Path, code: int, call: int) -> None:
    before = open_files()
    with faulty(FaultyDisk(tmp_path, call, code)) as disk, lock.hold(tmp_path):
        assert held_by_another(tmp_path), disk.calls[call]
    assert open_files() <= before


def test_a_folder_that_cannot_be_locked_at_all_is_said_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_handle: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    before = open_files()
    monkeypatch.setattr(lock, "_lock", refuse)
    with pytest.raises(ConfigError, match=r"cannot be locked: No locks available"), lock.hold(tmp_path):
        pass
    assert open_files() <= before


def test_a_folder_that_cannot_be_made_is_said_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with (
        pytest.raises(ConfigError, match=r"state folder .* cannot be made: Not a directory"),
        lock.hold(tmp_path / "file" / "state"),
    ):
        pass


def test_a_log_file_comes_when_the_disk_lets_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").write_bytes(b"")  # in the folder's place
    logs.configure("info", "json", tmp_path / "logs")
    log = structlog.get_logger()
    log.info("first")
    (tmp_path / "logs").unlink()
    log.info("second")
    written = (tmp_path / "logs" / "agent.log").read_text()
    assert '"second"' in written
    assert '"first"' not in written
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["event"] for line in lines] == ["first", "second"]


class Refusing:
    """A standard error that takes nothing."""

    def write(self, _text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def flush(self) -> None:
        raise OSError(errno.EPIPE, os.strerror(errno.EPIPE))

    def isatty(self) -> bool:
        return False


def test_a_standard_error_that_takes_nothing_ends_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Refusing())
    logs.configure("info", "json", tmp_path)
    structlog.get_logger().info("told to the file alone")
    assert "told to the file alone" in (tmp_path / "agent.log").read_text()


def test_a_log_file_that_is_full_ends_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json", tmp_path)
    log = structlog.get_logger()
    for code in CODES:
        for call in range(4):
            with faulty(FaultyDisk(tmp_path, call, code)):
                log.info("still here")
    assert capsys.readouterr().err.count("still here") == 12


def test_facts_are_of_this_machine(tmp_path: Path) -> None:
    found = facts.collect("pi-1", "demo", "1", tmp_path, (), datetime.now(UTC))
    assert found.memory_total_bytes > found.memory_available_bytes > 0
    assert found.disk_free_bytes > 0
    assert found.cpu_count >= 1
    assert found.cpu


@pytest.mark.parametrize("folder", ["not/there", "not"])
def test_facts_of_a_device_whose_state_folder_is_not_made_yet(
    tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`phifleet-agent probe` is the first command on a new device."""
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / folder, Path(folder)):
        assert facts.collect("pi-1", "demo", "1", path, (), datetime.now(UTC)).disk_free_bytes > 0
    assert list(tmp_path.iterdir()) == []


def test_the_hottest_sensor_counts_where_there_is_any(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        def __init__(self, current: float | None) -> None:
            self.current = current

    sensors: dict[str, list[Any]] = {"cpu": [Entry(41.0), Entry(None)], "ssd": [Entry(55.5)]}
    monkeypatch.setattr("psutil.sensors_temperatures", lambda: sensors, raising=False)
    assert facts.temperature_c() == 55.5
    sensors.clear()
    assert facts.temperature_c() is None
    monkeypatch.delattr("psutil.sensors_temperatures")
    assert facts.temperature_c() is None
