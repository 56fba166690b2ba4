"""What the agent can be told: by file, environment and flag, and what it says of what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.cli.local import _own_key
from agent.compose import endpoint_config
from agent.errors import AgentError, ConfigError
from agent.settings import AgentSettings, load, provenance

KEYS = """
allowed_hosts = ["kitchen.local"]
api_keys = ["letmein", { name = "kiosk", secret = "sha256:%s", requests_per_minute = 60, concurrent = 2 }]
""" % ("ab" * 32)


def written(folder: Path, text: str) -> Path:
    path = folder / "agent.toml"
    path.write_text(text)
    return path


def test_flags_go_before_the_environment_and_that_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHIFLEET_AGENT_PORT", "2")
    monkeypatch.setenv("PHIFLEET_AGENT_QUEUE_LIMIT", "20")
    file = written(tmp_path, "port = 1\nqueue_limit = 10\nthreads = 3\n")
    settings, source = load({"port": 3, "host": None}, file)
    assert (settings.port, settings.queue_limit, settings.threads) == (3, 20, 3)
    shown = {name: where for name, _, where in provenance(settings, source)}
    assert (shown["port"], shown["threads"], shown["host"]) == ("flag", str(file), "default")


def test_a_key_alone_and_one_with_limits(tmp_path: Path) -> None:
    settings, source = load({}, written(tmp_path, KEYS))
    config = endpoint_config(settings)
    assert [(key.name, key.requests_per_minute, key.concurrent) for key in config.keys] == [
        ("key-1", None, None),
        ("kiosk", 60, 2),
    ]
    assert config.allowed_hosts == ("kitchen.local",)
    assert "letmein" not in str(provenance(settings, source))
    assert _own_key(settings) == "letmein"


def test_the_device_itself_cannot_use_the_digest_of_a_key() -> None:
    assert _own_key(AgentSettings()) is None
    with pytest.raises(AgentError, match="digests of keys only"):
        _own_key(AgentSettings(api_keys=["sha256:" + "ab" * 32]))  # type: ignore[arg-type]  # as a file gives it


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prot = 1", "prot"),
        ("port = 70000", "port"),
        ("api_keys = [{ name = 'kiosk' }]", "api_keys"),
        ("api_keys = [{ name = 'kiosk', secret = 'x', concurrent = 0 }]", "concurrent"),
        ("api_keys = 'x'", "api_keys"),
        ("port = ", "agent.toml"),
    ],
)
def test_what_is_wrong_is_named_with_its_file(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        load({}, written(tmp_path, text))
    assert "agent.toml" in str(caught.value)


def test_a_mistyped_variable_is_named_and_not_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHIFLEET_AGENT_PROT", "1")
    with pytest.raises(ConfigError, match=r"unknown variable PHIFLEET_AGENT_PROT; did you mean PHIFLEET_AGENT_PORT\?"):
        load({}, None)


@pytest.mark.parametrize(
    "text",
    [
        'api_key = ["hunter2"]',
        "api_keys = [{ name = 'kiosk', secret = 'hunter2', concurent = 1 }]",
        "api_keys = 'hunter2'",
        "port = 'hunter2'",
        "hunter2",
    ],
)
def test_no_error_prints_the_value_that_a_mistyped_key_holds(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load({}, written(tmp_path, text))
    assert "hunter2" not in str(caught.value)


def test_a_variable_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHIFLEET_AGENT_CONFIG", str(written(tmp_path, "port = 7\n")))
    assert load({}, None)[0].port == 7


@pytest.mark.parametrize(
    "name",
    ["PHIFLEET_AGNET_PORT", "PHIFLEET_AGENTS_PORT", "PHIFLET_AGENT_PORT", "phifleet_agent_prot", "PHIFLEET_AGEN_PORT"],
)
def test_a_variable_that_was_meant_for_the_agent_is_named_and_its_value_is_not(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(name, "hunter2")
    with pytest.raises(ConfigError, match=f"unknown variable {name}; did you mean PHIFLEET_AGENT_PORT") as caught:
        load({}, None)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["PHIFLEET_HOME", "PHIFLEET_BROKER", "PHIFLEET_LOG_LEVEL", "AGENT_PORT", "FLEET_AGENT_X"]
)
def test_a_variable_of_another_program_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, "x")
    load({}, None)
