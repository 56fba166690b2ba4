"""The adapter that the public TUF suite calls, tried on our own repository over HTTP: it cannot rot unseen."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from agent.contract.manifest import manifest_target
from agent.platform.clock import SystemClock
from fleet.trust.repository import Repository
from tests.simulators.repository import make_manifest, make_repository

ROOT = Path(__file__).parents[2]


@dataclass
class Suite:
    """What the public suite does: one folder, one server, and the client as a program."""

    folder: Path
    repository: Repository
    url: str = ""
    forged: dict[str, bytes] = field(default_factory=dict)

    def read(self, path: str) -> bytes | None:
        name = path.removeprefix("/metadata/").removeprefix("/")
        return self.forged.get(name) or self.repository.read(name)

    def client(self, *command: str) -> subprocess.CompletedProcess[str]:
        arguments = [f"--metadata-dir={self.folder / 'metadata'}", f"--metadata-url={self.url}/metadata"]
        arguments += [f"--target-base-url={self.url}/targets", f"--target-dir={self.folder / 'targets'}", *command]
        return subprocess.run(
            [sys.executable, "-P", "-m", "tests.conformance.tuf_client", *arguments],
            env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
        )  # fmt: skip


@pytest.fixture
def suite(tmp_path: Path) -> Iterator[Suite]:
    repository = make_repository(tmp_path / "fleet", SystemClock())
    repository.publish(make_manifest())
    (tmp_path / "device" / "metadata").mkdir(parents=True)
    found = Suite(tmp_path / "device", repository)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = found.read(self.path)
            self.send_response(404 if data is None else 200)
            self.end_headers()
            self.wfile.write(data or b"")

        def log_message(self, *_: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield found
        server.shutdown()


def test_the_clients_commands_do_what_the_suite_expects_of_them(suite: Suite) -> None:
    root = suite.folder / "given.json"
    root.write_bytes(suite.repository.read("1.root.json") or b"")
    assert suite.client("init", str(root)).returncode == 0
    assert suite.client("refresh").returncode == 0
    assert (suite.folder / "metadata" / "timestamp.json").read_bytes() == suite.repository.read("timestamp.json")

    target = manifest_target(make_manifest().digest)
    assert suite.client(f"--target-name={target}", "download").returncode == 0
    assert (suite.folder / "targets" / Path(target).name).read_bytes() == make_manifest().to_json()

    nothing = suite.client("--target-name=none.json", "download")
    assert (nothing.returncode, nothing.stderr) == (
        1, "trust.not_found: none.json is not among the signed targets\n"
    )  # fmt: skip
    suite.forged["timestamp.json"] = b"{}"
    forged = suite.client("refresh")
    assert forged.returncode == 1 and forged.stderr.startswith("trust.signature: ")
    assert "Traceback" not in forged.stderr
