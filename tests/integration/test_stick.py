"""A device that no network reaches: its orders come on a stick, and its reports go back on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.contract.messages import State
from tests import without_links
from tests.models import Built
from tests.rig import Rig


def run(
    module: str, *arguments: str, inside: int | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """``inside`` is the process whose network namespace it runs in."""
    enter = ["nsenter", "--target", str(inside), "--net"] if inside is not None else []
    command = [*enter, sys.executable, "-m", module, *arguments]
    return subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=120, env=os.environ | environment
    )


def phifleet(rig: Rig, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run("fleet", *arguments, PHIFLEET_HOME=str(rig.home.root))


def written(rig: Rig, folder: Path, *arguments: str) -> Path:
    done = phifleet(rig, "stick", "write", str(folder), "--device", rig.device, *arguments)
    assert done.returncode == 0, done.stderr
    return folder


def at_the_device(rig: Rig, *arguments: str) -> subprocess.CompletedProcess[str]:
    inside = rig.agent.pid if rig.launcher and rig.agent is not None else None
    return run("agent", "--state-dir", str(rig.state_dir), *arguments, inside=inside)


def plugged(rig: Rig, folder: Path) -> subprocess.CompletedProcess[str]:
    return at_the_device(rig, "stick", str(folder))


def serving(rig: Rig) -> str | None:
    told = at_the_device(rig, "status", "--json")
    return (json.loads(told.stdout).get("serving") or {}).get("artifact")


@pytest.fixture(scope="module")
def rig(tiny_artifact: Built) -> Iterator[Rig]:
    """A controller's home, and a device that has no links, where that can be made; nor is there any broker."""
    with Rig(certified=True) as rig:
        rig.take_over(tiny_artifact.manifest, tiny_artifact.files)
        rig.stop_broker()
        if without_links.possible():
            rig.launcher = ("tests.without_links",)
        rig.start_agent()
        rig.until(lambda: at_the_device(rig, "status").returncode == 0, "the agent")
        yield rig


@pytest.fixture(scope="module")
def first(rig: Rig, tiny_artifact: Built) -> Path:
    """The first order's stick, which the device has carried out."""
    rig.order(tiny_artifact.manifest)
    folder = written(rig, rig.folder / "first")
    done = plugged(rig, folder)
    assert done.returncode == 0, done.stderr + rig.logs()
    assert f"committed: serves {tiny_artifact.manifest.id}" in done.stderr
    return folder


def test_an_order_comes_on_a_stick_and_the_report_goes_back(rig: Rig, first: Path, tiny_artifact: Built) -> None:
    assert serving(rig) == tiny_artifact.manifest.id
    if rig.launcher:
        assert rig.agent is not None
        links = ["nsenter", "--target", str(rig.agent.pid), "--net", "ip", "-br", "link"]
        assert [line.split()[0] for line in subprocess.check_output(links, text=True).splitlines()] == ["lo"]
    assert rig.reported() is None, "the controller knows nothing of it yet"
    read = phifleet(rig, "stick", "read", str(first))
    assert read.returncode == 0, read.stderr
    assert f"{rig.device}: committed, serves {tiny_artifact.manifest.id}" in read.stdout
    assert read.stderr == "", "nothing is told twice"
    reported = rig.reported()
    assert reported is not None
    assert (reported.state, reported.artifact) == (State.COMMITTED, tiny_artifact.manifest.id)
    assert "committed" in phifleet(rig, "status").stdout
    assert not rig.online(), "a report on a stick is not somebody who is there"
    assert phifleet(rig, "stick", "read", str(first)).returncode == 0, "read twice it changes nothing"
    told = phifleet(rig, "audit", "list").stdout
    assert "stick.write" in told and "stick.read" in told


def test_the_same_stick_again_changes_nothing(rig: Rig, first: Path) -> None:
    again = plugged(rig, first)
    assert again.returncode == 0
    assert "committed" in again.stderr


def test_an_older_stick_is_a_replay(rig: Rig, first: Path, tiny_artifact: Built, tmp_path: Path) -> None:
    other = rig.variant(tiny_artifact, "newer", tmp_path, indexed=True)
    rig.order(other)
    newer = written(rig, tmp_path / "newer-stick")
    assert plugged(rig, newer).returncode == 0
    replayed = plugged(rig, first)
    assert replayed.returncode == 1
    assert "rejected:" in replayed.stderr
    assert serving(rig) == other.id
    told = phifleet(rig, "stick", "read", str(first)).stdout
    assert f"serves {other.id}" in told, "the report says what the device serves all the same"


def test_a_stick_of_another_fleet_is_not_believed(rig: Rig, first: Path, tiny_artifact: Built, tmp_path: Path) -> None:
    before = serving(rig)
    with Rig(certified=True, device=rig.device) as foreign:
        foreign.take_over(tiny_artifact.manifest, tiny_artifact.files)
        for _ in range(5):  # its numbers are higher than ours
            foreign.order(tiny_artifact.manifest)
        done = plugged(rig, written(foreign, tmp_path / "foreign"))
    assert done.returncode == 1
    assert "rejected: metadata cannot be trusted" in done.stderr
    assert serving(rig) == before
    mine = phifleet(rig, "stick", "read", str(tmp_path / "foreign"))
    assert mine.returncode == 0, "the report is this device's, whoever's the stick is"


def _overwritten(path: Path) -> None:
    path.write_bytes(b"?" * path.stat().st_size)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda folder: (folder / "stick.json").unlink(), "is no stick, or was not written to its end"),
        (lambda folder: (folder / "stick.json").write_bytes(b'{"version"'), "is damaged"),
        (lambda folder: os.truncate(next(folder.glob("artifacts/*/model.onnx.data")), 4096), "is not whole"),
        (lambda folder: (folder / "tuf" / "timestamp.json").unlink(), "is not whole"),
        (lambda folder: _overwritten(folder / "orders" / "pi-1.json"), "the order on the stick"),
    ],
    ids=["without its index", "with half an index", "with half an artifact", "without a signature", "no order"],
)
def test_a_stick_that_is_not_whole_is_told_before_anything_begins(rig, first, tmp_path, spoil, told) -> None:  # type: ignore[no-untyped-def]
    folder = shutil.copytree(first, tmp_path / "half")
    spoil(folder)
    done = plugged(rig, folder)
    assert done.returncode == 1
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert serving(rig) is not None


def test_bytes_that_are_wrong_are_never_served(rig: Rig, tiny_artifact: Built, tmp_path: Path) -> None:
    """A stick that is worn out, or that somebody has changed: the sizes are right, and a chunk is not."""
    before, other = serving(rig), rig.variant(tiny_artifact, "worn", tmp_path)
    rig.order(other, transfer={"stall_s": 3.0, "window_bytes": 4 * 2**20}, deadline_s=20.0)
    folder = written(rig, tmp_path / "worn-stick")
    note = folder / "artifacts" / other.digest / "worn.txt"
    note.write_bytes(note.read_bytes()[::-1])
    done = plugged(rig, folder)
    assert done.returncode == 1, done.stderr
    assert "chunks came with wrong bytes" in done.stderr + rig.logs()
    assert serving(rig) == before


def test_a_stick_that_has_ended_is_told(rig: Rig, tiny_artifact: Built, tmp_path: Path) -> None:
    rig.order(rig.variant(tiny_artifact, "late", tmp_path), deadline_s=20.0)
    folder = written(rig, tmp_path / "late-stick", "--expires", "0.02m")
    time.sleep(2)
    done = plugged(rig, folder)
    assert done.returncode == 1
    assert "the stick ended on" in done.stderr
    index = json.loads((folder / "stick.json").read_text())
    (folder / "stick.json").write_text(json.dumps(index | {"expires_at": "2099-01-01T00:00:00Z"}))
    before = serving(rig)
    forged = plugged(rig, folder)
    assert forged.returncode == 1, "its index is not what is believed"
    assert "expired" in forged.stderr
    assert serving(rig) == before


def test_a_device_that_the_stick_does_not_name_is_told_whom_it_is_for(rig: Rig, first: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(first, tmp_path / "elsewhere")
    index = json.loads((folder / "stick.json").read_text())
    name = f"orders/{rig.device}.json"
    files = [file | {"path": file["path"].replace(name, "orders/pi-2.json")} for file in index["files"]]
    (folder / name).rename(folder / "orders" / "pi-2.json")
    (folder / "stick.json").write_text(json.dumps(index | {"files": files, "devices": {"pi-2": "x"}}))
    done = plugged(rig, folder)
    assert done.returncode == 1
    assert f"the stick has no order for {rig.device}; it has some for pi-2" in done.stderr
