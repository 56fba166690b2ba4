"""What to ask for next: window, order, retries and stall of one artifact's transfer. No IO, no clock.

The server keeps no state a device, so everything that makes a transfer robust is decided here:

* at most ``window_bytes`` are asked for and not yet here; the window starts small and grows as chunks come, so that
  a slow link is not flooded before it is known to be slow;
* requests go to the shared topic, in ascending order, continuing after the newest chunk that others were seen to
  get: devices that start late fall into step, and one publication serves them all;
* a chunk that was overtaken by later ones, or came with wrong bytes, is asked for again on the device's own topic;
* in silence one chunk is asked for again, ever more seldom, and the rest only once that was answered: so neither a
  slow link nor a server that comes back is met with a whole window a second time;
* a device that the shared topic overruns, or that it only repeats itself to, stops following it;
* what all devices want in the same moment, such as an index, is listened for before it is asked for, and asked for
  again on the shared topic: one publication then serves all that came meanwhile;
* with a limit of bytes a second no more is asked for than may come, and the shared topic, on which others have the
  say, is not followed at all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from heapq import heappop, heappush

from agent.contract.bandwidth import Bandwidth
from agent.contract.manifest import MAX_CHUNK_BYTES
from agent.contract.messages import Progress
from agent.core.chunks import ChunkTable

#: Limits of one ``Want`` (agent/contract/messages.py).
MAX_RANGES = 256
MAX_CREDIT = 4096

FIRST_WINDOW_BYTES = 1024 * 1024
LEAST_WINDOW_BYTES = 2 * MAX_CHUNK_BYTES
#: What is under way is what the link brings in twice its round trip and this long, and two chunks: so it never runs dry
#: while we ask, and little is lost with the connection. Others' requests may make a round trip look shorter than it is;
#: one of up to this long costs nothing by that.
AHEAD_S = 0.5
#: The highest rate that was seen counts for so long, and as long again.
RATE_KEPT_S = 5.0
#: With a limit, so many seconds of it may be under way: a link that stood still brings no more at once.
LIMITED_WINDOW_S = 1.0
#: Chunks that later ones overtook may still come, from a second server or another queue of the first.
OVERTAKEN_GRACE_S = 0.25
SCAN_S = 0.2
#: Without any answer for this long, or twice the longest recent gap, one chunk is asked for again.
SILENCE_S = 0.3
LONGEST_RETRY_S = 60.0
#: How often what all devices want at once is asked for again on the shared topic, before it is asked for alone.
SHARED_ATTEMPTS = 3
#: Losses on the shared topic, each within a minute of the last, after which it is plainly too fast for this device.
LOSSES_TO_LEAVE_SHARED = 6
LOSSES_FORGOTTEN_S = 60.0

_MISSING, _HAVE, _ASKED, _RETRY = range(4)


class Outcome(Enum):
    """Of a chunk that came."""

    GOOD = "good"
    BAD = "bad"
    DUPLICATE = "duplicate"
    USELESS = "useless"
    """It is no use to ask for it again; another transfer brings the chunk."""


@dataclass(frozen=True, slots=True)
class Request:
    """A ``Want`` to send now: ``ranges`` hold exactly ``credit`` chunks, first and last included."""

    ranges: tuple[tuple[int, int], ...]
    credit: int
    shared: bool


@dataclass(frozen=True, slots=True)
class _Asked:
    order: int
    at: float
    shared: bool
    before: _Asked | None = None
    """The request that this one repeats."""
    delivered: int | None = None
    """Bytes that had come when it was asked for; None: asked for before, so which request is answered is unknown."""


@dataclass(frozen=True, slots=True)
class Variation:
    """What is particular to the transfer of something else than an artifact's chunks.

    ``gather_s``: seconds to listen on the shared topic before anything is asked for. ``wire_bytes``: what a chunk takes
    on the wire, where that is not its size.
    """

    gather_s: float = 0.0
    wire_bytes: int | None = None


class _Pace:
    """What the link brings: the most bytes a second of late, and the shortest round trip of this connection."""

    def __init__(self, now: float) -> None:
        self.delivered = 0
        self._since = now
        self._rate = self._rate_before = 0.0
        self._round_trip: float | None = None

    def window_bytes(self) -> int:
        """How much may be under way."""
        rate = max(self._rate, self._rate_before)
        if not rate or self._round_trip is None:
            return sys.maxsize
        return int(rate * (2 * self._round_trip + AHEAD_S)) + 2 * MAX_CHUNK_BYTES

    def arrived(self, size: int, asked: _Asked, now: float) -> None:
        """What was asked for came: all that came meanwhile took as long, so the link brings that much at least."""
        self.delivered += size
        if asked.delivered is None:
            return
        seconds = max(now - asked.at, 1e-4)
        self._round_trip = seconds if self._round_trip is None else min(self._round_trip, seconds)
        if now - self._since > RATE_KEPT_S:
            self._since, self._rate_before, self._rate = now, self._rate, 0.0
        self._rate = max(self._rate, (self.delivered - asked.delivered) / seconds)

    def link_lost(self) -> None:
        """The next connection may take another way; what it brings is known by and by."""
        self._round_trip = None


class TransferCore:
    """Decides the requests of one transfer. Times are monotonic seconds; ``jitter`` gives numbers in [0, 1).

    ``present`` are the first occurrences that the disk holds already. ``bytes_per_s`` None: as fast as they come.
    """

    def __init__(
        self,
        table: ChunkTable,
        present: Iterable[int],
        *,
        window_bytes: int,
        stall_s: float,
        now: float,
        jitter: Callable[[], float],
        bytes_per_s: float | None = None,
        variation: Variation | None = None,
    ) -> None:
        variation = variation or Variation()
        self._table = table
        self._wire_bytes = variation.wire_bytes
        self._gathers = variation.gather_s > 0
        self._jitter = jitter
        self._stall_s = stall_s
        self._started = self._last_good = self._last_answer = self._last_event = now
        self._limit = max(window_bytes, MAX_CHUNK_BYTES)
        self._bandwidth = Bandwidth(bytes_per_s, now)
        if bytes_per_s is not None:
            self._limit = min(self._limit, max(LEAST_WINDOW_BYTES, int(bytes_per_s * LIMITED_WINDOW_S)))
        self._window = min(self._limit, FIRST_WINDOW_BYTES)
        self._pace = _Pace(now)
        self._state = bytearray(_MISSING if first == index else _HAVE for index, first in enumerate(table.first))
        self._asked: dict[int, _Asked] = {}
        self._ever_asked = bytearray(len(table))
        self._retries: list[tuple[float, int]] = []
        self._attempts: dict[int, int] = {}
        self._order = self._newest_order = 0
        self._overtaken_since: float | None = None
        self._cursor = 0
        self._probes = self._refusals = 0
        self._joining = True
        self._longest_gap = 0.0
        self._scanned_at = now
        self._quiet_until = now + variation.gather_s
        self._duplicate_bytes = self._unasked_cursor = 0
        self._losses, self._lost_at = 0, now
        self.following = bytes_per_s is None
        self.in_flight_bytes = 0
        self._left = self._state.count(_MISSING)
        self._progress = Progress(chunks_total=len(table), bytes_total=sum(table.sizes))
        self._chunks_done = self._bytes_done = self._received = self._mirrored = self._rejected = 0
        for index in present:
            self._have(index)
        self._reused = self._bytes_done

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        return self._left == 0

    def progress(self, now: float) -> Progress:
        """As it is reported."""
        return self._progress.model_copy(
            update={
                "chunks_done": self._chunks_done,
                "bytes_done": self._bytes_done,
                "bytes_received": self._received,
                "bytes_reused": self._reused,
                "bytes_mirrored": self._mirrored,
                "chunks_rejected": self._rejected,
                "seconds": round(now - self._started, 3),
            }
        )

    def stalled(self, now: float) -> bool:
        """Return whether no chunk with the right bytes came for too long."""
        return not self.complete and self.silent_s(now) >= self._stall_s

    def silent_s(self, now: float) -> float:
        """Return the seconds since the last chunk with the right bytes, or since the start."""
        return now - self._last_good

    def mirrored(self, index: int, outcome: Outcome, now: float) -> None:
        """A chunk came from a mirror, ``index`` being its first occurrence. It says nothing about the broker's link."""
        if outcome is Outcome.BAD:
            self._rejected += 1
        elif outcome is Outcome.GOOD:
            self._last_good = now
            self._mirrored += self._table.sizes[index]
            self._have(index)

    def asks_the_broker(self, now: float) -> None:
        """From now on a chunk is due: until then none was asked for."""
        self._last_good = self._last_answer = self._last_event = now

    def arrived(self, index: int, outcome: Outcome, size: int, *, shared: bool, now: float) -> None:
        """A chunk came, ``index`` being its first occurrence; ``size`` bytes."""
        self._received += size
        asked = self._settle(index)
        if asked is not None:
            # What comes on the shared topic answers the first request, however often it was repeated.
            answered = asked.before if shared and asked.before else asked
            self._pace.arrived(size, answered, now)
            self._answered(answered, now)
        elif shared:
            self._seen(index)
        if outcome is Outcome.USELESS:
            self._leave_out(index)
        elif outcome is Outcome.BAD:
            self._rejected += 1
            if asked is not None:  # else nobody asked for it, and nothing is lost
                self._retry(index, now)
        elif outcome is Outcome.DUPLICATE or self._state[index] == _HAVE:
            self._duplicate(size, shared and asked is None)
        else:
            self._last_good = now
            self._window = min(self._limit, self._window + size)
            self._have(index)

    def tick(self, now: float) -> list[Request]:
        """Return what to ask for at ``now``, if anything. Call after each batch of chunks, and a few times a second."""
        if self.complete:
            return []
        self._window = min(self._window, self._pace.window_bytes())
        self._find_overtaken(now)
        if now < self._quiet_until:
            return []
        if self._asked and now - self._last_event >= self._silence_s():
            requests = [self._probe(now)]
        elif self._has_room():
            requests = [request for request in (self._ask_again(now), self._ask_next(now)) if request is not None]
        else:
            return []
        if requests:
            self._last_event = now
        return requests

    def bytes_until_useful(self) -> int:
        """Return how many bytes must come before another ``tick`` can ask for more, or has nothing left to ask for."""
        room = self._window - self.in_flight_bytes
        return max(1, min(self.in_flight_bytes, self._window // 4 - room))

    def link_lost(self) -> None:
        """The connection ended: nothing that was asked for will come, and nothing may be asked until it is back."""
        self._pace.link_lost()
        for index in list(self._asked):
            self._settle(index)
            self._state[index] = _MISSING
            self._cursor = min(self._cursor, index)

    def unsent(self, now: float) -> None:
        """The broker refused a request: as ``link_lost``, and wait before the next."""
        self.link_lost()
        self._refusals += 1
        self._quiet_until = now + self._spread(min(LONGEST_RETRY_S, 0.5 * 2.0 ** min(self._refusals, 16)))

    def _spread(self, seconds: float) -> float:
        return seconds * (0.5 + 0.5 * self._jitter())

    def _answered(self, asked: _Asked, now: float) -> None:
        self._longest_gap = max(now - max(self._last_answer, asked.at), self._longest_gap * 0.98)
        self._last_answer = self._last_event = now
        if asked.order < self._newest_order:
            self._overtaken_since = now  # so others may be coming too
        self._newest_order = max(self._newest_order, asked.order)
        self._joining = False
        self._probes = self._refusals = 0

    def _seen(self, index: int) -> None:
        """A chunk that others asked for. What they got just before we joined, the server does not repeat to us."""
        if self._joining:
            self._joining = False
            self.link_lost()
            self._cursor = 0
        self._unasked_cursor = index + 1

    def _settle(self, index: int) -> _Asked | None:
        asked = self._asked.pop(index, None)
        if asked is not None:
            self.in_flight_bytes -= self._on_wire(index)
        return asked

    def _on_wire(self, index: int) -> int:
        return self._table.sizes[index] if self._wire_bytes is None else self._wire_bytes

    def _have(self, index: int) -> None:
        if self._state[index] == _HAVE:
            return
        self._state[index] = _HAVE
        self._left -= 1
        occurrences = self._table.occurrences(index)
        self._chunks_done += occurrences
        self._bytes_done += occurrences * self._table.sizes[index]

    def _leave_out(self, index: int) -> None:
        if self._state[index] != _HAVE:
            self._state[index] = _HAVE
            self._left -= 1

    def _duplicate(self, size: int, unasked: bool) -> None:
        if unasked:
            self._duplicate_bytes += size
            if self._duplicate_bytes > max(2 * self._limit, self._received // 4):
                self.following = False

    def _retry(self, index: int, now: float) -> None:
        if self._state[index] in (_HAVE, _RETRY):
            return
        attempts = self._attempts[index] = self._attempts.get(index, 0) + 1
        delay = 0.0 if attempts == 1 else self._spread(min(LONGEST_RETRY_S, 0.25 * 2.0 ** min(attempts, 16)))
        self._state[index] = _RETRY
        heappush(self._retries, (now + delay, index))

    def _find_overtaken(self, now: float) -> None:
        if now - self._scanned_at < SCAN_S:
            return
        self._scanned_at = now
        overtaken = [index for index, asked in self._asked.items() if asked.order < self._newest_order]
        if not overtaken:
            self._overtaken_since = None
        elif self._overtaken_since is None:
            self._overtaken_since = now
        elif now - self._overtaken_since >= max(OVERTAKEN_GRACE_S, 4 * self._longest_gap):
            self._lost(overtaken, now)

    def _lost(self, indices: list[int], now: float) -> None:
        self._window = min(self._limit, max(LEAST_WINDOW_BYTES, self._window // 2))
        if any(self._asked[index].shared for index in indices):
            self._losses = self._losses + 1 if now - self._lost_at < LOSSES_FORGOTTEN_S else 1
            self._lost_at = now
            self.following = self.following and self._losses < LOSSES_TO_LEAVE_SHARED
        for index in indices:
            self._settle(index)
            self._retry(index, now)

    def _silence_s(self) -> float:
        timeout = max(SILENCE_S, 2 * self._longest_gap) * 2.0 ** min(self._probes, 16)
        return min(LONGEST_RETRY_S, timeout * (1 + self._jitter()))

    def _probe(self, now: float) -> Request:
        self._probes += 1
        index, asked = min(self._asked.items(), key=lambda item: item[1].order)
        self._bandwidth.take(self._on_wire(index))
        self._order += 1
        shared = self._again_shared(self._probes)
        self._asked[index] = _Asked(self._order, now, shared=shared, before=asked.before or asked)
        return Request(((index, index),), 1, shared=shared)

    def _again_shared(self, attempts: int) -> bool:
        """Others miss it as well where all came at once; what stays away in spite of that is asked for alone."""
        return self._gathers and self.following and attempts <= SHARED_ATTEMPTS

    def _has_room(self) -> bool:
        # A want for each chunk would be as many messages back as forth.
        return not self._asked or self._window - self.in_flight_bytes >= self._window // 4

    def _ask_again(self, now: float) -> Request | None:
        chosen: list[int] = []
        shared = bool(self._retries) and self._again_shared(self._attempts.get(self._retries[0][1], 0))
        while self._retries and self._retries[0][0] <= now and len(chosen) < MAX_RANGES and self._may_ask(now):
            index = self._retries[0][1]
            if self._state[index] == _RETRY:
                if not self._fits(index):
                    break
                self._ask(index, now, shared=shared)
                chosen.append(index)
            heappop(self._retries)
        return _request(sorted(chosen), shared=shared)

    def _ask_next(self, now: float) -> Request | None:
        self._cursor = max(self._cursor, self._unasked_cursor)
        self._unasked_cursor = 0
        chosen: list[int] = []
        ranges = 0
        while len(chosen) < MAX_CREDIT and self._may_ask(now):
            index = self._next_missing()
            if index < 0 or not self._fits(index):
                break
            ranges += not chosen or index != chosen[-1] + 1
            if ranges > MAX_RANGES:
                break
            self._ask(index, now, shared=self.following)
            chosen.append(index)
            self._cursor = index + 1
        return _request(chosen, shared=self.following)

    def _next_missing(self) -> int:
        index = self._state.find(_MISSING, self._cursor)
        return index if index >= 0 else self._state.find(_MISSING)

    def _fits(self, index: int) -> bool:
        return not self._asked or self.in_flight_bytes + self._on_wire(index) <= self._window

    def _may_ask(self, now: float) -> bool:
        return self._bandwidth.wait_s(now) == 0

    def _ask(self, index: int, now: float, *, shared: bool) -> None:
        self._state[index] = _ASKED
        self._order += 1
        first_time = not self._ever_asked[index]
        self._ever_asked[index] = 1
        self._asked[index] = _Asked(self._order, now, shared, delivered=self._pace.delivered if first_time else None)
        self.in_flight_bytes += self._on_wire(index)
        self._bandwidth.take(self._on_wire(index))


def _request(indices: list[int], *, shared: bool) -> Request | None:
    if not indices:
        return None
    ranges: list[tuple[int, int]] = []
    for index in indices:
        if ranges and ranges[-1][1] == index - 1:
            ranges[-1] = (ranges[-1][0], index)
        else:
            ranges.append((index, index))
    return Request(tuple(ranges), len(indices), shared)
