"""Upgrading a database by hand and by the controller, and an audit that shows what was changed."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from datetime import UTC, datetime

import pytest

from fleet.errors import RegistryError
from fleet.registry import open_registry
from fleet.registry.schema import HEAD
from fleet.registry.upgrading import upgrade_own_file
from tests.fleet.cli.conftest import Phifleet
from tests.fleet.registry.test_schema import RELEASED
from tests.fleet.world import World


@pytest.fixture
def released(world: World) -> World:
    """A home whose database is as release 0.1.0 left it."""
    world.registry.close()
    world.home.database.unlink()
    with closing(sqlite3.connect(world.home.database)) as database:
        database.executescript(RELEASED.read_text(encoding="utf-8"))
    return world


def test_an_upgrade_keeps_a_copy_and_commands_work_again(phifleet: Phifleet, released: World):
    refused = phifleet("status")
    assert refused.code == 8
    assert "run `phifleet db upgrade`" in refused.err
    current = json.loads(phifleet("db", "current", "--json").out)
    assert current == {"revision": "0001", "works_with": HEAD, "known": True}
    done = phifleet("db", "upgrade")
    assert done.code == 0 and f"from 0001 to {HEAD}" in done.out
    (backup,) = released.home.root.glob("fleet.db.0001-*")
    assert str(backup) in done.out
    with closing(sqlite3.connect(backup)) as copy:
        assert copy.execute("SELECT count(*) FROM devices").fetchone() == (2,)
    assert "pi-1" in phifleet("status").out
    assert f"has {HEAD} already" in phifleet("db", "upgrade").out
    assert phifleet("audit", "verify").code == 0


def test_a_controller_brings_its_own_file_up_to_date_and_keeps_a_copy(released: World):
    done = upgrade_own_file(f"sqlite:///{released.home.database}", datetime(2026, 11, 25, tzinfo=UTC))
    assert done is not None and (done.before, done.after) == ("0001", HEAD)
    assert done.backup == released.home.root / "fleet.db.0001-20261125T000000"
    with closing(open_registry(f"sqlite:///{released.home.database}")) as registry:
        assert [row.id for row in registry.devices.all()] == ["pi-1", "pi-2"]
    assert upgrade_own_file(f"sqlite:///{released.home.database}", datetime.now(UTC)) is None


def test_an_upgrade_that_fails_changes_nothing_and_leaves_no_copy(phifleet: Phifleet, released: World):
    with closing(sqlite3.connect(released.home.database)) as database:
        database.execute("CREATE TABLE outbox (something TEXT)")  # in the way
        database.commit()
    before = released.home.database.read_bytes()
    failed = phifleet("db", "upgrade")
    assert failed.code == 8 and "Traceback" not in failed.err
    assert list(released.home.root.glob("fleet.db.0001-*")) == []
    with closing(sqlite3.connect(released.home.database)) as database:
        assert database.execute("SELECT version FROM phifleet_schema").fetchone() == (2,)
    assert len(before) == released.home.database.stat().st_size


def test_where_no_copy_can_be_made_nothing_is_upgraded(phifleet: Phifleet, released: World):
    named = released.home.root / "fleet.db.0001-20261125T000000"
    named.mkdir()  # a folder stands where the copy would be
    with pytest.raises(RegistryError, match=r"no backup can be made at .*fleet.db.0001-20261125T000000"):
        upgrade_own_file(f"sqlite:///{released.home.database}", datetime(2026, 11, 25, tzinfo=UTC))
    assert json.loads(phifleet("db", "current", "--json").out)["revision"] == "0001"


def test_the_audit_shows_who_did_what(phifleet: Phifleet, world: World):
    world.add("pi-1", "pi-2", "pi-3")
    entries = json.loads(phifleet("audit", "list", "--json").out)
    assert [(entry["id"], entry["action"], entry["subject"]) for entry in entries[:3]] == [
        (3, "device.add", "pi-3"),
        (2, "device.add", "pi-2"),
        (1, "device.add", "pi-1"),
    ]
    assert "tester" in phifleet("audit", "list", "--limit", "1").out
    whole = phifleet("audit", "verify")
    assert whole.code == 0 and entries[0]["hash"] in whole.out


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("UPDATE audit SET who = 'nobody' WHERE id = 2", "entry 2 was changed"),
        ("UPDATE audit SET details = NULL WHERE id = 3", "entry 3 was changed"),
        ("DELETE FROM audit WHERE id = 2", "entry 2 is missing"),
        ("DELETE FROM audit WHERE id = 3", "the newest entry should be 3"),
    ],
)
def test_an_entry_that_was_changed_or_taken_out_shows(phifleet: Phifleet, world: World, damage: str, words: str):
    world.add("pi-1", "pi-2", "pi-3")
    with closing(sqlite3.connect(world.home.database)) as database:
        database.executescript(f"DROP TRIGGER audit_no_update; DROP TRIGGER audit_no_delete; {damage}")
    found = phifleet("audit", "verify")
    assert found.code == 8 and words in found.err
