from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from agent.contract.manifest import Precision, Target, Toolchain
from agent.contract.profile import Recipe
from fleet.errors import BuildError, ProfileError
from fleet.home import Home
from fleet.profiles_loader import load_profile
from fleet.toolchains.build.build import plan_build
from fleet.toolchains.build.jobs import Request, build_all
from fleet.toolchains.drivers import process
from fleet.toolchains.progress import DONE, Progress, ProgressCallback, silent
from tests.models import Built, checkpoint
from tests.waiting import alive, wait_until

PROFILE = load_profile("iot-x86")
INT4 = Recipe(toolchain=Toolchain.ONNX_GENAI, precision=Precision.INT4, target=Target.CPU)
INT8 = Recipe(toolchain=Toolchain.ONNX_GENAI, precision=Precision.INT8, target=Target.CPU)
LARGE = 64 * 2**30


def _quiet(_: int) -> ProgressCallback:
    return silent


def test_what_is_there_is_reused_and_what_fails_does_not_stop_the_rest(tiny_artifact: Built, tiny_dir: Path) -> None:
    wrong = INT4.model_copy(update={"options": {"colour": "red"}})
    requests = [Request(PROFILE, recipe) for recipe in (wrong, INT4)]
    failed, reused = build_all(
        checkpoint(tiny_dir), requests, tiny_artifact.home, jobs=2, progress=_quiet, memory_bytes=LARGE
    )
    assert isinstance(failed.error, ProfileError) and failed.manifest is None
    assert reused.reused and reused.manifest == tiny_artifact.manifest


def test_a_build_that_cannot_fit_is_never_started(tiny_dir: Path, tmp_path: Path) -> None:
    (outcome,) = build_all(
        checkpoint(tiny_dir), [Request(PROFILE, INT4)], Home(tmp_path), progress=_quiet, memory_bytes=2**20
    )
    assert isinstance(outcome.error, BuildError) and "GiB of memory" in str(outcome.error)
    assert not (tmp_path / "artifacts").exists()


def test_builds_run_side_by_side_only_as_far_as_memory_goes(tiny_dir: Path, tmp_path: Path) -> None:
    model = checkpoint(tiny_dir)
    need = plan_build(model, PROFILE, INT4).peak_memory_bytes
    running: set[int] = set()
    most, lock = [0], threading.Lock()

    def watch(i: int) -> ProgressCallback:
        def tell(step: Progress) -> None:
            with lock:
                running.add(i)
                most[0] = max(most[0], len(running))
            if step.phase == DONE:
                with lock:
                    running.discard(i)

        return tell

    outcomes = build_all(
        model, [Request(PROFILE, recipe) for recipe in (INT4, INT8)], Home(tmp_path), jobs=2, progress=watch,
        memory_bytes=need * 3 // 2,
    )  # fmt: skip
    assert [outcome.error for outcome in outcomes] == [None, None]
    assert most[0] == 1


SCRIPT = """
import sys
from pathlib import Path
from fleet.home import Home
from fleet.toolchains.checkpoint.checkpoint import inspect
from fleet.toolchains.build.jobs import Request, build_all
from tests.fleet.toolchains.test_jobs import INT4, INT8, LARGE, PROFILE
tell = lambda i: lambda step: print(i, step.phase, flush=True)
requests = [Request(PROFILE, recipe) for recipe in (INT4, INT8)]
build_all(inspect(Path(sys.argv[1])), requests, Home(Path(sys.argv[2])), jobs=2, progress=tell, memory_bytes=LARGE)
"""


def test_an_interruption_ends_every_child_and_leaves_nothing_half_made(tiny_dir: Path, tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tiny_dir), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[3])},
    )  # fmt: skip
    assert parent.stdout is not None
    told = set()
    for line in parent.stdout:
        told.add(line.split()[0])
        if told == {"0", "1"}:
            break
    children = psutil.Process(parent.pid).children()
    assert len(children) == 2
    parent.send_signal(signal.SIGINT)
    parent.wait(30)
    parent.stdout.close()
    wait_until(lambda: not any(alive(child) for child in children), "the children end with their parent")
    assert list((tmp_path / "artifacts").iterdir()) == []


def test_profiles_that_share_a_recipe_share_a_build(tiny_dir: Path, tmp_path: Path) -> None:
    told: list[int] = []

    def watch(i: int) -> ProgressCallback:
        told.append(i)
        return silent

    other = PROFILE.model_copy(update={"name": "another"})
    requests = [Request(one, INT4) for one in (PROFILE, other)]
    built, shared = build_all(
        checkpoint(tiny_dir), requests, Home(tmp_path), jobs=2, progress=watch, memory_bytes=LARGE
    )
    assert told == [0]
    assert built.manifest == shared.manifest is not None
    assert (built.reused, shared.reused) == (False, True)


def test_after_an_interruption_no_child_begins(tiny_dir: Path, tmp_path: Path) -> None:
    """A build may be between two children when the operator interrupts: its second must not begin."""

    def interrupt(i: int) -> ProgressCallback:
        def tell(step: Progress) -> None:
            if step.phase == "asking the artifact":
                stop()

        return tell

    with process.stoppable() as stop:
        (outcome,) = build_all(
            checkpoint(tiny_dir), [Request(PROFILE, INT4)], Home(tmp_path), progress=interrupt, memory_bytes=LARGE
        )
        assert outcome.error is not None and "interrupted" in str(outcome.error)
    assert list((tmp_path / "artifacts").iterdir()) == []


@pytest.mark.parametrize("jobs", [0, -1])
def test_fewer_than_one_job_is_one(tiny_artifact: Built, tiny_dir: Path, jobs: int) -> None:
    (outcome,) = build_all(
        checkpoint(tiny_dir), [Request(PROFILE, INT4)], tiny_artifact.home, jobs=jobs, progress=_quiet,
        memory_bytes=LARGE,
    )  # fmt: skip
    assert outcome.reused
