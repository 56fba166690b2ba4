from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.simulators.broker import Broker, embedded, have_mosquitto, mosquitto


@pytest.fixture(scope="session")
def mosquitto_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    if not have_mosquitto():
        pytest.skip("mosquitto is not installed")
    with mosquitto(tmp_path_factory.mktemp("mosquitto")) as running:
        yield running


@pytest.fixture(scope="session")
def embedded_broker() -> Iterator[Broker]:
    with embedded() as running:
        yield running


@pytest.fixture(params=["mosquitto", "embedded"])
def broker(request: pytest.FixtureRequest) -> Broker:
    running = request.getfixturevalue(f"{request.param}_broker")
    assert isinstance(running, Broker)
    return running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path
