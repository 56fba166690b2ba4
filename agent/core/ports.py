"""What the parts of the agent need of one another, as Protocols. Simulators in tests implement them too."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Protocol

from agent.contract.manifest import Manifest
from agent.contract.messages import ArtifactRef, Desired, Progress, Proof, RuntimeFact
from agent.core.inference import GenerationEvent, GenerationRequest, ModelInfo


class Clock(Protocol):
    """Time, passed in."""

    def now(self) -> datetime:
        """Wall clock, aware, UTC; never before the newest time that was verified."""
        ...

    def monotonic(self) -> float:
        """Seconds, never going back."""
        ...


@dataclass(frozen=True, slots=True)
class Message:
    """One MQTT publication."""

    topic: str
    payload: bytes
    retained: bool = False
    response_topic: str | None = None
    correlation: bytes | None = None
    properties: Mapping[str, str] = field(default_factory=dict)
    #: Tells the broker that the message is safe; None where the link has done so, or nothing is owed (QoS 0).
    #: May be called from any thread, and again without harm.
    acknowledge: Callable[[], None] | None = field(default=None, compare=False, repr=False)


Handler = Callable[[Message], None]
"""Called for each message. Control handlers run on the event loop; bulk handlers on the link's own thread."""


class Link(Protocol):
    """An MQTT 5 connection that comes back by itself. Subscriptions survive a reconnect."""

    @property
    def connected(self) -> bool:
        """Whether the broker answers now."""
        ...

    async def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int = 1,
        retain: bool = False,
        response_topic: str | None = None,
        correlation: bytes | None = None,
        properties: Mapping[str, str] | None = None,
    ) -> None:
        """Hand over to the broker; waits for its acknowledgement at QoS 1.

        Raises:
            agent.errors.LinkError: not connected, or refused, naming the broker and its reason code.
        """
        ...

    async def subscribe(
        self, topic: str, handler: Handler, *, qos: int = 1, bulk: bool = False, manual_ack: bool = False
    ) -> None:
        """From now on, also after a reconnect.

        ``bulk``: the handler runs on the link's thread; it must be quick. ``manual_ack``: whoever gets a message at
        QoS 1 calls its ``acknowledge`` once it is safe; the broker sends no more than the link's receive maximum
        without that.
        """
        ...

    async def unsubscribe(self, topic: str) -> None:
        """No longer."""
        ...

    def progressed(self) -> None:
        """What came over this connection is verified and kept: when it is lost, the next attempt is soon."""
        ...


class Trust(Protocol):
    """Nothing is believed before it went through here."""

    def verify_desired(self, payload: bytes, newest_sequence: int) -> Desired:
        """Return the order in a ``SignedDesired`` payload. Offline and without IO beyond the trust store.

        Raises:
            agent.errors.TrustError: signature, expiry, replay, another device, or malformed.
        """
        ...

    async def refresh(self) -> None:
        """Bring TUF metadata up to date over the link.

        Raises:
            agent.errors.TrustError: code says which attack or fault.
        """
        ...

    async def manifest(self, ref: ArtifactRef) -> Manifest:
        """Return the verified manifest of an artifact; refreshes metadata first.

        Raises:
            agent.errors.TrustError: not found, not signed, or not the digest that was asked for.
        """
        ...


Stop = Callable[[], bool]
"""Asked now and then by blocking work; true when nobody waits for its result any more."""


class ArtifactStore(Protocol):
    """Artifacts on disk, content-addressed."""

    def path(self, digest: str) -> Path | None:
        """Return the folder of a complete, verified artifact, or None.

        Raises:
            agent.errors.StoreError: the disk does not say.
        """
        ...

    def manifest(self, digest: str) -> Manifest | None:
        """Of a complete artifact, or None where there is none or it is damaged.

        Raises:
            agent.errors.StoreError: the disk does not say.
        """
        ...

    def verify(self, digest: str, stop: Stop = ...) -> None:
        """Read every file again and compare with the manifest; blocking. Ends early when ``stop()`` turns true.

        Raises:
            agent.errors.StoreError: a file is missing or has other bytes (STORE_CORRUPT), or it was stopped
                (CANCELLED).
        """
        ...

    def discard(self, digest: str) -> None:
        """Forget an artifact that turned out to be damaged; blocking.

        Raises:
            agent.errors.StoreError: it cannot be deleted.
        """
        ...

    def collect(self, keep: Sequence[str], spare: Sequence[str] = ()) -> int:
        """Delete the complete artifacts that are not in ``keep``; returns bytes freed.

        Bytes that an order may want again are no longer complete, but stay: those of the digests in ``spare``, and
        what transfers that did not end have brought. They go when another artifact needs the room.

        Raises:
            agent.errors.StoreError: something cannot be deleted.
        """
        ...

    def free_bytes(self) -> int:
        """Return how many bytes are free where artifacts are kept; blocking.

        Raises:
            agent.errors.StoreError: the disk does not say.
        """
        ...


ProgressHandler = Callable[[Progress], None]


class Transfer(Protocol):
    """Brings an artifact's bytes onto the disk."""

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
        """Everything missing, each chunk verified; resumes from what is on disk. Cancel the task to stop it.

        ``bytes_per_s``: no more than so many on average; None for as fast as they come. ``mirrors`` are templates of
        ``agent.contract.mirrors``, which are read from before the broker is asked. With ``metered_bytes``, no more than
        so many are fetched at all. ``at_hand``: the bytes are at the device itself, so that none of this holds.

        Raises:
            agent.errors.StoreError: the disk is too small (before the transfer starts, with the figures) or fails.
            agent.errors.TransferError: no chunk for ``stall_s`` seconds, or no link for a while (TRANSFER_STALLED);
                chunks that are refused or wrong (TRANSFER_UNAVAILABLE).
        """
        ...


class ModelHost(Protocol):
    """Runs models in worker processes and gives the active one to the endpoint."""

    async def runtimes(self) -> Sequence[RuntimeFact]:
        """Return each runtime known, usable or not and why."""
        ...

    def displaces(self, manifest: Manifest) -> bool:
        """Return whether there is no memory for it beside what serves, so that proving it stops the serving."""
        ...

    async def prove(self, manifest: Manifest, folder: Path) -> Proof:
        """Load in a fresh worker, answer the signed probes, measure. The proven worker is kept for ``activate``.

        Raises:
            agent.errors.RuntimeLoadError: no runtime, no memory, or it does not load.
            agent.errors.ProbeError: it loads and does not answer as signed.
        """
        ...

    async def discard(self) -> None:
        """Drop what was proven and not activated; what it displaced comes back."""
        ...

    async def activate(self, manifest: Manifest, folder: Path) -> ModelInfo:
        """Move new requests to this artifact, drain the old one, unload it."""
        ...

    async def retire(self) -> None:
        """Serve nothing; used when the last good artifact is gone."""
        ...

    def active(self) -> ModelInfo | None:
        """Return what serves now."""
        ...


class Inference(Protocol):
    """What the endpoint sees of the model host."""

    def active(self) -> ModelInfo | None:
        """Return what serves now, or None."""
        ...

    def active_manifest(self) -> Manifest | None:
        """Return the signed facts of what serves now."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationEvent]:
        """Yield events of one request, ending with a ``DoneEvent``. Closing the iterator cancels the generation.

        Raises:
            agent.core.inference.InferenceError: it cannot be served.
        """
        ...

    def count_tokens(self, text: str) -> Awaitable[int]:
        """Return the number of tokens of ``text`` for the active model."""
        ...


class Journal(Protocol):
    """Crash-safe memory of the deployment: one small document, replaced atomically."""

    def load(self) -> bytes | None:
        """Return what was saved last, or None. A damaged file is set aside and counts as None."""
        ...

    def save(self, document: bytes) -> None:
        """Durable when this returns.

        Raises:
            agent.errors.StoreError: the disk refuses.
        """
        ...
