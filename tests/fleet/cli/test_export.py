"""`phifleet artifacts export` and `import` as an operator types them."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fleet.cli.conftest import Phifleet
from tests.fleet.world import World


def test_an_artifact_goes_to_another_home_with_its_papers(
    phifleet: Phifleet, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = world.manifest.id
    told = phifleet("artifacts", "export", artifact, "--bom", "--card", "--sign", "--oci", str(tmp_path / "out"))
    assert told.code == 0 and f"wrote {artifact} into" in told.out
    command = shlex.split(re.findall(r"`(model_signing .*?)`", told.out)[0])
    subprocess.run([Path(sys.executable).parent / command[0], *command[1:]], check=True, capture_output=True)
    assert f"skopeo copy oci:{tmp_path / 'out'}:{artifact}" in told.out
    other = Phifleet(tmp_path / "other", capsys)
    assert other("init").code == 0
    assert other("artifacts", "import", str(tmp_path / "out")).out.startswith(f"imported {artifact}: ")
    assert other("artifacts", "import", str(tmp_path / "out")).out.startswith(f"already here: {artifact}")
    listed = json.loads(other("artifacts", "list", "--json").out)
    assert [one["id"] for one in listed] == [artifact]


def test_it_is_told_to_machines_too(phifleet: Phifleet, world: World, tmp_path: Path) -> None:
    told = json.loads(
        phifleet("artifacts", "export", world.manifest.id[:12], str(tmp_path / "out"), "--oci", "--json").out
    )
    assert told["tag"] == told["artifact"] == world.manifest.id and told["digest"].startswith("sha256:")
    assert "model.bin" in told["files"]
    imported = phifleet("artifacts", "import", str(tmp_path / "out"), "--json")
    assert json.loads(imported.out)["digest"] == world.manifest.digest


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["export", "nothing", "OUT"], "no artifact is named nothing"),
        (["export", "ARTIFACT", "HOME"], "is not an empty folder; name a new one"),
        (["export", "ARTIFACT", "OUT", "--key", "k.pem"], "add --sign"),
        (["export", "ARTIFACT", "OUT", "--sign", "--key", "k.pem"], "k.pem: cannot be read: No such file"),
        (["export", "ARTIFACT", "/proc/out"], "cannot be written"),
        (["import", "HOME"], "is no exported artifact"),
        (["import", "HOME", "--tag", "x"], "is no exported artifact"),
        (["import", "absent"], "does not exist"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_changes_nothing(
    phifleet: Phifleet, world: World, tmp_path: Path, arguments: list[str], words: str
) -> None:
    places = {"OUT": str(tmp_path / "out"), "HOME": str(tmp_path / "home"), "ARTIFACT": world.manifest.id}
    before = sorted(tmp_path.rglob("*"))
    told = phifleet("artifacts", *(places.get(one, one) for one in arguments))
    assert told.code != 0 and words in told.err and told.out == ""
    assert [path for path in sorted(tmp_path.rglob("*")) if path not in before and path.suffix != ".lock"] == []


def test_without_the_library_that_signs_it_says_what_to_install(
    phifleet: Phifleet, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    told = phifleet("artifacts", "export", world.manifest.id, str(tmp_path / "out"), "--sign")
    assert told.code != 0 and "pip install 'phifleet[sign]'" in told.err
    assert not (tmp_path / "out").exists()
