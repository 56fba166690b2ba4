"""The works of a deployment: each a coroutine that ends with the event of its success, or raises an ``AgentError``."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from agent.contract.failures import FailureCode
from agent.contract.manifest import RUNTIME_OF, Manifest
from agent.contract.messages import ArtifactRef, Desired, Progress, Proof
from agent.contract.profile import HealthLimits
from agent.core import deployment as core
from agent.core.ports import ArtifactStore, Clock, ModelHost, Transfer, Trust
from agent.core.selection import Measured, Resources, constrain, fastest
from agent.daemon.monitor import Monitor
from agent.errors import AgentError, RuntimeLoadError, StoreError, TrustError

log = structlog.get_logger()


#: How often the clock is looked at while waiting for the window.
WINDOW_LOOK_S = 30.0


@dataclass(frozen=True, slots=True)
class Parts:
    """What the works need; each a Protocol of ``core.ports``."""

    trust: Trust
    store: ArtifactStore
    transfer: Transfer
    host: ModelHost
    monitor: Monitor
    clock: Clock
    #: Bytes of memory that a model may take now.
    available: Callable[[], int]
    #: Seconds between attempts to reach the controller; the last one repeats until the state's deadline.
    retry_s: tuple[float, ...] = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)

    def wait_s(self, attempt: int) -> float:
        """Before attempt number ``attempt + 1``."""
        return self.retry_s[min(attempt, len(self.retry_s) - 1)]


class Works:
    """Performs one work at a time for the deployment that it is given."""

    def __init__(self, parts: Parts, on_progress: Callable[[Progress], None]) -> None:
        self._parts = parts
        self._on_progress = on_progress
        self._manifests: dict[str, Manifest] = {}
        #: One model is loaded, proven or swapped at a time: memory is planned for that.
        self.host_lock = asyncio.Lock()

    async def perform(self, work: core.Work, deployment: core.Deployment) -> core.Event:
        """Do it.

        Raises:
            AgentError: it failed, and its code says how.
        """
        desired = deployment.desired
        if desired is None:
            raise AgentError(f"there is no order to {work.value}")
        match work:
            case core.Work.RESOLVE:
                return await self._resolve(desired)
            case core.Work.TRANSFER:
                return await self._transfer(deployment.candidates, desired)
            case core.Work.VERIFY:
                return await self._verify(deployment.candidates, desired)
            case core.Work.PROVE:
                return await self._prove(deployment.candidates, desired)
            case core.Work.ACTIVATE:
                return await self._activate(deployment.chosen, desired)
            case core.Work.WATCH:
                return await self._watch(deployment.chosen, desired)

    async def serve(self, ref: ArtifactRef | None, limits: HealthLimits) -> None:
        """Serve the committed artifact again, or nothing; every byte is checked before it is loaded.

        Raises:
            AgentError: it is gone, damaged, or does not load.
        """
        async with self.host_lock:
            self._parts.monitor.limits = limits
            if ref is None:
                await self._parts.host.retire()
                return
            active = self._parts.host.active()
            if active is not None and active.digest == ref.digest:
                return
            folder = self._parts.store.path(ref.digest)
            manifest = self._parts.store.manifest(ref.digest)
            if folder is None or manifest is None:
                raise StoreError(f"the committed artifact {ref.id} is not on disk", FailureCode.STORE_CORRUPT)
            await self._verify_committed(ref)
            info = await self._parts.host.activate(manifest, folder)
            self._parts.monitor.reset(manifest)
            log.info("serving", artifact=ref.id, runtime=info.runtime, load_s=round(info.load_s, 2))

    async def _verify_committed(self, ref: ArtifactRef) -> None:
        try:
            await asyncio.to_thread(self._parts.store.verify, ref.digest)
        except StoreError as error:
            if error.code is FailureCode.STORE_CORRUPT:  # so that the next order fetches it anew
                await asyncio.to_thread(self._parts.store.discard, ref.digest)
            raise

    def forget(self, keep: Sequence[str]) -> None:
        """Drop the manifests of all other artifacts."""
        self._manifests = {digest: known for digest, known in self._manifests.items() if digest in keep}

    async def _resolve(self, desired: Desired) -> core.Resolved:
        """What the device cannot run is not fetched; ``core.selection`` says why for each."""
        manifests = [await self._manifest(ref, newest=True) for ref in desired.artifacts]
        facts = await self._parts.host.runtimes()
        active = self._parts.host.active()
        has = Resources(facts, self._parts.available(), held=active.memory_bytes if active else 0)
        fit, refused = constrain(manifests, has)
        for refusal in refused:
            log.warning("variant refused", artifact=refusal.manifest.id, reason=refusal.reason)
        if not fit:
            usable = {fact.name for fact in facts if fact.usable}
            some = any(RUNTIME_OF[manifest.toolchain] in usable for manifest in manifests)
            code = FailureCode.INCOMPATIBLE if some else FailureCode.RUNTIME_MISSING
            raise RuntimeLoadError("; ".join(f"{each.manifest.id} {each.reason}" for each in refused), code)
        digests = {manifest.digest for manifest in fit}
        return core.Resolved(tuple(ref for ref in desired.artifacts if ref.digest in digests))

    async def _manifest(self, ref: ArtifactRef, *, newest: bool = False) -> Manifest:
        """From memory, from the store (verified when it came), or from TUF, for as long as it takes to be reached.

        ``newest`` asks TUF even so: it may have been measured again, or have another chat template.
        """
        known = self._manifests.get(ref.digest) or self._parts.store.manifest(ref.digest)
        attempt = 0
        while newest or known is None:
            try:
                known, newest = await self._parts.trust.manifest(ref), False
            except TrustError as error:
                if error.code is not FailureCode.TRUST_UNREACHABLE:
                    raise
                if known is not None:
                    break
                wait = self._parts.wait_s(attempt)
                log.warning("controller unreachable", artifact=ref.id, error=str(error), retry_in_s=wait)
                await asyncio.sleep(wait)
                attempt += 1
        self._manifests = {**self._manifests, ref.digest: known}
        return known

    async def _transfer(self, candidates: tuple[ArtifactRef, ...], desired: Desired) -> core.Transferred:
        here, last = [], None
        for ref in candidates:
            try:
                await self._fetch(ref, desired)
            except AgentError as error:
                log.warning("variant not transferred", artifact=ref.id, code=error.code.value, error=str(error))
                last = error
            else:
                here.append(ref)
        if not here:
            raise last or StoreError("the order names no artifact")
        return core.Transferred(tuple(here))

    async def _fetch(self, ref: ArtifactRef, desired: Desired) -> None:
        progress = await self._parts.transfer.fetch(
            await self._manifest(ref),
            window_bytes=desired.transfer.window_bytes,
            stall_s=desired.transfer.stall_s,
            on_progress=self._on_progress,
        )
        self._on_progress(progress)

    async def _verify(self, candidates: tuple[ArtifactRef, ...], desired: Desired) -> core.Verified:
        for ref in candidates:
            try:
                await asyncio.to_thread(self._parts.store.verify, ref.digest)
            except StoreError as error:
                if error.code is not FailureCode.STORE_CORRUPT:
                    raise
                log.warning("damaged on disk, fetched once more", artifact=ref.id, error=str(error))
                await asyncio.to_thread(self._parts.store.discard, ref.digest)
                await self._fetch(ref, desired)
                await asyncio.to_thread(self._parts.store.verify, ref.digest)
        return core.Verified()

    async def _prove(self, candidates: tuple[ArtifactRef, ...], desired: Desired) -> core.Proved:
        """The fastest of those that pass; a single failure is no failure while another variant passes."""
        passed: list[Measured] = []
        last: AgentError | None = None
        for ref in candidates:
            try:
                passed.append(Measured(await self._manifest(ref), await self._prove_one(ref, desired)))
            except AgentError as error:
                log.warning("variant not proven", artifact=ref.id, code=error.code.value, error=str(error))
                last = error
        if not passed:
            raise last or RuntimeLoadError("the order names no artifact")
        best = fastest(passed)
        return core.Proved(ArtifactRef(id=best.manifest.id, digest=best.manifest.digest), best.proof)

    async def _prove_one(self, ref: ArtifactRef, desired: Desired) -> Proof:
        manifest = await self._manifest(ref)
        if self._parts.host.displaces(manifest):  # a proof that applications notice belongs into the window
            await self._wait_for_window(desired)
        async with self.host_lock:
            return await self._parts.host.prove(manifest, self._folder(ref))

    async def _activate(self, ref: ArtifactRef | None, desired: Desired) -> core.Activated:
        if ref is None:
            raise AgentError("nothing was chosen to activate")
        await self._wait_for_window(desired)
        manifest = await self._manifest(ref)
        async with self.host_lock:
            info = await self._parts.host.activate(manifest, self._folder(ref))
        self._parts.monitor.reset(manifest)
        return core.Activated(info.digest)

    async def _wait_for_window(self, desired: Desired) -> None:
        begin, end = desired.window.not_before, desired.window.not_after
        if begin is not None and self._parts.clock.now() < begin:
            log.info("waiting for the window", not_before=begin.isoformat())
        # In slices: the clock may be set meanwhile, and no event tells.
        while begin is not None and (now := self._parts.clock.now()) < begin:  # noqa: ASYNC110
            await asyncio.sleep(min(WINDOW_LOOK_S, (begin - now).total_seconds()))
        if end is not None and self._parts.clock.now() > end:
            raise AgentError(f"the window to change the model closed at {end.isoformat()}", FailureCode.DEADLINE)

    async def _watch(self, ref: ArtifactRef | None, desired: Desired) -> core.Healthy:
        if ref is None:
            raise AgentError("nothing was chosen to watch")
        return core.Healthy(await self._parts.monitor.probation(desired.limits, desired.probation_s))

    def _folder(self, ref: ArtifactRef) -> Path:
        folder = self._parts.store.path(ref.digest)
        if folder is None:
            raise StoreError(f"{ref.id} is not complete on disk", FailureCode.STORE_CORRUPT)
        return folder
