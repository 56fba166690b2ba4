"""Asks the fleet for metadata over the link: request, response topic, correlation data, segments, retries.

Nothing here is trusted; what comes is verified by TUF. The rules below only bound what an answer can cost: a
segment must be as long as it can be, so a slow sender cannot feed a file byte by byte.
"""

from __future__ import annotations

import asyncio
import secrets
from contextlib import suppress
from dataclasses import dataclass

from agent.contract import topics
from agent.contract.failures import FailureCode
from agent.contract.manifest import MAX_CHUNK_BYTES
from agent.contract.messages import MetadataAnswer, MetadataStatus, MetadataWant, MetadataWantV1
from agent.core.dialect import Dialect
from agent.core.ports import Link, Message
from agent.errors import AgentError, TrustError


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long to wait for one answer, how often to ask, and below which rate a file counts as not coming."""

    timeout_s: float = 5.0
    attempts: int = 4
    factor: float = 2.0
    grace_s: float = 60.0
    min_bytes_per_s: float = 1024.0

    def is_over(self, seconds: float, received: int) -> bool:
        """A file is slower than the slowest link that is served."""
        return seconds > self.grace_s and received < self.min_bytes_per_s * seconds


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a file of ``total`` bytes."""

    data: bytes
    total: int


class NotFoundError(TrustError):
    """The fleet says that it has no such file."""

    default_code = FailureCode.TRUST_NOT_FOUND


class UnreachableError(TrustError):
    """Nobody answers, or not in a way that can be used."""

    default_code = FailureCode.TRUST_UNREACHABLE


class MetadataRequests:
    """One device's requests; all methods run on the event loop. ``dialect`` learns from the answers."""

    def __init__(
        self, link: Link, device: str, retry_policy: RetryPolicy | None = None, dialect: Dialect | None = None
    ) -> None:
        self.dialect = dialect or Dialect()
        self._link = link
        self._device = device
        self.retry_policy = retry_policy or RetryPolicy()
        self._waiting: dict[bytes, tuple[MetadataWant, asyncio.Future[Segment]]] = {}
        self._subscribed = False
        self.ignored = 0

    async def segment(self, name: str, offset: int) -> Segment:
        """Return one segment, asked for again when no answer comes.

        Raises:
            NotFoundError: the fleet has no such file.
            UnreachableError: no link, or no answer that can be used.
        """
        await self._subscribe()
        want = MetadataWant(name=name, offset=offset)
        correlation, timeout = secrets.token_bytes(16), self.retry_policy.timeout_s
        future: asyncio.Future[Segment] = asyncio.get_running_loop().create_future()
        self._waiting[correlation] = want, future
        try:
            for attempt in range(self.retry_policy.attempts):
                with suppress(TimeoutError):
                    async with asyncio.timeout(timeout):
                        await self._ask(want, correlation, repeated=attempt > 0)
                        return await asyncio.shield(future)
                timeout *= self.retry_policy.factor
        finally:
            del self._waiting[correlation]
            if not future.cancel():
                future.exception()  # read, or asyncio complains of an answer that came in the last moment
        raise UnreachableError(
            f"no answer to {self.retry_policy.attempts} requests for {name} at byte {offset}: "
            "is the controller running (`phifleet serve`), and on the same broker?"
        )

    async def _subscribe(self) -> None:
        if not self._subscribed:
            await self._link.subscribe(topics.metadata(self._device), self._on_answer)
            self._subscribed = True

    async def _ask(self, want: MetadataWant, correlation: bytes, *, repeated: bool) -> None:
        try:
            await self._publish(topics.metadata_want(self._device), want, correlation)
        except AgentError as error:
            # A broker whose ACL is of 0.1 does not let one ask there: its controller may listen at the old topic.
            try:
                await self._publish_v1(want, correlation)
            except AgentError:
                raise UnreachableError(f"cannot ask for {want.name}: {error}") from error
            return
        if self.dialect.asks_both(repeated=repeated):
            with suppress(AgentError):  # a broker that has forgotten 0.1 refuses it, rightly
                await self._publish_v1(want, correlation)

    async def _publish_v1(self, want: MetadataWant, correlation: bytes) -> None:
        old = MetadataWantV1(device=self._device, name=want.name, offset=want.offset)
        await self._publish(topics.METADATA_WANT_V1, old, correlation)

    async def _publish(self, topic: str, want: MetadataWant, correlation: bytes) -> None:
        await self._link.publish(
            topic, want.to_json(), response_topic=topics.metadata(self._device), correlation=correlation
        )

    def _on_answer(self, message: Message) -> None:
        want, future = self._waiting.get(message.correlation or b"", (None, None))
        if want is None or future is None or future.done():
            return  # late, or a duplicate
        try:
            answer = MetadataAnswer.from_properties(dict(message.properties))
            segment = _checked(want, answer, message.payload)
            self.dialect.answered(answer.wants)
            future.set_result(segment)
        except NotFoundError as error:
            future.set_exception(error)
        except ValueError:
            self.ignored += 1  # whoever can publish here can send rubbish; the right answer may still come


def _checked(want: MetadataWant, answer: MetadataAnswer, payload: bytes) -> Segment:
    if (answer.name, answer.offset) != (want.name, want.offset):
        raise ValueError("an answer to another question")
    if answer.status is MetadataStatus.NOT_FOUND:
        raise NotFoundError(f"the fleet has no {want.name}")
    size = min(MAX_CHUNK_BYTES, answer.total - want.offset)
    if len(payload) != size or (size <= 0 and answer.total != 0):
        raise ValueError("not the segment that the answer says it is")
    return Segment(payload, answer.total)
