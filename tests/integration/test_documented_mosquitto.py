"""Debian's mosquitto with Debian's own mosquitto.conf and ours beside it, started by root as its unit does."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from fleet.home import Home
from fleet.trust.ca import DeviceCA
from tests.simulators.broker import MOSQUITTO, free_port
from tests.waiting import wait_until

DEBIAN = Path("/etc/mosquitto/mosquitto.conf")
DOCUMENTED = Path(__file__).parents[2] / "docs" / "mosquitto"
USER = "mosquitto"


def _can_run() -> bool:
    users = {entry.pw_name for entry in pwd.getpwall()}
    return os.geteuid() == 0 and DEBIAN.exists() and USER in users and MOSQUITTO is not None


pytestmark = pytest.mark.skipif(not _can_run(), reason="needs root, and mosquitto as Debian installs it")


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that mosquitto's user can reach: pytest's own is for the user of the tests alone."""
    with tempfile.TemporaryDirectory(prefix="phifleet-mosquitto-") as made:
        Path(made).chmod(0o755)
        yield Path(made)


@contextmanager
def started(folder: Path, key_owner: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """As `docs/operations.md` lays the files, in a folder in the place of /etc/mosquitto."""
    ours = folder / "phifleet"
    ours.mkdir()
    home = Home(folder / "home")
    ca = DeviceCA(home)
    ca.init()
    made = ca.server_certificate(["localhost"])
    for name, text in (("ca.pem", made.ca), ("broker.pem", made.certificate), ("broker-key.pem", made.private_key)):
        (ours / name).write_text(text)
    shutil.copy(home.ca / "crl.pem", ours)
    shutil.copy(DOCUMENTED / "acl", ours)
    for name in ("broker-key.pem", "acl"):
        shutil.chown(ours / name, key_owner)
        (ours / name).chmod(0o400)
    (folder / "conf.d").mkdir()
    (folder / "data").mkdir()
    shutil.chown(folder / "data", USER)
    text = (DOCUMENTED / "mosquitto.conf").read_text().replace("/etc/mosquitto/phifleet", str(ours))
    text = text.replace("listener 8883", f"listener {free_port()} 127.0.0.1")
    (folder / "conf.d" / "phifleet.conf").write_text(text)
    main = DEBIAN.read_text()
    for at, here in (("/run/mosquitto", "data"), ("/var/lib/mosquitto", "data"), ("/var/log/mosquitto", "data")):
        main = main.replace(at, str(folder / here))
    (folder / "mosquitto.conf").write_text(main.replace("/etc/mosquitto/conf.d", str(folder / "conf.d")))
    log = folder / "data" / "mosquitto.log"
    command = [str(MOSQUITTO), "-c", str(folder / "mosquitto.conf")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            yield process, log
        finally:
            process.terminate()


def test_it_starts_beside_debians_configuration_as_its_own_user(folder: Path):
    with started(folder, USER) as (process, log):
        wait_until(lambda: process.poll() is not None or (log.exists() and "running" in log.read_text()), "it runs")
        said = process.stdout.read() if process.poll() is not None and process.stdout else b""
        assert process.poll() is None, f"{said.decode()}{log.read_text() if log.exists() else ''}"
        assert psutil.Process(process.pid).username() == USER
        assert "Error" not in log.read_text()


def test_a_key_of_roots_is_what_the_documents_keep_people_from(folder: Path):
    """The premise of the commands: if mosquitto read the key as root, they could be simpler."""
    with started(folder, "root") as (process, log):
        assert process.wait(20) != 0
        assert "Error opening acl file" in log.read_text()
