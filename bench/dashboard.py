"""The page of the fleet in a real Chromium, with 10,000 simulated devices that report every 30 s.

Real broker, controller and database; the browser, the devices and the controller share the machine's cores. The page
is opened, left open, and walked through as a person does it, each action until what it asked for is on the screen.

    python -m bench.dashboard [--devices 10000] [--minutes 10]
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from agent.platform import logs
from bench.figures import Figure, table
from bench.fleet import DEVICES
from bench.fleet_load import INTERVAL_S, Stage, staged
from fleet.core.roles import Role
from fleet.demo.processes import free_port
from fleet.demo.story import make_artifact
from fleet.operations.deploy import DeployOptions, deploy
from fleet.operations.links import make_link
from fleet.registry import Actor
from tests.browser import Page, browse

MINUTES, OPENED, ROUNDS = 10.0, 15, 20
#: What a person presses, one after the other, and what must be on the screen then.
_ROWS, _TITLE = "document.querySelectorAll('main tbody tr').length", "document.querySelector('h1')?.textContent"
_WALK = (
    ("#/devices", f"{_ROWS} === 100"),
    ("#/devices/sim-0042", f"{_TITLE} === 'sim-0042' && document.querySelector('dl.facts')"),
    ("#/devices?selector=profile%3Diot-x86%20and%20name%3Dsim-0007", f"{_ROWS} === 1"),
    ("#/artifacts", f"{_ROWS} >= 2"),
    ("#/rollouts", f"{_TITLE} === 'Rollouts' && document.querySelector('main .empty')"),
    ("#/overview", f"{_TITLE} === 'Overview' && document.querySelector('.heat canvas')"),
)
#: Milliseconds in the page itself, from the press until the frame after what was asked for is there.
_PRESS = """new Promise((done) => {{
  const began = performance.now();
  location.hash = {place!r};
  const look = () => ({there}) ? requestAnimationFrame(() => done(performance.now() - began)) : setTimeout(look, 4);
  setTimeout(look, 0);
}})"""


def figures(devices: int = DEVICES, minutes: float = MINUTES) -> list[Figure]:
    """All of them; a quarter of an hour."""
    logs.configure("error", "console")
    api = f"127.0.0.1:{free_port()}"
    with tempfile.TemporaryDirectory(prefix="phifleet-bench-") as folder, staged(Path(folder), devices, api) as stage:
        old = make_artifact(stage.fleet.home, "phi-old")
        make_artifact(stage.fleet.home, "phi-new")
        actor = Actor("bench", datetime.now(UTC))
        rows = [row for row in stage.fleet.registry.devices.all() if row.id.startswith("sim-")]
        deploy(stage.fleet, [old], rows, DeployOptions(probation_s=1.0), actor)
        stage.until(lambda: stage.serving(old.digest) == devices, f"all serve {old.id}")
        time.sleep(INTERVAL_S)
        return asyncio.run(_looked_at(stage, f"http://{api}", Path(folder) / "profile", minutes))


async def _looked_at(stage: Stage, url: str, profile: Path, minutes: float) -> list[Figure]:
    link, _ = make_link(stage.fleet, Role.ADMIN, Actor("bench", datetime.now(UTC)))
    async with browse(url + link, profile) as page:
        await page.size(1280, 900)
        await page.until(_WALK[-1][1], 30)
        opened = [await _opened(page) for _ in range(OPENED)]
        pressed = [
            await _pressed(page, _PRESS.format(place=place, there=there))
            for _ in range(ROUNDS)
            for place, there in _WALK
        ]
        heap = [await _heap(page)]
        while len(heap) < 1 + minutes * 2:
            await asyncio.sleep(30)
            heap.append(await _heap(page))
    share = statistics.quantiles(pressed, n=20)[18]
    by_place = {place: statistics.median(pressed[index :: len(_WALK)]) for index, (place, _) in enumerate(_WALK)}
    slowest = max(by_place, key=lambda place: by_place[place])
    what = f"page with {stage.devices} devices, opened until the heat map is drawn"
    spread = f"{min(opened):.0f} to {max(opened):.0f} ms, {OPENED} times"
    slow = f"slowest at the median: {slowest}, {by_place[slowest]:.0f} ms"
    return [
        Figure(what, statistics.median(opened), "ms", at_most=1000, note=spread),
        Figure("... an action until its answer is shown, median", statistics.median(pressed), "ms"),
        Figure("... 95th percentile", share, "ms", at_most=100, note=slow),
        Figure(
            f"... the tab's memory after {minutes:g} minutes of reports", heap[-1], "MB", peer="before", theirs=heap[0],
            ratio=heap[-1] / heap[0], at_most=1.2, note=f"each half minute: {' '.join(f'{one:.1f}' for one in heap)}",
        ),
    ]  # fmt: skip


async def _opened(page: Page) -> float:
    """Milliseconds from nothing to the heat map, as a person sees it who opens the page."""
    await page.run("document.body.replaceChildren()")
    began = time.perf_counter()
    await page.call("Page.reload", ignoreCache=True)
    await page.until(_WALK[-1][1])
    return 1000 * (time.perf_counter() - began)


async def _pressed(page: Page, step: str) -> float:
    """Milliseconds; a person looks at what is there before pressing again."""
    await asyncio.sleep(random.uniform(0.5, 1.5))
    return float(await page.run(step))


async def _heap(page: Page) -> float:
    """Megabytes in use after a collection."""
    await page.call("HeapProfiler.collectGarbage")
    return float(await page.run("performance.memory.usedJSHeapSize")) / 1e6


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=DEVICES)
    parser.add_argument("--minutes", type=float, default=MINUTES)
    given = parser.parse_args()
    print(table(figures(given.devices, given.minutes)))
