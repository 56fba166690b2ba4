"""The device's trust: implements ``ports.Trust``. Nothing is believed before it went through here.

tuf, securesystemslib and cryptography (10 MiB) are imported when something is verified, not at start.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from agent.contract.base import MalformedMessageError
from agent.contract.director import DirectorKeys
from agent.contract.failures import FailureCode
from agent.contract.manifest import Manifest, indexed_target, manifest_target
from agent.contract.messages import ArtifactRef, Desired, SignedDesired
from agent.core.dialect import Dialect
from agent.core.ports import Clock, Link
from agent.errors import TrustError
from agent.platform.concurrency import in_thread
from agent.trust.accepted import Accepted, load_accepted, save_accepted
from agent.trust.disk import disk_error
from agent.trust.identity import Identity
from agent.trust.requests import MetadataRequests, RetryPolicy
from agent.trust.time import VerifiedClock

if TYPE_CHECKING:
    from agent.trust.fetcher import LinkFetcher
    from agent.trust.updates import Updates

#: An order names a few artifacts and limits.
MAX_ORDER_BYTES = 128 * 1024

_Result = TypeVar("_Result")


class TrustClient:
    """``clock`` is the device's time from here on: it knows the newest time that was verified."""

    def __init__(self, identity: Identity, link: Link, clock: Clock, retry_policy: RetryPolicy | None = None) -> None:
        self._device = identity.device
        self._root = identity.root
        self._folder = identity.trust_folder
        #: What the answers to metadata requests tell about the controller.
        self.dialect = Dialect()
        self._requests = MetadataRequests(link, identity.device, retry_policy, self.dialect)
        self.clock = VerifiedClock(clock, self._folder / "time.json", identity.issued_at)
        self._lock = asyncio.Lock()
        self._director: DirectorKeys | None = None
        self._updates_made: Updates | None = None
        self._order_path = self._folder / "order.json"
        self._accepted = load_accepted(self._order_path, identity.device)
        self._remembering = threading.Lock()

    def verify_desired(self, payload: bytes, newest_sequence: int) -> Desired:
        """Return the order in a ``SignedDesired`` payload, by the director's keys as last verified.

        No network; blocking.

        The order must have a larger sequence number than ``newest_sequence``. One that was accepted before and
        comes again (the broker retains it) is not checked for expiry, and costs no cryptography.

        Raises:
            TrustError: signature (a refresh may bring the key that it is signed with), expiry, replay, another
                device, or malformed.
        """
        signed = _parsed(payload)
        before = self._accepted
        if before is not None and before.payload == payload and before.desired.sequence > newest_sequence:
            return before.desired
        from agent.trust.orders import verified_order

        if self._director is None:
            self._director = self._updates().director()
        desired = verified_order(signed, self._director)
        self._check(desired, newest_sequence)
        self._remember(Accepted(payload, desired, self.clock.monotonic()))
        return desired

    async def refresh(self) -> None:
        """Bring TUF metadata and the director's keys up to date over the link.

        Raises:
            TrustError: the code says which attack or fault.
        """
        await self._in_thread(self._refresh)

    async def manifest(self, ref: ArtifactRef) -> Manifest:
        """Return the verified manifest of an artifact; refreshes first, and then looks at the order again.

        Raises:
            TrustError: not found, not signed, not what was asked for, or the order turns out to be too old.
        """
        data = await self._in_thread(
            lambda fetcher: self._refresh(fetcher, indexed_target(ref.digest), manifest_target(ref.digest))
        )
        self._check_order_again(ref)
        try:
            manifest = await in_thread(lambda _stop: Manifest.from_json(data))  # megabytes, on a small core
        except MalformedMessageError as error:
            raise TrustError(f"the signed manifest of {ref.id} cannot be read: {error}") from error
        if (manifest.digest, manifest.id) != (ref.digest, ref.id):
            raise TrustError(
                f"asked for {ref.id} ({ref.digest[:12]}), but what is signed under that name is "
                f"{manifest.id} ({manifest.digest[:12]})"
            )
        return manifest

    def _refresh(self, fetcher: LinkFetcher, *targets: str) -> bytes:
        """Bring everything up to date; returns the first of the targets that is signed."""
        updates = self._updates()
        try:
            updater = updates.refresh(fetcher)
        finally:
            self._director = updates.director()
        return updates.target(updater, *targets) if targets else b""

    async def _in_thread(self, work: Callable[[LinkFetcher], _Result]) -> _Result:
        async with self._lock:
            from agent.trust.fetcher import LinkFetcher

            fetcher = LinkFetcher(self._requests, asyncio.get_running_loop())
            # The lock is held until the thread has ended: two at once would write the same metadata.
            return await in_thread(lambda _stop: work(fetcher), on_cancel=fetcher.stop)

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
        if desired.sequence <= newest_sequence:
            raise TrustError(
                f"order {desired.sequence} is not newer than order {newest_sequence}, which was taken before",
                FailureCode.TRUST_REPLAY,
            )
        if self.clock.now() >= desired.expires_at:
            raise self._expired(desired)

    def _expired(self, desired: Desired) -> TrustError:
        ended = desired.expires_at.isoformat(timespec="seconds")
        return TrustError(
            f"order {desired.sequence} ended at {ended}, and {self.clock.explain()}", FailureCode.TRUST_EXPIRED
        )

    def _check_order_again(self, ref: ArtifactRef) -> None:
        order = self._accepted
        if order is None or ref not in order.desired.artifacts:
            return
        from agent.trust.orders import verified_order

        verified_order(SignedDesired.from_json(order.payload), self._director)
        if order.confirmed:
            return
        # The refresh may have told a device without a clock what time it was when it took the order.
        since = 0.0 if order.monotonic is None else self.clock.monotonic() - order.monotonic
        if self.clock.now() - timedelta(seconds=since) >= order.desired.expires_at:
            raise self._expired(order.desired)
        self._remember(replace(order, confirmed=True))

    def _remember(self, order: Accepted) -> None:
        """Keep it, unless a newer one was kept meanwhile: checks may run side by side, and end in any order."""
        with self._remembering:
            kept = self._accepted
            if kept is not None and kept.desired.sequence > order.desired.sequence:
                return
            try:
                save_accepted(self._order_path, order)
            except OSError as error:
                raise disk_error(error, self._order_path) from error
            self._accepted = order


def _parsed(payload: bytes) -> SignedDesired:
    if len(payload) > MAX_ORDER_BYTES:
        raise TrustError(f"the order has {len(payload)} bytes, at most {MAX_ORDER_BYTES} are taken")
    try:
        return SignedDesired.from_json(payload)
    except MalformedMessageError as error:
        raise TrustError(f"the order is malformed: {error}") from error
