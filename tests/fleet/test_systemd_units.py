from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from agent.settings import load as load_agent
from fleet.settings import FleetSettings
from fleet.settings import load as load_fleet

UNITS = Path(__file__).parents[2] / "systemd"
ANALYZE = shutil.which("systemd-analyze")

needs_systemd = pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed")


def settings(unit: str) -> dict[str, str]:
    lines = (UNITS / unit).read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if re.match(r"^[A-Z]\w+=", line))


@needs_systemd
@pytest.mark.parametrize(("unit", "tenths"), [("phifleet-agent.service", 30), ("phifleet.service", 20)])
def test_exposure_is_low(unit: str, tenths: int) -> None:
    command = [str(ANALYZE), "security", "--offline=yes", f"--threshold={tenths}", str(UNITS / unit)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stdout[-300:]


@needs_systemd
@pytest.mark.parametrize("unit", ["phifleet-agent.service", "phifleet.service"])
def test_systemd_knows_every_setting(unit: str, tmp_path: Path) -> None:
    # The programs are looked for, so there they are.
    text = (UNITS / unit).read_text().replace("/opt/phifleet/bin/", f"{tmp_path}/")
    for program in ("phifleet", "phifleet-agent"):
        (tmp_path / program).write_text("#!/bin/sh\n")
        (tmp_path / program).chmod(0o755)
    (tmp_path / unit).write_text(text)
    command = [str(ANALYZE), "verify", "--man=no", str(tmp_path / unit)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    complaints = [line for line in result.stderr.splitlines() if unit in line]
    assert complaints == []


@pytest.mark.parametrize("unit", ["phifleet-agent.service", "phifleet.service"])
def test_a_unit_is_watched_bounded_and_says_why_something_is_open(unit: str) -> None:
    found = settings(unit)
    assert found["Type"] == "notify"
    assert int(found["WatchdogSec"]) >= 30
    assert found["Restart"] == "always" and found["StartLimitIntervalSec"] == "0"
    assert {"MemoryMax", "CPUWeight", "TasksMax", "StateDirectory"} <= found.keys()
    text = (UNITS / unit).read_text()
    for name in ("PrivateDevices", "PrivateUsers", "MemoryDenyWriteExecute", "ProcSubset", "IPAddressDeny"):
        assert name in found or f"# - {name}" in text or f", {name}:" in text, name


@pytest.mark.parametrize(
    ("unit", "prefix"), [("phifleet-agent.service", "PHIFLEET_AGENT_"), ("phifleet.service", "PHIFLEET_")]
)
def test_a_unit_sets_nothing_that_the_operators_commands_would_not_see(unit: str, prefix: str) -> None:
    text = (UNITS / unit).read_text()
    assert "EnvironmentFile" not in text
    assert re.findall(r"PHIFLEET_\w+(?==)", text) == [f"{prefix}LOG_FORMAT"]
    words = settings(unit)["ExecStart"].split()
    assert words[1:] in (["serve"], ["run"]), "flags would be the service's alone, too"


def test_the_sample_settings_are_settings_and_name_the_folder_that_the_unit_may_write() -> None:
    fleet, _ = load_fleet({}, UNITS / "fleet.toml")
    agent, _ = load_agent({}, UNITS / "agent.toml")
    for unit, folder in (("phifleet.service", fleet.home), ("phifleet-agent.service", agent.state_dir)):
        assert folder == Path("/var/lib") / settings(unit)["StateDirectory"]
    commented = re.sub(r"^#(?=\w+ = )", "", (UNITS / "fleet.toml").read_text(), flags=re.MULTILINE)
    assert set(tomllib.loads(commented)) <= set(FleetSettings.model_fields), "what is offered in a comment exists"


@pytest.mark.parametrize("program", ["phifleet", "phifleet-agent"])
def test_the_operators_command_runs_as_the_user_of_the_unit(program: str) -> None:
    script = (UNITS / "bin" / program).read_text()
    found = settings(f"{program}.service")
    assert f'exec sudo -u {found["User"]} {found["ExecStart"].split()[0]} "$@"' in script
    subprocess.run(["sh", "-n", str(UNITS / "bin" / program)], check=True)


def test_the_users_of_the_units_are_made() -> None:
    made = (UNITS / "sysusers.d" / "phifleet.conf").read_text()
    for unit in ("phifleet-agent.service", "phifleet.service"):
        assert re.search(rf"^u\s+{settings(unit)['User']}\s", made, re.MULTILINE)
