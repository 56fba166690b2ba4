"""`phifleet artifacts mirror`: what a web server is given, and given again."""

from __future__ import annotations

import json
from pathlib import Path

from tests.fleet.cli.conftest import Phifleet
from tests.fleet.world import World


def test_artifacts_are_written_once_and_mended(phifleet: Phifleet, world: World, tmp_path: Path) -> None:
    root, manifest = tmp_path / "www", world.manifest
    folder, file = root / manifest.digest, manifest.files[0]
    told = phifleet("artifacts", "mirror", str(root))
    assert told.code == 0 and f"wrote: {manifest.digest}/" in told.out
    assert 'mirrors = ["https://HOST/{digest}/{path}"]' in told.out
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
        one.path for one in manifest.files
    }
    written = (folder / file.path).read_bytes()
    assert folder.stat().st_mode & 0o055 == 0o055, "another user's web server reads it"
    before = (folder / file.path).stat()
    again = json.loads(phifleet("artifacts", "mirror", str(root), manifest.id, "--json").out)
    assert again == [{"artifact": manifest.id, "digest": manifest.digest, "bytes": manifest.size, "there": True}]
    assert (folder / file.path).stat().st_mtime_ns == before.st_mtime_ns
    for damage in (b"", b"x" * len(written), None):
        (folder / file.path).unlink() if damage is None else (folder / file.path).write_bytes(damage)
        (mended,) = json.loads(phifleet("artifacts", "mirror", str(root), "--json").out)
        assert not mended["there"] and (folder / file.path).read_bytes() == written
    assert list(root.iterdir()) == [folder], "nothing half-made is left"


def test_what_cannot_be_written_is_one_sentence(phifleet: Phifleet, world: World, tmp_path: Path) -> None:
    assert "no artifact is named nothing" in phifleet("artifacts", "mirror", str(tmp_path / "www"), "nothing").err
    told = phifleet("artifacts", "mirror", "/proc/www")
    assert told.code and "/proc/www" in told.err and "cannot be written" in told.err
    (phifleet.home / "artifacts" / world.manifest.id / "files" / world.manifest.files[0].path).write_bytes(b"other")
    told = phifleet("artifacts", "mirror", str(tmp_path / "www"))
    assert told.code and "is not what its manifest says" in told.err
    assert not list((tmp_path / "www").glob("*"))
