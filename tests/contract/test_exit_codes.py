"""One table of exit codes for both programs; the document and the units agree with it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from agent import errors as agent_errors
from agent.contract.exit_codes import MEANINGS, ExitCode
from fleet import errors as fleet_errors

ROOT = Path(__file__).parents[2]


def test_every_code_has_one_meaning() -> None:
    assert set(MEANINGS) == set(ExitCode)
    assert len({code.value for code in ExitCode}) == len(ExitCode.__members__)
    assert len(set(MEANINGS.values())) == len(MEANINGS)


@pytest.mark.parametrize("error", [agent_errors.ConfigError, fleet_errors.UsageError])
def test_wrong_settings_end_both_programs_with_what_the_units_do_not_restart(
    error: type[agent_errors.ConfigError | fleet_errors.UsageError],
) -> None:
    assert error.exit_code == ExitCode.USAGE
    for unit in (ROOT / "systemd").glob("phifleet*.service"):
        found = re.findall(r"^RestartPreventExitStatus=(.*)$", unit.read_text(encoding="utf-8"), re.MULTILINE)
        assert all(str(ExitCode.USAGE.value) in codes.split() for codes in found), unit.name


def test_what_may_pass_is_tried_again() -> None:
    """A port or a lock that another process still holds must not keep the service down for ever."""
    assert agent_errors.UnavailableError.exit_code == ExitCode.FAILED


def test_the_document_has_the_same_table() -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\d+) \| (.+) \|$", text, re.MULTILINE))
    assert rows == {str(code.value): meaning for code, meaning in MEANINGS.items()}
