"""Small artifacts with real chunks, without a toolchain."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

from agent.contract.chunk_index import INDEX_FILE, with_index
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
from fleet.delivery.chunking import chunk_file


def noise(size: int, seed: int = 0) -> bytes:
    source = random.Random(seed)  # in pieces: one call gives at most 256 MiB
    return b"".join(source.randbytes(min(1 << 20, size - done)) for done in range(0, size, 1 << 20))


def make_artifact(folder: Path, files: Mapping[str, bytes], name: str = "sample") -> Manifest:
    """Writes ``files`` below ``folder`` and returns the manifest that lists them."""
    listed = []
    for path, data in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        digest, size, chunks = chunk_file(target)
        listed.append(ArtifactFile(path=path, size=size, sha256=digest, chunks=chunks))
    return manifest_of(tuple(listed), name)


def manifest_of(files: tuple[ArtifactFile, ...], name: str = "sample") -> Manifest:
    own = f"{name}-onnx-genai-int4-cpu-{artifact_digest(name, files)[:12]}"
    return Manifest(
        id=own,
        digest=artifact_digest(own, files),
        size=sum(file.size for file in files),
        model=ModelFacts(
            name=name, architecture="Phi3ForCausalLM", parameters=1, source_digest="0" * 64, max_context=128
        ),
        toolchain=Toolchain.ONNX_GENAI,
        versions={},
        recipe={},
        precision=Precision.INT4,
        target=Target.CPU,
        profile="test",
        context=128,
        entry=".",
        memory=MemoryNeed(weights_bytes=1, kv_bytes_per_token=1, overhead_bytes=1),
        chat=Chat(template="{{ messages }}"),
        files=files,
    )


def make_indexed(folder: Path, files: Mapping[str, bytes], name: str = "sample") -> tuple[Manifest, Manifest]:
    """As ``make_artifact``, with an index beside ``folder``; returns its manifest, and that which lists the chunks."""
    whole = make_artifact(folder, files, name)
    manifest, packed = with_index(whole, 0)
    (folder.parent / INDEX_FILE).write_bytes(packed or b"")
    return manifest, whole
