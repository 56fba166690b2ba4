"""Performs a transfer: what ``agent.core.transfer`` decides, over the link, onto the disk.

Chunks go from the link's thread straight to the disk, each after its own SHA-256 was checked; the event loop sees
only that some came.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import structlog

from agent.contract import topics
from agent.contract.chunk_index import Content
from agent.contract.failures import FailureCode
from agent.contract.manifest import Manifest
from agent.contract.messages import ChunkRange, Progress, Want, WantV1
from agent.core.chunks import ChunkTable
from agent.core.dialect import Dialect
from agent.core.ports import Link, Message, ProgressHandler
from agent.core.transfer import Outcome, Request, TransferCore, Variation
from agent.errors import LinkError, MeteredError, TransferError
from agent.platform.concurrency import Stop, ended, in_thread
from agent.store.artifacts import ArtifactStore
from agent.store.intake import FLUSH_BYTES, DeltaIntake, Intake
from agent.store.mirrors import MirrorReader
from agent.store.partial import Partial

TICK_S = 0.25
PROGRESS_S = 0.5
#: A link that is away longer is waited for by the deployment, whose clock then stands still.
LINK_PATIENCE_S = 30.0
#: An order reaches many devices in the same moment, and all of them want the index first.
GATHER_S = 1.0
#: Without a piece of a delta for this long the chunks are asked for whole: nobody serves it any more.
DELTA_PATIENCE_S = 30.0
_TAKEN = {"bytes_received", "chunks_rejected", "seconds"}


_log = structlog.get_logger(component=__name__)


@dataclass(frozen=True, slots=True)
class OwnLimits:
    """What the device's own settings say of all transfers, beside each order: the lower limit holds.

    Its ``mirrors`` go before those of an order.
    """

    bytes_per_s: int | None = None
    metered_bytes: int | None = None
    mirrors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Limits:
    """What holds for one transfer, from its order and the device's own settings."""

    window_bytes: int
    stall_s: float
    bytes_per_s: int | None
    metered_bytes: int | None
    mirrors: tuple[str, ...]


class Fetcher:
    """Implements ``agent.core.ports.Transfer``."""

    def __init__(
        self,
        link: Link,
        store: ArtifactStore,
        device: str,
        *,
        dialect: Dialect | None = None,
        own: OwnLimits | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._dialect = dialect or Dialect()
        self._own = own or OwnLimits()
        self._link = link
        self._store = store
        self._device = device
        self._monotonic = monotonic
        self._jitter = jitter

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

        What will be fetched is reported, and logged, before anything is asked for. What no mirror has comes from the
        broker, and the log says why.

        Raises:
            agent.errors.StoreError: the disk is too small (before the transfer starts, with the figures) or fails.
            agent.errors.MeteredError: it is more than a metered network may carry unasked.
            agent.errors.TransferError: no chunk for ``stall_s`` seconds, no link for LINK_PATIENCE_S (both
                TRANSFER_STALLED), or chunks that come are refused or wrong (TRANSFER_UNAVAILABLE).
        """
        if self._store.path(manifest.digest) is not None:
            await in_thread(lambda _stop: self._store.renew(manifest))
            return _all_there(manifest)
        limits = _Limits(
            window_bytes,
            stall_s,
            None if at_hand else _least(bytes_per_s, self._own.bytes_per_s),
            None if at_hand else _least(metered_bytes, self._own.metered_bytes),
            () if at_hand else tuple(dict.fromkeys((*self._own.mirrors, *mirrors))),
        )
        before = await self._fetch_index(manifest, limits, on_progress, at_hand=at_hand)
        partial = await in_thread(lambda _stop: self._store.begin(manifest), undo=self._store.abandon)
        try:
            present = await in_thread(lambda stop: self._find(partial, stop))
            if not at_hand:
                present, before = await self._fetch_delta(manifest, partial, present, limits, before, on_progress)
            progress = await self._bring(partial, present, limits, lambda one: on_progress(_sum(one, before)))
            await in_thread(lambda _stop: self._store.commit(partial))
        finally:
            self._store.abandon(partial)
        on_progress(_sum(progress, before))
        return _sum(progress, before)

    async def _fetch_index(
        self, manifest: Manifest, limits: _Limits, on_progress: ProgressHandler, *, at_hand: bool
    ) -> Progress:
        """The list of the artifact's chunks, where the manifest does not have it; returns what that took."""
        partial = await in_thread(lambda _stop: self._store.begin_index(manifest), undo=self._undo_index)
        if partial is None:
            return Progress()

        def tell(progress: Progress) -> None:
            on_progress(Progress(bytes_total=manifest.size, **progress.model_dump(include=_TAKEN)))

        try:
            present = await in_thread(lambda stop: array("I", partial.present(stop)))
            # Web servers have the artifact's files alone.
            listening = Variation(gather_s=0.0 if at_hand else GATHER_S)
            progress = await self._bring(partial, present, replace(limits, mirrors=()), tell, listening)
            await in_thread(lambda _stop: self._store.commit_index(manifest, partial))
        finally:
            self._store.abandon(partial)
        return Progress(**progress.model_dump(include=_TAKEN))

    async def _fetch_delta(
        self,
        manifest: Manifest,
        partial: Partial,
        present: array[int],
        limits: _Limits,
        before: Progress,
        on_progress: ProgressHandler,
    ) -> tuple[array[int], Progress]:
        """What a delta tells, if the device has the base of one; returns what is here then, and what it all took.

        Whatever a delta does not tell comes whole.

        Raises:
            agent.errors.StoreError: the disk fails.
            agent.errors.MeteredError: the delta alone is more than a metered network may carry unasked.
            agent.errors.TransferError: the link is gone.
        """
        found = await in_thread(lambda _stop: self._store.base(manifest))
        missing = manifest.chunk_count - len(present)
        if found is None or missing <= 0:
            return present, before
        delta, base = found
        if delta.base is None and limits.mirrors:
            return present, before  # who names mirrors wants the bytes from there
        table = partial.table
        wire_bytes = max(1, delta.size // max(1, len(table)))
        limits = replace(limits, stall_s=min(limits.stall_s, DELTA_PATIENCE_S), mirrors=())
        intake = DeltaIntake(partial, present, base)
        core = self._core(table, present, limits, Variation(wire_bytes=wire_bytes))
        expected = wire_bytes * missing + delta.whole_bytes
        _log.info("delta found", artifact=manifest.id, delta=delta.name, bytes=expected)
        try:
            if not core.complete:
                _check_metered(manifest, expected, limits.metered_bytes)
                at = _At(self._link, self._device, self._dialect, delta.digest, f"{manifest.id} ({delta.name})")
                await _Session(at, intake, core, self._monotonic, lambda one: on_progress(_sum(one, before))).run()
        except TransferError as error:
            if not self._link.connected:
                raise
            _log.warning("delta given up, chunks come whole", artifact=manifest.id, delta=delta.name, error=str(error))
        finally:
            intake.close()
        if intake.useless:
            _log.info("delta left chunks out", artifact=manifest.id, delta=delta.name, chunks=intake.useless)
        here = array("I", (first for first in table.unique() if intake.has(first)))
        return here, _sum(core.progress(self._monotonic()), before)

    def _undo_index(self, partial: Partial | None) -> None:
        if partial is not None:
            self._store.abandon(partial)

    async def _bring(
        self,
        partial: Partial,
        present: Sequence[int],
        limits: _Limits,
        on_progress: ProgressHandler,
        variation: Variation | None = None,
    ) -> Progress:
        core = self._core(partial.table, present, limits, variation)
        if not core.complete:
            _tell_plan(partial.content, core.progress(self._monotonic()), on_progress, limits.metered_bytes)
            intake = Intake(partial, present)
            reader = MirrorReader(intake, core, on_progress, bytes_per_s=limits.bytes_per_s, monotonic=self._monotonic)
            told = await reader.read(limits.mirrors)
            if not core.complete:
                content = partial.content
                at = _At(self._link, self._device, self._dialect, content.digest, content.id)
                await _Session(at, intake, core, self._monotonic, on_progress, told).run()
        return core.progress(self._monotonic())

    def _core(
        self, table: ChunkTable, present: Sequence[int], limits: _Limits, variation: Variation | None
    ) -> TransferCore:
        return TransferCore(
            table,
            present,
            window_bytes=limits.window_bytes,
            stall_s=limits.stall_s,
            now=self._monotonic(),
            jitter=self._jitter,
            bytes_per_s=limits.bytes_per_s,
            variation=variation,
        )

    def _find(self, partial: Partial, stop: Stop) -> array[int]:
        """Chunks that need not be sent: those that came before, and those of other artifacts."""
        present = array("I", partial.present(stop))
        here = bytearray(len(partial.table))
        for first in present:
            here[first] = 1
        missing = array("I", (first for first in partial.table.unique() if not here[first]))
        if missing:
            present.extend(partial.reuse(self._store.donors(partial.artifact), missing, stop))
        return present


@dataclass(frozen=True, slots=True)
class _At:
    """Where chunks are asked for, and under which name: ``digest`` on the wire, ``name`` for people."""

    link: Link
    device: str
    dialect: Dialect
    digest: str
    name: str


class _Session:
    """From the first request to the last chunk."""

    def __init__(
        self,
        at: _At,
        intake: Intake,
        core: TransferCore,
        monotonic: Callable[[], float],
        on_progress: ProgressHandler,
        mirrors: Sequence[str] = (),
    ) -> None:
        """``mirrors``: what was wrong with each."""
        self._mirrors = mirrors
        self._link = at.link
        self._device = at.device
        self._dialect = at.dialect
        self._digest = at.digest
        self._name = at.name
        self._partial = intake.partial
        self._core = core
        self._intake = intake
        self._monotonic = monotonic
        self._on_progress = on_progress
        self._arrivals: deque[tuple[int, Outcome, int, bool]] = deque()
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._arrived_bytes = 0  # written by the link's thread alone
        self._taken_bytes = 0
        self._wake_at = 1
        self._wake_pending = False
        self._linked = True
        self._unlinked_since = monotonic()
        self._following = False
        self._requests: set[asyncio.Task[None]] = set()
        self._flush: asyncio.Task[None] | None = None
        self._flush_at = FLUSH_BYTES
        self._shared_filter = topics.shared_chunks(self._digest)
        self._own_filter = topics.own_chunks(self._device, self._digest)

    async def run(self) -> None:
        """Until nothing is missing.

        Raises:
            agent.errors.StoreError: the disk fails.
            agent.errors.TransferError: stalled, or the broker refuses the chunks' topics.
        """
        self._core.asks_the_broker(self._monotonic())
        try:
            await self._follow()
            while not self._core.complete:
                await self._turn()
        finally:
            await self._end()
        self._raise_if_refused()

    async def _follow(self) -> None:
        try:
            await self._link.subscribe(self._own_filter, self._on_chunk, qos=0, bulk=True)
            if self._core.following:
                await self._link.subscribe(self._shared_filter, self._on_chunk, qos=0, bulk=True)
        except LinkError as error:
            raise TransferError(f"chunks cannot be received: {error}", FailureCode.TRANSFER_UNAVAILABLE) from error
        self._following = self._core.following

    async def _turn(self) -> None:
        reported = self._monotonic()
        while not self._core.complete and self._monotonic() - reported < PROGRESS_S:
            self._take_arrivals()
            self._ask()
            self._flush_now_and_then()
            await self._stop_following_when_told()
            self._raise_if_hopeless()
            await self._wait()
        self._on_progress(self._core.progress(self._monotonic()))

    async def _wait(self) -> None:
        if self._core.complete:
            return
        try:
            async with asyncio.timeout(TICK_S):
                await self._wake.wait()
        except TimeoutError:
            return
        self._wake.clear()

    def _take_arrivals(self) -> None:
        self._wake_pending = False  # before looking: what comes from now on wakes again
        now, good = self._monotonic(), False
        while self._arrivals:
            first, outcome, size, shared = self._arrivals.popleft()
            self._taken_bytes += size
            good = good or outcome is Outcome.GOOD
            self._core.arrived(first, outcome, size, shared=shared, now=now)
        if good:
            self._link.progressed()

    def _ask(self) -> None:
        if self._linked != self._link.connected:
            self._linked = not self._linked
            if not self._linked:
                self._unlinked_since = self._monotonic()
                self._core.link_lost()
        if not self._linked:
            return
        requests = self._core.tick(self._monotonic())
        self._wake_at = self._taken_bytes + self._core.bytes_until_useful()
        if self._arrived_bytes >= self._wake_at:  # they came while we were looking
            self._wake.set()
        for request in requests:
            task = self._loop.create_task(self._send(request))
            self._requests.add(task)
            task.add_done_callback(self._requests.discard)

    async def _send(self, request: Request) -> None:
        ranges = tuple(ChunkRange(first=first, last=last) for first, last in request.ranges)
        topic, want = self._want(ranges, request)
        try:
            await self._link.publish(topic, want.to_json())
        except LinkError as error:
            _log.warning("want not sent", digest=self._digest, error=str(error))
            self._core.unsent(self._monotonic())

    def _want(self, ranges: tuple[ChunkRange, ...], request: Request) -> tuple[str, Want | WantV1]:
        credit, shared = request.credit, request.shared
        if self._dialect.shared_topics:
            old = WantV1(device=self._device, ranges=ranges, credit=credit, shared=shared)
            return topics.want_v1(self._digest), old
        return topics.want(self._device), Want(artifact=self._digest, ranges=ranges, credit=credit, shared=shared)

    def _flush_now_and_then(self) -> None:
        if self._taken_bytes < self._flush_at or (self._flush is not None and not self._flush.done()):
            return
        self._flush_at = self._taken_bytes + FLUSH_BYTES
        self._flush = self._loop.create_task(asyncio.to_thread(self._intake.flush))

    async def _stop_following_when_told(self) -> None:
        if self._following and not self._core.following:
            self._following = False
            _log.info("transfer leaves shared topic", digest=self._digest)
            await self._link.unsubscribe(self._shared_filter)

    def _raise_if_refused(self) -> None:
        if self._intake.error is not None:
            raise self._intake.error

    def _raise_if_hopeless(self) -> None:
        self._raise_if_refused()
        now = self._monotonic()
        away = not self._linked and now - self._unlinked_since >= LINK_PATIENCE_S
        if not away and not self._core.stalled(now):
            return
        progress = self._core.progress(now)
        where = f"artifact {self._name} at {progress.bytes_done} of {progress.bytes_total} bytes"
        mirrors = "".join(f"; mirror {told}" for told in self._mirrors)
        if not self._linked:
            raise TransferError(f"the broker is not connected; {where}, which are kept{mirrors}")
        silent = f"no chunk came for {self._core.silent_s(now):.0f} s; {where}, which are kept"
        if progress.chunks_rejected:
            raise TransferError(
                f"{silent}; {progress.chunks_rejected} chunks came with wrong bytes: is the controller's copy whole?",
                FailureCode.TRANSFER_UNAVAILABLE,
            )
        raise TransferError(
            f"{silent}; does a controller serve it, and does the broker let this device read its chunks?{mirrors}"
        )

    async def _end(self) -> None:
        for task in self._requests:
            task.cancel()
        if self._flush is not None:
            await ended([self._flush])
        for topic in (self._shared_filter, self._own_filter):
            await self._link.unsubscribe(topic)

    def _on_chunk(self, message: Message) -> None:
        """On the link's thread."""
        named = topics.parse_chunk(message.topic)
        if named is None or named[1] >= len(self._partial.table):
            return
        first = self._partial.table.first[named[1]]
        shared = not message.topic.startswith(self._own_filter[:-1])
        size = len(message.payload)
        self._arrivals.append((first, self._intake.accept(first, message.payload), size, shared))
        self._arrived_bytes += size
        # Not for each chunk: a task switch costs as much as hashing one. The tick is there for what this misses.
        if self._arrived_bytes >= self._wake_at and not self._wake_pending:
            self._wake_pending = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._wake.set)


def _tell_plan(content: Content, progress: Progress, on_progress: ProgressHandler, metered: int | None) -> None:
    """Report what will be fetched.

    Raises:
        MeteredError: it is more than may be.
    """
    missing = progress.bytes_total - progress.bytes_done
    on_progress(progress)
    _check_metered(content, missing, metered)
    _log.info("transfer begins", artifact=content.id, bytes=missing, bytes_reused=progress.bytes_reused)


def _check_metered(content: Content, missing: int, metered: int | None) -> None:
    if metered is not None and missing > metered:
        raise MeteredError(
            f"{content.id} needs {missing} of its {content.size} bytes, and this device's network is metered: "
            f"at most {metered} bytes are fetched unasked. `phifleet deploy --transfer-now` lifts a profile's limit, "
            "`metered_bytes` in the device's settings is its own; a stick needs neither"
        )


def _least(*limits: int | None) -> int | None:
    return min((one for one in limits if one is not None), default=None)


def _sum(progress: Progress, before: Progress) -> Progress:
    """Of the artifact, with what its index and its delta took; what the delta told was not found on the device."""
    sums = {name: getattr(progress, name) + getattr(before, name) for name in _TAKEN}
    return progress.model_copy(update=sums | ({"bytes_reused": before.bytes_reused} if before.bytes_total else {}))


def _all_there(manifest: Manifest) -> Progress:
    chunks = manifest.chunk_count
    return Progress(
        chunks_total=chunks,
        chunks_done=chunks,
        bytes_total=manifest.size,
        bytes_done=manifest.size,
        bytes_reused=manifest.size,
    )
