"""The device's trust: implements ``ports.Trust``. Nothing is believed before it went through here.

tuf, securesystemslib and cryptography (10 MiB) are imported when something is verified, not at start.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import structlog

from agent.contract.base import MalformedMessageError, sha256_hex
from agent.contract.director import DirectorKeys
from agent.contract.failures import FailureCode
from agent.contract.manifest import Manifest, manifest_target
from agent.contract.messages import ArtifactRef, Desired, SignedDesired
from agent.core.ports import Clock, Link
from agent.errors import TrustError
from agent.trust.files import write_atomic
from agent.trust.identity import Identity
from agent.trust.requests import MetadataRequests, Patience
from agent.trust.time import VerifiedClock

if TYPE_CHECKING:
    from agent.trust.fetcher import LinkFetcher
    from agent.trust.updates import Updates

#: An order names a few artifacts and limits.
MAX_ORDER_BYTES = 128 * 1024

#: Orders by unknown keys make the device look for newer keys, but not more often than this.
REFRESH_FOR_UNKNOWN_KEY_S = 30.0

_log = structlog.get_logger(__name__)
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class _Accepted:
    signed: SignedDesired
    desired: Desired
    monotonic: float


class TrustClient:
    """``clock`` is the device's time from here on: it knows the newest time that was verified."""

    def __init__(self, identity: Identity, link: Link, clock: Clock, patience: Patience | None = None) -> None:
        self._device = identity.device
        self._root = identity.root
        self._folder = identity.trust_folder
        self._requests = MetadataRequests(link, identity.device, patience)
        self.clock = VerifiedClock(clock, self._folder / "time.json", identity.issued_at)
        self._lock = asyncio.Lock()
        self._director: DirectorKeys | None = None
        self._updates_made: Updates | None = None
        self._accepted: _Accepted | None = None
        self._looked_for_keys: float | None = None

    def verify_desired(self, payload: bytes, newest_sequence: int) -> Desired:
        """The order in a ``SignedDesired`` payload, with the director's keys as last verified. No network.

        ``newest_sequence`` is the largest ever accepted; the order that has it may come again (it is retained),
        and is then not checked for expiry.

        Raises:
            TrustError: signature, expiry, replay, another device, or malformed.
        """
        signed = _parsed(payload)
        known = self._same_as_accepted(payload, newest_sequence)
        if known is not None:
            return known
        from agent.trust.orders import verified_order

        if self._director is None:
            self._director = self._updates().director()
        desired = verified_order(signed, self._director)
        self._check(desired, newest_sequence)
        self._remember(payload, signed, desired)
        return desired

    async def accept(self, payload: bytes, newest_sequence: int) -> Desired:
        """As ``verify_desired``, off the event loop; looks for newer director keys where the order has an unknown one.

        Raises:
            TrustError: as ``verify_desired`` and ``refresh``.
        """
        try:
            return await asyncio.to_thread(self.verify_desired, payload, newest_sequence)
        except TrustError as error:
            if not self._may_look_for_keys(error):
                raise
            _log.info("refreshing for an unknown director key", reason=str(error))
        await self.refresh()
        return await asyncio.to_thread(self.verify_desired, payload, newest_sequence)

    async def refresh(self) -> None:
        """Bring TUF metadata and the director's keys up to date over the link.

        Raises:
            TrustError: the code says which attack or fault.
        """
        await self._in_thread(lambda fetcher: self._refresh(fetcher, None))

    async def manifest(self, ref: ArtifactRef) -> Manifest:
        """The verified manifest of an artifact; refreshes first, and then looks at the order again.

        Raises:
            TrustError: not found, not signed, not what was asked for, or the order turns out to be too old.
        """
        data = await self._in_thread(lambda fetcher: self._refresh(fetcher, manifest_target(ref.digest)))
        self._check_order_again(ref)
        try:
            manifest = Manifest.from_json(data)
        except MalformedMessageError as error:
            raise TrustError(f"the signed manifest of {ref.id} cannot be read: {error}") from error
        if (manifest.digest, manifest.id) != (ref.digest, ref.id):
            raise TrustError(
                f"asked for {ref.id} ({ref.digest[:12]}), but what is signed under that name is "
                f"{manifest.id} ({manifest.digest[:12]})"
            )
        return manifest

    def _refresh(self, fetcher: LinkFetcher, target: str | None) -> bytes:
        updates = self._updates()
        try:
            updater = updates.refresh(fetcher)
        finally:
            self._director = updates.director()
        return updates.target(updater, target) if target else b""

    async def _in_thread(self, work: Callable[[LinkFetcher], _Result]) -> _Result:
        async with self._lock:
            from agent.trust.fetcher import LinkFetcher

            fetcher = LinkFetcher(self._requests, asyncio.get_running_loop())
            try:
                return await asyncio.to_thread(work, fetcher)
            finally:
                fetcher.stop()

    def _updates(self) -> Updates:
        if self._updates_made is None:
            from agent.trust.updates import Updates

            self._updates_made = Updates(self._folder, self._root, self.clock)
        return self._updates_made

    def _check(self, desired: Desired, newest_sequence: int) -> None:
        if desired.device != self._device:
            raise TrustError(
                f"the order is for device {desired.device}, this is {self._device}", FailureCode.TRUST_WRONG_DEVICE
            )
        if desired.sequence < newest_sequence:
            raise TrustError(
                f"order {desired.sequence} is older than order {newest_sequence}, which was taken before",
                FailureCode.TRUST_REPLAY,
            )
        if desired.sequence > newest_sequence and self.clock.now() >= desired.expires_at:
            raise self._expired(desired)

    def _expired(self, desired: Desired) -> TrustError:
        ended = desired.expires_at.isoformat(timespec="seconds")
        return TrustError(
            f"order {desired.sequence} ended at {ended}, and {self.clock.explain()}", FailureCode.TRUST_EXPIRED
        )

    def _check_order_again(self, ref: ArtifactRef) -> None:
        accepted = self._accepted
        if accepted is None or ref not in accepted.desired.artifacts:
            return
        from agent.trust.orders import verified_order

        verified_order(accepted.signed, self._director)
        # The refresh may have told a device without a clock what time it was when it took the order.
        since = timedelta(seconds=self.clock.monotonic() - accepted.monotonic)
        if self.clock.now() - since >= accepted.desired.expires_at:
            raise self._expired(accepted.desired)

    def _may_look_for_keys(self, error: TrustError) -> bool:
        from agent.trust.orders import UnknownKeyError

        now = self.clock.monotonic()
        recently = self._looked_for_keys is not None and now - self._looked_for_keys < REFRESH_FOR_UNKNOWN_KEY_S
        if not isinstance(error, UnknownKeyError) or recently:
            return False
        self._looked_for_keys = now
        return True

    def _remember(self, payload: bytes, signed: SignedDesired, desired: Desired) -> None:
        self._accepted = _Accepted(signed, desired, self.clock.monotonic())
        document = {"payload_sha256": sha256_hex(payload), "desired": desired.model_dump(mode="json")}
        try:
            write_atomic(self._folder / "order.json", json.dumps(document).encode())
        except OSError as error:
            raise TrustError(f"the trust store cannot be written: {error}", FailureCode.STORE_IO) from error

    def _same_as_accepted(self, payload: bytes, newest_sequence: int) -> Desired | None:
        """The order that was taken last, retained by the broker: it changes nothing, so it need not be verified."""
        try:
            document = json.loads((self._folder / "order.json").read_bytes())
            if document["payload_sha256"] != sha256_hex(payload):
                return None
            desired = Desired.model_validate(document["desired"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return desired if desired.sequence == newest_sequence and desired.device == self._device else None


def _parsed(payload: bytes) -> SignedDesired:
    if len(payload) > MAX_ORDER_BYTES:
        raise TrustError(f"the order has {len(payload)} bytes, at most {MAX_ORDER_BYTES} are taken")
    try:
        return SignedDesired.from_json(payload)
    except MalformedMessageError as error:
        raise TrustError(f"the order is malformed: {error}") from error
