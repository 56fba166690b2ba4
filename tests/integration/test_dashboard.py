"""A stranger runs a rollout from the page: real controller, broker, database and browser; the devices are simulated."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from fleet.demo.processes import free_port
from fleet.demo.story import SLOW_PROFILE, Stage, staged
from tests.browser import CHROMIUM, Page, browse
from tests.fleet.api.test_dashboard import fill, go, press, shows

DEVICES = 60


async def plan_and_start(page: Page, stage: Stage) -> None:
    """As a person does it: the form, the plan, the question, and yes."""
    await go(page, "#/rollouts/new", stage.new.id)
    await fill(page, "form.form input", "autumn")
    chosen = f"[...document.querySelectorAll('select option')].find((one) => one.value === {json.dumps(stage.new.id)})"
    await page.run(f"{chosen}.selected = true")
    await page.run("document.querySelector('select').dispatchEvent(new Event('change', { bubbles: true }))")
    await fill(page, "input[placeholder='label.site=lyon']", "has profile")
    await fill(page, "form.form label:nth-of-type(4) input", "40, 100%")
    await fill(page, "form.form input[type=number]", "0.3")
    await press(page, "Plan")
    await page.until(shows(f"{DEVICES} devices in 2 waves"))
    await press(page, "Start the rollout")
    asked = await page.run("document.querySelector('dialog[open]').textContent")
    assert f"Changes the model on {DEVICES} devices in 2 waves" in asked
    await press(page, "Start the rollout", "dialog[open]")


async def a_strangers_path(stage: Stage, link: str, folder: Path) -> None:
    async with browse(link, folder / "profile") as page:
        await page.size(1200, 900)
        await page.until(shows("Time per token"))
        await page.until(shows(f"{DEVICES} online"))
        assert SLOW_PROFILE in await page.run("document.querySelector('main table').textContent")
        await go(page, "#/devices/sim-0001", "Orders")
        await page.until("document.querySelectorAll('.line canvas').length >= 3", 30)
        await plan_and_start(page, stage)
        await page.until("location.hash === '#/rollouts/autumn'")
        await page.until("document.querySelector('h1 .state')?.textContent === 'taken back'", 180)
        await page.until(shows("slower per token"))
        why = await page.run("document.querySelector('.note')?.textContent ?? ''")
        assert SLOW_PROFILE in why and "slower per token" in why
        await page.until("document.querySelectorAll('.bar .reverted').length > 0")
        await go(page, "#/overview", "was stopped and has taken its devices back")
        await go(page, "#/audit", "token:sign-in")
        errors = [one for one in page.events if one["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
        assert errors == []


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")
def test_a_stranger_starts_a_rollout_sees_it_stop_and_reads_why(tmp_path: Path):
    from click.testing import CliRunner

    from fleet.cli.main import cli

    api = f"127.0.0.1:{free_port()}"
    with staged(tmp_path, DEVICES, 0.25, seed=3, say=lambda _: None, api=api) as stage:
        home = str(stage.fleet.home.root)
        made = CliRunner().invoke(cli, ["--home", home, "dashboard"], env={"PHIFLEET_API": api})
        assert made.exit_code == 0 and made.output.startswith(f"http://{api}/#sign-in="), made.output
        asyncio.run(a_strangers_path(stage, made.output.strip(), tmp_path))
        serving = {(row.reported or {}).get("digest") for row in stage.fleet.registry.devices.all()}
        assert serving == {stage.old.digest}, "all are back"
