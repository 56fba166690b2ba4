"""The model host: proves artifacts in fresh workers, moves requests from one model to the next, and serves them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import structlog

from agent.contract.failures import FailureCode
from agent.contract.manifest import Manifest
from agent.contract.messages import Proof, RuntimeFact
from agent.core.inference import RESTARTING, GenerationEvent, GenerationRequest, InferenceError, ModelInfo
from agent.core.memory import MemoryPlan, Placement, plan
from agent.errors import AgentError, RuntimeLoadError
from agent.platform.resources import available_bytes
from agent.runtimes.host.checking import Checker
from agent.runtimes.host.loading import LoadedModel, load_model
from agent.runtimes.host.model_server import ModelServer
from agent.runtimes.host.page_cache import read_ahead
from agent.runtimes.host.proving import prove
from agent.runtimes.host.settings import HostEvent, HostSettings, HostStats, Render
from agent.runtimes.protocol.registry import REGISTRY, RuntimeSpec, missing, versions

log = structlog.get_logger(component=__name__)

Result = TypeVar("Result")


class WorkerHost:
    """Implements ``ports.ModelHost`` and ``ports.Inference``.

    ``prove``, ``activate``, ``discard`` and ``retire`` exclude one another; serving goes on meanwhile.
    """

    def __init__(
        self,
        render: Render,
        settings: HostSettings | None = None,
        *,
        registry: Mapping[str, RuntimeSpec] = REGISTRY,
        on_event: Callable[[HostEvent], None] = lambda _event: None,
        available: Callable[[], int] = available_bytes,
    ) -> None:
        self._render = render
        self._settings = settings or HostSettings()
        self._registry = registry
        self._on_event = on_event
        self._available = available
        self._checker = Checker(self._settings.check_timeout_s, self._settings.cache_file)
        self._lock = asyncio.Lock()
        self._active: ModelServer | None = None
        self._proven: LoadedModel | None = None
        self._parked: tuple[Manifest, Path] | None = None
        self._expiry: asyncio.TimerHandle | None = None
        self._draining: set[asyncio.Task[None]] = set()
        self._undoing: set[asyncio.Task[None]] = set()
        self._at_work: asyncio.Task[Any] | None = None
        self._closing = False
        self._swap_s = 0.0
        self._swaps = 0
        self._restarts_before = 0
        self._reason = "no model is deployed"

    async def runtimes(self) -> Sequence[RuntimeFact]:
        """Return each runtime known, usable or why not; a check runs in a process of its own, once a version."""
        return [await self._checker.fact(spec) for spec in self._registry.values()]

    def active(self) -> ModelInfo | None:
        """Return what serves now. A model whose worker is being restarted still counts: its requests wait."""
        return self._active.info if self._active is not None and not self._active.failed else None

    def active_manifest(self) -> Manifest | None:
        """Return the signed facts of what serves now."""
        return self._active.manifest if self._active is not None and not self._active.failed else None

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationEvent]:
        """Yield events of one request; see ``ports.Inference``."""
        events = self._model_server().generate(request)
        async with contextlib.aclosing(events):
            async for event in events:
                yield event

    async def count_tokens(self, text: str) -> int:
        """Return the number of tokens of ``text`` for the active model."""
        return await self._model_server().count_tokens(text)

    def displaces(self, manifest: Manifest) -> bool:
        """Return whether there is no memory for it beside what serves; see ``ports.ModelHost``."""
        return self._active is not None and self._fits(self._spec(manifest), manifest).placement is Placement.SWAP

    async def prove(self, manifest: Manifest, folder: Path) -> Proof:
        """Load in a fresh worker, answer the signed probes; the worker is kept for ``activate``.

        Without memory for two models the one that serves is unloaded first; it comes back if the proof fails. After
        a cancellation it comes back in the background: whoever cancels does not wait for a model to load.
        """
        return await self._alone(lambda: self._prove(manifest, folder))

    async def activate(self, manifest: Manifest, folder: Path) -> ModelInfo:
        """Move new requests to this artifact; the old model drains in the background, then is unloaded."""
        return await self._alone(lambda: self._activate(manifest, folder))

    async def discard(self) -> None:
        """Drop what was proven and not activated; what it displaced comes back."""
        await self._alone(self._discard)

    async def retire(self) -> None:
        """Serve nothing."""
        await self._alone(self._retire)

    async def close(self) -> None:
        """End every worker at once, and with it what is at work: its caller sees a ``CancelledError``."""
        self._closing = True
        for task in (self._at_work, *self._undoing):
            if task is not None:
                task.cancel()
        async with self._lock:
            await self._drop_proven()
            model, self._active = self._active, None
            self._reason = "the agent is shutting down"
            if model is not None:
                await self._close(model)
            for task in list(self._draining):
                task.cancel()
            await asyncio.gather(*self._draining, *self._undoing, return_exceptions=True)

    def stats(self) -> HostStats:
        """Now, for metrics."""
        restarts, draining = self._restarts_before, len(self._draining)
        if self._active is None:
            state = "swapping" if self._parked else "empty"
            return HostStats(state, draining=draining, restarts=restarts, swaps=self._swaps, reason=self._reason)
        now = self._active.stats()
        return HostStats(
            state="failed" if self._active.failed else RESTARTING if self._active.restarting else "serving",
            queued=now.queued,
            active=now.active,
            draining=draining,
            restarts=restarts + now.restarts,
            swaps=self._swaps,
            memory_bytes=now.memory_bytes,
            kv_used_tokens=now.kv_used_tokens,
            kv_capacity_tokens=now.kv_capacity_tokens,
            reason=self._active.failed or self._active.restarting,
        )

    def _model_server(self) -> ModelServer:
        if self._active is not None:
            return self._active
        if self._parked is not None:
            raise InferenceError("unavailable", "the model is being replaced", retry_after_s=max(1.0, self._swap_s))
        raise InferenceError("unavailable", self._reason)

    async def _alone(self, work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        """One at a time, in a task of its own, so that ``close`` need not wait for it."""
        async with self._lock:
            if self._closing:
                raise RuntimeLoadError("the agent is shutting down", FailureCode.CANCELLED)
            self._at_work = task = asyncio.create_task(work())
            try:
                return await task
            finally:
                self._at_work = None

    async def _prove(self, manifest: Manifest, folder: Path) -> Proof:
        await self._drop_proven()
        async with self._undone():
            loaded = await self._bring_in(manifest, folder)
            try:
                proof = await prove(loaded.worker, manifest, loaded.info, self._render, self._settings.probe_timeout_s)
            except BaseException:
                await loaded.worker.kill()
                raise
        self._proven = loaded
        keep_s = self._settings.swap_keep_s if self._parked else self._settings.proven_keep_s
        self._expiry = asyncio.get_running_loop().call_later(keep_s, self._expire, loaded, keep_s)
        log.info("artifact proven", artifact=manifest.id, **proof.model_dump())
        return proof

    async def _activate(self, manifest: Manifest, folder: Path) -> ModelInfo:
        current = self._active
        if self._proven is not None and self._proven.of(manifest) and self._proven.worker.alive:
            loaded, self._proven = self._proven, None
            self._cancel_expiry()
        elif current is not None and current.manifest.digest == manifest.digest and not current.failed:
            return current.info
        else:
            await self._drop_proven()
            async with self._undone():
                loaded = await self._bring_in(manifest, folder)
        self._exchange(self._serve(loaded))
        return loaded.info

    async def _discard(self) -> None:
        async with self._undone():
            await self._drop_proven()
            await self._restore()

    async def _retire(self) -> None:
        await self._drop_proven()
        self._parked = None
        model, self._active = self._active, None
        self._reason = "the model was retired"
        if model is not None:
            await self._drain(model)
            self._report("retired", model.manifest)

    @contextlib.asynccontextmanager
    async def _undone(self) -> AsyncIterator[None]:
        """If the body fails, what it unloaded serves again; after a cancellation a little later."""
        try:
            try:
                yield
            except Exception:
                await self._restore()
                raise
        except asyncio.CancelledError:
            if self._parked is not None and not self._closing:
                self._undo(self._restore_unless_proven)
            raise

    async def _restore_unless_proven(self) -> None:
        if self._proven is None:  # else another proof came first, and what becomes of that decides
            async with self._undone():
                await self._restore()

    def _undo(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        task = asyncio.create_task(self._undo_alone(work), name="undo")
        self._undoing.add(task)
        task.add_done_callback(self._undoing.discard)

    async def _undo_alone(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        with contextlib.suppress(RuntimeLoadError):  # it was closed meanwhile
            await self._alone(work)

    async def _bring_in(self, manifest: Manifest, folder: Path) -> LoadedModel:
        """Load beside the active model, or in its place, as memory allows."""
        spec = self._spec(manifest)
        if self._draining:  # what it still holds would count against the new one
            await asyncio.wait(self._draining, timeout=self._settings.drain_timeout_s)
        chosen = self._plan(spec, manifest)
        if chosen.placement is Placement.REFUSED:
            raise RuntimeLoadError(f"{manifest.id} {chosen.sentence()}", FailureCode.RUNTIME_MEMORY)
        if chosen.placement is Placement.SWAP:
            await self._park(folder)
        return await self._load(spec, manifest, folder, chosen, placed=True)

    def _spec(self, manifest: Manifest) -> RuntimeSpec:
        for spec in self._registry.values():
            if spec.toolchain == manifest.toolchain.value:
                if versions(spec) is None:
                    reason = f"{manifest.id} needs the runtime {spec.name}, which is {missing(spec)}"
                    raise RuntimeLoadError(reason, FailureCode.RUNTIME_MISSING)
                return spec
        known = ", ".join(self._registry)
        reason = f"{manifest.id} was built by {manifest.toolchain}; no runtime here takes that (known: {known})"
        raise RuntimeLoadError(reason, FailureCode.RUNTIME_MISSING)

    def _fits(self, spec: RuntimeSpec, manifest: Manifest) -> MemoryPlan:
        return plan(
            manifest.memory,
            context=manifest.context,
            sequences=self._settings.answers_at_once(spec),
            available=self._available(),
            held=self._active.worker.memory_bytes() if self._active is not None else 0,
            limit=self._settings.memory_limit_bytes or None,
        )

    def _plan(self, spec: RuntimeSpec, manifest: Manifest) -> MemoryPlan:
        """As ``_fits``, with the figures in the log: it is about to be loaded."""
        chosen = self._fits(spec, manifest)
        log.info(
            "memory planned",
            artifact=manifest.id,
            placement=chosen.placement.value,
            weights_bytes=manifest.memory.weights_bytes,
            kv_tokens=chosen.kv_tokens,
            need_bytes=chosen.need_bytes,
            available_bytes=chosen.available_bytes,
            held_bytes=chosen.freed_bytes,
        )
        return chosen

    async def _load(
        self, spec: RuntimeSpec, manifest: Manifest, folder: Path, chosen: MemoryPlan, *, placed: bool = False
    ) -> LoadedModel:
        return await load_model(spec, manifest, folder, chosen.kv_tokens, self._settings, placed=placed)

    def _serve(self, loaded: LoadedModel) -> ModelServer:
        return ModelServer(loaded, self._settings, self._on_event)

    async def _park(self, folder: Path) -> None:
        """Unload what serves, to make room; the new files are read into the page cache before the gap begins."""
        model = self._active
        if model is None:
            return
        await asyncio.to_thread(read_ahead, folder)
        self._report("swap_begun", model.manifest)
        self._parked, self._active = (model.manifest, model.folder), None
        self._swap_s = model.info.load_s + 2.0
        await self._drain(model)

    async def _restore(self) -> None:
        """What was unloaded for a proof that failed serves again."""
        if self._parked is None:
            return
        manifest, folder = self._parked
        try:
            spec = self._spec(manifest)
            loaded = await self._load(spec, manifest, folder, self._plan(spec, manifest))
        except AgentError as error:
            self._reason = f"the model that served before does not load any more: {error}"
            log.error("restore failed", artifact=manifest.id, error=str(error), code=error.code)
            self._on_event(HostEvent("gave_up", manifest.digest, error.code, self._reason))
        else:
            self._active = self._serve(loaded)
        self._parked = None
        self._report("swap_ended", manifest)

    def _exchange(self, model: ModelServer) -> None:
        old, self._active = self._active, model
        self._swaps += 1
        if self._parked is not None:
            self._parked = None
            self._report("swap_ended", model.manifest)
        self._report("activated", model.manifest)
        if old is not None:
            task = asyncio.create_task(self._drain(old), name=f"drain-{old.manifest.id}")
            self._draining.add(task)
            task.add_done_callback(self._draining.discard)

    async def _drain(self, model: ModelServer) -> None:
        try:
            if not await model.drain(self._settings.drain_timeout_s):
                log.warning("drain timeout", artifact=model.manifest.id, seconds=self._settings.drain_timeout_s)
        finally:
            await self._close(model)

    async def _close(self, model: ModelServer) -> None:
        self._restarts_before += model.restarts
        await model.close()

    async def _drop_proven(self) -> None:
        self._cancel_expiry()
        loaded, self._proven = self._proven, None
        if loaded is not None:
            await loaded.worker.close()

    def _expire(self, loaded: LoadedModel, keep_s: float) -> None:
        log.warning("proven expired", artifact=loaded.manifest.id, seconds=keep_s)
        self._undo(lambda: self._forget(loaded))

    async def _forget(self, loaded: LoadedModel) -> None:
        if self._proven is loaded:  # else it was activated, or another was proven, while this waited its turn
            await self._discard()

    def _cancel_expiry(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None

    def _report(self, kind: str, manifest: Manifest) -> None:
        log.info(f"model_{kind}", artifact=manifest.id, digest=manifest.digest)
        self._on_event(HostEvent(kind, manifest.digest))
