"""A whole fleet on this machine, of real processes: a broker, a controller, an agent. For tests and benchmarks.

with Rig(broker="mosquitto") as rig:
    rig.start_controller(); rig.start_agent()
    rig.order(manifest); rig.until(State.COMMITTED)
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

import psutil

from agent.contract.bundle import Bundle
from agent.contract.chunk_index import INDEX_FILE, with_index
from agent.contract.manifest import ArtifactFile, Manifest, artifact_digest
from agent.contract.messages import ArtifactRef, Desired, Reported, State
from agent.contract.profile import HealthLimits, QualityGate
from fleet.delivery.chunking import chunk_file
from fleet.demo.processes import Process
from fleet.home import Home
from fleet.operations.devices import add_device
from fleet.operations.fleet import Fleet
from fleet.profiles_loader import load_profile
from fleet.registry import Actor, open_registry
from fleet.settings import load
from fleet.store import FolderStore
from fleet.trust.ca import DeviceCA
from fleet.trust.repository import Repository
from tests.models import Built
from tests.simulators import broker as brokers
from tests.waiting import child_running

TIMEOUT_S = 90.0


class Rig:
    """Everything in one temporary folder; processes are ended with it, however it ends."""

    def __init__(
        self, broker: str = "mosquitto", device: str = "pi-1", folder: Path | None = None, *, certified: bool = False
    ) -> None:
        self._certified = certified
        #: Runs the agent's module in its own way.
        self.launcher: tuple[str, ...] = ()
        self.device = device
        self.folder = folder or Path(tempfile.mkdtemp(prefix="phifleet-rig-"))
        self.state_dir = self.folder / "device"
        self.bundle = self.folder / "bundle.json"
        self.controller: Process | None = None
        self.agent: Process | None = None
        self._broker_kind = broker
        self._stack = contextlib.ExitStack()
        self._processes: list[Process] = []

    def __enter__(self) -> Self:
        start = brokers.mosquitto(self.folder) if self._broker_kind == "mosquitto" else brokers.embedded()
        self.broker = self._stack.enter_context(start)
        self.fleet = self._stack.enter_context(
            Fleet(load({"home": self.folder / "fleet", "broker": self.broker.url}, None)[0])
        )
        Repository(self.home).init()
        profile = load_profile("iot-x86").model_copy(update={"quality": QualityGate()})
        add_device(self.fleet, self.device, profile, self.bundle, Actor("rig", datetime.now(UTC)), custom=True)
        if self._certified:
            self._certify()
        return self

    def _certify(self) -> None:
        """Give the device a key and a certificate, which it has only where the broker speaks TLS."""
        ca = DeviceCA(self.home)
        ca.init()
        own = ca.enrol(self.device)
        bundle = Bundle.from_json(self.bundle.read_bytes())
        change = {"certificate": own.certificate, "private_key": own.private_key, "broker_ca": own.ca}
        self.bundle.write_bytes(bundle.model_copy(update=change).to_json())

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._processes):
            process.stop()
        self._stack.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def home(self) -> Home:
        return self.fleet.home

    @property
    def broker_url(self) -> str:
        return self.broker.url

    def stop_broker(self) -> None:
        assert self.broker.process is not None
        self.broker.process.terminate()
        self.broker.process.wait(5)

    def start_controller(self) -> int:
        environment = {"PHIFLEET_HOME": str(self.home.root), "PHIFLEET_BROKER": self.broker.url}
        self.controller = self._start("controller", ["fleet", "serve"], environment)
        return self.controller.pid

    def start_agent(self, *arguments: str, **environment: str) -> int:
        command = ["agent", "run", "--bundle", str(self.bundle), "--state-dir", str(self.state_dir), "--port", "0"]
        quick = {"PHIFLEET_AGENT_HEALTH_INTERVAL_S": "0.5"}
        self.agent = self._start("agent", [*self.launcher, *command, *arguments], quick | environment)
        return self.agent.pid

    def _start(self, name: str, arguments: list[str], environment: dict[str, str]) -> Process:
        process = Process(name, arguments, self.folder / f"{name}.log", environment)
        self._processes.append(process)
        return process

    def worker(self) -> int | None:
        """The process that holds the model, if there is one now."""
        assert self.agent is not None
        found = child_running(psutil.Process(self.agent.pid), "agent.runtimes.engines.worker")
        return found.pid if found else None

    @staticmethod
    def kill(process: Process | None) -> None:
        """kill -9, and see it gone."""
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        process.stop()

    def take_over(self, manifest: Manifest, files: Path, index: bytes | None = None) -> None:
        """Put an artifact that was built elsewhere into this home; ``index`` lies beside its files where it has one."""
        folder = self.home.artifacts / manifest.id
        folder.mkdir(parents=True)
        (folder / "files").symlink_to(files)
        if index is None and manifest.index is not None:
            index = (files.parent / INDEX_FILE).read_bytes()
        if index is not None:
            (folder / INDEX_FILE).write_bytes(index)
        (folder / "manifest.json").write_bytes(manifest.to_json())

    def variant(
        self, built: Built, name: str, folder: Path, *, indexed: bool = False, beside: bytes | None = None
    ) -> Manifest:
        """The same model with one file more: another digest, nearly all chunks the same.

        ``indexed``: with an index, as if it were large. ``beside``: what is in that file.
        """
        files = folder / name
        shutil.copytree(built.files, files, copy_function=os.link)
        note = files / (f"{name}.txt" if beside is None else "beside.bin")
        note.write_bytes(beside or f"a variant by the name of {name}\n".encode())
        digest, size, chunks = chunk_file(note)
        added = ArtifactFile(path=note.name, size=size, sha256=digest, chunks=chunks)
        all_files = (*built.manifest.files, added)
        own = f"{built.manifest.id}-{name}"
        change = {
            "id": own,
            "files": all_files,
            "digest": artifact_digest(own, all_files),
            "size": built.manifest.size + size,
        }
        manifest, index = with_index(built.manifest.model_copy(update=change), 0 if indexed else sys.maxsize)
        self.take_over(manifest, files, index)
        return manifest

    def order(self, *manifests: Manifest, **changes: Any) -> None:
        """Publish and order, with anything of ``Desired`` as wished."""
        repository = Repository(self.home)
        for manifest in manifests:
            repository.publish(manifest, FolderStore(self.home.artifacts).index(manifest))
        now = datetime.now(UTC)
        fields: dict[str, Any] = {
            "issued_at": now,
            "expires_at": now + timedelta(days=1),
            "artifacts": tuple(ArtifactRef(id=each.id, digest=each.digest) for each in manifests),
            "limits": HealthLimits(),
            "probation_s": 0.5,
        }

        def draft(device: str, sequence: int, deployment: str) -> Desired:
            return Desired.model_validate(
                fields | {"device": device, "sequence": sequence, "deployment": deployment} | changes
            )

        with contextlib.closing(open_registry(self.fleet.settings.database_url)) as registry:
            for manifest in manifests:
                registry.artifacts.record(manifest, Actor("rig", now))
            registry.deployments.create([self.device], draft, repository.sign_desired, Actor("rig", now))

    def reported(self) -> Reported | None:
        """What the controller recorded of the device."""
        with contextlib.closing(open_registry(self.fleet.settings.database_url)) as registry:
            found = registry.devices.get(self.device).reported
        return Reported.model_validate(found) if found else None

    def health(self) -> dict[str, Any] | None:
        with contextlib.closing(open_registry(self.fleet.settings.database_url)) as registry:
            return registry.devices.get(self.device).health

    def online(self) -> bool:
        with contextlib.closing(open_registry(self.fleet.settings.database_url)) as registry:
            return bool(registry.devices.get(self.device).online)

    def journal(self) -> dict[str, Any]:
        """The device's own memory, as it is on its disk now."""
        try:
            return dict(json.loads((self.state_dir / "journal").read_bytes().partition(b"\n")[2]))
        except (FileNotFoundError, ValueError):
            return {"state": "idle", "newest_sequence": 0}

    def until(self, reached: Callable[[], Any], what: str, timeout_s: float = TIMEOUT_S, every_s: float = 0.05) -> Any:
        """Wait; with both logs in the error when it does not come about."""
        end = time.monotonic() + timeout_s
        while not (found := reached()):
            if time.monotonic() > end:
                raise AssertionError(f"waited {timeout_s:g} s for {what}\n{self.logs()}")
            time.sleep(every_s)
        return found

    def settled(self, sequence: int) -> Reported:
        """The device's last word on that order."""
        over = (State.COMMITTED, State.ROLLED_BACK, State.FAILED)

        def ended() -> Reported | None:
            reported = self.reported()
            return reported if reported and reported.sequence == sequence and reported.state in over else None

        found: Reported = self.until(ended, f"order {sequence} to end")
        return found

    def logs(self) -> str:
        return "\n".join(
            f"--- {process.name}\n{process.tail()}" for process in (self.controller, self.agent) if process
        )
