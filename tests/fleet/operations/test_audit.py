"""The audit against what was signed: a database that is written anew cannot hide what it said before."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from fleet.cli.main import run
from fleet.operations.audit import verify_audit
from fleet.operations.fleet import Fleet
from fleet.registry.chain import EMPTY, entry_hash
from fleet.settings import FleetSettings
from tests.fleet.world import World, make_world


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = make_world(tmp_path / "home")
    made.add("pi-1", "pi-2")
    yield made
    made.registry.close()


def test_the_snapshot_vouches_for_the_entries_before_it(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    with Fleet(FleetSettings(home=world.home.root)) as fleet:
        assert verify_audit(fleet)["signed"] is None, "nothing was signed since"
        fleet.repository.publish(world.manifest)
        world.add("pi-3")
        found = verify_audit(fleet)
        assert (found["signed"], found["entries"], found["broken"]) == (2, 3, [])
    assert run(["--home", str(world.home.root), "audit", "verify"]) == 0
    assert "the signed metadata vouches for the first 2 of them" in capsys.readouterr().out


def test_a_whole_new_chain_is_not_the_one_that_was_signed(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    with Fleet(FleetSettings(home=world.home.root)) as fleet:
        fleet.repository.publish(world.manifest)
        _write_anew(world)
        found = verify_audit(fleet)
        assert len(found["broken"]) == 1, "the chain itself is whole"
        assert found["broken"][0].startswith("entry 2 is not the one that the signed snapshot names: ")
    assert run(["--home", str(world.home.root), "audit", "verify"]) != 0
    assert "was tampered with" in capsys.readouterr().err


def test_a_snapshot_is_signed_while_the_database_is_away(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with Fleet(FleetSettings(home=world.home.root, database="sqlite:////proc/nowhere/x.db")) as fleet:  # type: ignore[arg-type]
        fleet.repository.publish(world.manifest)
        assert fleet.repository.signed_audit() is None


def _write_anew(world: World) -> None:
    """As somebody with the database's file could: another story, and each hash right."""
    rows = world.registry.audit.trail()[::-1]
    with closing(sqlite3.connect(world.home.database, isolation_level=None)) as database:
        for verb in ("update", "delete"):
            database.execute(f"DROP TRIGGER audit_no_{verb}")
        hashed = EMPTY
        for row in rows:
            hashed = entry_hash(hashed, row.id, row.at, "nobody", row.action, row.subject, row.details)
            database.execute("UPDATE audit SET who = 'nobody', hash = ? WHERE id = ?", (hashed, row.id))
        database.execute("UPDATE audit_head SET hash = ?", (hashed,))
