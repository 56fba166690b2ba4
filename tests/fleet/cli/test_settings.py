from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent.platform.settings import OTHER_VARIABLES
from fleet.errors import UsageError
from fleet.settings import FleetSettings, load, provenance
from tests.fleet.cli.conftest import Phifleet


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "fleet.toml", 'broker = "mqtt://file:1"\nbroker_port = 1001\nlog_level = "error"\n')
    monkeypatch.setenv("PHIFLEET_BROKER_PORT", "1002")
    monkeypatch.setenv("PHIFLEET_LOG_LEVEL", "warning")
    settings, source = load({"log_level": "debug", "home": None}, file)
    assert (settings.broker, settings.broker_port, settings.log_level) == ("mqtt://file:1", 1002, "debug")
    assert source["broker"] == str(file)
    assert source["broker_port"] == "PHIFLEET_* in the environment"
    assert source["log_level"] == "flag"
    assert "home" not in source


def test_the_agents_variables_are_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHIFLEET_AGENT_BROKER", "nonsense")
    assert load({}, None)[0].broker == "embedded"


def test_a_mistyped_variable_is_named_and_not_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHIFLEET_BROKR", "mqtts://broker:8883")
    with pytest.raises(UsageError, match=r"unknown variable PHIFLEET_BROKR; did you mean PHIFLEET_BROKER\?"):
        load({}, None)


@pytest.mark.parametrize("name", sorted(OTHER_VARIABLES))
def test_variables_that_are_no_settings_are_let_through(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "")
    assert load({}, None)[0].broker == "embedded"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('brokr = "x"', "unknown field brokr; did you mean broker?"),
        ("colour = 1", "unknown field colour; there are api, "),
        ("broker_port = 70000", "broker_port: Input should be less than or equal to 65535"),
        ('broker = "http://x"', "must be embedded, mqtt://host:port, or the same with mqtts, ws or wss"),
        ('broker = "mqtt://"', "must be embedded, mqtt://host:port, or the same with mqtts, ws or wss"),
        ('broker = "mqtt://x:99999"', "must be embedded, mqtt://host:port, or the same with mqtts, ws or wss"),
        ('broker = "mqtt://me:secret@x"', "use broker_username and broker_password"),
        ('broker_cert = "x.pem"', "broker_cert and broker_key go together"),
        ('log_level = "loud"', "log_level: Input should be 'debug', 'info', 'warning' or 'error'"),
        ("broker = [", "Invalid"),
    ],
)
def test_a_wrong_setting_is_named_with_its_file_and_what_is_allowed(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path / "fleet.toml", text)
    with pytest.raises(UsageError) as caught:
        load({}, file)
    assert message in str(caught.value)
    assert str(file) in str(caught.value) or "go together" in message
    assert "secret" not in str(caught.value)


def test_a_file_that_is_named_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        load({}, tmp_path / "no.toml")
    monkeypatch.setenv("PHIFLEET_CONFIG", str(tmp_path / "neither.toml"))
    with pytest.raises(UsageError, match=r"neither\.toml does not exist"):
        load({}, None)


def test_the_machines_file_is_read_by_everybody_and_the_users_goes_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, user = tmp_path / "etc" / "fleet.toml", tmp_path / "user" / "fleet.toml"
    monkeypatch.setattr("fleet.settings.default_files", lambda: (machine, user))
    assert load({}, None)[1] == {}, "neither need exist"
    for file, text in ((machine, 'broker = "mqtt://a"\nbroker_port = 1\n'), (user, "broker_port = 2\n")):
        file.parent.mkdir()
        write(file, text)
    settings, source = load({}, None)
    assert (settings.broker, settings.broker_port) == ("mqtt://a", 2)
    assert source == {"broker": str(machine), "broker_port": str(user)}
    named = write(tmp_path / "own.toml", "broker_port = 3\n")
    assert load({}, named)[0].broker == "embedded", "a file that is named takes the place of both"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_says_as_whom_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = write(tmp_path / "fleet.toml", "broker_port = 1\n")
    machine.chmod(0)
    monkeypatch.setattr("fleet.settings.default_files", lambda: (machine, tmp_path / "none.toml"))
    with pytest.raises(UsageError, match=r"fleet\.toml: Permission denied; run the command as the user of the service"):
        load({}, None)


def test_every_setting_says_its_unit_or_what_it_is() -> None:
    for name, field in FleetSettings.model_fields.items():
        assert field.description, name


def test_no_secret_is_ever_shown(tmp_path: Path) -> None:
    text = 'broker_password = "hunter2"\ndatabase = "postgresql://fleet:hunter2@db/fleet"\n'
    settings, source = load({}, write(tmp_path / "fleet.toml", text))
    shown = {name: value for name, value, _ in provenance(settings, source)}
    assert "hunter2" not in str(shown) and "hunter2" not in repr(settings)
    assert shown["database"] == "postgresql://fleet:***@db/fleet"
    assert settings.database_url == "postgresql://fleet:hunter2@db/fleet"


def test_show_config_names_value_and_source(phifleet: Phifleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHIFLEET_BROKER", "mqtts://broker:8883")
    shown = phifleet("--show-config")
    assert shown.code == 0
    assert f"home = {phifleet.home}  (flag)" in shown.out
    assert "broker = mqtts://broker:8883  (PHIFLEET_* in the environment)" in shown.out
    assert f"database = sqlite:///{phifleet.home}/fleet.db  (default)" in shown.out
    served = phifleet("serve", "--broker-port", "2000", "--show-config")
    assert "broker_port = 2000  (flag)" in served.out


@pytest.mark.parametrize(
    "name",
    ["PHIFLEET_HOEM", "PHIFLET_HOME", "PHIFLEETT_HOME", "phifleet_hoem", "PHIFLEET_AGNET_PORT", "PHIFLEET_AGENTS_X"],
)
def test_a_variable_that_was_meant_for_us_is_named_and_its_value_is_not(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, "hunter2")
    with pytest.raises(UsageError, match=f"unknown variable {name}") as caught:
        load({}, None)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["FLEET_HOME", "PHI_HOME", "PHIFLEET_AGENT_PORT", "PROFILE_HOME", "PHIFLEET", "FLEETS"]
)
def test_a_variable_of_another_program_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, "x")
    load({}, None)
