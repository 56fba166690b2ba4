"""An artifact in a fresh worker, and how to do that again after a crash."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil
import structlog

from agent.contract.manifest import Manifest
from agent.core.inference import ModelInfo
from agent.runtimes.host.settings import HostSettings
from agent.runtimes.host.supervisor import WorkerProcess
from agent.runtimes.protocol.engine import LoadOptions, ModelSource
from agent.runtimes.protocol.registry import RuntimeSpec

log = structlog.get_logger(component=__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in a worker of its own; nobody watches over it yet."""

    spec: RuntimeSpec
    manifest: Manifest
    folder: Path
    kv_tokens: int
    settings: HostSettings
    worker: WorkerProcess
    info: ModelInfo

    def of(self, manifest: Manifest) -> bool:
        """Return whether it is this artifact."""
        return self.manifest.digest == manifest.digest

    async def again(self) -> LoadedModel:
        """Return the same in another worker; raises as ``load_model`` does."""
        return await load_model(self.spec, self.manifest, self.folder, self.kv_tokens, self.settings)


async def load_model(
    spec: RuntimeSpec,
    manifest: Manifest,
    folder: Path,
    kv_tokens: int,
    settings: HostSettings,
    *,
    placed: bool = False,
) -> LoadedModel:
    """Start a worker and load the artifact; ``placed``: find out what share of it the device computes.

    Raises:
        agent.errors.RuntimeLoadError: it does not load; no process is left behind.
    """
    options = LoadOptions(
        context=manifest.context,
        kv_tokens=kv_tokens,
        max_sequences=settings.answers_at_once(spec),
        threads=settings.threads or _cores(),
        device=manifest.target.value.upper(),
        placed=placed,
        extra=dict(settings.runtime_options.get(spec.name, {})),
    )
    source = ModelSource(folder, manifest.entry, manifest.model.name, _stops(manifest))
    worker = await WorkerProcess.start(spec, settings.memory_hard_limit_bytes)
    try:
        loaded = await worker.load(source, options, settings.load_timeout_s)
    except BaseException:
        await worker.kill()
        raise
    info = ModelInfo(
        name=manifest.model.name,
        artifact=manifest.id,
        digest=manifest.digest,
        runtime=spec.name,
        device=loaded.device,
        context=loaded.context,
        load_s=loaded.load_s,
        memory_bytes=loaded.memory_bytes,
        capabilities=loaded.capabilities,
        device_share=loaded.device_share,
        facts={"kv_tokens": options.kv_tokens, "threads": options.threads},
        defaults=manifest.sampling_defaults,
    )
    log.info("model loaded", artifact=manifest.id, runtime=spec.name, seconds=round(loaded.load_s, 3))
    return LoadedModel(spec, manifest, folder, kv_tokens, settings, worker, info)


def _stops(manifest: Manifest) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for text in (*manifest.chat.stop, manifest.chat.eos_token) if text))


def _cores() -> int:
    """Physical cores that this process may use: a second thread on a core only costs in a matrix product."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))
