"""A fleet in a folder: a real repository, and manifests that name no real files."""

from __future__ import annotations

import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

from tuf.api.metadata import Metadata

from agent.contract.base import sha256_hex
from agent.contract.manifest import (
    ArtifactFile,
    Chat,
    Manifest,
    MemoryNeed,
    ModelFacts,
    Precision,
    Target,
    Toolchain,
    artifact_digest,
)
from agent.contract.messages import ArtifactRef, Desired
from fleet.home import Home
from fleet.trust.keyring import Keyring
from fleet.trust.release import Release, Signatures
from fleet.trust.repository import Repository
from tests.simulators.clock import FakeClock

DEVICE = "pi-1"


def make_manifest(content: bytes = b"weights", **changes: Any) -> Manifest:
    """A manifest of one file with these bytes, in one chunk."""
    digest = sha256_hex(content)
    files = (ArtifactFile(path="model.bin", size=len(content), sha256=digest, chunks=((len(content), digest),)),)
    fields: dict[str, Any] = {
        "id": f"sample-onnx_genai-int4-cpu-{digest[:12]}",
        "size": len(content),
        "model": ModelFacts(
            name="sample", architecture="Phi3ForCausalLM", parameters=1, source_digest=digest, max_context=4096
        ),
        "toolchain": Toolchain.ONNX_GENAI,
        "versions": {"onnxruntime-genai": "0.18"},
        "recipe": {},
        "precision": Precision.INT4,
        "target": Target.CPU,
        "profile": "demo",
        "context": 4096,
        "entry": ".",
        "memory": MemoryNeed(weights_bytes=len(content), kv_bytes_per_token=1, overhead_bytes=1),
        "chat": Chat(template="{{ messages }}"),
        "files": files,
    }
    fields |= changes
    return Manifest(**({"digest": artifact_digest(fields["id"], fields["files"])} | fields))


def ref(manifest: Manifest) -> ArtifactRef:
    return ArtifactRef(id=manifest.id, digest=manifest.digest)


def make_desired(clock: FakeClock, *artifacts: ArtifactRef, **changes: Any) -> Desired:
    """An order to `DEVICE` that holds for a day."""
    fields: dict[str, Any] = {
        "device": DEVICE,
        "sequence": 1,
        "deployment": "d-1",
        "issued_at": clock.now(),
        "expires_at": clock.now() + timedelta(days=1),
        "artifacts": artifacts or (ref(make_manifest()),),
    }
    return Desired(**(fields | changes))


def make_repository(folder: Path, clock: FakeClock, **options: Any) -> Repository:
    """Initialised, with the keys that a first `phifleet init` makes."""
    repository = Repository(Home(folder), clock.now)
    repository.init(**options)
    return repository


class Thief:
    """Holds copies of the private keys, and makes metadata as the fleet's repository would."""

    def __init__(self, home: Home, clock: FakeClock, copy_to: Path) -> None:
        shutil.copytree(home.keys, copy_to)
        self._release = Release(home.tuf, Keyring(copy_to), clock.now)
        self._clock = clock

    def now(self) -> Signatures:
        """What the repository says now, to be changed."""
        return self._release.load()

    def sign(self, metadata: Metadata[Any], role: str, keys: int = 99) -> bytes:
        """The metadata as edited, by at most `keys` of the role's keys as the root had them when they were stolen."""
        holders = self._release.load().root.signed.roles[role].keyids
        metadata.signatures.clear()
        for signer in self._release.signers(role, holders, 0)[:keys]:
            metadata.sign(signer, append=True)
        return metadata.to_bytes()
