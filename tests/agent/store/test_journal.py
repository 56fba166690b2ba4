from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from agent.contract.failures import FailureCode
from agent.core.ports import Journal
from agent.errors import StoreError
from agent.store.journal import FileJournal
from tests.waiting import wait_until


def test_what_was_saved_last_is_there_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "state" / "journal"
    journal: Journal = FileJournal(path)
    assert journal.load() is None
    for document in (b"", b"{}", b"a\nb\0" * 1000):
        journal.save(document)
        assert FileJournal(path).load() == document
    assert [entry.name for entry in path.parent.iterdir()] == ["journal"]


@example(document=b"", at=64, damage=b"")
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(document=st.binary(max_size=200), at=st.integers(0, 300), damage=st.binary(max_size=20))
def test_damage_is_set_aside_and_never_believed(tmp_path: Path, document: bytes, at: int, damage: bytes) -> None:
    path = tmp_path / "journal"
    journal = FileJournal(path)
    journal.save(document)
    stored = path.read_bytes()
    damaged = stored[:at] + damage
    path.write_bytes(damaged)
    loaded = journal.load()
    if damaged == stored:
        assert loaded == document
    else:
        assert loaded is None
        assert not path.exists()
        assert (tmp_path / "journal.damaged").read_bytes() == damaged
    journal.save(b"next")
    assert journal.load() == b"next"


def test_full_disk_keeps_the_last_document(tmp_path: Path) -> None:
    script = """
import resource, signal, sys
from pathlib import Path
from agent.errors import StoreError
from agent.store.journal import FileJournal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
journal = FileJournal(Path(sys.argv[1]))
journal.save(b"first")
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    journal.save(bytes(100_000))
except StoreError as error:
    print(error.code, error)
"""
    path = tmp_path / "journal"
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(FailureCode.STORE_DISK_FULL), done.stdout
    assert str(path) in done.stdout
    assert FileJournal(path).load() == b"first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["journal"]


def test_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="file"):
        FileJournal(tmp_path / "file" / "journal").save(b"")


def test_killed_while_saving_there_is_always_a_whole_document(tmp_path: Path) -> None:
    script = """
import sys, itertools
from pathlib import Path
from agent.store.journal import FileJournal
journal = FileJournal(Path(sys.argv[1]))
for n in itertools.count():
    journal.save(b"%d " % n * 20_000)
"""
    for saved in (1, 2, 5, 11):
        path = tmp_path / f"journal-{saved}"
        process = subprocess.Popen([sys.executable, "-c", script, str(path)])
        wait_until(lambda path=path, saved=saved: int((FileJournal(path).load() or b"-1").split()[0]) >= saved)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        document = FileJournal(path).load()
        assert document is not None
        words = document.split()
        assert len(words) == 20_000
        assert len(set(words)) == 1
        assert int(words[0]) >= saved
