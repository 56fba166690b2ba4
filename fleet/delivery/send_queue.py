"""Which chunk goes out next. Pure: no IO, no clock.

Wants of many devices for the same chunk become one publication. Bytes are scheduled by deficit round robin
(Shreedhar and Varghese, 1996): each device that waits gets the same share of the link, whatever it asks for and
however often, and a device that has itself sent again and again what it was sent before gets less.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from agent.contract.manifest import MAX_CHUNK_BYTES

#: A chunk on the shared topic is not repeated within this time: whoever follows the topic has it, or has lost it.
COALESCE_S = 1.0
#: Entries waiting in all; a want past that is dropped, and its device asks again.
MAX_WAITING = 1_000_000
#: Bytes that one device may have waiting: far more than its window. Beyond it its oldest wishes are dropped.
DEVICE_BYTES = 64 * 1024 * 1024
#: What a device may be sent in its turn. No chunk is larger, so no turn passes without one.
QUANTUM_BYTES = MAX_CHUNK_BYTES
#: Of an artifact a device may be sent a quarter more than its size, and this much in any case, before that counts as
#: waste; what it was sent counts half after each ``WASTE_HALVED_S``.
REPEATS = 1.25
LEAST_ALLOWED_BYTES = 8 * 1024 * 1024
WASTE_HALVED_S = 600.0
LEAST_SHARE = 1 / 16
#: Pairs of device and artifact whose bytes are remembered.
MAX_REMEMBERED = 4096

#: Whose turn the wants of agents 0.1 share: who sends them cannot be known.
ANYBODY = ""


@dataclass(slots=True)
class QueueCounts:
    """``coalesced``: chunks asked for that another's want had already brought onto the way."""

    coalesced: int = 0
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class Chunk:
    """Chunk ``index`` of an artifact, for the shared topic, or for one device alone (``device``)."""

    digest: str
    index: int
    device: str | None


@dataclass(slots=True)
class _Line:
    """What one device waits for, oldest first, with sizes in bytes."""

    waiting: OrderedDict[Chunk, int] = field(default_factory=OrderedDict)
    bytes: int = 0
    deficit: float = 0.0

    def remove(self, chunk: Chunk) -> None:
        self.bytes -= self.waiting.pop(chunk)


class SendQueue:
    """Chunks waiting to be published. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._lines: OrderedDict[str, _Line] = OrderedDict()
        self._length = 0
        self._sharers: dict[Chunk, set[str]] = {}
        self._published: OrderedDict[Chunk, float] = OrderedDict()
        self._served: OrderedDict[tuple[str, str], tuple[float, float]] = OrderedDict()
        self._allowed: dict[str, float] = {}
        self.counts = QueueCounts()

    def __len__(self) -> int:
        """Publications that are due."""
        return self._length

    def want(self, asker: str, chunks: Iterable[tuple[Chunk, int]], now: float, *, of_bytes: int = 0) -> None:
        """Queue what is not queued for ``asker`` already, nor, on the shared topic, just published.

        ``chunks`` come with their sizes and belong to one artifact, of ``of_bytes`` in all.
        """
        self._forget_old(now)
        for chunk, size in chunks:
            self._allowed[chunk.digest] = max(LEAST_ALLOWED_BYTES, REPEATS * of_bytes)
            line = self._lines.get(asker)
            if (line is not None and chunk in line.waiting) or chunk in self._published:
                self.counts.coalesced += 1
                continue
            shared_with = self._sharers.get(chunk) if chunk.device is None else None
            if shared_with is None and self._length >= MAX_WAITING:
                self.counts.dropped += 1
                continue
            if line is None:
                line = self._lines[asker] = _Line()
            line.waiting[chunk], line.bytes = size, line.bytes + size
            if shared_with is not None:
                shared_with.add(asker)
                self.counts.coalesced += 1
            else:
                self._length += 1
                if chunk.device is None:
                    self._sharers[chunk] = {asker}
            while asker != ANYBODY and line.bytes > DEVICE_BYTES:
                self._leave(asker, next(iter(line.waiting)))
                self.counts.dropped += 1

    def next(self, now: float) -> Chunk | None:
        """Take the next chunk to publish, or None."""
        while self._lines:
            asker, line = next(iter(self._lines.items()))
            chunk, size = next(iter(line.waiting.items()))
            if line.deficit >= size:
                line.deficit -= size
                self._book(asker, chunk.digest, size, now)
                self._sent(asker, chunk, now)
                return chunk
            line.deficit += QUANTUM_BYTES * self._share(asker, chunk.digest, now)
            self._lines.move_to_end(asker)
        return None

    def forget(self, unless: Callable[[str], bool] | None = None) -> None:
        """Drop what waits, or that part of it whose artifact ``unless`` denies: after a lost connection, say."""
        for asker, line in list(self._lines.items()):
            for chunk in list(line.waiting):
                if unless is None or not unless(chunk.digest):
                    self._leave(asker, chunk)
        for digest in list(self._allowed):
            if unless is None or not unless(digest):
                del self._allowed[digest]

    def _sent(self, asker: str, chunk: Chunk, now: float) -> None:
        if chunk.device is not None:
            self._leave(asker, chunk)
            return
        for sharer in list(self._sharers[chunk]):
            self._leave(sharer, chunk)
        self._published.pop(chunk, None)
        self._published[chunk] = now

    def _leave(self, asker: str, chunk: Chunk) -> None:
        """``asker`` no longer waits for the chunk; nor does anybody, if it was the last."""
        line = self._lines[asker]
        line.remove(chunk)
        if not line.waiting:
            del self._lines[asker]
        sharers = self._sharers.get(chunk)
        if sharers is not None:
            sharers.discard(asker)
            if sharers:
                return
            del self._sharers[chunk]
        self._length -= 1

    def _share(self, asker: str, digest: str, now: float) -> float:
        """1, and less for a device that was sent more of the artifact than there is."""
        served, at = self._served.get((asker, digest), (0.0, now))
        served *= 0.5 ** ((now - at) / WASTE_HALVED_S)
        allowed = self._allowed.get(digest, LEAST_ALLOWED_BYTES)
        return 1.0 if served <= allowed or asker == ANYBODY else max(LEAST_SHARE, (allowed / served) ** 4)

    def _book(self, asker: str, digest: str, size: int, now: float) -> None:
        served, at = self._served.pop((asker, digest), (0.0, now))
        self._served[asker, digest] = served * 0.5 ** ((now - at) / WASTE_HALVED_S) + size, now
        while len(self._served) > MAX_REMEMBERED:
            self._served.popitem(last=False)

    def _forget_old(self, now: float) -> None:
        while self._published:
            key, at = next(iter(self._published.items()))
            if now - at < COALESCE_S:
                return
            del self._published[key]
