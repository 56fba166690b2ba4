"""What the child process of a measurement does: make a reference, or score and time one artifact against it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from agent.contract.manifest import Target, Toolchain
from fleet.toolchains import divergence, reference
from fleet.toolchains.progress import Progress, ProgressCallback
from fleet.toolchains.scorers import Opened, open_scorer

#: A short question of a person, and an answer of a sentence or two.
PROMPT_TOKENS = 64
ANSWER_TOKENS = 32
_ROUNDS = 3


class MeasureJob(BaseModel):
    """Score ``folder``/``entry`` against the file ``against``, which ``ReferenceJob`` made of ``source``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    toolchain: Toolchain
    target: Target
    folder: Path
    entry: str
    context: int
    threads: int
    source: Path
    against: Path
    evaluation: str


def run(kind: str, job: dict[str, Any], progress: ProgressCallback) -> dict[str, Any]:
    """The job ``reference`` or ``measure``; what it returns is JSON.

    Raises:
        FleetError: it cannot be done, and why.
    """
    if kind == "reference":
        reference.write(reference.ReferenceJob.model_validate(job), progress)
        return {}
    return _measure(MeasureJob.model_validate(job), progress)


def _measure(job: MeasureJob, progress: ProgressCallback) -> dict[str, Any]:
    # NumPy's matrix products: a second thread wins little, and loses ten times where others hold the cores.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    scored = reference.read(job.against)
    progress(Progress("loading the artifact"))
    opened = Opened((job.folder / job.entry).resolve(), job.target, job.context, job.threads)
    scorer = open_scorer(job.toolchain, opened)
    prompt = [token for one in scored for token in one.ids][:PROMPT_TOKENS]
    progress(Progress("timing"))
    scorer.generate(prompt[:8], 4)  # the first call compiles and allocates
    timings = [scorer.generate(prompt, ANSWER_TOKENS) for _ in range(_ROUNDS)]
    peak = peak_memory_bytes()
    scorer.prepare_logits()
    logits_of = reference.output_layer(job.source)
    losses = []
    for done, one in enumerate(scored):
        progress(Progress("measuring the loss", done / len(scored)))
        found = scorer.logits(one.ids, one.start)
        losses.append(divergence.compare(logits_of(one.hidden), found, one.ids[one.start :]))
    quality = divergence.summarise(losses, job.evaluation)
    return {
        "quality": quality.model_dump(mode="json"),
        "ttft_ms": min(timing.ttft_ms for timing in timings),
        "tpot_ms": min(timing.tpot_ms for timing in timings),
        "peak_memory_bytes": peak,
    }


def peak_memory_bytes() -> int:
    """Of this process until now, resident. ``ru_maxrss`` would carry over what the parent held when it forked."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        import psutil

        return int(getattr(psutil.Process().memory_info(), "peak_wset", 0))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
