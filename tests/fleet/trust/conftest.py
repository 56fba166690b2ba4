"""A fleet's repository, and a device that believes nobody: verification from the first root on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fleet.home import Home
from fleet.trust.repository import Repository
from tests.simulators.clock import FakeClock
from tests.simulators.repository import make_repository


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "fleet")


@pytest.fixture
def repository(home: Home, clock: FakeClock) -> Repository:
    return make_repository(home.root, clock)


@pytest.fixture
def verify(home: Home, clock: FakeClock, tmp_path: Path) -> Callable[[], frozenset[str]]:
    """Walks from the first root to the targets as a new device would; the digests that it may install."""

    def walk() -> frozenset[str]:
        return verified_digests(home, clock, tmp_path / "device")

    return walk


def verified_digests(home: Home, clock: FakeClock, folder: Path) -> frozenset[str]:
    """As ngclient sees the repository in `home`.

    Raises:
        Exception: it does not verify.
    """
    import json
    import shutil
    from collections.abc import Iterator

    from tuf.api.exceptions import DownloadHTTPError
    from tuf.ngclient import FetcherInterface, Updater

    repository = Repository(home, clock.now)

    class Direct(FetcherInterface):
        def _fetch(self, url: str) -> Iterator[bytes]:
            data = repository.read(url.removeprefix("m/").replace("t/", "targets/", 1))
            if data is None:
                raise DownloadHTTPError(url, 404)
            yield data

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    root = repository.read("1.root.json")
    updater = Updater(str(folder), "m/", str(folder), "t/", Direct(), bootstrap=root)
    updater._trusted_set.reference_time = clock.now()
    updater.refresh()
    paths = json.loads((folder / "targets.json").read_bytes())["signed"]["targets"]
    for path in paths:
        info = updater.get_targetinfo(path)
        assert info is not None
        updater.download_target(info)
    assert "director.json" in paths
    return frozenset(path[len("artifacts/") : -len(".json")] for path in paths if path != "director.json")
