"""A machine becomes a device over TLS, with the documented broker and real programs, and ceases to be one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import pytest

from agent.contract.messages import State
from fleet.demo.watch import chat
from fleet.operations.fleet import Fleet
from fleet.settings import load
from tests.models import Built
from tests.rig import Rig
from tests.simulators import broker as brokers
from tests.simulators.broker import free_port, have_mosquitto

DOCUMENTED = Path(__file__).parents[2] / "docs" / "mosquitto"

pytestmark = pytest.mark.skipif(not have_mosquitto(), reason="mosquitto is not installed")


class SecureRig(Rig):
    """With mutual TLS and the ACL as documented, the controller's API over TLS, and no device yet."""

    def __enter__(self) -> Self:
        self.tls = self.folder / "tls"
        self.tls.mkdir()
        self.api_port, broker_port = free_port(), free_port()
        self.settings = {
            "PHIFLEET_HOME": str(self.folder / "fleet"),
            "PHIFLEET_BROKER": f"mqtts://localhost:{broker_port}",
            "PHIFLEET_BROKER_CA": str(self.tls / "ca.pem"),
            "PHIFLEET_BROKER_CERT": str(self.tls / "controller.pem"),
            "PHIFLEET_BROKER_KEY": str(self.tls / "controller-key.pem"),
            "PHIFLEET_API": f"127.0.0.1:{self.api_port}",
            "PHIFLEET_API_CERT": str(self.tls / "broker.pem"),
            "PHIFLEET_API_KEY": str(self.tls / "broker-key.pem"),
            # A certificate begins an hour before it is made, so two thirds of this one are over at once.
            "PHIFLEET_DEVICE_CERTIFICATE_DAYS": "0.02",
        }
        (self.folder / "fleet").mkdir()
        self.phifleet("init")
        self.phifleet("trust", "issue-broker", "localhost", "127.0.0.1", "--out", str(self.tls))
        self.phifleet("trust", "issue-controller", "--out", str(self.tls))
        shutil.copy(self.folder / "fleet" / "ca" / "crl.pem", self.tls)
        shutil.copy(DOCUMENTED / "acl", self.tls)
        lines = (DOCUMENTED / "mosquitto.conf").read_text().replace("/etc/mosquitto/phifleet", str(self.tls))
        listener = "\n".join(line for line in lines.splitlines() if not line.startswith("listener"))
        start = brokers.mosquitto(self.folder, port=broker_port, listener=listener, tls=True)
        self.broker = self._stack.enter_context(start)
        self.fleet = self._stack.enter_context(Fleet(load({"home": self.folder / "fleet"}, None)[0]))
        return self

    @property
    def api(self) -> str:
        return f"https://127.0.0.1:{self.api_port}"

    def phifleet(self, *arguments: str) -> str:
        return self._typed("fleet", *arguments)

    def at_the_device(self, *arguments: str) -> str:
        return self._typed("agent", *arguments, "--state-dir", str(self.state_dir))

    def _typed(self, module: str, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            env={**os.environ, **self.settings},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    def start_controller(self) -> int:
        self.controller = self._start("controller", ["fleet", "serve"], self.settings)
        self.until(lambda: "API listens" in self.logs(), "the controller is ready")
        return self.controller.pid

    def start_agent(self, *arguments: str, **environment: str) -> int:
        command = ["agent", "run", "--state-dir", str(self.state_dir), "--port", "0", *arguments]
        self.agent = self._start("agent", command, environment)
        return self.agent.pid

    def reload_broker(self) -> None:
        """As phifleet-crl.service does."""
        shutil.copy(self.folder / "fleet" / "ca" / "crl.pem", self.tls)
        assert self.broker.process is not None
        self.broker.process.send_signal(signal.SIGHUP)

    def agents_log(self) -> str:
        return (self.folder / "agent.log").read_text()


@pytest.fixture
def rig() -> Iterator[SecureRig]:
    with SecureRig(device="kitchen-cam") as made:
        yield made


def test_enrolled_ordered_renewed_revoked_refused(rig: SecureRig, sample_artifact: Built) -> None:
    rig.take_over(sample_artifact.manifest, sample_artifact.files)
    rig.start_controller()
    token = rig.phifleet("device", "token", "--profile", "iot-x86", "--label", "site=lyon").strip()
    said = rig.at_the_device("enrol", "--url", rig.api, "--token", token, "--id", rig.device)
    assert f"enrolled as {rig.device} (iot-x86)" in said
    certificate = rig.state_dir / "identity" / "client.pem"
    first, then = certificate.read_bytes(), datetime.now(UTC)
    rig.until(lambda: (datetime.now(UTC) - then).total_seconds() > 1.5, "a certificate would end later: it has seconds")

    rig.start_agent()
    rig.until(rig.online, "its presence over TLS")
    rig.until(lambda: certificate.read_bytes() != first, "its certificate is renewed")
    # The file is replaced first and the line is written after it.
    rig.until(lambda: "certificate renewed" in rig.agents_log(), "its log says so")

    rig.order(sample_artifact.manifest)
    reported = rig.settled(1)
    assert reported.state is State.COMMITTED, reported.failure
    name = sample_artifact.manifest.model.name
    assert "Paris" in chat(f"{reported.endpoint}/v1", name, "What is the capital of France?")

    began = datetime.now(UTC)
    rig.phifleet("device", "revoke", rig.device, "--yes")
    rig.reload_broker()
    rig.until(lambda: "broker not connected" in rig.agents_log(), "its session is ended")
    assert (datetime.now(UTC) - began).total_seconds() < 30
    rig.until(lambda: "certificate was revoked" in rig.agents_log(), "the broker refuses it, and it says why")
    assert not rig.online()
    assert "Paris" in chat(f"{reported.endpoint}/v1", name, "What is the capital of France?"), "it serves what it has"
    actions = [entry.action for entry in rig.fleet.registry.audit.trail(50)]
    assert {"enrolment.token", "device.enrol", "device.certificate", "device.revoke"} <= set(actions)
