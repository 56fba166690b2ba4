"""Several builds side by side, as many as memory allows. What was built before an interruption is not built again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import psutil

from agent.contract.manifest import Manifest
from agent.contract.profile import DeviceProfile, Recipe
from fleet.errors import BuildError, FleetError
from fleet.home import Home
from fleet.toolchains import artifacts, process
from fleet.toolchains.build import build, cores, plan_build
from fleet.toolchains.checkpoint import Checkpoint
from fleet.toolchains.progress import ProgressCallback
from fleet.toolchains.registry import driver_of

#: Left to everything else on the machine.
_RESERVE_BYTES = 512 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Request:
    """One artifact that is wanted."""

    profile: DeviceProfile
    recipe: Recipe


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
    budget = memory_bytes if memory_bytes is not None else psutil.virtual_memory().available - _RESERVE_BYTES
    return _Queue(model, requests, home, max(1, jobs), budget, progress).run()


class _Queue:
    def __init__(
        self, model: Checkpoint, requests: Sequence[Request], home: Home, jobs: int, budget: int,
        progress: Callable[[int], ProgressCallback],
    ) -> None:  # fmt: skip
        self._model, self._requests, self._home = model, requests, home
        self._jobs, self._budget, self._progress = jobs, budget, progress
        self._threads = max(1, cores() // jobs)
        self._outcomes: dict[int, Outcome] = {}
        self._lock = threading.Lock()

    def run(self) -> tuple[Outcome, ...]:
        waiting = {i: self._need(i) for i in range(len(self._requests))}
        waiting = {i: need for i, need in waiting.items() if i not in self._outcomes}
        running: dict[Future[None], int] = {}
        with ThreadPoolExecutor(self._jobs) as pool:
            try:
                while waiting or running:
                    for i in self._startable(waiting, sum(running.values()), self._jobs - len(running)):
                        running[pool.submit(self._build, i)] = waiting.pop(i)
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        running.pop(future)
                        future.result()
            except BaseException:
                process.stop_all()
                raise
        return tuple(self._outcomes[i] for i in range(len(self._requests)))

    def _need(self, i: int) -> int:
        """Bytes of memory; the outcome is noted at once where nothing is to be built."""
        request = self._requests[i]
        try:
            plan = plan_build(self._model, request.profile, request.recipe)
            if found := artifacts.find(self._home, plan.id):
                self._outcomes[i] = Outcome(request, found, reused=True)
            need = driver_of(request.recipe.toolchain).peak_memory_bytes(request.recipe, self._model)
            if need > self._budget and i not in self._outcomes:
                raise BuildError(
                    f"building {plan.id} takes about {need / 2**30:.1f} GiB of memory, and {self._budget / 2**30:.1f} "
                    "GiB are available; build it on a larger machine"
                )
        except FleetError as error:
            self._outcomes[i] = Outcome(request, error=error)
            return 0
        return need

    def _startable(self, waiting: dict[int, int], taken: int, slots: int) -> list[int]:
        """Those that fit now, in order; a smaller one may overtake one that has to wait for memory."""
        chosen: list[int] = []
        for i, need in waiting.items():
            if len(chosen) < slots and taken + need <= self._budget:
                chosen.append(i)
                taken += need
        return chosen

    def _build(self, i: int) -> None:
        request = self._requests[i]
        try:
            manifest = build(
                self._model, request.profile, request.recipe, self._home,
                progress=self._progress(i), threads=self._threads,
            )  # fmt: skip
            outcome = Outcome(request, manifest)
        except FleetError as error:
            outcome = Outcome(request, error=error)
        with self._lock:
            self._outcomes[i] = outcome
