"""The TUF repository: releases, rotation, what is served, crashes, and two controllers at once."""

from __future__ import annotations

import base64
import json
import multiprocessing
import resource
import shutil
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from securesystemslib.signer import SIGNER_FOR_URI_SCHEME, CryptoSigner, Key, SecretsHandler, Signature, Signer

from agent.contract.chunk_index import with_index
from agent.contract.manifest import manifest_target
from agent.contract.messages import Desired
from fleet.errors import RepositoryError
from fleet.home import Home
from fleet.trust.keyring import Keyring
from fleet.trust.release import KEPT_VERSIONS, Expiry
from fleet.trust.repository import ROLES, Repository
from tests.fleet.trust import crash
from tests.fleet.trust.conftest import verified_digests
from tests.simulators.clock import FakeClock
from tests.simulators.repository import make_desired, make_manifest, make_repository, ref

Verify = Callable[[], frozenset[str]]


def test_a_new_repository(repository: Repository, home: Home, verify: Verify) -> None:
    assert verify() == frozenset()
    rows = {row.role: row for row in repository.status()}
    assert list(rows) == list(ROLES)
    assert (rows["root"].threshold, len(rows["root"].keys)) == (2, 3)
    assert all(row.version == 1 for role, row in rows.items() if role != "director")
    assert len({keyid for row in rows.values() for keyid in row.keys}) == 7


def test_private_files_are_private(repository: Repository, home: Home) -> None:
    assert stat.S_IMODE(home.keys.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in home.keys.iterdir()} == {0o600}


def test_init_again_is_refused_and_changes_nothing(repository: Repository) -> None:
    root = repository.root_bytes()
    with pytest.raises(RepositoryError, match="holds a repository already"):
        repository.init()
    assert repository.root_bytes() == root


@pytest.mark.parametrize(("keys", "threshold"), [(1, 2), (3, 0)])
def test_a_threshold_that_cannot_be(home: Home, clock: FakeClock, keys: int, threshold: int) -> None:
    with pytest.raises(RepositoryError, match="must be from 1 to the"):
        Repository(home, clock.now).init(root_keys=keys, root_threshold=threshold)
    assert not home.keys.exists()


def test_without_a_repository(home: Home, clock: FakeClock) -> None:
    repository = Repository(home, clock.now)
    assert not repository.exists
    for use in (repository.root_bytes, repository.status, repository.refresh_online, repository.published):
        with pytest.raises(RepositoryError, match="run `phifleet init`"):
            use()


def test_publish_and_withdraw(repository: Repository, verify: Verify) -> None:
    first, second = make_manifest(b"1"), make_manifest(b"2")
    assert repository.publish(first) == 2
    assert repository.publish(first) == 2
    assert repository.publish(second) == 3
    assert verify() == frozenset(repository.published()) == {first.digest, second.digest}
    assert repository.withdraw(first.digest)
    assert not repository.withdraw(first.digest)
    assert verify() == {second.digest}


def test_an_artifact_with_an_index_is_one_artifact(repository: Repository, verify: Verify) -> None:
    whole = make_manifest(b"1")
    manifest, index = with_index(whole, 0)
    assert repository.publish(manifest, index) == 2
    assert repository.publish(manifest, index) == 2
    assert repository.published() == (manifest.digest,)
    for wrong in (None, b"x" * 36):
        with pytest.raises(ValueError, match="is not the one that its manifest names"):
            repository.publish(manifest, wrong)
    found, _ = repository.lasting(timedelta(days=1), [manifest.digest])
    assert [name for name in found if name.startswith("targets/artifacts/")] == []
    [carried] = [name for name in found if name.startswith("targets/indexed/")]
    assert found[carried] == manifest.to_json() == repository.read(carried)
    assert repository.withdraw(manifest.digest)
    assert repository.published() == () and not repository.withdraw(manifest.digest)


def test_the_same_files_for_two_contexts_are_two_artifacts(repository: Repository, verify: Verify) -> None:
    short, long = make_manifest(), make_manifest(id="sample-for-a-longer-context", context=8192)
    assert short.files == long.files
    repository.publish(short)
    repository.publish(long)
    assert verify() == {short.digest, long.digest}
    assert len(repository.published()) == 2


def test_measured_again_is_published_again(repository: Repository, verify: Verify) -> None:
    manifest = make_manifest()
    repository.publish(manifest)
    assert repository.publish(manifest.model_copy(update={"context": 2048})) == 3
    assert verify() == {manifest.digest}


def test_custom_metadata_says_what_an_artifact_is(repository: Repository, home: Home) -> None:
    manifest = make_manifest()
    repository.publish(manifest)
    targets = json.loads(repository.read("2.targets.json") or b"")["signed"]["targets"]
    custom = targets[manifest_target(manifest.digest)]["custom"]
    assert (custom["model"], custom["precision"], custom["size"]) == ("sample", "int4", manifest.size)


def test_old_versions_are_deleted_and_roots_are_not(repository: Repository, home: Home, verify: Verify) -> None:
    for n in range(KEPT_VERSIONS + 4):
        repository.publish(make_manifest(b"%d" % n))
    repository.rotate("root")
    names = {path.name for path in (home.tuf / "metadata").iterdir()}
    assert len([name for name in names if name.endswith("targets.json")]) == KEPT_VERSIONS
    assert {"1.root.json", "2.root.json"} <= names
    verify()


def test_refresh_signs_again_at_half_time(repository: Repository, clock: FakeClock, verify: Verify) -> None:
    clock.advance(days=3)
    assert not repository.refresh_online()
    clock.advance(days=1)
    assert repository.refresh_online()
    assert not repository.refresh_online()
    versions = {row.role: row.version for row in repository.status()}
    assert (versions["timestamp"], versions["snapshot"]) == (2, 1)
    clock.advance(days=6)
    assert repository.refresh_online()
    versions = {row.role: row.version for row in repository.status()}
    assert (versions["timestamp"], versions["snapshot"]) == (3, 2)
    verify()


def test_a_controller_that_refreshes_stays_good_for_as_long_as_its_targets(
    repository: Repository, clock: FakeClock, verify: Verify
) -> None:
    for _ in range(60):
        clock.advance(days=6)
        repository.refresh_online()
        verify()


def test_expiries_are_configured(home: Home, clock: FakeClock) -> None:
    repository = make_repository(home.root, clock, expiry=Expiry(root=10, targets=5, snapshot=2, timestamp=1))
    ends = {row.role: row.expires for row in repository.status()}
    assert {role: ends[role] - clock.now() for role in ROLES[:-1] if (ends[role])} == {  # type: ignore[operator]
        "root": timedelta(days=10),
        "targets": timedelta(days=5),
        "snapshot": timedelta(days=2),
        "timestamp": timedelta(days=1),
    }


def test_a_wrong_expiry_names_its_field(repository: Repository, home: Home) -> None:
    (home.tuf / "config.json").write_text('{"timestamp": 0, "days": 1}')
    with pytest.raises(RepositoryError, match=r"config.json: expiry in days(?s:.)*timestamp"):
        repository.publish(make_manifest())


# Rotation.


@pytest.mark.parametrize("role", ROLES)
def test_rotation(repository: Repository, home: Home, role: str, verify: Verify) -> None:
    manifest = make_manifest()
    repository.publish(manifest)
    before = {row.role: row.keys for row in repository.status()}
    made = repository.rotate(role)
    after = {row.role: row.keys for row in repository.status()}
    assert set(after[role]) == set(made)
    assert not set(before[role]) & set(made)
    assert {name: keys for name, keys in after.items() if name != role} == {
        name: keys for name, keys in before.items() if name != role
    }
    assert {f"file2:{path.name}" for path in home.keys.glob("*.pem")} == {
        uri for keys in after.values() for uri in keys.values()
    }
    assert verify() == {manifest.digest}
    repository.publish(make_manifest(b"later"))
    verify()


def test_rotating_one_root_key(repository: Repository, verify: Verify) -> None:
    old = next(iter(repository.status()[0].keys))
    made = repository.rotate("root", keyid=old[:10])
    keys = repository.status()[0].keys
    assert len(keys) == 3
    assert old not in keys
    assert made[0] in keys
    verify()


@pytest.mark.parametrize(("role", "keyid"), [("nobody", None), ("root", "ffff0000"), ("director", "zz")])
def test_rotating_what_is_not_there(repository: Repository, home: Home, role: str, keyid: str | None) -> None:
    files = sorted(path.name for path in home.keys.iterdir())
    with pytest.raises(RepositoryError, match=r"is no role|has no key"):
        repository.rotate(role, keyid=keyid)
    assert sorted(path.name for path in home.keys.iterdir()) == files


def take_offline(home: Home, to: Path, count: int) -> None:
    to.mkdir()
    for path in sorted(home.keys.glob("root-*.pem"))[:count]:
        shutil.move(path, to)


def test_with_root_keys_offline_all_but_root_goes_on(
    repository: Repository, home: Home, clock: FakeClock, tmp_path: Path, verify: Verify
) -> None:
    take_offline(home, tmp_path / "usb", 3)
    repository.publish(make_manifest())
    clock.advance(days=4)
    assert repository.refresh_online()
    repository.rotate("director")
    files = sorted(path.name for path in home.keys.iterdir())
    with pytest.raises(RepositoryError, match=r"root needs 2 keys, 0 can be opened.*No such file"):
        repository.rotate("timestamp")
    assert sorted(path.name for path in home.keys.iterdir()) == files
    verify()
    Repository(home, clock.now, offline_keys=tmp_path / "usb").rotate("timestamp")
    verify()


def test_two_of_three_root_keys_are_enough(repository: Repository, home: Home, tmp_path: Path, verify: Verify) -> None:
    take_offline(home, tmp_path / "lost", 1)
    repository.rotate("root")
    verify()


def test_a_lost_timestamp_key_can_be_rotated(repository: Repository, home: Home, verify: Verify) -> None:
    next(home.keys.glob("timestamp-*.pem")).unlink()
    with pytest.raises(RepositoryError, match="timestamp needs 1 keys, 0 can be opened"):
        repository.publish(make_manifest())
    verify()
    repository.rotate("timestamp")
    verify()


def test_a_key_that_others_can_read_is_not_used(repository: Repository, home: Home) -> None:
    path = next(home.keys.glob("targets-*.pem"))
    path.chmod(0o640)
    with pytest.raises(RepositoryError, match="can be read by others: chmod 600"):
        repository.publish(make_manifest())


def test_another_key_under_the_name_is_not_used(repository: Repository, home: Home, verify: Verify) -> None:
    shutil.copy(next(home.keys.glob("snapshot-*.pem")), next(home.keys.glob("targets-*.pem")))
    with pytest.raises(RepositoryError, match="does not match public key"):
        repository.publish(make_manifest())
    verify()


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"version": 1, "keys": {"a": {}}}'])
def test_a_damaged_keyring(repository: Repository, home: Home, data: bytes) -> None:
    (home.keys / "keyring.json").write_bytes(data)
    with pytest.raises(RepositoryError, match=r"keyring.json is damaged .* restore it"):
        repository.publish(make_manifest())


@pytest.mark.parametrize("name", ["timestamp.json", "1.snapshot.json", "1.targets.json", "1.root.json"])
def test_damaged_metadata(repository: Repository, home: Home, name: str) -> None:
    (home.tuf / "metadata" / name).write_bytes(b"{")
    with pytest.raises(RepositoryError, match=r"metadata is damaged: .* restore it"):
        repository.publish(make_manifest())


class VaultSigner(Signer):
    """Stands for a KMS: a signer behind a URI scheme of its own, whose private key is never a file of ours."""

    vault: dict[str, CryptoSigner] = {}  # noqa: RUF012 - the vault is one for all
    sealed = False

    def __init__(self, name: str) -> None:
        self._signer = self.vault[name]

    @classmethod
    def from_priv_key_uri(
        cls, priv_key_uri: str, public_key: Key, secrets_handler: SecretsHandler | None = None
    ) -> VaultSigner:
        return cls(priv_key_uri.removeprefix("testvault:"))

    @property
    def public_key(self) -> Key:
        return self._signer.public_key

    def sign(self, payload: bytes) -> Signature:
        if self.sealed:
            raise ConnectionError("the vault is sealed")
        return self._signer.sign(payload)


@pytest.fixture
def vault() -> Iterator[CryptoSigner]:
    SIGNER_FOR_URI_SCHEME["testvault"] = VaultSigner
    VaultSigner.vault["alias/x"] = CryptoSigner.generate_ecdsa()
    yield VaultSigner.vault["alias/x"]
    VaultSigner.sealed = False
    del SIGNER_FOR_URI_SCHEME["testvault"]


@pytest.mark.parametrize("role", ["targets", "timestamp", "director"])
def test_a_key_in_a_vault(repository: Repository, home: Home, vault: CryptoSigner, role: str, verify: Verify) -> None:
    repository.rotate(role, external=("testvault:alias/x", vault.public_key))
    assert not list(home.keys.glob(f"{role}-*.pem"))
    repository.publish(make_manifest())
    repository.sign_desired(make_desired(FakeClock()))
    verify()
    VaultSigner.sealed = True
    with pytest.raises(RepositoryError, match="the vault is sealed"):
        repository.publish(make_manifest(b"2")) if role != "director" else repository.sign_desired(
            make_desired(FakeClock())
        )
    verify()


def test_a_scheme_that_is_not_installed(repository: Repository, home: Home) -> None:
    keyring = Keyring(home.keys)
    keyid = next(iter(repository.status()[1].keys))
    document = json.loads((home.keys / "keyring.json").read_bytes())
    document["keys"][keyid]["uri"] = "nonsense:x"
    (home.keys / "keyring.json").write_text(json.dumps(document))
    with pytest.raises(RepositoryError, match="at nonsense:x: Unsupported private key scheme"):
        keyring.signer(keyid)


# What is served.


def test_served_names(repository: Repository) -> None:
    manifest = make_manifest()
    repository.publish(manifest)
    for name in ("1.root.json", "timestamp.json", "2.snapshot.json", "1.targets.json"):
        assert repository.read(name)
    assert repository.read("3.root.json") is None
    targets = json.loads(repository.read("2.targets.json") or b"")["signed"]["targets"]
    sha256 = targets[manifest_target(manifest.digest)]["hashes"]["sha256"]
    assert repository.read(f"targets/artifacts/{sha256}.{manifest.digest}.json") == manifest.to_json()


@given(
    name=st.text(max_size=60) | st.from_regex(r"(targets/|\.\./|/|%2e|\\|artifacts/|[a-z0-9.]){1,12}", fullmatch=True)
)
@example("../keys/keyring.json")
@example("targets/../../keys/keyring.json")
@example("targets/artifacts/../../../keys/keyring.json")
@example("/etc/passwd")
@example("1.root.json/../../config.json")
@example("config.json")
@example("timestamp.json\n")
@example("\u0661.root.json")
@example("")
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_other_name_reaches_the_disk(repository: Repository, home: Home, name: str) -> None:
    data = repository.read(name)
    assert data is None or name in {path.name for path in (home.tuf / "metadata").iterdir()}


# Crashes.


@contextmanager
def spawned() -> Iterator[Any]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.fleet.trust.crash"])
    yield context


@pytest.fixture(scope="module")
def populated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("populated") / "fleet"
    make_repository(folder, FakeClock(), expiry=Expiry(timestamp=15)).publish(make_manifest(b"old"))
    return folder


@pytest.mark.parametrize("operation", crash.OPERATIONS)
def test_killed_at_every_rename(populated: Path, tmp_path: Path, operation: str) -> None:
    """Whatever a killed controller leaves verifies, and the same operation can be done after it."""
    old, clock = make_manifest(b"old").digest, FakeClock()
    clock.advance(days=10)
    with spawned() as context:
        for dies_at in range(1, 40):
            home = Home(tmp_path / str(dies_at))
            shutil.copytree(populated, home.root)
            process = context.Process(target=crash.run, args=(home.root, operation, dies_at))
            process.start()
            process.join(60)
            if operation != "withdraw":
                assert old in verified_digests(home, clock, tmp_path / "device"), f"killed at rename {dies_at}"
            if process.exitcode == crash.COMPLETE:
                assert dies_at > 1
                return
            assert process.exitcode == -signal.SIGKILL
            repository = Repository(home, clock.now)
            if not (operation == "refresh" and repository.refresh_online() is False):
                crash.perform(repository, operation if operation != "refresh" else "renew timestamp")
            repository.publish(make_manifest(b"after"))
            verified_digests(home, clock, tmp_path / "device")
            assert not list(home.root.rglob(".new-*"))
    pytest.fail("it never came to its end")


def test_two_controllers_at_once(repository: Repository, home: Home, verify: Verify) -> None:
    count = 12
    with spawned() as context:
        processes = [context.Process(target=crash.publish_many, args=(home.root, name, count)) for name in ("a", "b")]
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes):
            verify()
        assert [process.exitcode for process in processes] == [0, 0]
    assert verify() == {make_manifest(f"{name} {n}".encode()).digest for name in ("a", "b") for n in range(count)}
    assert len(repository.published()) == 2 * count


def test_a_full_disk_leaves_the_old_release(repository: Repository, home: Home, verify: Verify) -> None:
    repository.publish(make_manifest(b"1"))
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, limit[1]))
    try:
        with pytest.raises(RepositoryError, match=r"cannot be read or written: .* is full; make room there"):
            repository.publish(make_manifest(b"2"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert verify() == {make_manifest(b"1").digest}
    assert not list(home.root.rglob(".new-*"))
    repository.publish(make_manifest(b"2"))
    assert len(verify()) == 2


def test_a_lock_that_is_held_is_named(repository: Repository, home: Home, clock: FakeClock) -> None:
    patient = Repository(home, clock.now, lock_timeout_s=0.05)
    with FileLock(home.root / "trust.lock"), pytest.raises(RepositoryError, match="another process has held"):
        patient.publish(make_manifest())


def test_init_killed_at_every_rename(clock: FakeClock, tmp_path: Path) -> None:
    home = Home(tmp_path / "never")
    with spawned() as context:
        for dies_at in range(1, 90, 3):
            home = Home(tmp_path / str(dies_at))
            process = context.Process(target=crash.run, args=(home.root, "init", dies_at))
            process.start()
            process.join(60)
            if process.exitcode == crash.COMPLETE:
                break
            assert not Repository(home, clock.now).exists
            Repository(home, clock.now).init()
            verified_digests(home, clock, tmp_path / "device")
    assert Repository(home, clock.now).exists


def test_orders_are_signed_by_the_director(repository: Repository, clock: FakeClock) -> None:
    desired = make_desired(clock, ref(make_manifest()))
    envelope = json.loads(repository.sign_desired(desired))
    assert {signature["keyid"] for signature in envelope["signatures"]} == set(repository.status()[-1].keys)
    assert Desired.from_json(base64.b64decode(envelope["payload"])) == desired
