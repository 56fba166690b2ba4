"""A disk that refuses one call of the trust of the fleet: it is told, and the next attempt finds all as it was."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509

from fleet.errors import FleetError
from fleet.home import Home
from fleet.trust.ca import DeviceCA
from fleet.trust.repository import Repository
from tests.simulators.clock import FakeClock
from tests.simulators.faulty_disk import each_fault, open_files
from tests.simulators.repository import make_desired, make_manifest, make_repository, ref

MANIFEST = make_manifest(b"published before")
OTHER = make_manifest(b"published now")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a repository, one artifact in it, and a CA with one device."""
    folder = tmp_path_factory.mktemp("whole") / "home"
    repository = make_repository(folder, FakeClock())
    repository.publish(MANIFEST)
    ca = DeviceCA(Home(folder))
    ca.init()
    ca.enrol("pi-1")
    return folder


Operation = Callable[[Home, FakeClock], object]
REPOSITORY: dict[str, Operation] = {
    "publish": lambda home, clock: Repository(home, clock.now).publish(OTHER),
    "withdraw": lambda home, clock: Repository(home, clock.now).withdraw(MANIFEST.digest),
    "sign an order": lambda home, clock: Repository(home, clock.now).sign_desired(make_desired(clock, ref(MANIFEST))),
    "root": lambda home, clock: Repository(home, clock.now).root_bytes(),
    "published": lambda home, clock: Repository(home, clock.now).published(),
    "status": lambda home, clock: Repository(home, clock.now).status(),
    "refresh": lambda home, clock: Repository(home, _later(clock).now).refresh_online(),
}
CA: dict[str, Operation] = {
    "enrol": lambda home, clock: DeviceCA(home).enrol("pi-2"),
    "revoke": lambda home, clock: DeviceCA(home).revoke("pi-1"),
    "the broker's certificate": lambda home, clock: DeviceCA(home).server_certificate(["localhost"]),
}


def _later(clock: FakeClock) -> FakeClock:
    later = FakeClock(clock.now())
    later.advance(days=6)
    return later


@pytest.mark.parametrize("name", REPOSITORY)
def test_a_repository_that_is_refused_a_call_says_so_and_goes_on(whole: Path, tmp_path: Path, name: str):
    _go_through(whole, tmp_path, name, REPOSITORY[name], _the_repository_works)


@pytest.mark.parametrize("name", CA)
def test_a_ca_that_is_refused_a_call_says_so_and_goes_on(whole: Path, tmp_path: Path, name: str):
    _go_through(whole, tmp_path, name, CA[name], _the_ca_works)


def _go_through(whole: Path, tmp_path: Path, name: str, operation: Operation, works: Callable[[Home], object]) -> None:
    home, opened = Home(tmp_path / "home"), open_files()

    def prepare() -> Callable[[], object]:
        shutil.rmtree(home.root, ignore_errors=True)
        shutil.copytree(whole, home.root)
        clock = FakeClock()
        return lambda: operation(home, clock)

    refused = 0
    for call, code, raised in each_fault(home.root, prepare):
        assert raised is None or isinstance(raised, FleetError), f"{name}, {call}, {code}: {raised!r}"
        refused += raised is not None
        half = list(home.root.rglob(".new-*"))
        assert not half or raised is not None, "what is half written is left by a failure at most"
        works(home)
    assert refused, "a disk that refuses is told"
    assert open_files() == opened


def _the_repository_works(home: Home) -> None:
    """Whatever happened, the next order publishes both artifacts."""
    repository = Repository(home, _later(FakeClock()).now)
    repository.publish(MANIFEST)
    repository.publish(OTHER)
    assert set(repository.published()) == {MANIFEST.digest, OTHER.digest}


def _the_ca_works(home: Home) -> None:
    ca = DeviceCA(home)
    ca.enrol("pi-3")
    assert ca.revoke("pi-1") in (0, 1)
    assert ca.revoke("pi-1") == 0
    listed = x509.load_pem_x509_crl((home.ca / "crl.pem").read_bytes())
    assert len(list(listed)) == 1, "the broker is told, also when the disk had refused the list"
