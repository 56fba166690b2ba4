"""Makes the screenshots of the fleet's page: a simulated fleet, a rollout that stops itself, a real browser."""

from __future__ import annotations

import asyncio
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from fleet.core.roles import Role
from fleet.demo.processes import free_port
from fleet.demo.story import ROLLOUT, Stage, canary_spec, staged
from fleet.operations.links import make_link
from fleet.operations.rollouts import start_rollout
from fleet.registry import Actor
from tests.browser import browse

FOLDER = Path(__file__).parent / "images"
DEVICES = 600
SIZE = (1200, 780)


async def shoot(stage: Stage, root: str, folder: Path) -> None:
    """Take the pictures while the rollout runs and after it has stopped."""
    path, _ = make_link(stage.fleet, Role.ADMIN, Actor("screenshots", datetime.now(UTC)))
    async with browse(root + path, folder / "profile") as page:
        await page.size(*SIZE)
        await page.until("document.querySelector('canvas')", 30)
        await asyncio.sleep(2)
        await page.screenshot(FOLDER / "overview.png")
        start_rollout(stage.fleet, ROLLOUT, canary_spec(stage.new), Actor("screenshots", datetime.now(UTC)))
        await page.run(f"location.hash = '#/rollouts/{ROLLOUT}'")
        await page.until("document.querySelector('h1 .state')?.textContent === 'taken back'", 300)
        await asyncio.sleep(4)
        await page.screenshot(FOLDER / "rollout.png")
        await page.run("location.hash = '#/devices/sim-0001'")
        await page.until("document.querySelectorAll('.line canvas').length >= 3", 60)
        await asyncio.sleep(1)
        await page.size(*SIZE, dark=True)
        await page.screenshot(FOLDER / "device-dark.png")


def main() -> None:
    """Write docs/images."""
    FOLDER.mkdir(exist_ok=True)
    api = f"127.0.0.1:{free_port()}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with staged(folder, DEVICES, 0.2, seed=2, say=print, api=api) as stage:
            asyncio.run(shoot(stage, f"http://{api}", folder))


if __name__ == "__main__":
    main()
