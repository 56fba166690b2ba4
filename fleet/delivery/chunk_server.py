"""Answers wants: publishes chunks of artifacts, as many as were asked for.

What it remembers of devices is only for fairness, and may be lost at any time: another controller may answer next.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import structlog

from agent.contract import topics
from agent.contract.bandwidth import Bandwidth
from agent.contract.base import MalformedMessageError
from agent.contract.chunk_index import Content, Layout
from agent.contract.messages import ChunkRange, Want, WantV1
from agent.link import BulkSource, Handler, Message
from fleet.delivery.admission import Admission, everybody
from fleet.delivery.send_queue import ANYBODY, Chunk, SendQueue
from fleet.errors import StoreError

#: Artifacts with open files; the least recently wanted is closed.
MAX_OPEN = 16
#: Distinct complaints that are logged; each is logged once.
MAX_COMPLAINTS = 1000

_log = structlog.get_logger(component=__name__)


class Artifact(Protocol):
    """The bytes of one artifact, or of its index; ``fleet.store.ArtifactReader`` has it."""

    @property
    def content(self) -> Content:
        """What the bytes are."""
        ...

    def layout(self) -> Layout:
        """Where its chunks are; raises OSError."""
        ...

    def read(self, file: int, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset`` of the content's file number ``file``; raises OSError."""
        ...

    def close(self) -> None:
        """Release what reading has opened."""
        ...


Artifacts = Callable[[str], Artifact | None]
"""Opens an artifact or an index by its digest, None where there is none. Called on the link's thread, seldom."""


class BulkLink(Protocol):
    """What the server needs of the link; ``agent.link.MqttLink`` has it."""

    async def subscribe(
        self, topic: str, handler: Handler, *, qos: int = 1, bulk: bool = False, manual_ack: bool = False
    ) -> None:
        """See ``agent.link.Link``."""
        ...

    async def unsubscribe(self, topic: str) -> None:
        """See ``agent.link.Link``."""
        ...

    def serve_bulk(self, source: BulkSource) -> None:
        """Publish what the source gives, as fast as the socket takes it."""
        ...

    def wake_bulk(self) -> None:
        """The source has something."""
        ...


@dataclass(frozen=True, slots=True)
class ChunkServerStats:
    """Since the start."""

    wants: int = 0
    wants_malformed: int = 0
    wants_unknown: int = 0
    wants_refused: int = 0
    chunks: int = 0
    bytes: int = 0
    coalesced: int = 0
    dropped: int = 0
    unreadable: int = 0
    waiting: int = 0


class ChunkServer:
    """One of any number that share the wants. Give it a link of its own: bulk then never delays control.

    ``group`` is what the controllers of this fleet share and no device knows; ``admission`` says who is answered;
    ``bytes_per_s`` limits what is published, to all devices together.
    """

    def __init__(
        self,
        link: BulkLink,
        artifacts: Artifacts,
        *,
        group: str,
        admission: Admission = everybody,
        bytes_per_s: int | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._admission = admission
        self._topic = topics.for_one_of(group, "chunks", topics.ALL_WANTS)
        self._topic_v1 = topics.for_one_of(group, "chunks-v1", topics.ALL_WANTS_V1)
        #: Devices that have asked on their own topic: nobody is answered who asks for them on the old one.
        self._on_own_topic: set[str] = set()
        self._link = link
        self._artifacts = artifacts
        self._monotonic = monotonic
        self._queue = SendQueue()
        self._bandwidth = Bandwidth(bytes_per_s, monotonic())
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wakes = False
        self._open: OrderedDict[str, _OpenArtifact] = OrderedDict()
        self._lock = threading.Lock()
        self._complaints: set[str] = set()
        self._wants = self._malformed = self._unknown = self._refused = self._chunks = self._bytes = (
            self._unreadable
        ) = 0

    async def start(self) -> None:
        """Answer from now on.

        Raises:
            agent.errors.LinkError: the broker refuses the subscription.
        """
        self._loop = asyncio.get_running_loop()
        self._link.serve_bulk(self._next)
        await self._link.subscribe(self._topic, self._on_want, bulk=True)
        await self._link.subscribe(self._topic_v1, self._on_want_v1, bulk=True)

    async def stop(self) -> None:
        """Answer no more wants, and drop those that wait."""
        for topic in (self._topic, self._topic_v1):
            await self._link.unsubscribe(topic)
        with self._lock:
            self._queue.forget()
            while self._open:
                self._open.popitem()[1].close()

    def forget(self, digest: str) -> None:
        """Close an artifact's files, since it was deleted or replaced."""
        with self._lock:
            self._queue.forget(unless=lambda other: other != digest)
            if (artifact := self._open.pop(digest, None)) is not None:
                artifact.close()

    def stats(self) -> ChunkServerStats:
        """Counts so far; from any thread."""
        return ChunkServerStats(
            wants=self._wants,
            wants_malformed=self._malformed,
            wants_unknown=self._unknown,
            wants_refused=self._refused,
            chunks=self._chunks,
            bytes=self._bytes,
            coalesced=self._queue.counts.coalesced,
            dropped=self._queue.counts.dropped,
            unreadable=self._unreadable,
            waiting=len(self._queue),
        )

    # On the link's thread.

    def _on_want(self, message: Message) -> None:
        self._wants += 1
        device = topics.parse_asking(message.topic)
        if device is None or not self._admitted(device):
            return
        self._on_own_topic.add(device)
        try:
            want = Want.from_json(message.payload)
        except MalformedMessageError as error:
            self._malformed_want(message.topic, error)
            return
        self._queue_up(device, device, want.artifact, want)

    def _on_want_v1(self, message: Message) -> None:
        self._wants += 1
        digest = topics.parse_want_v1(message.topic)
        try:
            want = WantV1.from_json(message.payload)
        except MalformedMessageError as error:
            self._malformed_want(message.topic, error)
            return
        if digest is None:
            self._unknown_artifact(message.topic, want.device)
        elif want.device in self._on_own_topic:
            self._refused += 1
        elif self._admitted(want.device):
            self._queue_up(ANYBODY, want.device, digest, want)

    def _queue_up(self, asker: str, device: str, digest: str, want: Want | WantV1) -> None:
        with self._lock:
            artifact = self._opened(digest)
            if artifact is None:
                self._unknown_artifact(digest, device)
                return
            alone = None if want.shared else device
            chunks = (
                (Chunk(digest, index, alone), artifact.size_of(index))
                for index in _indices(want.ranges, want.credit, artifact.count)
            )
            self._queue.want(asker, chunks, self._monotonic(), of_bytes=artifact.size)
        self._link.wake_bulk()

    def _admitted(self, device: str) -> bool:
        refusal = self._admission(device)
        if refusal is not None:
            self._refused += 1
            self._complain("want refused", device, refusal)
        return refusal is None

    def _malformed_want(self, topic: str, error: MalformedMessageError) -> None:
        self._malformed += 1
        self._complain("want malformed", topic, str(error))

    def _unknown_artifact(self, about: str, device: str) -> None:
        self._unknown += 1
        self._complain("want unknown artifact", about, f"asked for by {device}")

    def _next(self) -> tuple[str, bytes] | None:
        with self._lock:
            if len(self._queue) and (wait_s := self._bandwidth.wait_s(self._monotonic())) > 0:
                self._wake_in(wait_s)
                return None
            while (chunk := self._queue.next(self._monotonic())) is not None:
                if chunk.device is not None and self._admission(chunk.device) is not None:
                    continue
                data = self._read(chunk.digest, chunk.index)
                if data is not None:
                    self._chunks += 1
                    self._bytes += len(data)
                    self._bandwidth.take(len(data))
                    if chunk.device is None:
                        return topics.shared_chunk(chunk.digest, chunk.index), data
                    return topics.own_chunk(chunk.device, chunk.digest, chunk.index), data
        return None

    def _wake_in(self, seconds: float) -> None:
        """The link asks again then; it has no clock of its own for that."""
        if self._wakes or self._loop is None:
            return

        def wake() -> None:
            self._wakes = False
            self._link.wake_bulk()

        with contextlib.suppress(RuntimeError):  # the loop is closed: nothing is sent any more
            self._loop.call_soon_threadsafe(self._loop.call_later, seconds, wake)
            self._wakes = True

    def _opened(self, digest: str) -> _OpenArtifact | None:
        try:
            return self._artifact(digest)
        except (OSError, StoreError) as error:
            self._complain("artifact unreadable", digest, str(error))
            return None

    def _artifact(self, digest: str) -> _OpenArtifact | None:
        artifact = self._open.get(digest)
        if artifact is None:
            found = self._artifacts(digest)
            if found is None:
                return None
            artifact = self._open[digest] = _OpenArtifact(found)
            if len(self._open) > MAX_OPEN:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(digest)
        return artifact

    def _read(self, digest: str, index: int) -> bytes | None:
        try:
            artifact = self._artifact(digest)
            if artifact is not None:
                return artifact.read(index)
        except (OSError, StoreError) as error:
            self._complain("chunk unreadable", digest, str(error))
        self._unreadable += 1
        return None

    def _complain(self, event: str, about: str, error: str) -> None:
        # Anyone who may publish wants could fill the log otherwise.
        key = f"{event} {about}"
        if key not in self._complaints and len(self._complaints) < MAX_COMPLAINTS:
            self._complaints.add(key)
            _log.warning(event, about=about, error=error)


def _indices(ranges: tuple[ChunkRange, ...], credit: int, count: int) -> Iterator[int]:
    """At most ``credit`` of the chunks named, in the order named; numbers that the artifact has not are skipped."""
    left = credit
    for span in ranges:
        for index in range(span.first, min(span.last, count - 1) + 1):
            if left == 0:
                return
            left -= 1
            yield index


class _OpenArtifact:
    """An artifact, and where each of its chunks is."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self._layout = artifact.layout()

    @property
    def count(self) -> int:
        return len(self._layout)

    @property
    def size(self) -> int:
        return self._artifact.content.size

    def size_of(self, index: int) -> int:
        return self._layout.sizes[index]

    def read(self, index: int) -> bytes:
        place = self._layout.place(index)
        return self._artifact.read(place.file, place.offset, self._layout.sizes[index])

    def close(self) -> None:
        self._artifact.close()
