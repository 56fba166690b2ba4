"""What each runtime measures on this device, on the smallest artifact of its kind that is there.

Every measurement runs in a process of its own, with a timeout and a limit on its memory, and is kept until a
package, a driver or the artifact changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from agent.contract.manifest import Manifest
from agent.contract.messages import Proof, RuntimeFact
from agent.core.selection import Resources, why_not
from agent.errors import AgentError
from agent.platform.resources import available_bytes
from agent.runtimes.host.checking import Checker, environment, read_cache, write_cache
from agent.runtimes.host.loading import load_model
from agent.runtimes.host.proving import prove
from agent.runtimes.host.settings import HostSettings, Render
from agent.runtimes.protocol.registry import REGISTRY, RuntimeSpec

#: Private memory beyond its signed need that a probe may take: thread stacks and arenas of native libraries count.
_SLACK_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class RuntimeReport:
    """A runtime, and what it measured; ``reason`` says why nothing was measured. ``kept``: it was, some time ago."""

    fact: RuntimeFact
    artifact: str = ""
    proof: Proof | None = None
    reason: str = ""
    kept: bool = False


class Prober:
    """Measures runtimes. ``models`` are the verified artifacts on this device, each with its folder."""

    def __init__(
        self,
        models: Sequence[tuple[Manifest, Path]],
        render: Render,
        settings: HostSettings,
        *,
        registry: Mapping[str, RuntimeSpec] = REGISTRY,
        available: Callable[[], int] = available_bytes,
    ) -> None:
        self._models = models
        self._render = render
        self._settings = replace(settings, max_sequences=1)
        self._registry = registry
        self._available = available
        self._checker = Checker(settings.check_timeout_s, settings.cache_file)
        self._file = settings.cache_file.with_name("probes.json") if settings.cache_file else None
        self._cache = read_cache(self._file)

    async def reports(self) -> tuple[RuntimeReport, ...]:
        """One for each runtime known, one after the other: two at once would measure each other."""
        return tuple([await self._report(spec) for spec in self._registry.values()])

    async def _report(self, spec: RuntimeSpec) -> RuntimeReport:
        fact = await self._checker.fact(spec)
        if not fact.usable:
            return RuntimeReport(fact, reason=fact.reason)
        mine = sorted(
            (pair for pair in self._models if pair[0].toolchain.value == spec.toolchain), key=lambda pair: pair[0].size
        )
        if not mine:
            return RuntimeReport(fact, reason=f"no artifact of {spec.toolchain} is on this device")
        manifest, folder = mine[0]
        kept = self._kept(spec, manifest)
        if kept is not None:
            return RuntimeReport(fact, manifest.id, kept, kept=True)
        reason = why_not(
            manifest, Resources((fact,), self._available(), limit=self._settings.memory_limit_bytes or None)
        )
        if reason is not None:
            return RuntimeReport(fact, manifest.id, reason=reason)
        try:
            proof = await self._measure(spec, manifest, folder)
        except AgentError as error:
            return RuntimeReport(fact, manifest.id, reason=str(error))
        self._cache[self._key(spec, manifest)] = proof.model_dump(mode="json")
        await asyncio.to_thread(write_cache, self._file, self._cache)
        return RuntimeReport(fact, manifest.id, proof)

    async def _measure(self, spec: RuntimeSpec, manifest: Manifest, folder: Path) -> Proof:
        need = manifest.memory.at_context(manifest.context)
        limited = replace(self._settings, memory_hard_limit_bytes=need + _SLACK_BYTES)
        loaded = await load_model(spec, manifest, folder, manifest.context, limited, placed=True)
        try:
            return await prove(loaded.worker, manifest, loaded.info, self._render, limited.probe_timeout_s)
        finally:
            await loaded.worker.kill()

    def _kept(self, spec: RuntimeSpec, manifest: Manifest) -> Proof | None:
        with contextlib.suppress(ValidationError):
            return Proof.model_validate(self._cache.get(self._key(spec, manifest)))
        return None

    def _key(self, spec: RuntimeSpec, manifest: Manifest) -> str:
        return json.dumps([environment(spec), manifest.digest, manifest.context, self._settings.threads])
