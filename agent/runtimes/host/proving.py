"""Proof that an artifact runs here: the signed probe prompts, answered and timed."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence

from agent.contract.failures import FailureCode
from agent.contract.manifest import Manifest, Probe
from agent.contract.messages import Proof
from agent.core.inference import DoneEvent, GenerationRequest, InferenceError, ModelInfo, Sampling, TokenEvent
from agent.core.probes import misanswered
from agent.errors import ProbeError, RuntimeLoadError
from agent.runtimes.host.settings import Render
from agent.runtimes.host.supervisor import WorkerProcess

#: Put to a model whose manifest has no probes: any answer will do.
_ANY = Probe(prompt="Say hello.", max_tokens=8)


async def prove(worker: WorkerProcess, manifest: Manifest, info: ModelInfo, render: Render, timeout_s: float) -> Proof:
    """Answer every probe, one after the other.

    Raises:
        ProbeError: an answer holds none of the expected texts, or is empty.
        RuntimeLoadError: the worker crashes, or does not answer within ``timeout_s``.
    """
    try:
        async with asyncio.timeout(timeout_s):
            results = [
                await _probe(worker, manifest, probe, render, number)
                for number, probe in enumerate(manifest.probes or (_ANY,))
            ]
    except TimeoutError:
        raise RuntimeLoadError(
            f"{manifest.id}: the probes were not answered in {timeout_s:.0f} s", FailureCode.RUNTIME_HUNG
        ) from None
    return _proof(worker, info, results)


def _proof(worker: WorkerProcess, info: ModelInfo, results: Sequence[DoneEvent]) -> Proof:
    spread = [result.tpot_ms for result in results if result.completion_tokens > 1]
    return Proof(
        runtime=info.runtime,
        device=info.device,
        load_s=info.load_s,
        ttft_ms=statistics.median(result.ttft_ms for result in results),
        tpot_ms=statistics.median(spread) if spread else 0.0,
        memory_bytes=worker.memory_bytes(),
        device_share=info.device_share,
    )


async def _probe(worker: WorkerProcess, manifest: Manifest, probe: Probe, render: Render, number: int) -> DoneEvent:
    prompt = render(manifest, [{"role": "user", "content": probe.prompt}])
    sampling = Sampling(max_tokens=probe.max_tokens, temperature=0.0, stop=manifest.chat.stop)
    try:
        answer, done = await _answer(worker, GenerationRequest(f"probe-{number}", prompt, sampling))
    except InferenceError as error:
        crashed = error.kind in ("crashed", "timeout")
        code = FailureCode.RUNTIME_CRASHED if crashed else FailureCode.PROBE_FAILED
        kind = RuntimeLoadError if crashed else ProbeError
        raise kind(f"{manifest.id}: probe {probe.prompt!r}: {error}", code) from error
    wrong = misanswered(probe, answer, done.completion_tokens)
    if wrong is not None:
        raise ProbeError(f"{manifest.id}: probe {probe.prompt!r} {wrong}")
    return done


async def _answer(worker: WorkerProcess, request: GenerationRequest) -> tuple[str, DoneEvent]:
    events: asyncio.Queue[object] = asyncio.Queue()
    worker.submit(request, events.put_nowait)
    text = ""
    while True:
        event = await events.get()
        if isinstance(event, InferenceError):
            raise event
        if isinstance(event, TokenEvent):
            text += event.text
        if isinstance(event, DoneEvent):
            if event.error:
                raise InferenceError(event.error_kind or "crashed", event.error)
            return text, event
