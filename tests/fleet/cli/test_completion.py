"""What the shell is offered, asked as bash asks: by the program itself, with the words typed so far."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fleet.cli.conftest import Phifleet
from tests.fleet.world import World


def offered(home: Path, *words: str) -> list[str]:
    typed = ["phifleet", "--home", str(home), *words]
    environment = os.environ | {
        "_PHIFLEET_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(typed), "COMP_CWORD": str(len(typed) - 1),
    }  # fmt: skip
    code = "from fleet.__main__ import main; main()"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    return [line.partition(",")[2] for line in done.stdout.splitlines() if line]


def test_devices_profiles_artifacts_and_commands_are_offered(world: World):
    world.add("pi-1", "pi-2", "box-1")
    home = world.home.root
    assert offered(home, "device", "show", "pi") == ["pi-1", "pi-2"]
    assert offered(home, "deploy", "sam") == [world.manifest.id]
    assert offered(home, "deploy", world.manifest.id, "--device", "b") == ["box-1"]
    assert "raspberry-pi-5" in offered(home, "device", "add", "x", "--profile", "rasp")
    assert "status" in offered(home, "st")


def test_a_home_that_is_not_there_offers_nothing_and_is_not_made(tmp_path: Path):
    assert offered(tmp_path / "none", "device", "show", "") == []
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_printed_for_each_shell(phifleet: Phifleet, shell: str):
    result = phifleet("completion", shell)
    assert result.code == 0
    assert "_PHIFLEET_COMPLETE" in result.out
