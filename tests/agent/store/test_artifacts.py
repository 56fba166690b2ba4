from __future__ import annotations

import errno
import hashlib
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.contract.failures import FailureCode
from agent.contract.manifest import Manifest
from agent.core import ports
from agent.errors import StoreError
from agent.platform.files import free_bytes
from agent.store.artifacts import ArtifactStore
from agent.store.partial import Partial
from tests.disk import MIB, small_disk
from tests.simulators.artifacts import make_artifact, noise


def never() -> bool:
    return False


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "device", reserve_bytes=0)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "source"


@pytest.fixture
def manifest(source: Path) -> Manifest:
    files = {
        "model.bin": noise(MIB) + noise(200_000),
        "deep/er/config.json": b"{}",
        "empty": b"",
        "again": noise(200_000),
    }
    return make_artifact(source, files)


def chunk(source: Path, partial: Partial, first: int) -> bytes:
    place = partial.table.places(first)[0]
    data = (source / partial.content.files[place.file].path).read_bytes()
    return data[place.offset : place.offset + partial.table.sizes[first]]


def fill(store: ArtifactStore, source: Path, manifest: Manifest, share: float = 1.0) -> Partial:
    partial = store.begin(manifest)
    unique = list(partial.table.unique())
    for first in unique[: round(share * len(unique))]:
        partial.write(first, chunk(source, partial, first))
    return partial


def complete(store: ArtifactStore, source: Path, manifest: Manifest) -> Path:
    store.commit(fill(store, source, manifest))
    path = store.path(manifest.digest)
    assert path is not None
    return path


def same_files(one: Path, other: Path) -> bool:
    def listing(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    return listing(one) == listing(other)


def test_is_the_port(store: ArtifactStore) -> None:
    _: ports.ArtifactStore = store


def test_complete_artifact_holds_the_very_files(store: ArtifactStore, source: Path, manifest: Manifest) -> None:
    assert store.path(manifest.digest) is None
    path = complete(store, source, manifest)
    assert same_files(path, source)
    assert store.manifest(manifest.digest) == manifest
    assert store.digests() == [manifest.digest]
    store.verify(manifest.digest)


def test_nothing_is_complete_before_commit(store: ArtifactStore, source: Path, manifest: Manifest) -> None:
    partial = fill(store, source, manifest)
    assert store.path(manifest.digest) is None
    assert store.manifest(manifest.digest) is None
    assert store.digests() == []
    store.abandon(partial)
    assert store.path(manifest.digest) is None


def test_what_is_on_disk_is_found_again(store: ArtifactStore, source: Path, manifest: Manifest) -> None:
    store.abandon(fill(store, source, manifest, share=0.5))
    partial = store.begin(manifest)
    unique = list(partial.table.unique())
    assert list(partial.present(never)) == unique[: round(0.5 * len(unique))]
    store.abandon(partial)


def test_damage_in_what_came_is_found(store: ArtifactStore, source: Path, manifest: Manifest, tmp_path: Path) -> None:
    store.abandon(fill(store, source, manifest))
    path = tmp_path / "device" / "partial" / manifest.digest / "files" / "model.bin"
    with path.open("r+b") as file:
        file.seek(300_000)
        file.write(b"power cut")
    partial = store.begin(manifest)
    missing = set(partial.table.unique()) - set(partial.present(never))
    assert len(missing) == 1
    first = missing.pop()
    place = partial.table.places(first)[0]
    assert place.offset <= 300_000 < place.offset + partial.table.sizes[first]
    store.abandon(partial)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_repaired_by_what_is_missing(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("damage")
    manifest = make_artifact(folder / "source", {"a": noise(300_000), "b/c": noise(50_000, 1), "d": b"x"})
    store = ArtifactStore(folder / "device", reserve_bytes=0)
    store.abandon(fill(store, folder / "source", manifest))
    below = folder / "device" / "partial" / manifest.digest
    victims = [path for path in sorted(below.rglob("*")) if path.is_file()]
    for victim in data.draw(st.lists(st.sampled_from(victims), max_size=4)):
        if not victim.exists():
            continue
        kind = data.draw(st.sampled_from(["delete", "truncate", "grow", "overwrite"]))
        if kind == "delete":
            victim.unlink()
        elif kind == "truncate":
            os.truncate(victim, data.draw(st.integers(0, victim.stat().st_size)))
        elif kind == "grow":
            victim.write_bytes(victim.read_bytes() + b"more")
        else:
            with victim.open("r+b") as file:
                file.seek(data.draw(st.integers(0, victim.stat().st_size)))
                file.write(data.draw(st.binary(max_size=50)))
    partial = store.begin(manifest)
    present = set(partial.present(never))
    for first in set(partial.table.unique()) - present:
        partial.write(first, chunk(folder / "source", partial, first))
    store.commit(partial)
    store.verify(manifest.digest)


def test_chunks_of_other_artifacts_are_used(store: ArtifactStore, source: Path, tmp_path: Path) -> None:
    weights = noise(2 * MIB)
    old = make_artifact(source, {"model.gguf": b"template one" + weights, "config.json": b"{}"})
    complete(store, source, old)
    new_source = tmp_path / "new"
    new = make_artifact(new_source, {"renamed.gguf": b"a much longer template" * 50 + weights})
    partial = store.begin(new)
    missing = list(partial.table.unique())
    reused = list(partial.reuse(store.donors(new.digest), missing, never))
    assert sum(partial.table.sizes[first] for first in reused) > 0.9 * new.size
    for first in set(missing) - set(reused):
        partial.write(first, chunk(new_source, partial, first))
    store.commit(partial)
    store.verify(new.digest)


def test_partial_artifacts_give_chunks_too(store: ArtifactStore, source: Path, tmp_path: Path) -> None:
    weights = noise(2 * MIB)
    old = make_artifact(source, {"model.bin": weights})
    store.abandon(fill(store, source, old, share=0.5))
    partial = store.begin(make_artifact(tmp_path / "new", {"model.bin": weights + b"tail"}))
    reused = list(partial.reuse(store.donors(partial.content.digest), partial.table.unique(), never))
    assert 0.3 < sum(partial.table.sizes[first] for first in reused) / partial.content.size < 0.6
    store.abandon(partial)


def test_damaged_donor_gives_only_what_is_right(store: ArtifactStore, source: Path, tmp_path: Path) -> None:
    weights = noise(2 * MIB)
    old = complete(store, source, make_artifact(source, {"model.bin": weights}))
    (old / "model.bin").write_bytes(weights[:MIB] + bytes(MIB))
    partial = store.begin(make_artifact(tmp_path / "new", {"model.bin": weights + b"tail"}))
    reused = set(partial.reuse(store.donors(partial.content.digest), partial.table.unique(), never))
    assert 0.3 < sum(partial.table.sizes[first] for first in reused) / partial.content.size < 0.6
    assert set(partial.present(never)) == reused
    store.abandon(partial)


def change(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (change, "SHA-256"),
        (lambda path: path.unlink(), "missing"),
        (lambda path: os.truncate(path, 10), "SHA-256"),
        (lambda path: (path.unlink(), path.mkdir()), "does not read"),
    ],
    ids=["changed", "missing", "truncated", "a folder"],
)
def test_verify_names_the_file(
    store: ArtifactStore, source: Path, manifest: Manifest, harm: Callable[[Path], None], words: str
) -> None:
    path = complete(store, source, manifest)
    harm(path / "again")
    with pytest.raises(StoreError, match=words) as caught:
        store.verify(manifest.digest)
    assert caught.value.code is FailureCode.STORE_CORRUPT
    assert "again" in str(caught.value)


def test_verify_of_nothing_and_of_a_damaged_manifest(store: ArtifactStore, source: Path, manifest: Manifest) -> None:
    with pytest.raises(StoreError, match="no artifact"):
        store.verify("0" * 64)
    path = complete(store, source, manifest)
    (path.parent / "manifest.json").write_bytes(b"{")
    assert store.manifest(manifest.digest) is None
    with pytest.raises(StoreError) as caught:
        store.verify(manifest.digest)
    assert caught.value.code is FailureCode.STORE_CORRUPT


def test_corrupt_artifact_is_discarded_and_fetched_again(
    store: ArtifactStore, source: Path, manifest: Manifest
) -> None:
    change(complete(store, source, manifest) / "again")
    store.discard(manifest.digest)
    assert store.path(manifest.digest) is None
    complete(store, source, manifest)
    store.verify(manifest.digest)


def test_collect_deletes_what_is_complete_and_not_kept(store: ArtifactStore, tmp_path: Path) -> None:
    made = [make_artifact(tmp_path / name, {"f": noise(100_000, n)}, name) for n, name in enumerate("abcd")]
    for name, manifest in zip("ab", made, strict=False):
        complete(store, tmp_path / name, manifest)
    store.abandon(fill(store, tmp_path / "c", made[2]))
    transferring = fill(store, tmp_path / "d", made[3])
    freed = store.collect([made[0].digest])
    assert freed > 100_000
    assert store.digests() == [made[0].digest]
    assert {donor.content.digest for donor in store.donors("")} == {each.digest for each in (made[0], *made[2:])}
    store.commit(transferring)
    assert store.collect([]) > 200_000
    assert store.digests() == []


def partial_names(store: ArtifactStore, made: Iterable[Manifest]) -> list[str]:
    there = {donor.content.digest for donor in store.donors("")} - set(store.digests())
    return [manifest.model.name for manifest in made if manifest.digest in there]


def begun(store: ArtifactStore, folder: Path, names: str) -> list[Manifest]:
    """Half of each, begun a second after the one before."""
    made = [make_artifact(folder / name, {"f": noise(200_000, n)}, name) for n, name in enumerate(names)]
    for n, (name, manifest) in enumerate(zip(names, made, strict=True)):
        store.abandon(fill(store, folder / name, manifest, 0.5))
        os.utime(folder / "device" / "partial" / manifest.digest / "manifest.json", (n, n))
    return made


def test_collect_leaves_the_newest_left_overs_and_those_that_are_spared(store: ArtifactStore, tmp_path: Path) -> None:
    made = begun(store, tmp_path, "abcdefg")
    assert store.collect([], [made[1].digest]) > 0
    assert partial_names(store, made) == ["b", *"defg"]
    assert store.collect([]) > 0
    assert partial_names(store, made) == list("defg")
    assert store.collect([]) == 0


def test_what_has_arrived_survives_collections_and_restarts(store: ArtifactStore, tmp_path: Path) -> None:
    (manifest,) = begun(store, tmp_path, "a")
    for _ in range(3):
        store.collect([])
        store = ArtifactStore(tmp_path / "device", reserve_bytes=0)
    partial = store.begin(manifest)
    assert len(list(partial.present(never))) == round(0.5 * len(list(partial.table.unique())))
    store.abandon(partial)


def test_a_spared_artifact_is_no_longer_complete_and_needs_no_byte_again(
    store: ArtifactStore, source: Path, manifest: Manifest
) -> None:
    complete(store, source, manifest)
    assert store.collect([], [manifest.digest]) == 0
    assert store.path(manifest.digest) is None
    partial = store.begin(manifest)
    assert set(partial.present(never)) == set(partial.table.unique())
    store.commit(partial)
    store.verify(manifest.digest)


def test_room_is_made_by_the_oldest_left_overs_and_no_more_of_them_than_needed(tmp_path: Path) -> None:
    with small_disk(tmp_path / "device", 4 * MIB):
        store = ArtifactStore(tmp_path / "device", reserve_bytes=0)
        made = [make_artifact(tmp_path / name, {"f": noise(MIB, n)}, name) for n, name in enumerate("abc")]
        for n, (name, manifest) in enumerate(zip("abc", made, strict=True)):
            store.abandon(fill(store, tmp_path / name, manifest, 0.5))
            os.utime(tmp_path / "device" / "partial" / manifest.digest / "manifest.json", (n, n))
        huge = make_artifact(tmp_path / "huge", {"f": noise(5 * MIB, 9)}, "huge")
        with pytest.raises(StoreError, match="are free; free") as caught:
            store.begin(huge)
        assert caught.value.code is FailureCode.STORE_DISK_FULL
        assert partial_names(store, made) == list("abc"), "deleting them would not have helped"
        large = make_artifact(tmp_path / "large", {"f": noise(int(1.5 * MIB), 8)}, "large")
        store.abandon(store.begin(large))
        assert partial_names(store, made) == list("bc")
        store.abandon(store.begin(made[1]))  # what is there already needs no room
        assert partial_names(store, made) == list("bc")


def test_a_disk_that_does_not_read_some_bytes_has_them_fetched_again(
    store: ArtifactStore, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = make_artifact(source, {"model.bin": noise(MIB)})
    store.abandon(fill(store, source, manifest))
    partial = store.begin(manifest)
    bad = partial.table.places(1)[0].offset
    read = os.pread

    def pread(descriptor: int, size: int, offset: int) -> bytes:
        if offset == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(descriptor, size, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", pread)
        missing = set(partial.table.unique()) - set(partial.present(never))
    assert missing == {1}
    for first in missing:
        partial.write(first, chunk(source, partial, first))
    store.commit(partial)
    store.verify(manifest.digest)


def test_a_disk_that_refuses_at_the_closing_leaves_nothing_open_and_nothing_claimed(
    store: ArtifactStore, source: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = fill(store, source, manifest)
    before = len(list(Path("/proc/self/fd").iterdir()))
    close = os.close

    def refuse(descriptor: int) -> None:
        close(descriptor)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "close", refuse)
        store.abandon(partial)
    assert len(list(Path("/proc/self/fd").iterdir())) == before - len(manifest.files)
    complete(store, source, manifest)
    store.verify(manifest.digest)


def test_reading_back_ends_early_when_nobody_waits_for_it(
    store: ArtifactStore, source: Path, manifest: Manifest
) -> None:
    complete(store, source, manifest)
    with pytest.raises(StoreError, match="cancelled") as caught:
        store.verify(manifest.digest, lambda: True)
    assert caught.value.code is FailureCode.CANCELLED
    assert store.path(manifest.digest) is not None


def test_too_small_a_disk_is_told_with_the_figures_before_anything_is_written(
    tmp_path: Path, source: Path, manifest: Manifest
) -> None:
    free = free_bytes(tmp_path)
    store = ArtifactStore(tmp_path / "device", reserve_bytes=free)
    with pytest.raises(StoreError) as caught:
        store.begin(manifest)
    assert caught.value.code is FailureCode.STORE_DISK_FULL
    text = str(caught.value)
    assert f"needs {manifest.size / MIB:.1f} MiB more" in text
    assert str(tmp_path / "device" / "partial") in text
    assert "are free" in text
    assert not list((tmp_path / "device").rglob("*"))
    assert store.collect([]) == 0


def test_full_disk(tmp_path: Path, source: Path, manifest: Manifest) -> None:
    with small_disk(tmp_path / "disk", MIB) as disk:
        with pytest.raises(StoreError, match="are free; free"):
            ArtifactStore(disk, reserve_bytes=0).begin(manifest)
        assert not list(disk.iterdir())


def test_disk_that_fills_up_between_the_look_and_the_writing(tmp_path: Path, source: Path, manifest: Manifest) -> None:
    with small_disk(tmp_path / "disk", 4 * MIB) as disk:
        store = ArtifactStore(disk, reserve_bytes=0)
        sparse = disk / "partial" / manifest.digest / "files" / "model.bin"
        sparse.parent.mkdir(parents=True)
        sparse.touch()
        os.truncate(sparse, manifest.files[0].size)  # as where the file system cannot promise room
        partial = store.begin(manifest)
        other = disk / "somebody"
        with other.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(bytes(65536))
        with pytest.raises(StoreError, match=r"model\.bin.*free space") as caught:
            for first in partial.table.unique():
                partial.write(first, chunk(source, partial, first))
        assert caught.value.code is FailureCode.STORE_DISK_FULL
        store.abandon(partial)
        other.unlink()
        complete(store, source, manifest)
        store.verify(manifest.digest)


def test_file_size_limit_is_a_full_disk_too(tmp_path: Path, source: Path, manifest: Manifest) -> None:
    script = """
import resource, signal, sys
from pathlib import Path
from agent.contract.manifest import Manifest
from agent.errors import StoreError
from agent.store.artifacts import ArtifactStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
try:
    ArtifactStore(Path(sys.argv[1])).begin(Manifest.from_json(sys.stdin.buffer.read()))
except StoreError as error:
    print(error.code, error)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "device")]
    done = subprocess.run(command, input=manifest.to_json(), capture_output=True, check=True)
    assert done.stdout.decode().startswith(FailureCode.STORE_DISK_FULL), done


def test_writing_after_the_end_is_harmless(store: ArtifactStore, source: Path, manifest: Manifest) -> None:
    partial = fill(store, source, manifest)
    data = chunk(source, partial, 0)
    store.commit(partial)
    assert partial.write(0, data) is False


def test_no_descriptor_is_left_open(store: ArtifactStore, source: Path, manifest: Manifest) -> None:
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    before = len(list(Path("/proc/self/fd").iterdir()))
    store.abandon(fill(store, source, manifest, 0.3))
    complete(store, source, manifest)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_killed_at_any_moment_it_is_complete_or_resumes(tmp_path: Path, source: Path, manifest: Manifest) -> None:
    script = """
import sys
from pathlib import Path
from agent.contract.manifest import Manifest
from agent.store.artifacts import ArtifactStore
manifest = Manifest.from_json(sys.stdin.buffer.read())
store = ArtifactStore(Path(sys.argv[1]), reserve_bytes=0)
source = Path(sys.argv[2])
while True:
    store.discard(manifest.digest)
    partial = store.begin(manifest)
    print("begun", flush=True)
    for first in partial.table.unique():
        place = partial.table.places(first)[0]
        data = (source / manifest.files[place.file].path).read_bytes()
        partial.write(first, data[place.offset : place.offset + partial.table.sizes[first]])
    store.commit(partial)
"""
    for delay in (0.0, 0.003, 0.01, 0.02, 0.03, 0.05):
        device = tmp_path / f"device-{delay}"
        command = [sys.executable, "-c", script, str(device), str(source)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(manifest.to_json())
        process.stdin.close()
        process.stdout.readline()
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            process.kill()
        process.wait()
        process.stdout.close()
        store = ArtifactStore(device, reserve_bytes=0)
        if store.path(manifest.digest) is None:
            partial = store.begin(manifest)
            for first in set(partial.table.unique()) - set(partial.present(never)):
                partial.write(first, chunk(source, partial, first))
            store.commit(partial)
        store.verify(manifest.digest)


def test_files_are_those_of_the_manifest_by_digest(source: Path, manifest: Manifest) -> None:
    for file in manifest.files:
        assert hashlib.sha256((source / file.path).read_bytes()).hexdigest() == file.sha256


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EACCES, errno.ENOSPC, errno.ENOMEM])
@pytest.mark.parametrize("name", ["manifest.json", "again"])
def test_a_disk_that_cannot_be_read_now_is_no_verdict_on_the_artifact(
    store: ArtifactStore, source: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, code: int, name: str
) -> None:
    complete(store, source, manifest)
    real = io.open

    def refuse(file: object, *arguments: Any, **more: Any) -> Any:
        if isinstance(file, Path) and file.name == name:
            raise OSError(code, os.strerror(code), str(file))
        return real(file, *arguments, **more)  # type: ignore[call-overload]

    with monkeypatch.context() as patch:
        patch.setattr(io, "open", refuse)
        with pytest.raises(StoreError, match=name.replace(".json", "")) as caught:
            store.verify(manifest.digest)
        assert list(store.donors("")) == [] or name != "manifest.json"
    expected = FailureCode.STORE_DISK_FULL if code == errno.ENOSPC else FailureCode.STORE_IO
    assert caught.value.code is expected
    store.verify(manifest.digest)


def test_looking_for_chunks_ends_early_when_nobody_waits(store: ArtifactStore, source: Path, tmp_path: Path) -> None:
    weights = noise(MIB)
    old = make_artifact(source, {"model.bin": weights})
    complete(store, source, old)
    partial = store.begin(make_artifact(tmp_path / "new", {"model.bin": weights + b"tail"}))
    assert list(partial.present(lambda: True)) == []
    assert list(partial.reuse(store.donors(partial.content.digest), partial.table.unique(), lambda: True)) == []
    asked = iter([False, False, True])
    some = list(partial.reuse(store.donors(partial.content.digest), partial.table.unique(), lambda: next(asked, True)))
    assert len(some) <= 1
    (source.parent / "device" / "artifacts" / old.digest / "files" / "model.bin").unlink()
    assert list(partial.reuse(store.donors(partial.content.digest), partial.table.unique(), never)) == []
    store.abandon(partial)
