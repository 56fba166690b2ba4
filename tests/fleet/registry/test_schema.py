"""A database as release 0.1.0 left it, with devices and history, is brought up to date, and the fleet goes on."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fleet.errors import RegistryError
from fleet.registry import Actor, open_registry
from fleet.registry.models import SCHEMA_VERSION

RELEASED = Path(__file__).parent / "golden" / "registry.v2.sql"
NOW = datetime(2026, 11, 25, tzinfo=UTC)


@pytest.fixture
def released(tmp_path: Path) -> Path:
    path = tmp_path / "fleet.db"
    with closing(sqlite3.connect(path)) as database:
        database.executescript(RELEASED.read_text(encoding="utf-8"))
    return path


def test_devices_and_history_of_the_release_before_are_there(released: Path):
    with closing(open_registry(f"sqlite:///{released}")) as registry:
        first, second = registry.devices.all()
        assert (first.id, first.sequence, first.health["tokens_per_s"]) == ("pi-1", 1, 74.0)  # type: ignore[index]
        assert (second.id, second.revoked_at, second.health_at) == ("pi-2", None, None)
        (deployment,) = registry.deployments.history("pi-1")
        assert (deployment.stage, deployment.publish_error) == ("committed", None)
        # What the new tables are for works on what was there before.
        registry.devices.revoke("pi-2", Actor("tester", NOW))
        assert registry.devices.barred() == {"pi-2"}
        assert registry.artifacts.withdraw(deployment.digest, "a test", Actor("tester", NOW))
        assert [entry.action for entry in registry.audit.trail()][:2] == ["artifact.withdraw", "device.revoke"]
    with closing(open_registry(f"sqlite:///{released}")) as again:
        assert again.devices.barred() == {"pi-2"}


def test_a_database_of_a_later_version_is_left_alone(released: Path):
    with closing(sqlite3.connect(released)) as database:
        database.execute("UPDATE phifleet_schema SET version = ?", (SCHEMA_VERSION + 1,))
        database.commit()
    with pytest.raises(RegistryError, match="upgrade phifleet"):
        open_registry(f"sqlite:///{released}")
