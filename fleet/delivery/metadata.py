"""The metadata server: answers devices that ask for a segment of a TUF file (docs/protocol.md).

It holds nothing about devices. Its answers need no protection of their own: what they carry is signed.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Protocol

import structlog

from agent.contract import topics
from agent.contract.base import MalformedMessageError
from agent.contract.manifest import MAX_CHUNK_BYTES
from agent.contract.messages import MetadataWant, MetadataWantV1, metadata_segment
from fleet.delivery.admission import Admission, everybody

#: Requests being answered at once, and waiting at most; a device asks again after its timeout.
CONCURRENT = 16
MAX_WAITING = 4096
#: Of one device: it asks for one segment after the other, and again for one that did not come.
MAX_WAITING_OF_ONE = 8

_CACHED_FILES = 8

_log = structlog.get_logger(component=__name__)


class Request(Protocol):
    """What is read of a publication."""

    @property
    def topic(self) -> str:
        """Says who asks."""
        ...

    @property
    def payload(self) -> bytes:
        """A ``MetadataWant``."""
        ...

    @property
    def response_topic(self) -> str | None:
        """Where the answer goes."""
        ...

    @property
    def correlation(self) -> bytes | None:
        """Given back with the answer."""
        ...


class MetadataLink(Protocol):
    """What the server needs of ``agent.link``."""

    async def subscribe(self, topic: str, handler: Callable[[Request], None], *, qos: int = 1) -> None:
        """From now on, also after a reconnect."""
        ...

    async def unsubscribe(self, topic: str) -> None:
        """No longer."""
        ...

    async def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        correlation: bytes | None = None,
        properties: Mapping[str, str] | None = None,
    ) -> None:
        """Hand over to the broker."""
        ...


class MetadataSource(Protocol):
    """What the server needs of ``fleet.trust``: a name is looked up in a list, never joined to a path unchecked."""

    def read(self, name: str) -> bytes | None:
        """Return the bytes, or None where there is no such file."""
        ...


class MetadataServer:
    """Answers on the shared subscription, so several controllers may run side by side.

    ``group`` is what the controllers of this fleet share and no device knows; ``admission`` says who is answered.
    """

    def __init__(
        self, link: MetadataLink, source: MetadataSource, *, group: str, admission: Admission = everybody
    ) -> None:
        self._admission = admission
        self._topic = topics.for_one_of(group, "metadata", topics.ALL_METADATA_WANTS)
        self._topic_v1 = topics.for_one_of(group, "metadata-v1", topics.METADATA_WANT_V1)
        self._link = link
        self._source = source
        self._slots = asyncio.Semaphore(CONCURRENT)
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting: Counter[str] = Counter()
        #: Devices that have asked on their own topic: nobody is answered who asks for them on the old one.
        self._on_own_topic: set[str] = set()
        self._cache: OrderedDict[str, bytes] = OrderedDict()
        self.answered = 0
        self.ignored = 0

    async def start(self) -> None:
        """Subscribe."""
        await self._link.subscribe(self._topic, self._on_want)
        await self._link.subscribe(self._topic_v1, self._on_want_v1)

    async def stop(self) -> None:
        """Unsubscribe and drop what is being answered."""
        for topic in (self._topic, self._topic_v1):
            await self._link.unsubscribe(topic)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _on_want(self, request: Request) -> None:
        device = topics.parse_asking(request.topic)
        if device is None:
            self._ignore(f"{request.topic} is no device's")
            return
        try:
            want = MetadataWant.from_json(request.payload)
        except MalformedMessageError as error:
            self._ignore(str(error))
            return
        if self._take(device, want, request):
            self._on_own_topic.add(device)

    def _on_want_v1(self, request: Request) -> None:
        try:
            want = MetadataWantV1.from_json(request.payload)
        except MalformedMessageError as error:
            self._ignore(str(error))
            return
        if want.device in self._on_own_topic:
            self._ignore(f"device {want.device} has a topic of its own to ask on")
        else:
            self._take(want.device, want, request)

    def _take(self, device: str, want: MetadataWant, request: Request) -> bool:
        refusal = self._admission(device)
        # An answer to any other topic would let a device publish, with our rights, where it has none itself.
        if refusal is None and request.response_topic != topics.metadata(device):
            refusal = f"it wants the answer on {request.response_topic}"
        if refusal is None and len(self._tasks) >= MAX_WAITING:
            refusal = f"{MAX_WAITING} requests are waiting"
        if refusal is None and self._waiting[device] >= MAX_WAITING_OF_ONE:
            refusal = f"{MAX_WAITING_OF_ONE} requests of it are waiting"
        if refusal is not None:
            self._ignore(f"device {device}: {refusal}")
            return False
        task = asyncio.create_task(self._answer(device, want, request.correlation))
        self._waiting[device] += 1
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._done(done, device))
        return True

    def _done(self, task: asyncio.Task[None], device: str) -> None:
        self._tasks.discard(task)
        self._waiting[device] -= 1
        if not self._waiting[device]:
            del self._waiting[device]

    def _ignore(self, error: str) -> None:
        self.ignored += 1
        if self.ignored == 1:
            _log.warning("metadata request ignored", error=error, note="only the first is logged")

    async def _answer(self, device: str, want: MetadataWant, correlation: bytes | None) -> None:
        async with self._slots:
            try:
                data = await self._read(want.name)
                answer, segment = metadata_segment(want, data)
                await self._link.publish(
                    topics.metadata(device), segment, correlation=correlation, properties=answer.to_properties()
                )
                self.answered += 1
            except Exception as error:
                _log.warning("metadata answer failed", device=device, name=want.name, error=str(error))

    async def _read(self, name: str) -> bytes | None:
        if name in self._cache:
            self._cache.move_to_end(name)
            return self._cache[name]
        data = await asyncio.to_thread(self._source.read, name)
        # Only what is read in several segments; and timestamp.json changes under its name, all others never do.
        if data is not None and len(data) > MAX_CHUNK_BYTES and name != "timestamp.json":
            self._cache[name] = data
            while len(self._cache) > _CACHED_FILES:
                self._cache.popitem(last=False)
        return data
