"""A Debian 12 with systemd and next to nothing else, for commands that must work on a stranger's machine.

debootstrap makes the base once; each machine is a copy of it, booted with systemd-nspawn on the host's network. It has
no compiler, no Python, and no package of the host. Needs root, debootstrap and systemd-nspawn.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.bare.documents import ROOT

#: Beside Debian's essential packages: what makes it a machine with a service manager and people.
PACKAGES = "systemd,systemd-sysv,dbus,sudo,ca-certificates"
#: Who is there, and where each works.
USERS = {"root": "/root", "operator": "/home/operator/phifleet", "admin": "/home/admin"}
#: The name that the documents give the broker.
BROKER = "broker.example.org"
#: Where it is kept; PHIFLEET_BARE names another folder.
FOLDER = Path(os.environ.get("PHIFLEET_BARE", "/var/tmp/phifleet-bare"))

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: The host's authorities and settings of pip, without which neither would reach a package index behind a proxy.
_BOUND = ("/etc/ssl/certs", "/etc/pip.conf", "/etc/xdg/pip", "/usr/local/share/ca-certificates")
_BOOT_S = 60


@dataclass(frozen=True)
class Result:
    code: int
    output: str


class Machine:
    """One that is booted; its files are removed when it is left."""

    def __init__(self) -> None:
        base = _base()
        self.root = Path(tempfile.mkdtemp(prefix="machine-", dir=FOLDER))
        subprocess.run(["cp", "-a", "--reflink=auto", f"{base}/.", str(self.root)], check=True)
        try:
            self._furnish()
        except BaseException:
            _remove(self.root)
            raise
        bound = [f"--bind-ro={path}" for path in _BOUND if Path(path).exists()]
        command = ["systemd-nspawn", "--quiet", f"--directory={self.root}", "--register=no", "--keep-unit", "--boot"]
        self._log = (FOLDER / "console.log").open("wb")
        self._nspawn = subprocess.Popen(
            [*command, *bound], stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log
        )
        try:
            self._leader = self._booted()
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self._nspawn.terminate()
        try:
            self._nspawn.wait(60)
        except subprocess.TimeoutExpired:
            self._nspawn.kill()
            self._nspawn.wait(10)
        self._log.close()
        _remove(self.root)

    def run(self, script: str, user: str = "root", *, timeout_s: float = 600) -> Result:
        """Run a script with bash as somebody would at a prompt, but ending at the first command that fails."""
        inside = ["/usr/bin/env", "-i", f"PATH={_PATH}", "LANG=C.UTF-8", "TERM=dumb"]
        command = [*self._enter(), *inside, "runuser", "-l", user, "-c", f"cd {USERS[user]} && bash -euo pipefail -s"]
        done = subprocess.run(
            command,
            input=script,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout_s,
        )
        return Result(done.returncode, done.stdout)

    def must(self, script: str, user: str = "root", *, timeout_s: float = 600) -> str:
        """The output of a script that has to succeed."""
        result = self.run(script, user, timeout_s=timeout_s)
        assert result.code == 0, f"{user}: {script}\nended with {result.code}:\n{result.output}\n{self.journal()}"
        return result.output

    def processes(self) -> list[tuple[str, str]]:
        """Whose each is, and its command line; there is no ps on a bare machine."""
        each = (
            'for p in /proc/[0-9]*; do echo "$(stat -c %U $p) $(tr "\\0" " " < $p/cmdline)"; done 2>/dev/null || true'
        )
        return [(user, line) for user, _, line in (found.partition(" ") for found in self.must(each).splitlines())]

    def journal(self) -> str:
        """The newest lines of the services' logs."""
        return self.run("journalctl --no-pager -n 30 -u 'phifleet*' -u mosquitto").output

    def _enter(self) -> list[str]:
        return ["nsenter", f"--target={self._leader}", "--mount", "--uts", "--ipc", "--pid"]

    def _furnish(self) -> None:
        """People, the names of the documents, the host's package sources, and a clone of the repository."""
        etc = self.root / "etc"
        for user in ("operator", "admin"):
            subprocess.run(["chroot", str(self.root), "useradd", "-mN", "-s", "/bin/bash", user], check=True)
            (etc / "sudoers.d" / user).write_text(f"{user} ALL=(ALL) NOPASSWD: ALL\n")
        (etc / "hostname").write_text("bare\n")
        (etc / "hosts").write_text(f"127.0.0.1 localhost bare {BROKER}\n")
        _copy_sources(etc)
        clone = self.root / USERS["operator"].lstrip("/")
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        subprocess.run(["chroot", str(self.root), "chown", "-R", "operator:", USERS["operator"]], check=True)

    def _booted(self) -> int:
        deadline = time.monotonic() + _BOOT_S
        while time.monotonic() < deadline:
            children = Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children")
            for pid in children.read_text().split() if children.exists() else []:
                if Path(f"/proc/{pid}/comm").read_text().strip() == "systemd":
                    self._leader = int(pid)
                    waited = subprocess.run(
                        [*self._enter(), "systemctl", "is-system-running", "--wait"], check=False, capture_output=True
                    )
                    if waited.stdout.strip() in (b"running", b"degraded"):
                        return self._leader
            if self._nspawn.poll() is not None:
                break
            time.sleep(0.2)
        raise RuntimeError(f"the machine did not boot; its console is in {FOLDER / 'console.log'}")


def missing() -> str:
    """What a machine cannot be made without here, or nothing."""
    if os.geteuid() != 0:
        return "root"
    return ", ".join(tool for tool in ("debootstrap", "systemd-nspawn", "nsenter") if shutil.which(tool) is None)


def _remove(folder: Path) -> None:
    subprocess.run(["rm", "-rf", "--one-file-system", str(folder)], check=True)


def _base() -> Path:
    base = FOLDER / "base"
    if not (base / ".made").exists():
        _remove(base)
        base.mkdir(parents=True)
        FOLDER.chmod(0o700)
        command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(base), *_mirror()]
        with (FOLDER / "debootstrap.log").open("wb") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log)
        (base / ".made").touch()
    return base


def _sources() -> list[Path]:
    apt = Path("/etc/apt")
    return [path for path in (apt / "sources.list", *sorted((apt / "sources.list.d").glob("*"))) if path.is_file()]


def _mirror() -> list[str]:
    """Of the host's Debian, so that both reach the same packages; none: debootstrap's own."""
    for path in _sources():
        if found := re.search(r"https?://\S+/debian/?(?=\s)", path.read_text()):
            return [found[0]]
    return []


def _copy_sources(etc: Path) -> None:
    if not _sources():
        return
    (etc / "apt" / "sources.list").unlink(missing_ok=True)
    for path in _sources():
        shutil.copy(path, etc / path.relative_to("/etc"))
    shutil.copytree("/usr/share/keyrings", etc.parent / "usr/share/keyrings", dirs_exist_ok=True)
