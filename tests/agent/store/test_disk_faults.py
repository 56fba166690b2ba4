"""Each call to the disk refused in turn: an error of the store, nothing half-written, nothing leaked."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.contract.failures import FailureCode
from agent.contract.manifest import Manifest
from agent.errors import StoreError
from agent.platform.files import free_bytes
from agent.store.artifacts import ArtifactStore
from agent.store.journal import FileJournal
from tests.agent.store.test_artifacts import chunk, complete, fill
from tests.simulators.artifacts import make_artifact, noise
from tests.simulators.faulty_disk import each_fault, open_files

Operation = Callable[[], object]


def of_the_store(raised: BaseException | None, call: str, code: int) -> None:
    """It went well despite the fault, or it says what it was in the store's terms."""
    if raised is None:
        return
    assert isinstance(raised, StoreError), f"{call} raised {raised!r}"
    if code in (errno.ENOSPC, errno.EDQUOT) and raised.code is not FailureCode.STORE_CORRUPT:
        assert raised.code is FailureCode.STORE_DISK_FULL, f"{call}: {raised}"


class Bench:
    """A store on a disk that is made anew for each fault."""

    def __init__(self, folder: Path) -> None:
        self.home, self.source, self.other_source = folder / "device", folder / "source", folder / "other"
        self.manifest = make_artifact(self.source, {"model.bin": noise(150_000), "deep/config.json": b"{}"})
        self.other = make_artifact(self.other_source, {"f": noise(60_000, 1)}, "other")
        self.store = ArtifactStore(self.home, reserve_bytes=0)

    def fresh(self) -> ArtifactStore:
        shutil.rmtree(self.home, ignore_errors=True)
        self.store = ArtifactStore(self.home, reserve_bytes=0)
        return self.store

    def fetch(self) -> None:
        """All of a transfer but the link."""
        partial = self.store.begin(self.manifest)
        try:
            here = set(partial.present(lambda: False))
            for first in set(partial.table.unique()) - here:
                partial.write(first, chunk(self.source, partial, first))
            partial.flush()
            self.store.commit(partial)
        finally:
            self.store.abandon(partial)


def transfer(bench: Bench) -> Operation:
    bench.fresh()
    return bench.fetch


def resume(bench: Bench) -> Operation:
    store = bench.fresh()
    store.abandon(fill(store, bench.source, bench.manifest, 0.5))
    return bench.fetch


def begin_where_room_must_be_made(bench: Bench) -> Operation:
    store = bench.fresh()
    store.abandon(fill(store, bench.other_source, bench.other))
    store._reserve_bytes = free_bytes(bench.home) - bench.manifest.size + 30_000
    return bench.fetch


def collect(bench: Bench) -> Operation:
    store = bench.fresh()
    complete(store, bench.other_source, bench.other)
    complete(store, bench.source, bench.manifest)
    return lambda: store.collect([], [bench.manifest.digest])


def discard(bench: Bench) -> Operation:
    store = bench.fresh()
    complete(store, bench.source, bench.manifest)
    return lambda: store.discard(bench.manifest.digest)


def renew(bench: Bench) -> Operation:
    store = bench.fresh()
    complete(store, bench.source, bench.manifest)
    return lambda: store.renew(bench.manifest.model_copy(update={"context": 64}))


def verify(bench: Bench) -> Operation:
    store = bench.fresh()
    complete(store, bench.source, bench.manifest)
    return lambda: store.verify(bench.manifest.digest)


def look(bench: Bench) -> Operation:
    store = bench.fresh()
    complete(store, bench.source, bench.manifest)
    return lambda: (store.digests(), store.path(bench.manifest.digest), list(store.donors("")))


@pytest.mark.parametrize(
    "operation",
    [transfer, resume, begin_where_room_must_be_made, collect, discard, renew, verify, look],
    ids=lambda operation: operation.__name__,
)
def test_a_refused_call_is_an_error_of_the_store_and_leaks_nothing(
    operation: Callable[[Bench], Operation], tmp_path: Path
) -> None:
    bench = Bench(tmp_path)
    before = open_files()
    faults = 0
    for call, code, raised in each_fault(bench.home, lambda: operation(bench)):
        faults += 1
        of_the_store(raised, call, code)
        assert open_files() <= before, f"{call} left files open"
        assert not list(bench.home.rglob(".new-*")), f"{call} left a temporary file"
        manifest: Manifest | None = bench.store.manifest(bench.manifest.digest)
        if manifest is not None:  # what looks complete is complete
            bench.store.verify(bench.manifest.digest)
        bench.store._reserve_bytes = 0
        if manifest is None:  # the claim was given back, and what is there does no harm
            bench.fetch()
            bench.store.verify(bench.manifest.digest)
    assert faults >= 2


def test_the_journal_keeps_what_was_saved_last(tmp_path: Path) -> None:
    journal = FileJournal(tmp_path / "state" / "journal")

    def prepare() -> Operation:
        shutil.rmtree(tmp_path / "state", ignore_errors=True)
        journal.save(b"first")
        return lambda: journal.save(b"second")

    for call, code, raised in each_fault(tmp_path, prepare):
        of_the_store(raised, call, code)
        assert journal.load() in ((b"first", b"second") if raised else (b"second",)), call
        assert [entry.name for entry in (tmp_path / "state").iterdir()] == ["journal"], call


@pytest.mark.parametrize("damaged", [False, True])
def test_a_journal_that_does_not_read_says_so_and_stays(tmp_path: Path, damaged: bool) -> None:
    journal = FileJournal(tmp_path / "journal")

    def prepare() -> Operation:
        journal.save(b"first")
        if damaged:
            (tmp_path / "journal").write_bytes(b"rubbish")
        return journal.load

    for call, code, raised in each_fault(tmp_path, prepare):
        assert isinstance(raised, StoreError), call
        of_the_store(raised, call, code)
        assert (tmp_path / "journal").exists()
