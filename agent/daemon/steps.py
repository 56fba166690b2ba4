"""The steps of a deployment: each a coroutine that ends with the event of its success, or raises an ``AgentError``."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import structlog

from agent.contract.failures import FailureCode
from agent.contract.manifest import RUNTIME_OF, Manifest
from agent.contract.messages import ArtifactRef, Desired, Progress, Proof
from agent.contract.profile import HealthLimits
from agent.contract.windows import open_from, open_until, parsed
from agent.core import deployment as core
from agent.core.health import computes_elsewhere
from agent.core.inference import ModelInfo
from agent.core.ports import ArtifactStore, Clock, ModelHost, Transfer, Trust
from agent.core.selection import Measured, Resources, constrain, fastest
from agent.daemon.monitor import Monitor
from agent.errors import AgentError, MeteredError, RuntimeLoadError, StoreError, TrustError
from agent.platform.concurrency import in_thread

log = structlog.get_logger(component=__name__)


#: How often the clock is looked at while waiting for the window.
WINDOW_LOOK_S = 30.0
#: How often it is looked whether a link is back, or the disk has room.
LOOK_S = 1.0


@dataclass(frozen=True, slots=True)
class StepParts:
    """What the steps need; each a Protocol of ``core.ports``."""

    trust: Trust
    store: ArtifactStore
    transfer: Transfer
    host: ModelHost
    monitor: Monitor
    clock: Clock
    #: Bytes of memory that a model may take now.
    available: Callable[[], int]
    #: Whether the broker is connected.
    linked: Callable[[], bool]
    #: Seconds between attempts to reach the controller; the last one repeats until the state's deadline.
    retry_s: tuple[float, ...] = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
    #: Whether what answers is at the device itself, such as a stick: no limit of a network holds then.
    at_hand: Callable[[], bool] = lambda: False

    def wait_s(self, attempt: int) -> float:
        """Before attempt number ``attempt + 1``."""
        return self.retry_s[min(attempt, len(self.retry_s) - 1)]


class Steps:
    """Performs one step at a time for the deployment that it is given."""

    def __init__(self, parts: StepParts, on_progress: Callable[[Progress], None]) -> None:
        self._parts = parts
        self._on_progress = on_progress
        self._manifests: dict[str, Manifest] = {}
        #: Orders that need more than a metered network may carry unasked.
        self._metered: set[int] = set()
        #: One model is loaded, proven or swapped at a time: memory is planned for that.
        self.host_lock = asyncio.Lock()
        #: What is being read back is not discarded meanwhile: a step and the serving may want the same artifact.
        self._disk_lock = asyncio.Lock()

    async def perform(self, step: core.Step, deployment: core.Deployment) -> core.Event:
        """Do it.

        Raises:
            AgentError: it failed, and its code says how.
        """
        order = deployment.desired
        if order is None:
            raise AgentError(f"there is no order to {step.value}")
        work: dict[core.Step, Callable[[], Awaitable[core.Event]]] = {
            core.Step.RESOLVE: lambda: self._resolve(order),
            core.Step.TRANSFER: lambda: self._transfer(deployment.candidates, order),
            core.Step.AWAIT_LINK: lambda: self._await_link(deployment, order),
            core.Step.AWAIT_SPACE: lambda: self._await_space(deployment.waits, deployment.waiting),
            core.Step.VERIFY: lambda: self._verify(deployment.candidates, order),
            core.Step.PROVE: lambda: self._prove(deployment.candidates, order),
            core.Step.ACTIVATE: lambda: self._activate(deployment.chosen, order),
            core.Step.WATCH: lambda: self._watch(deployment.chosen, order),
        }
        return await work[step]()

    async def serve(self, ref: ArtifactRef | None, limits: HealthLimits) -> None:
        """Serve the committed artifact again, or nothing; every byte is checked before it is loaded.

        Raises:
            AgentError: it is gone, damaged, or does not load.
        """
        async with self.host_lock:
            self._parts.monitor.limits = limits
            if ref is None:
                await self._parts.host.retire()
                self._parts.monitor.retired()
                return
            active = self._parts.host.active()
            if active is not None and active.digest == ref.digest:
                return
            folder = self._parts.store.path(ref.digest)
            manifest = self._parts.store.manifest(ref.digest)
            if folder is None or manifest is None:
                raise StoreError(f"the committed artifact {ref.id} is not on disk", FailureCode.STORE_CORRUPT)
            damage = await self._damage(ref)
            if damage is not None:
                raise StoreError(damage, FailureCode.STORE_CORRUPT)
            info = await self._activated(manifest, folder)
            log.info("serving", artifact=ref.id, runtime=info.runtime, load_s=round(info.load_s, 2))

    async def _activated(self, manifest: Manifest, folder: Path) -> ModelInfo:
        """Activate, and let health watch what serves from then on: also if this is cancelled when it serves already."""
        host, monitor = self._parts.host, self._parts.monitor
        try:
            info = await host.activate(manifest, folder)
        except BaseException:
            active = host.active()
            if active is not None and active.digest == manifest.digest != monitor.digest:
                monitor.reset(manifest)
            raise
        monitor.reset(manifest)
        return info

    async def _damage(self, ref: ArtifactRef) -> str | None:
        """Return what is wrong with the bytes on disk, or None; a damaged artifact is discarded, to be fetched anew."""
        store = self._parts.store
        async with self._disk_lock:
            try:
                await in_thread(lambda stop: store.verify(ref.digest, stop))
            except StoreError as error:
                if error.code is not FailureCode.STORE_CORRUPT:
                    raise
                log.warning("artifact damaged on disk", artifact=ref.id, code=error.code.value, error=str(error))
                await in_thread(lambda _stop: store.discard(ref.digest))
                return str(error)
        return None

    async def collect(self, keep: Sequence[str], spare: Sequence[str]) -> int:
        """Drop what the device no longer needs; returns bytes freed.

        Raises:
            AgentError: something cannot be deleted.
        """
        self._manifests = {digest: known for digest, known in self._manifests.items() if digest in keep}
        async with self._disk_lock:
            return await in_thread(lambda _stop: self._parts.store.collect(keep, spare))

    async def _resolve(self, order: Desired) -> core.Resolved:
        """What the device cannot run is not fetched; ``core.selection`` says why for each."""
        manifests = [await self._manifest(ref, newest=True) for ref in order.artifacts]
        facts = await self._parts.host.runtimes()
        active = self._parts.host.active()
        has = Resources(facts, self._parts.available(), held=active.memory_bytes if active else 0)
        fit, refused = constrain(manifests, has)
        for refusal in refused:
            log.warning("variant refused", artifact=refusal.manifest.id, error=refusal.reason)
        if not fit:
            usable = {fact.name for fact in facts if fact.usable}
            some = any(RUNTIME_OF[manifest.toolchain] in usable for manifest in manifests)
            code = FailureCode.INCOMPATIBLE if some else FailureCode.RUNTIME_MISSING
            raise RuntimeLoadError("; ".join(f"{each.manifest.id} {each.reason}" for each in refused), code)
        digests = {manifest.digest for manifest in fit}
        return core.Resolved(tuple(ref for ref in order.artifacts if ref.digest in digests))

    async def _manifest(self, ref: ArtifactRef, *, newest: bool = False) -> Manifest:
        """From memory, from the store (verified when it came), or from TUF.

        ``newest`` asks TUF even so: it may have been measured again, or have another chat template.

        Raises:
            AgentError: there is none, or nobody who has it can be reached.
        """
        known = self._manifests.get(ref.digest) or self._parts.store.manifest(ref.digest)
        if newest or known is None:
            try:
                known = await self._parts.trust.manifest(ref)
            except TrustError as error:
                if known is None or error.code is not FailureCode.TRUST_UNREACHABLE:
                    raise
        self._manifests = {**self._manifests, ref.digest: known}
        return known

    async def _await_link(self, deployment: core.Deployment, order: Desired) -> core.Available:
        """Until bytes may be fetched, the broker is connected, and a controller has answered.

        Raises:
            AgentError: what it answered is no good.
        """
        attempt = max(0, deployment.waits - 1)
        # Nothing is asked meanwhile, as that costs too: a new order, a stick or the device's settings end it.
        while order.sequence in self._metered and not self._parts.at_hand():  # noqa: ASYNC110
            await asyncio.sleep(LOOK_S)
        self._metered.discard(order.sequence)
        # In slices: the clock may be set meanwhile, and no event tells.
        while (opens := self._opens(deployment.candidates, order)) is not None:
            attempt = 0
            await asyncio.sleep(min(WINDOW_LOOK_S, (opens - self._parts.clock.now()).total_seconds()))
        while True:
            await self._pause(self._parts.wait_s(attempt))
            if self._parts.linked():
                try:
                    await self._parts.trust.refresh()
                except TrustError as error:
                    if error.code is not FailureCode.TRUST_UNREACHABLE:
                        raise
                    log.debug("controller still unreachable", error=str(error))
                else:
                    return core.Available()
            attempt += 1

    async def _pause(self, seconds: float) -> None:
        """Wait so long, or until the broker is connected again: it may be for minutes only."""
        was, left = self._parts.linked(), seconds
        while left > 0:
            await asyncio.sleep(min(LOOK_S, left))
            left -= LOOK_S
            linked = self._parts.linked()
            if linked and not was:
                return
            was = linked

    async def _await_space(self, waits: int, waiting: core.Waiting | None) -> core.Available:
        """Until so many bytes are free; first for a while, as room that is there may not be all that was missing."""
        await asyncio.sleep(self._parts.wait_s(max(0, waits - 1)))
        needs = waiting.needs_bytes if waiting is not None else 0
        # No event tells that somebody has deleted something.
        while await in_thread(lambda _stop: self._parts.store.free_bytes()) < needs:  # noqa: ASYNC110
            await asyncio.sleep(LOOK_S)
        return core.Available()

    def _opens(self, candidates: tuple[ArtifactRef, ...], order: Desired) -> datetime | None:
        """Return when the order's next transfer window opens; None: bytes may be fetched now, or are all here."""
        if self._parts.at_hand():
            return None
        now = self._parts.clock.now()
        opens = open_from(parsed(order.transfer.windows), now)
        missing = any(self._parts.store.path(ref.digest) is None for ref in candidates)
        return opens if opens > now and missing else None

    async def _transfer(self, candidates: tuple[ArtifactRef, ...], order: Desired) -> core.Transferred:
        """Within the order's transfer windows; what has come when one closes is kept.

        Raises:
            AgentError: TRANSFER_STALLED outside of them, so that the deployment waits.
        """
        if (opens := self._opens(candidates, order)) is not None:
            raise _closed(order, opens)
        windows, now = parsed(order.transfer.windows), self._parts.clock.now()
        closes = None if self._parts.at_hand() else open_until(windows, now)
        left = None if closes is None else (closes - now).total_seconds()
        try:
            async with asyncio.timeout(left) as limit:
                return await self._fetch_all(candidates, order)
        except TimeoutError:
            if closes is None or not limit.expired():
                raise
            raise _closed(order, open_from(windows, closes)) from None

    async def _fetch_all(self, candidates: tuple[ArtifactRef, ...], order: Desired) -> core.Transferred:
        here, last = [], None
        for ref in candidates:
            try:
                await self._fetch(ref, order)
            except AgentError as error:
                log.warning("variant not transferred", artifact=ref.id, code=error.code.value, error=str(error))
                last = error
            else:
                here.append(ref)
        if not here:
            raise last or StoreError("the order names no artifact")
        return core.Transferred(tuple(here))

    async def _fetch(self, ref: ArtifactRef, order: Desired) -> None:
        try:
            progress = await self._parts.transfer.fetch(
                await self._manifest(ref),
                window_bytes=order.transfer.window_bytes,
                stall_s=order.transfer.stall_s,
                on_progress=self._on_progress,
                bytes_per_s=order.transfer.max_bytes_per_s,
                mirrors=order.transfer.mirrors,
                metered_bytes=order.transfer.metered_bytes,
                at_hand=self._parts.at_hand(),
            )
        except MeteredError:
            self._metered.add(order.sequence)
            raise
        self._on_progress(progress)

    async def _verify(self, candidates: tuple[ArtifactRef, ...], order: Desired) -> core.Verified:
        for ref in candidates:
            if await self._damage(ref) is None:
                continue
            await self._fetch(ref, order)
            if (again := await self._damage(ref)) is not None:
                raise StoreError(f"fetched a second time, and damaged again: {again}", FailureCode.STORE_CORRUPT)
        return core.Verified()

    async def _prove(self, candidates: tuple[ArtifactRef, ...], order: Desired) -> core.Proved:
        """The fastest of those that pass; a single failure is no failure while another variant passes."""
        passed: list[Measured] = []
        last: AgentError | None = None
        for ref in candidates:
            try:
                passed.append(Measured(await self._manifest(ref), await self._prove_one(ref, order)))
            except AgentError as error:
                log.warning("variant not proven", artifact=ref.id, code=error.code.value, error=str(error))
                last = error
        if not passed:
            raise last or RuntimeLoadError("the order names no artifact")
        best = fastest(passed)
        return core.Proved(ArtifactRef(id=best.manifest.id, digest=best.manifest.digest), best.proof)

    async def _prove_one(self, ref: ArtifactRef, order: Desired) -> Proof:
        manifest = await self._manifest(ref)
        if self._parts.host.displaces(manifest):  # a proof that applications notice belongs into the window
            await self._wait_for_window(order)
        async with self.host_lock:
            proof = await self._parts.host.prove(manifest, self._folder(ref))
            elsewhere = computes_elsewhere(proof, order.limits)
            if elsewhere is not None:
                await self._parts.host.discard()
                raise RuntimeLoadError(f"{ref.id} {elsewhere}")
        return proof

    async def _activate(self, ref: ArtifactRef | None, order: Desired) -> core.Activated:
        if ref is None:
            raise AgentError("nothing was chosen to activate")
        await self._wait_for_window(order)
        manifest = await self._manifest(ref)
        async with self.host_lock:
            before = self._parts.host.active()
            info = await self._activated(manifest, self._folder(ref))
        replaced = (before.name, before.artifact) if before is not None and before.digest != info.digest else None
        return core.Activated(info.digest, (info.name, info.artifact), replaced)

    async def _wait_for_window(self, order: Desired) -> None:
        begin, end = order.window.not_before, order.window.not_after
        if begin is not None and self._parts.clock.now() < begin:
            log.info("waiting for the window", not_before=begin.isoformat())
        # In slices: the clock may be set meanwhile, and no event tells.
        while begin is not None and (now := self._parts.clock.now()) < begin:  # noqa: ASYNC110
            await asyncio.sleep(min(WINDOW_LOOK_S, (begin - now).total_seconds()))
        if end is not None and self._parts.clock.now() > end:
            raise AgentError(f"the window to change the model closed at {end.isoformat()}", FailureCode.DEADLINE)

    async def _watch(self, ref: ArtifactRef | None, order: Desired) -> core.Healthy:
        if ref is None:
            raise AgentError("nothing was chosen to watch")
        return core.Healthy(await self._parts.monitor.probation(order.limits, order.probation_s))

    def _folder(self, ref: ArtifactRef) -> Path:
        folder = self._parts.store.path(ref.digest)
        if folder is None:
            raise StoreError(f"{ref.id} is not complete on disk", FailureCode.STORE_CORRUPT)
        return folder


def _closed(order: Desired, opens: datetime) -> AgentError:
    windows = ", ".join(order.transfer.windows)
    return AgentError(
        f"chunks are fetched in the transfer window alone ({windows}); it opens at {opens:%Y-%m-%d %H:%M} UTC",
        FailureCode.TRANSFER_STALLED,
    )
