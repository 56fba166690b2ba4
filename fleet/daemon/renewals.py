"""Answers devices that ask for a new certificate for the key that they have."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from datetime import datetime

import structlog

from agent.contract import topics
from agent.contract.base import MalformedMessageError, sha256_hex
from agent.contract.messages import CertificateAnswer, CertificateWant
from agent.link import Link, LinkError, Message
from fleet.delivery.admission import Admission
from fleet.errors import FleetError, UsageError
from fleet.registry import Actor, Registry
from fleet.trust.ca import DeviceCA

#: One device is given one certificate within this, however often it asks: an answer that was lost is given again.
EVERY_S = 600.0
#: Answers that are remembered, requests that wait, and those that are answered at once.
MAX_REMEMBERED, MAX_WAITING, AT_ONCE = 4096, 1024, 4

_log = structlog.get_logger(component="controller")


class Renewals:
    """One of any number that share the requests.

    ``group`` is what the controllers of this fleet share and no device knows; ``days`` is how long a certificate
    holds; ``monotonic`` gives seconds.
    """

    def __init__(
        self,
        link: Link,
        registry: Registry,
        ca: DeviceCA,
        admission: Admission,
        *,
        group: str,
        days: float,
        clock: Callable[[], datetime],
        monotonic: Callable[[], float],
    ) -> None:
        self._link, self._registry, self._ca, self._admission = link, registry, ca, admission
        self._days, self._clock, self._monotonic = days, clock, monotonic
        self._topic = topics.for_one_of(group, "certificate", topics.ALL_CERTIFICATE_WANTS)
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()
        self._busy: set[str] = set()
        #: By device: when it was given which certificate, and for which key.
        self._given: OrderedDict[str, tuple[float, str, str]] = OrderedDict()
        self.ignored = 0

    async def start(self) -> None:
        """Subscribe.

        Raises:
            LinkError: the broker refuses.
        """
        await self._link.subscribe(self._topic, self._on_want)

    async def stop(self) -> None:
        """Unsubscribe, and drop what is being answered."""
        await self._link.unsubscribe(self._topic)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _on_want(self, message: Message) -> None:
        device = topics.parse_asking(message.topic)
        try:
            want = CertificateWant.from_json(message.payload)
        except MalformedMessageError as error:
            self._ignore(str(error))
            return
        if device is None or device in self._busy or len(self._tasks) >= MAX_WAITING:
            self._ignore(f"{message.topic}: it asks again before it was answered, or too many ask")
            return
        refusal = self._admission(device)
        if refusal is not None:
            self._ignore(f"device {device}: {refusal}")
            return
        self._busy.add(device)
        task = asyncio.create_task(self._answer(device, want.csr, message.correlation))
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._done(done, device))

    def _done(self, task: asyncio.Task[None], device: str) -> None:
        self._tasks.discard(task)
        self._busy.discard(device)

    def _ignore(self, error: str) -> None:
        self.ignored += 1
        if self.ignored == 1:
            _log.warning("certificate request ignored", error=error, note="only the first is logged")

    async def _answer(self, device: str, csr: str, correlation: bytes | None) -> None:
        async with self._slots:
            try:
                answer = CertificateAnswer(certificate=await self._certificate(device, csr))
            except UsageError as error:
                answer = CertificateAnswer(refused=str(error))
                _log.warning("certificate refused", device=device, error=str(error))
            except FleetError as error:  # of this controller, and not of the device: it asks again
                _log.error("certificate not made", device=device, error=str(error))
                return
            try:
                await self._link.publish(topics.certificate(device), answer.to_json(), correlation=correlation)
            except LinkError as error:
                _log.warning("certificate not sent", device=device, error=str(error))

    async def _certificate(self, device: str, csr: str) -> str:
        at, of, certificate = self._given.get(device, (0.0, "", ""))
        asked = sha256_hex(csr.encode())
        if certificate and self._monotonic() - at < EVERY_S:
            if of == asked:
                return certificate
            raise UsageError(f"{device} was given a certificate less than {EVERY_S / 60:g} minutes ago")
        made = await asyncio.to_thread(self._ca.certify, device, csr, self._days)
        actor = Actor(f"device:{device}", self._clock())
        await asyncio.to_thread(self._registry.audit.record, actor, "device.certificate", device)
        self._given[device] = (self._monotonic(), asked, made.certificate)
        self._given.move_to_end(device)
        while len(self._given) > MAX_REMEMBERED:
            self._given.popitem(last=False)
        _log.info("certificate renewed", device=device, until=made.expires.isoformat())
        return made.certificate
