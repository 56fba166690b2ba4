"""Several builds side by side, as many as memory allows. What was built before an interruption is not built again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from agent.contract.manifest import Manifest
from agent.contract.profile import DeviceProfile, Recipe
from agent.platform.resources import available_bytes
from fleet.errors import BuildError, FleetError
from fleet.home import Home
from fleet.toolchains.build.build import BuildPlan, build, find_built, plan_build
from fleet.toolchains.checkpoint.checkpoint import Checkpoint
from fleet.toolchains.drivers import process
from fleet.toolchains.progress import DONE, FAILED, Progress, ProgressCallback

#: Left to everything else on the machine.
_RESERVE_BYTES = 512 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Request:
    """One artifact that is wanted."""

    profile: DeviceProfile
    recipe: Recipe
    after: Manifest | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a request: a manifest, or the reason why there is none. ``reused``: it was there already."""

    request: Request
    manifest: Manifest | None = None
    error: FleetError | None = None
    reused: bool = False


def build_all(
    model: Checkpoint, requests: Sequence[Request], home: Home, *, jobs: int = 1,
    progress: Callable[[int], ProgressCallback], memory_bytes: int | None = None,
) -> tuple[Outcome, ...]:  # fmt: skip
    """Outcomes in the order of ``requests``; one that fails does not stop the others.

    A build starts when its estimate fits beside those that run, into ``memory_bytes`` (what is available now); one that
    would not fit alone is refused. ``progress(i)`` is the callback of request i. An interruption ends all children,
    removes what is half made, and is passed on.
    """
    budget = memory_bytes if memory_bytes is not None else available_bytes() - _RESERVE_BYTES
    return _Queue(model, requests, home, budget, progress).run(max(1, jobs))


class _Queue:
    def __init__(
        self, model: Checkpoint, requests: Sequence[Request], home: Home, budget: int,
        progress: Callable[[int], ProgressCallback],
    ) -> None:  # fmt: skip
        self._model, self._requests, self._home = model, requests, home
        self._budget, self._progress = budget, progress
        self._outcomes: dict[int, Outcome] = {}
        self._lock = threading.Lock()

    def run(self, jobs: int) -> tuple[Outcome, ...]:
        waiting = self._to_build()
        threads = max(1, process.cores() // max(1, min(jobs, len(waiting))))
        running: dict[Future[None], int] = {}
        with process.stoppable() as stop, ThreadPoolExecutor(jobs) as pool:
            try:
                while waiting or running:
                    for wanted_by in self._startable(waiting, sum(running.values()), jobs - len(running)):
                        running[pool.submit(self._build, wanted_by, threads)] = waiting.pop(wanted_by)
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        running.pop(future)
                        future.result()
            except BaseException:
                stop()
                raise
        return tuple(self._outcomes[i] for i in range(len(self._requests)))

    def _to_build(self) -> dict[tuple[int, ...], int]:
        """Return the requests that one build is for, and its memory; of all others the outcome is noted.

        Profiles share recipes, and so requests an artifact.
        """
        plans: dict[str, tuple[BuildPlan, list[int]]] = {}
        for i, request in enumerate(self._requests):
            try:
                plan = plan_build(self._model, request.profile, request.recipe, request.after)
            except FleetError as error:
                self._note((i,), error=error)
            else:
                plans.setdefault(plan.id, (plan, []))[1].append(i)
        needs = {tuple(wanted_by): self._need(plan, tuple(wanted_by)) for plan, wanted_by in plans.values()}
        return {wanted_by: need for wanted_by, need in needs.items() if need is not None}

    def _need(self, plan: BuildPlan, wanted_by: tuple[int, ...]) -> int | None:
        """Return the bytes of memory; None where there is nothing to build, and the outcome is noted."""
        try:
            if found := find_built(plan, self._home):
                self._note(wanted_by, found, reused=True)
                return None
            need = plan.peak_memory_bytes
            if need > self._budget:
                raise BuildError(
                    f"building {plan.id} takes about {need / 2**30:.1f} GiB of memory, and {self._budget / 2**30:.1f} "
                    "GiB are available; build it on a larger machine"
                )
        except FleetError as error:
            self._note(wanted_by, error=error)
            return None
        return need

    def _startable(self, waiting: dict[tuple[int, ...], int], taken: int, slots: int) -> list[tuple[int, ...]]:
        """Return those that fit now, in order; a smaller one may overtake one that has to wait for memory."""
        chosen: list[tuple[int, ...]] = []
        for wanted_by, need in waiting.items():
            if len(chosen) < slots and taken + need <= self._budget:
                chosen.append(wanted_by)
                taken += need
        return chosen

    def _build(self, wanted_by: tuple[int, ...], threads: int) -> None:
        first = wanted_by[0]
        request, progress = self._requests[first], self._progress(first)
        try:
            manifest = build(
                self._model, request.profile, request.recipe, self._home,
                progress=progress, threads=threads, after=request.after,
            )  # fmt: skip
        except FleetError as error:
            progress(Progress(FAILED))
            self._note(wanted_by, error=error)
        else:
            progress(Progress(DONE))
            self._note(wanted_by, manifest)

    def _note(
        self, wanted_by: tuple[int, ...], manifest: Manifest | None = None, *, error: FleetError | None = None,
        reused: bool = False,
    ) -> None:  # fmt: skip
        """Where one build was for several requests, the first has it built and the others find it there."""
        with self._lock:
            for i in wanted_by:
                shared = manifest is not None and i != wanted_by[0]
                self._outcomes[i] = Outcome(self._requests[i], manifest, error, reused or shared)
