"""Answers wants: publishes chunks of artifacts, as many as were asked for, and keeps nothing about any device."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import Protocol

import structlog

from agent.contract import topics
from agent.contract.base import MalformedMessageError
from agent.contract.manifest import Manifest
from agent.contract.messages import Want
from agent.link import BulkSource, Handler, Message
from fleet.delivery.send_queue import SendQueue
from fleet.errors import StoreError

#: Artifacts with open files; the least recently wanted is closed.
MAX_OPEN = 16
#: Distinct complaints that are logged; each is logged once.
MAX_COMPLAINTS = 1000

_log = structlog.get_logger(component=__name__)


class Artifact(Protocol):
    """The bytes of one artifact; ``fleet.store.ArtifactReader`` has it."""

    @property
    def manifest(self) -> Manifest:
        """What the bytes are."""
        ...

    def read(self, file: int, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset`` of the manifest's file number ``file``; raises OSError."""
        ...

    def close(self) -> None:
        """Release what reading has opened."""
        ...


Artifacts = Callable[[str], Artifact | None]
"""Opens an artifact by its digest, None where there is none. Called on the link's thread, seldom."""


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
    """One of any number that share the wants. Give it a link of its own: bulk then never delays control."""

    def __init__(
        self,
        link: BulkLink,
        artifacts: Artifacts,
        *,
        barred: Container[str] = (),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._barred = barred
        self._link = link
        self._artifacts = artifacts
        self._monotonic = monotonic
        self._queue = SendQueue()
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
        self._link.serve_bulk(self._next)
        await self._link.subscribe(topics.ARTIFACT_WANT_SHARED, self._on_want, bulk=True)

    async def stop(self) -> None:
        """Answer no more wants, and drop those that wait."""
        await self._link.unsubscribe(topics.ARTIFACT_WANT_SHARED)
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
        digest = topics.parse_want(message.topic)
        try:
            want = Want.from_json(message.payload)
        except MalformedMessageError as error:
            self._malformed += 1
            self._complain("want malformed", message.topic, str(error))
            return
        if want.device in self._barred:
            self._refused += 1
            self._complain("want refused", want.device, "the device was revoked or removed")
            return
        with self._lock:
            artifact = self._opened(digest) if digest is not None else None
            if digest is None or artifact is None:
                self._unknown += 1
                self._complain("want unknown artifact", message.topic, f"asked for by {want.device}")
                return
            destination = (digest, None if want.shared else want.device)
            self._queue.want(destination, _indices(want, artifact.count), self._monotonic())
        self._link.wake_bulk()

    def _next(self) -> tuple[str, bytes] | None:
        with self._lock:
            while (item := self._queue.next(self._monotonic())) is not None:
                (digest, device), index = item
                if device is not None and device in self._barred:
                    continue
                data = self._read(digest, index)
                if data is not None:
                    self._chunks += 1
                    self._bytes += len(data)
                    topic = topics.shared_chunk(digest, index) if device is None else None
                    return topic or topics.own_chunk(str(device), digest, index), data
        return None

    def _opened(self, digest: str) -> _OpenArtifact | None:
        try:
            return self._artifact(digest)
        except StoreError as error:
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


def _indices(want: Want, count: int) -> Iterator[int]:
    """At most ``credit`` of the chunks named, in the order named; numbers that the artifact has not are skipped."""
    left = want.credit
    for span in want.ranges:
        for index in range(span.first, min(span.last, count - 1) + 1):
            if left == 0:
                return
            left -= 1
            yield index


class _OpenArtifact:
    """An artifact, and where each of its chunks is."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self._chunks: list[tuple[int, int, int]] = []
        for number, file in enumerate(artifact.manifest.files):
            offset = 0
            for size, _digest in file.chunks:
                self._chunks.append((number, offset, size))
                offset += size

    @property
    def count(self) -> int:
        return len(self._chunks)

    def read(self, index: int) -> bytes:
        return self._artifact.read(*self._chunks[index])

    def close(self) -> None:
        self._artifact.close()
