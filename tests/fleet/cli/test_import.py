"""`phifleet device import`: a file of devices, all of it or a word on each line that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agent.contract.bundle import Bundle
from fleet.home import Home
from fleet.trust.ca import DeviceCA
from tests.fleet.cli.conftest import Phifleet
from tests.fleet.world import World


def written(folder: Path, text: str) -> str:
    (folder / "devices.csv").write_text(text, encoding="utf-8")
    (folder / "bundles").mkdir(exist_ok=True)
    return str(folder / "devices.csv")


GOOD = "device,profile,label.site,label.rack\npi-1,iot-x86,rue 4,\npi-2,raspberry-pi-5,lyon,a\n"


def test_devices_are_added_with_their_labels_and_a_bundle_each(phifleet: Phifleet, world: World, tmp_path: Path):
    file = written(tmp_path, "\ufeff" + GOOD)
    done = phifleet("device", "import", file, "--bundles", str(tmp_path / "bundles"))
    assert done.code == 0 and "2 devices added, 0 were there" in done.out
    rows = {row.id: (row.profile, row.labels) for row in world.registry.devices.all()}
    assert rows == {"pi-1": ("iot-x86", {"site": "rue 4"}), "pi-2": ("raspberry-pi-5", {"site": "lyon", "rack": "a"})}
    for name in ("pi-1", "pi-2"):
        path = tmp_path / "bundles" / f"{name}.json"
        assert path.stat().st_mode & 0o777 == 0o600
        assert Bundle.model_validate_json(path.read_text()).device == name
    before = (tmp_path / "bundles" / "pi-1.json").read_bytes()
    again = phifleet("device", "import", file, "--bundles", str(tmp_path / "bundles"))
    assert "0 devices added, 2 were there" in again.out
    assert (tmp_path / "bundles" / "pi-1.json").read_bytes() == before, "what was added stays as it is"
    (tmp_path / "bundles" / "pi-2.json").unlink()
    phifleet("device", "import", file, "--bundles", str(tmp_path / "bundles"))
    assert (tmp_path / "bundles" / "pi-2.json").exists(), "an interrupted run is finished"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "its first line names the columns device, profile"),
        ("device\npi-1\n", "its first line names the columns"),
        ("device,profile,colour\npi-1,iot-x86,red\n", "its first line names the columns"),
        ("device,profile,device\npi-1,iot-x86,x\n", "each once"),
        ("device,profile\npi-1,iot-x86,more\n", "line 2: has more or fewer values"),
        ("device,profile\npi-1\n", "line 2: has more or fewer values"),
        ("device,profile\nPi 1,iot-x86\npi-2,iot-x86\n", "line 2: 'Pi 1' is no device id"),
        ("device,profile\npi-1,iot-x86\npi-1,iot-x86\n", "line 3: pi-1 is on line 2 too"),
        ("device,profile,label.Site\npi-1,iot-x86,x\n", "line 2: label 'Site': lower case letters"),
        ('device,profile\n"pi-1,iot-x86\n', "unexpected end of data"),
        ("device,profile\npi-1,pi-55\n", "pi-55"),
    ],
)
def test_a_file_that_is_wrong_adds_nothing(phifleet: Phifleet, world: World, tmp_path: Path, text: str, words: str):
    file = written(tmp_path, text)
    done = phifleet("device", "import", file, "--bundles", str(tmp_path / "bundles"))
    assert done.code in (2, 4) and words in done.err
    assert world.registry.devices.all() == []
    assert list((tmp_path / "bundles").iterdir()) == []


def test_a_device_with_another_profile_is_no_reason_to_change_it(phifleet: Phifleet, world: World, tmp_path: Path):
    world.add("pi-2")
    done = phifleet("device", "import", written(tmp_path, GOOD), "--bundles", str(tmp_path / "bundles"))
    assert done.code == 2 and "line 3: pi-2 is in the fleet with the profile iot-x86" in done.err


def test_the_one_file_of_before_is_taken_apart_and_revocations_stay(world: World):
    ca = DeviceCA(Home(world.home.root))
    ca.init()
    for name in ("pi-1", "pi-2", "fleet.controller"):
        (ca.client_certificate if "." in name else ca.enrol)(name)
    assert ca.revoke("pi-2") == 1
    issued = [json.loads(path.read_text()) for path in (world.home.ca / "issued").rglob("*.json")]
    revoked = {entry["serial"]: entry for entry in json.loads((world.home.ca / "revoked.json").read_text())}
    old = [revoked.get(entry["serial"], entry) for entries in issued for entry in entries]
    for path in (world.home.ca / "issued").rglob("*.json"):
        path.unlink()
    (world.home.ca / "revoked.json").unlink()
    (world.home.ca / "issued.json").write_text(json.dumps(old))  # as 0.1.0 kept it
    again = DeviceCA(Home(world.home.root))
    assert again.revoke("pi-2") == 0, "it is revoked already"
    assert again.revoke("pi-1") == 1
    assert not (world.home.ca / "issued.json").exists()
    assert len(json.loads((world.home.ca / "revoked.json").read_text())) == 2
