"""Whatever bytes arrive as metadata: a TrustError or the truth, never another exception."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tuf.api.exceptions import DownloadHTTPError
from tuf.api.metadata import Metadata

from agent.errors import TrustError
from agent.trust.fetcher import METADATA_URL, LinkFetcher
from agent.trust.time import VerifiedClock
from agent.trust.updates import Updates
from fleet.trust.repository import Repository
from tests.simulators.clock import START, FakeClock
from tests.simulators.repository import make_manifest, make_repository

NAMES = ("timestamp.json", "2.root.json", "3.snapshot.json", "3.targets.json")


class Direct(LinkFetcher):
    """The repository without a link, and one file changed."""

    def __init__(self, repository: Repository, name: str, data: bytes) -> None:
        self._repository, self._changed = repository, {name: data}

    def _fetch(self, url: str) -> Iterator[bytes]:
        name = url.removeprefix(METADATA_URL)
        data = self._changed.get(name, self._repository.read(name))
        if data is None:
            raise DownloadHTTPError(name, 404)
        yield data


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    repository = make_repository(tmp_path_factory.mktemp("fuzz") / "fleet", FakeClock())
    repository.publish(make_manifest())
    repository.rotate("timestamp")
    repository.renew("targets")
    return repository


def refresh(repository: Repository, folder: Path, name: str, data: bytes) -> None:
    clock = VerifiedClock(FakeClock(), folder / "time.json", START)
    root = repository.read("1.root.json")
    assert root is not None
    try:
        Updates(folder, root, clock).refresh(Direct(repository, name, data))
    except TrustError:
        return
    # What is verified is what was understood: python-tuf fills in a missing spec_version, and verifies with it.
    assert Metadata.from_bytes(data).signed == Metadata.from_bytes(repository.read(name) or b"").signed


def edits(original: bytes) -> st.SearchStrategy[bytes]:
    """A byte changed, a piece cut out, or a value of the JSON replaced."""
    index = st.integers(0, len(original) - 1)
    byte = st.tuples(index, st.binary(min_size=1, max_size=1)).map(
        lambda at: original[: at[0]] + at[1] + original[at[0] + 1 :]
    )
    cut = st.tuples(index, index).map(lambda at: original[: min(at)] + original[max(at) :])
    value: st.SearchStrategy[Any] = st.none() | st.integers() | st.text(max_size=5) | st.just([]) | st.just({})
    return byte | cut | st.tuples(st.randoms(use_true_random=False), value).map(lambda pair: replaced(original, *pair))


def replaced(original: bytes, random: Any, value: Any) -> bytes:
    document = json.loads(original)
    node, key = document, random.choice(sorted(document))
    while isinstance(node[key], dict) and node[key] and random.random() < 0.8:
        node = node[key]
        key = random.choice(sorted(node))
    node[key] = value
    return json.dumps(document).encode()


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_changed_metadata(repository: Repository, tmp_path: Path, name: str, data: st.DataObject) -> None:
    original = repository.read(name)
    assert original is not None
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    refresh(repository, folder, name, data.draw(edits(original)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("data", [b"[" * 100_000, b'{"a":' * 50_000, b'{"signed":1e999}', b"\x00" * 100])
def test_hostile_metadata(repository: Repository, tmp_path: Path, name: str, data: bytes) -> None:
    with pytest.raises(TrustError):
        Updates(
            tmp_path, repository.read("1.root.json") or b"", VerifiedClock(FakeClock(), tmp_path / "time.json", START)
        ).refresh(Direct(repository, name, data))
