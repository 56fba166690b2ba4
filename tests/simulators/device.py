"""The parts of a device, simulated: each implements its Protocol of `core/ports.py`, with faults that can be set.

They keep the promises of the real parts (a store that has only what was fetched, a host that serves only what it
activated), so that a test of the daemon that passes here says something about the daemon.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from agent.contract.failures import FailureCode
from agent.contract.manifest import Manifest
from agent.contract.messages import ArtifactRef, Desired, Progress, Proof, RuntimeFact
from agent.core.inference import (
    Capabilities,
    DoneEvent,
    FinishReason,
    GenerationEvent,
    GenerationRequest,
    InferenceError,
    ModelInfo,
    TokenEvent,
)
from agent.core.ports import ProgressHandler, Stop
from agent.errors import AgentError, RuntimeLoadError, StoreError, TransferError, TrustError


class SimClock:
    """Real waiting, but the wall clock is a given day."""

    def __init__(self, at: datetime = datetime(2026, 11, 23, tzinfo=UTC)) -> None:
        self.at = at

    def now(self) -> datetime:
        return self.at + timedelta(seconds=self.monotonic())

    def monotonic(self) -> float:
        return asyncio.get_event_loop().time()

    def set(self, now: datetime) -> None:
        """Somebody sets the wall clock."""
        self.at = now - timedelta(seconds=self.monotonic())


@dataclass
class SimTrust:
    """Knows orders by their JSON and manifests by their digest; `unreachable` counts down."""

    device: str
    manifests: dict[str, Manifest]
    unreachable: int = 0
    error: TrustError | None = None
    refreshed: int = 0
    #: The order's JSON by the envelope that carries it.
    payloads: dict[bytes, bytes] = field(default_factory=dict)

    def verify_desired(self, payload: bytes, newest_sequence: int) -> Desired:
        if self.error is not None:
            raise self.error
        desired = Desired.from_json(self.payloads.get(payload, payload))
        if desired.sequence <= newest_sequence:
            raise TrustError(f"sequence {desired.sequence} is a replay", FailureCode.TRUST_REPLAY)
        return desired

    async def refresh(self) -> None:
        self.refreshed += 1
        if self.unreachable > 0:
            self.unreachable -= 1
            raise TrustError("the controller does not answer", FailureCode.TRUST_UNREACHABLE)

    async def manifest(self, ref: ArtifactRef) -> Manifest:
        if self.unreachable > 0:
            self.unreachable -= 1
            raise TrustError("the controller does not answer", FailureCode.TRUST_UNREACHABLE)
        if ref.digest not in self.manifests:
            raise TrustError(f"no target for {ref.digest}", FailureCode.TRUST_NOT_FOUND)
        return self.manifests[ref.digest]


@dataclass
class SimStore:
    """Complete artifacts by digest."""

    complete: dict[str, Manifest] = field(default_factory=dict)
    corrupt: set[str] = field(default_factory=set)
    #: Comes out wrong however often it is fetched.
    rotten: set[str] = field(default_factory=set)
    #: Bytes of artifacts that are not complete, by digest.
    partial: dict[str, int] = field(default_factory=dict)
    free: int = 1 << 40

    def free_bytes(self) -> int:
        return self.free

    def path(self, digest: str) -> Path | None:
        return Path("/simulated") / digest if digest in self.complete else None

    def manifest(self, digest: str) -> Manifest | None:
        return self.complete.get(digest)

    def verify(self, digest: str, stop: Stop = lambda: False) -> None:
        if digest in self.corrupt | self.rotten or digest not in self.complete:
            raise StoreError(f"{digest[:12]}: other bytes than the manifest's", FailureCode.STORE_CORRUPT)

    def discard(self, digest: str) -> None:
        self.complete.pop(digest, None)
        self.corrupt.discard(digest)

    def collect(self, keep: Sequence[str], spare: Sequence[str] = ()) -> int:
        gone = [digest for digest in self.complete if digest not in keep]
        for digest in gone:
            manifest = self.complete.pop(digest)
            if digest in spare:
                self.partial[digest] = manifest.size
        return len(gone)


@dataclass
class SimTransfer:
    """Puts an artifact into the store, unless told otherwise; `hang` waits for ever."""

    store: SimStore
    error: AgentError | None = None
    hang: bool = False
    #: The share of the bytes that comes before no more does.
    stall_at: float | None = None
    fetched: list[str] = field(default_factory=list)
    #: Those that it was told of last.
    mirrors: Sequence[str] = ()

    async def fetch(
        self,
        manifest: Manifest,
        *,
        window_bytes: int,
        stall_s: float,
        on_progress: ProgressHandler,
        bytes_per_s: int | None = None,
        mirrors: Sequence[str] = (),
        metered_bytes: int | None = None,
        at_hand: bool = False,
    ) -> Progress:
        self.mirrors = mirrors
        if self.hang:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
        if manifest.digest in self.store.complete:
            return Progress(bytes_total=manifest.size, bytes_done=manifest.size, bytes_reused=manifest.size)
        self.fetched.append(manifest.digest)
        here = self.store.partial.pop(manifest.digest, 0)
        if self.stall_at is not None:
            self.store.partial[manifest.digest] = max(here, int(manifest.size * self.stall_at))
            raise TransferError(f"stalled at {self.store.partial[manifest.digest]} of {manifest.size} bytes")
        self.store.complete[manifest.digest] = manifest
        progress = Progress(
            bytes_total=manifest.size,
            bytes_done=manifest.size,
            bytes_received=manifest.size - here,
            bytes_reused=here,
        )
        on_progress(progress)
        return progress


@dataclass
class SimHost:
    """Serves what it activated and answers Paris. Faults by digest."""

    prove_errors: dict[str, AgentError] = field(default_factory=dict)
    activate_errors: dict[str, AgentError] = field(default_factory=dict)
    tpot_ms: dict[str, float] = field(default_factory=dict)
    #: What the runtime tells of the share that its device computes; without an entry all of it.
    shares: dict[str, float | None] = field(default_factory=dict)
    answers: dict[str, str] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    usable: bool = True
    hang_in_prove: bool = False
    #: There is memory for one model only.
    narrow: bool = False
    #: How often `activate` fails before it works.
    short_of_memory: int = 0
    proven: Manifest | None = None
    serving: Manifest | None = None
    history: list[str] = field(default_factory=list)
    closed: bool = False

    async def runtimes(self) -> Sequence[RuntimeFact]:
        return [RuntimeFact(name="onnx_genai", usable=self.usable, reason="" if self.usable else "not installed")]

    def displaces(self, manifest: Manifest) -> bool:
        return self.narrow and self.serving is not None

    async def prove(self, manifest: Manifest, folder: Path) -> Proof:
        if self.hang_in_prove:
            await asyncio.Event().wait()
        if manifest.digest in self.prove_errors:
            raise self.prove_errors[manifest.digest]
        tpot = self.tpot_ms.get(manifest.digest, 10.0)
        share = self.shares.get(manifest.digest, 1.0)
        self.proven = manifest
        return Proof(runtime="onnx_genai", load_s=0.1, ttft_ms=20, tpot_ms=tpot, device_share=share)

    async def discard(self) -> None:
        self.proven = None

    async def activate(self, manifest: Manifest, folder: Path) -> ModelInfo:
        if self.short_of_memory > 0:
            self.short_of_memory -= 1
            raise RuntimeLoadError("needs 9 bytes, 3 are free", FailureCode.RUNTIME_MEMORY)
        if manifest.digest in self.activate_errors:
            raise self.activate_errors[manifest.digest]
        self.serving, self.proven = manifest, None
        self.history.append(manifest.digest)
        info = self.active()
        assert info is not None
        return info

    async def retire(self) -> None:
        self.serving = None
        self.history.append("")

    async def close(self) -> None:
        self.closed = True

    def active(self) -> ModelInfo | None:
        if self.serving is None:
            return None
        return ModelInfo(
            self.serving.model.name,
            self.serving.id,
            self.serving.digest,
            "onnx_genai",
            "CPU",
            64,
            0.1,
            9,
            Capabilities(),
        )

    def active_manifest(self) -> Manifest | None:
        return self.serving

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationEvent]:
        if self.serving is None:
            raise InferenceError("unavailable", "no model is loaded")
        if self.serving.digest in self.broken:
            raise InferenceError("crashed", "the worker died")
        yield TokenEvent(request.id, self.answers.get(self.serving.digest, "It is Paris."))
        yield DoneEvent(request.id, FinishReason.STOP, 5, 4, 0, ttft_ms=20, tpot_ms=10)

    async def count_tokens(self, text: str) -> int:
        return len(text.split())


class MemoryJournal:
    """A journal that survives the daemon but not the process."""

    def __init__(self) -> None:
        self.document: bytes | None = None
        self.saved = 0
        self.full = False

    def load(self) -> bytes | None:
        return self.document

    def save(self, document: bytes) -> None:
        if self.full:
            raise StoreError("no space left on the device", FailureCode.STORE_DISK_FULL)
        self.document = document
        self.saved += 1
