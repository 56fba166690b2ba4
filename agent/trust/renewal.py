"""The device's certificate is renewed by itself, for the key that it has, when two thirds of its time are over.

A device that was off until its certificate had expired is let in by no broker. It asks the controller's API, if it was
enrolled there, and proves by its old key who it is.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

import structlog

from agent.contract import topics
from agent.contract.base import MalformedMessageError
from agent.contract.bundle import Bundle
from agent.contract.failures import FailureCode
from agent.contract.messages import CertificateAnswer, CertificateWant
from agent.core.ports import Clock, Link, Message
from agent.errors import AgentError, TrustError
from agent.platform.concurrency import in_thread
from agent.platform.files import PRIVATE, reason, write_atomic
from agent.trust.enrolment import renew_at_controller
from agent.trust.identity import BUNDLE, CERTIFICATE, Identity

#: How often it is looked at. A certificate holds for weeks after it is due.
LOOK_S = 6 * 3600.0
#: After a failure; half of it at least, drawn, so that a fleet does not come at once.
RETRY_S = 3600.0
ANSWER_S = 30.0
#: Before the end of the certificate, failures are warnings.
SOON = timedelta(days=14)

_log = structlog.get_logger(component=__name__)


class CertificateRenewal:
    """One device's certificate. ``run`` ends at once where the broker asks for none."""

    def __init__(
        self,
        who: Identity,
        link: Link,
        clock: Clock,
        on_expiry: Callable[[datetime], None],
        *,
        look_s: float = LOOK_S,
        retry_s: float = RETRY_S,
        answer_s: float = ANSWER_S,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._who, self._link, self._clock, self._on_expiry = who, link, clock, on_expiry
        self._look_s, self._retry_s, self._answer_s, self._jitter = look_s, retry_s, answer_s, jitter
        self._waiting: dict[bytes, asyncio.Future[CertificateAnswer]] = {}
        self._subscribed = False

    async def run(self) -> None:
        """Look, and renew when it is due, for ever."""
        certificate, key = self._who.certificate, self._who.private_key
        if certificate is None or key is None:
            return
        while True:
            pause_s = await self._turn(certificate, key)
            await asyncio.sleep(pause_s)

    async def _turn(self, certificate: Path, key: Path) -> float:
        """Return how many seconds until the next."""
        known: datetime | None = None
        try:
            ends, due = await in_thread(lambda _stop: _times(certificate))
            known = ends
            self._on_expiry(ends)
            now = self._clock.now()
            if now < due:
                return min(self._look_s, max(1.0, (due - now).total_seconds())) * (1 + 0.1 * self._jitter())
            renewed = await self._renewed(key, expired=now >= ends)
            await in_thread(lambda _stop: keep_certificate(certificate.parent, self._who.device, key, renewed, ends))
        except AgentError as error:
            self._tell(error, known or self._clock.now())
            return self._retry_s * (0.5 + 0.5 * self._jitter())
        until, _ = await in_thread(lambda _stop: _times(certificate))
        self._on_expiry(until)
        _log.info("certificate renewed", device=self._who.device, until=until.isoformat())
        return 1.0  # it may be due again already, where certificates are short

    async def _renewed(self, key: Path, *, expired: bool) -> str:
        device = self._who.device
        csr = await in_thread(lambda _stop: _request(key, device))
        if not expired or self._link.connected:
            return await self._ask(csr)
        found = await in_thread(lambda _stop: renew_at_controller(key.parent, device, csr))
        if found is None:
            raise TrustError(
                f"the certificate of {device} has expired, and this device knows no controller to ask: on the"
                f" controller, `phifleet device bundle {device} --bundle FILE` writes a new one",
                FailureCode.TRUST_UNREACHABLE,
            )
        return found

    async def _ask(self, csr: str) -> str:
        device = self._who.device
        if not self._subscribed:
            await self._link.subscribe(topics.certificate(device), self._on_answer)
            self._subscribed = True
        correlation = secrets.token_bytes(16)
        future: asyncio.Future[CertificateAnswer] = asyncio.get_running_loop().create_future()
        self._waiting[correlation] = future
        try:
            await self._link.publish(
                topics.certificate_want(device),
                CertificateWant(csr=csr).to_json(),
                response_topic=topics.certificate(device),
                correlation=correlation,
            )
            async with asyncio.timeout(self._answer_s):
                answer = await future
        except TimeoutError:
            raise TrustError(
                f"no controller has answered the request for a new certificate within {self._answer_s:g} s",
                FailureCode.TRUST_UNREACHABLE,
            ) from None
        finally:
            del self._waiting[correlation]
        if answer.certificate is None:
            raise TrustError(
                f"the controller refuses a new certificate: {answer.refused}", FailureCode.TRUST_UNREACHABLE
            )
        return answer.certificate

    def _on_answer(self, message: Message) -> None:
        future = self._waiting.get(message.correlation or b"")
        if future is None or future.done():
            return
        with suppress(MalformedMessageError):  # whoever can publish here can send rubbish; the answer may still come
            future.set_result(CertificateAnswer.from_json(message.payload))

    def _tell(self, error: AgentError, ends: datetime) -> None:
        write = _log.warning if ends - self._clock.now() < SOON else _log.info
        write(
            "certificate not renewed, trying again", error=str(error), code=error.code.value, expires=ends.isoformat()
        )


def keep_certificate(folder: Path, device: str, key: Path, pem: str, not_before: datetime) -> None:
    """Put a new certificate in the place of the old one, if it is for this device and its key and holds for longer.

    Raises:
        TrustError: it is not, or the disk refuses.
    """
    from agent.trust.keys import public_bytes, read_certificate, read_key

    try:
        found, own = read_certificate(pem), public_bytes(read_key(_read(key)))
    except ValueError as error:
        raise TrustError(f"the new certificate cannot be read: {error}") from None
    if found.name != device or found.key != own:
        raise TrustError(f"the new certificate is for {found.name or 'nobody'} or another key, and not for {device}")
    if found.ends <= not_before:
        raise TrustError("the new certificate ends no later than the one before")
    try:
        # The bundle first: it is read at the next start, and the file alone is what TLS reads now.
        bundle = Bundle.from_json(_read(folder / BUNDLE))
        write_atomic(folder / BUNDLE, bundle.model_copy(update={"certificate": pem}).to_json(), PRIVATE)
        write_atomic(folder / CERTIFICATE, pem.encode(), PRIVATE)
    except MalformedMessageError as error:
        raise TrustError(f"the identity in {folder} is damaged: {error}") from None
    except OSError as error:
        raise TrustError(f"the new certificate cannot be written: {reason(error, folder)}") from error


def _times(certificate: Path) -> tuple[datetime, datetime]:
    from agent.trust.keys import read_certificate

    try:
        found = read_certificate(_read(certificate))
    except ValueError as error:
        raise TrustError(f"the certificate {certificate} cannot be read: {error}") from None
    return found.ends, found.renewal_at


def _request(key: Path, device: str) -> str:
    from agent.trust.keys import read_key, request_for

    try:
        return request_for(read_key(_read(key)), device)
    except ValueError as error:
        raise TrustError(f"the key {key} cannot be read: {error}") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TrustError(f"{path} cannot be read: {error.strerror or error}") from error
