"""What the child process of a measurement does: make a reference, or score and time one artifact against it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from agent.contract.manifest import Target, Toolchain
from fleet.errors import UsageError
from fleet.toolchains.progress import Progress, ProgressCallback
from fleet.toolchains.quality import divergence, reference
from fleet.toolchains.quality.scorers import Opened, Scorer, Timing, open_scorer

#: A short question of a person, and an answer of a sentence or two.
PROMPT_TOKENS = 64
ANSWER_TOKENS = 32
_ROUNDS = 3
#: After which no further round begins.
_ENOUGH_S = 5.0


class MeasureJob(BaseModel):
    """Score ``folder``/``entry`` against each file of ``against``, by the label of its evaluation set.

    ``ReferenceJob`` made them of ``source``. Sets after the first are left out where the context is too short for them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    toolchain: Toolchain
    target: Target
    folder: Path
    entry: str
    context: int
    threads: int
    source: Path
    against: dict[str, Path]


def run(kind: str, job: dict[str, Any], progress: ProgressCallback) -> dict[str, Any]:
    """Return the job ``reference`` or ``measure``; what it returns is JSON.

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
    sets = {label: reference.read(path) for label, path in job.against.items()}
    scored = next(iter(sets.values()))
    longest = max(len(one.ids) for one in scored)
    if longest > job.context:
        raise UsageError(
            f"the artifact is for a context of {job.context} tokens, and the loss is measured on up to {longest} at "
            "once: give the profile a longer context, or build with --no-measure"
        )
    progress(Progress("loading the artifact"))
    opened = Opened((job.folder / job.entry).resolve(), job.target, job.context, job.threads)
    scorer = open_scorer(job.toolchain, opened)
    progress(Progress("timing"))
    times = timings(scorer, [token for one in scored for token in one.ids])
    peak = peak_memory_bytes()
    scorer.prepare_logits()
    logits_of = reference.output_layer(job.source)
    fit = {label: texts for label, texts in sets.items() if max(len(one.ids) for one in texts) <= job.context}
    steps, done = sum(map(len, fit.values())), 0
    qualities = {}
    for label, texts in fit.items():
        losses = []
        for one in texts:
            progress(Progress("measuring the loss", done / steps))
            found = scorer.logits(one.ids, one.start)
            losses.append(divergence.compare(logits_of(one.hidden), found, one.ids[one.start :]))
            done += 1
        qualities[label] = divergence.summarise(losses, label).model_dump(mode="json")
    return {
        "qualities": qualities,
        "ttft_ms": min(timing.ttft_ms for timing in times),
        "tpot_ms": min(timing.tpot_ms for timing in times),
        "peak_memory_bytes": peak,
    }


def timings(scorer: Scorer, tokens: Sequence[int]) -> list[Timing]:
    """Each round has a prompt of its own: OpenVINO's pipeline finds one again that it has seen."""
    scorer.generate(tokens[:8], 4)  # the first call compiles and allocates
    began, found = time.monotonic(), []
    for turn in range(1, 1 + _ROUNDS):
        found.append(scorer.generate(tokens[turn : turn + PROMPT_TOKENS], ANSWER_TOKENS))
        if time.monotonic() - began > _ENOUGH_S:
            break
    return found


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
