"""The repository and the CA on a disk that refuses one call: an error of ours, nothing half done, and a retry works."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509

from fleet.errors import RepositoryError
from fleet.home import Home
from fleet.trust.ca import DeviceCA
from fleet.trust.keyring import Keyring
from fleet.trust.release import Expiry
from fleet.trust.repository import Repository
from tests.fleet.trust import crash
from tests.fleet.trust.conftest import verified_digests
from tests.models import slow
from tests.simulators.clock import FakeClock
from tests.simulators.faulty_disk import CODES, FaultyDisk, each_fault, faulty, open_files
from tests.simulators.repository import make_desired, make_manifest, make_repository

OLD = make_manifest(b"old")

pytestmark = pytest.mark.thorough


@pytest.fixture
def late(clock: FakeClock) -> FakeClock:
    """As late as the online roles must be signed again."""
    clock.advance(days=10)
    return clock


@pytest.fixture(scope="module")
def populated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("populated") / "fleet"
    clock = FakeClock()
    make_repository(folder, clock, expiry=Expiry(timestamp=15)).publish(OLD)
    DeviceCA(Home(folder), clock.now).init()
    return folder


def check(raised: BaseException | None, call: str, code: int, home: Home) -> None:
    """Clean-up may fail without a word; everything else is told, with the folder and what to do about a full disk."""
    if raised is None:
        return
    assert isinstance(raised, RepositoryError), f"{call} raised {raised!r}"
    assert str(home.root) in str(raised), call
    assert "damaged" not in str(raised), f"{call}: a disk that does not answer says nothing about the bytes"


def key_files(home: Home) -> set[str]:
    return {f"file2:{path.name}" for path in home.keys.glob("*.pem")}


def named_keys(repository: Repository) -> set[str]:
    return {uri for row in repository.status() for uri in row.keys.values()}


#: Of the rotations, which differ in what they sign again, the root's and the targets' sign the most.
ALIKE = ("rotate snapshot", "rotate timestamp", "rotate director")


@pytest.mark.parametrize("operation", [slow(one) if one in ALIKE else one for one in crash.OPERATIONS])
def test_a_write_that_the_disk_refuses(populated: Path, late: FakeClock, tmp_path: Path, operation: str) -> None:
    home = Home(tmp_path / "fleet")

    def prepare() -> Callable[[], object]:
        shutil.rmtree(home.root, ignore_errors=True)
        shutil.copytree(populated, home.root)
        fresh = Repository(home, late.now)
        return lambda: crash.perform(fresh, operation)

    before, refused = open_files(), 0
    for call, code, raised in each_fault(home.root, prepare):
        check(raised, call, code, home)
        refused += raised is not None
        assert open_files() <= before, call
        repository = Repository(home, late.now)
        # Devices verify what is there, and every key that is named for a role can still be opened.
        verified_digests(home, late, tmp_path / "device")
        assert named_keys(repository) <= key_files(home), call
        if not (operation == "refresh" and not repository.refresh_online()):
            crash.perform(repository, operation if operation != "refresh" else "renew timestamp")
        repository.publish(make_manifest(b"after"))
        assert make_manifest(b"after").digest in verified_digests(home, late, tmp_path / "device")
        assert not list(home.root.rglob(".new-*"))
        if operation.startswith("rotate"):
            assert key_files(home) == named_keys(repository), call
    assert refused > 10


READS: dict[str, Callable[[Repository], object]] = {
    "exists": lambda repository: repository.exists,
    "status": Repository.status,
    "published": Repository.published,
    "root_bytes": Repository.root_bytes,
    "read": lambda repository: repository.read("timestamp.json"),
    "sign_desired": lambda repository: repository.sign_desired(make_desired(FakeClock())),
}


@pytest.mark.parametrize("name", READS)
def test_a_read_that_the_disk_refuses(populated: Path, clock: FakeClock, tmp_path: Path, name: str) -> None:
    home = Home(tmp_path / "fleet")
    shutil.copytree(populated, home.root)

    def prepare() -> Callable[[], object]:
        return lambda: READS[name](Repository(home, clock.now))

    for call, code, raised in each_fault(home.root, prepare):
        assert raised is not None, call
        check(raised, call, code, home)
        assert READS[name](Repository(home, clock.now))


def test_a_first_repository_that_the_disk_refuses(clock: FakeClock, tmp_path: Path) -> None:
    home = Home(tmp_path / "fleet")

    def prepare() -> Callable[[], object]:
        shutil.rmtree(home.root, ignore_errors=True)
        home.root.mkdir()
        fresh = Repository(home, clock.now)
        return lambda: fresh.init(root_keys=1, root_threshold=1)

    for call, code, raised in each_fault(home.root, prepare):
        check(raised, call, code, home)
        repository = Repository(home, clock.now)
        if not repository.exists:
            repository.init()
        verified_digests(home, clock, tmp_path / "device")
        assert key_files(home) == named_keys(repository), call


def revoked(home: Home) -> int:
    return len(list(x509.load_pem_x509_crl((home.ca / "crl.pem").read_bytes())))


CA_WRITES: dict[str, Callable[[DeviceCA], object]] = {
    "enrol": lambda ca: ca.enrol("pi-2"),
    "revoke": lambda ca: ca.revoke("pi-1"),
    "refresh_crl": DeviceCA.refresh_crl,
}


@pytest.mark.parametrize("name", CA_WRITES)
def test_a_ca_that_the_disk_refuses(clock: FakeClock, tmp_path: Path, name: str) -> None:
    home, pristine = Home(tmp_path / "fleet"), tmp_path / "pristine"
    first = DeviceCA(Home(pristine), clock.now)
    first.init()
    first.enrol("pi-1")
    clock.advance(days=20)

    def prepare() -> Callable[[], object]:
        shutil.rmtree(home.root, ignore_errors=True)
        shutil.copytree(pristine, home.root)
        return lambda: CA_WRITES[name](DeviceCA(home, clock.now))

    before, refused = open_files(), 0
    for call, code, raised in each_fault(home.root, prepare):
        check(raised, call, code, home)
        refused += raised is not None
        assert open_files() <= before, call
        ca = DeviceCA(home, clock.now)
        CA_WRITES[name](ca)
        assert revoked(home) == (name == "revoke"), f"{call}: the broker is told after the retry"
        assert ca.enrol("pi-3").ca == ca.ca_pem()
        assert not list(home.root.rglob(".new-*"))
    assert refused > 3 * 4


def test_a_revocation_that_did_not_reach_the_list_is_on_the_next_one(clock: FakeClock, tmp_path: Path) -> None:
    """The controller signs the list again by itself; nobody need remember the command that failed."""
    home = Home(tmp_path / "fleet")
    ca = DeviceCA(home, clock.now)
    ca.init()
    ca.enrol("pi-1")
    empty = (home.ca / "crl.pem").read_bytes()
    assert ca.revoke("pi-1") == 1
    assert not ca.refresh_crl()
    (home.ca / "crl.pem").write_bytes(empty)
    assert ca.refresh_crl()
    assert revoked(home) == 1


def test_a_first_ca_that_the_disk_refuses(clock: FakeClock, tmp_path: Path) -> None:
    home = Home(tmp_path / "fleet")

    def prepare() -> Callable[[], object]:
        shutil.rmtree(home.root, ignore_errors=True)
        home.root.mkdir()
        return lambda: DeviceCA(home, clock.now).init()

    for call, code, raised in each_fault(home.root, prepare):
        check(raised, call, code, home)
        ca = DeviceCA(home, clock.now)
        if not ca.exists:
            ca.init()
        assert ca.enrol("pi-1").ca == ca.ca_pem(), call


@pytest.mark.parametrize("code", CODES[1:])
def test_a_full_disk_is_told_as_one(populated: Path, clock: FakeClock, tmp_path: Path, code: int) -> None:
    uses: tuple[Callable[[Home], object], ...] = (
        lambda home: Repository(home, clock.now).publish(make_manifest()),
        lambda home: DeviceCA(home).enrol("pi-1"),
    )
    for number, use in enumerate(uses):
        counted, full = Home(tmp_path / f"counted-{number}"), Home(tmp_path / f"full-{number}")
        for home in (counted, full):
            shutil.copytree(populated, home.root)
        with faulty(FaultyDisk(counted.root)) as counting:
            use(counted)
        last_sync = len(counting.calls) - 1 - counting.calls[::-1].index("fsync")
        with faulty(FaultyDisk(full.root, last_sync, code)), pytest.raises(RepositoryError, match="make room there"):
            use(full)


def test_a_key_that_could_not_be_entered_leaves_no_file(tmp_path: Path) -> None:
    """A private key that no keyring names would lie about for ever."""
    folder = tmp_path / "keys"

    def prepare() -> Callable[[], object]:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return lambda: Keyring(folder).create("targets")

    for call, _, raised in each_fault(folder, prepare):
        entered = {entry.uri for entry in Keyring(folder).entries().values()}
        assert {f"file2:{path.name}" for path in folder.glob("*.pem")} == entered, f"{call}: {raised!r}"


def test_the_revoked_are_those_of_the_clock(clock: FakeClock, tmp_path: Path) -> None:
    """What has expired need not be revoked, and leaves the book of what was issued."""
    home = Home(tmp_path / "fleet")
    ca = DeviceCA(home, clock.now)
    ca.init()
    ca.enrol("pi-1", days=1)
    clock.advance(days=2)
    ca.enrol("pi-1", days=30)
    assert ca.revoke("pi-1") == 1
    assert revoked(home) == 1
