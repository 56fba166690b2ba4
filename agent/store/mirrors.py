"""Reads chunks from a web server, by ranges of the artifact's files.

A mirror is not trusted and owes nothing: whatever goes wrong with it is a reason to ask the next, and in the end the
broker, never to fail. What a mirror can cost is bounded: its time by a least rate, its bytes by what was asked for, and
its wrong chunks by a few.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import aiohttp
import structlog

from agent.contract.bandwidth import Bandwidth
from agent.contract.mirrors import mirror_url
from agent.core.ports import ProgressHandler
from agent.core.transfer import Outcome, TransferCore
from agent.store.intake import FLUSH_BYTES, Intake

#: What one request asks for, at most; a connection that breaks loses nothing of it that came.
RANGE_BYTES = 64 * 1024 * 1024
#: Bytes that are there and lie between two that are missing, at most, for one request instead of two.
GAP_BYTES = 256 * 1024
#: Handed to a thread at once, to be checked and written.
BATCH_BYTES = 1024 * 1024
#: Read ahead by aiohttp, which loses twice that when a connection breaks.
BUFFER_BYTES = 128 * 1024
CONNECT_S, SILENCE_S = 15.0, 30.0
PROGRESS_S = 0.5
#: How often in a row a request may bring nothing, and the first of the pauses between, which double.
ATTEMPTS, PAUSE_S = 4, 0.5
#: Slower than this over a minute, a mirror is of no use: half of what the least limit of a device allows.
LEAST_BYTES_PER_S, GRACE_S = 512, 60.0
WRONG_CHUNKS = 3
_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")
#: Answers that may be another a moment later.
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
_OTHER_BYTES = "has other bytes than the artifact"

_log = structlog.get_logger(component=__name__)


class MirrorError(Exception):
    """This mirror is of no use for this artifact, and why."""


class _PassingError(Exception):
    """The request may be made again."""


@dataclass(frozen=True, slots=True)
class _Run:
    """A piece of a file: from ``offset`` on, one chunk after the other, by first occurrence and size in bytes."""

    offset: int
    pieces: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(size for _, size in self.pieces)


def _missing(run: _Run, has: Callable[[int], bool]) -> Iterator[_Run]:
    """Yield what of it is not there, no more at once than a request may ask for; short gaps are read once more."""
    taken: list[tuple[int, int]] = []
    gap: list[tuple[int, int]] = []
    start = offset = run.offset
    seen: set[int] = set()
    for first, size in run.pieces:
        offset += size
        if has(first) or first in seen:
            gap.append((first, size))
            continue
        between = sum(length for _, length in gap) if taken else 0
        if taken and (between > GAP_BYTES or offset - start > RANGE_BYTES):
            yield _Run(start, tuple(taken))
            taken = []
        if not taken:
            start, gap = offset - size, []
        taken += [*gap, (first, size)]
        gap = []
        seen.add(first)
    if taken:
        yield _Run(start, tuple(taken))


class MirrorReader:
    """Of one transfer. ``bytes_per_s`` is its limit."""

    def __init__(
        self,
        intake: Intake,
        core: TransferCore,
        on_progress: ProgressHandler,
        *,
        bytes_per_s: int | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._intake = intake
        self._core = core
        self._on_progress = on_progress
        self._monotonic = monotonic
        self._reported = monotonic()
        self._bandwidth = Bandwidth(bytes_per_s, monotonic())
        self._unflushed = 0

    async def read(self, templates: Collection[str]) -> list[str]:
        """Everything missing that one of them has; returns what was wrong with those that did not bring the rest.

        Raises:
            agent.errors.StoreError: the disk fails.
        """
        told: list[str] = []
        if not templates:  # nor are the system's certificates read
            return told
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENCE_S)
        # The system's proxies and certificates hold here as for every other program.
        connector = aiohttp.TCPConnector(ssl=ssl.create_default_context())
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, auto_decompress=False, trust_env=True, read_bufsize=BUFFER_BYTES,
            headers={"Accept-Encoding": "identity", "User-Agent": "phifleet-agent"},
        ) as self._http:  # fmt: skip
            for template in templates:
                try:
                    await self._read_one(template)
                except MirrorError as error:
                    told.append(str(error))
                    progress = self._core.progress(self._monotonic())
                    missing = progress.bytes_total - progress.bytes_done
                    artifact = self._intake.partial.content.id
                    _log.warning("mirror given up", artifact=artifact, error=str(error), bytes_missing=missing)
                if self._intake.error is not None:
                    raise self._intake.error
                if self._core.complete:
                    break
        return told

    async def _read_one(self, template: str) -> None:
        """What the disk refuses is in the intake's ``error``.

        Raises:
            MirrorError: it is of no use, or of no use any more; what came is kept.
        """
        self._wrong, self._came, self._began = 0, 0, self._monotonic()
        partial, has = self._intake.partial, self._intake.has
        for number, file in enumerate(partial.content.files):
            url = mirror_url(template, partial.content, file.path)
            todo = deque(_missing(_Run(0, tuple(partial.table.of_file(number))), has))
            failures = 0
            while todo:
                run = todo.popleft()
                came, fault = self._came, None
                try:
                    await self._request(url, run, file.size)
                except MirrorError:
                    raise
                except Exception as error:  # a proxy or a name can make the libraries raise anything
                    fault = error
                if self._intake.error is not None:
                    return
                rest = list(_missing(run, has))
                if fault is not None:
                    failures = failures + 1 if self._came == came else 1
                    if failures >= ATTEMPTS:
                        raise MirrorError(f"{url}: {_said(fault)}, {failures} times in a row")
                    await asyncio.sleep(PAUSE_S * 2.0**failures)
                elif rest:  # it was all read
                    raise MirrorError(f"{url} {_OTHER_BYTES}")
                todo.extendleft(reversed(rest))

    async def _request(self, url: str, run: _Run, file_size: int) -> None:
        last = run.offset + run.size - 1
        async with self._http.get(url, headers={"Range": f"bytes={run.offset}-{last}"}) as response:
            _check(response, url, run.offset, last, file_size)
            batch: list[tuple[int, bytes]] = []
            try:
                for first, size in run.pieces:
                    batch.append((first, await self._piece(response.content, size)))
                    if sum(len(data) for _, data in batch) >= BATCH_BYTES or self._is_due():
                        await self._take(url, batch)
                        batch = []
                    if self._intake.error is not None:
                        return
            except MirrorError:
                raise
            except Exception:
                await self._take(url, batch)  # what has come is kept
                raise
            await self._take(url, batch)

    def _is_due(self) -> bool:
        return self._monotonic() - self._reported >= PROGRESS_S

    async def _piece(self, body: aiohttp.StreamReader, size: int) -> bytes:
        await asyncio.sleep(self._bandwidth.wait_s(self._monotonic()))
        self._bandwidth.take(size)
        async with asyncio.timeout(SILENCE_S + size / LEAST_BYTES_PER_S):
            return await body.readexactly(size)

    async def _take(self, url: str, batch: Sequence[tuple[int, bytes]]) -> None:
        outcomes = await asyncio.to_thread(lambda: [self._intake.accept(first, data) for first, data in batch])
        now = self._monotonic()
        for (first, data), outcome in zip(batch, outcomes, strict=True):
            self._core.mirrored(first, outcome, now)
            self._wrong += outcome is Outcome.BAD
            self._came += len(data) if outcome is Outcome.GOOD else 0
            self._unflushed += len(data)
        if self._unflushed >= FLUSH_BYTES:
            self._unflushed = 0
            await asyncio.to_thread(self._intake.flush)
        if self._is_due():
            self._reported = now
            self._on_progress(self._core.progress(now))
        if self._wrong >= WRONG_CHUNKS:
            raise MirrorError(f"{url} {_OTHER_BYTES}")
        if now - self._began > GRACE_S and self._came < LEAST_BYTES_PER_S * (now - self._began):
            raise MirrorError(f"{url}: {self._came} bytes in {now - self._began:.0f} s are too slow")


def _check(response: aiohttp.ClientResponse, url: str, first: int, last: int, file_size: int) -> None:
    """Whether what follows are the bytes that were asked for.

    Raises:
        MirrorError: they are not.
        _PassingError: they may be, another time.
    """
    status, headers = response.status, response.headers
    if url.startswith("https:") and response.url.scheme != "https":
        raise MirrorError(f"{url} redirects to {response.url}, which is not encrypted")
    if status in _PASSING:
        raise _PassingError(f"it answers {status} {response.reason}")
    if status not in (200, 206):
        raise MirrorError(f"{url} answers {status} {response.reason}")
    if headers.get("Content-Encoding", "identity") != "identity":
        raise MirrorError(f"{url} comes with Content-Encoding {headers['Content-Encoding']}")
    if status == 206:
        said = headers.get("Content-Range", "")
        found = _RANGE.fullmatch(said)
        if found is None or int(found[1]) != first or int(found[2]) > last:
            raise MirrorError(f"{url} answers bytes {first} to {last} with Content-Range {said!r}")
        if found[3] not in ("*", str(file_size)):
            raise MirrorError(f"{url} has {found[3]} bytes, and the artifact's file {file_size}")
    elif first > 0:
        raise MirrorError(f"{url} answers no ranges of bytes")
    elif response.content_length not in (None, file_size):
        raise MirrorError(f"{url} has {response.content_length} bytes, and the artifact's file {file_size}")


def _said(error: Exception) -> str:
    if isinstance(error, asyncio.IncompleteReadError):
        return "the connection ended before all bytes had come"
    if isinstance(error, TimeoutError):
        return f"no answer for {SILENCE_S:.0f} s"
    return str(error) or type(error).__name__
