"""A stranger runs a rollout from the page: real controller, broker, database and browser; the devices are simulated."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.request import urlopen

import pytest
from click.testing import CliRunner

from fleet.cli.main import cli
from fleet.demo.processes import Process, free_port, running
from fleet.demo.story import SLOW_PROFILE, Stage, staged
from fleet.export.export import Papers, export
from fleet.operations.fleet import Fleet
from fleet.store.folder import FolderStore
from tests.browser import CHROMIUM, Page, browse
from tests.fleet.api.test_dashboard import fill, go, press, shows
from tests.waiting import wait_until

DEVICES = 60
PROFILE = "iot-x86"
AGENTS = ("kitchen-cam", "hall-cam")


async def plan_and_start(page: Page, stage: Stage) -> None:
    """As a person does it: the form, the plan, the question, and yes."""
    await go(page, "#/rollouts/new", stage.new.id)
    await fill(page, "form.form input", "autumn")
    chosen = f"[...document.querySelectorAll('select option')].find((one) => one.value === {json.dumps(stage.new.id)})"
    await page.run(f"{chosen}.selected = true")
    await page.run("document.querySelector('select').dispatchEvent(new Event('change', { bubbles: true }))")
    # The two real agents have no part in it: the model of the others is drawn.
    await fill(page, "input[placeholder='label.site=lyon']", f"not name in ({', '.join(AGENTS)})")
    await fill(page, "form.form label:nth-of-type(4) input", "40, 100%")
    await fill(page, "form.form input[type=number]", "0.3")
    await press(page, "Plan")
    await page.until(shows(f"{DEVICES} devices in 2 waves"))
    await page.until(shows("Bytes, at most"))
    await press(page, "Start the rollout")
    asked = await page.run("document.querySelector('dialog[open]').textContent")
    assert f"Changes the model on {DEVICES} devices in 2 waves" in asked
    await press(page, "Start the rollout", "dialog[open]")


async def enrol(page: Page, folder: Path, agents: ExitStack) -> None:
    """A token from the page, and two real agents that become devices with it."""
    await go(page, "#/enrolment", "New enrolment token")
    await page.until(f"[...document.querySelectorAll('form.form option')].some((one) => one.value === '{PROFILE}')")
    await fill(page, "form.form input[type=number]", str(len(AGENTS)))
    await page.run(f"document.querySelector('form.form select').value = '{PROFILE}'")
    await page.run("document.querySelector('form.form select').dispatchEvent(new Event('input', { bubbles: true }))")
    await press(page, "Make a token")
    await page.until("document.querySelector('pre.secret')")
    program, *command = (await page.run("document.querySelector('pre.secret').textContent")).split()
    assert program == "phifleet-agent"
    for name in AGENTS:
        where = ["--state-dir", str(folder / name)]
        typed = [sys.executable, "-m", "agent", *command, "--id", name, *where]
        done = await asyncio.to_thread(subprocess.run, typed, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and f"enrolled as {name} ({PROFILE})" in done.stdout, done.stderr
        log = folder / f"{name}.log"
        agents.enter_context(running(Process(name, ["agent", "run", "--port", "0", *where], log, {})))
    await page.until(shows("2 of 2"))
    await go(page, "#/overview", "Time per token")
    await page.until(shows(f"{len(AGENTS)} online"), 60)
    await go(page, f"#/devices/{AGENTS[0]}", "online")


def carry(stage: Stage) -> None:
    """The new model was built on another machine: it is not in the store, but lies exported in the folder."""
    store = FolderStore(stage.fleet.home.artifacts)
    stage.fleet.home.imports.mkdir()
    export(store, stage.new, stage.fleet.home.imports / "from-the-builder", Papers())
    shutil.rmtree(store.folder(stage.new.id))


async def take_in(page: Page, stage: Stage) -> None:
    """As the page's Artifacts offer it."""
    await go(page, "#/artifacts", "from-the-builder")
    await press(page, "Import")
    await press(page, "Import", "dialog[open]")
    await page.until(shows("here already"))


async def on_an_empty_fleet(link: str, folder: Path, agents: ExitStack) -> None:
    """What is shown where nothing is, says what to do next; the first two devices are real agents."""
    async with browse(link, folder / "first-profile") as page:
        await page.size(1200, 900)
        await page.until(shows("There is no device in this fleet yet"))
        await go(page, "#/rollouts", "There was no rollout yet")
        await enrol(page, folder, agents)
        no_errors(page)


def no_errors(page: Page) -> None:
    assert [one for one in page.events if one["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")] == []


async def a_rollout_that_stops(stage: Stage, link: str, folder: Path) -> None:
    async with browse(link, folder / "profile") as page:
        await page.size(1200, 900)
        await page.until(shows("Time per token"))
        await page.until(shows(f"{DEVICES + len(AGENTS)} online"), 30)
        await take_in(page, stage)
        await go(page, "#/overview", "Time per token")
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
        no_errors(page)


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")
def test_a_stranger_starts_a_rollout_sees_it_stop_and_reads_why(tmp_path: Path):
    api = f"127.0.0.1:{free_port()}"
    with ExitStack() as agents:

        def before(fleet: Fleet) -> None:
            asyncio.run(on_an_empty_fleet(signed_in(fleet, api), tmp_path, agents))

        with staged(tmp_path, DEVICES, 0.25, seed=3, say=lambda _: None, api=api, before=before) as stage:
            carry(stage)
            asyncio.run(a_rollout_that_stops(stage, signed_in(stage.fleet, api), tmp_path))
            rows = stage.fleet.registry.devices.all()
            serving = {(row.reported or {}).get("digest") for row in rows if row.id not in AGENTS}
            assert serving == {stage.old.digest}, "all are back"


def signed_in(fleet: Fleet, api: str) -> str:
    """The link that the command prints, once the controller's page is there."""
    made = CliRunner().invoke(cli, ["--home", str(fleet.home.root), "dashboard"], env={"PHIFLEET_API": api})
    assert made.exit_code == 0 and made.output.startswith(f"http://{api}/#sign-in="), made.output
    wait_until(lambda: answers(f"http://{api}/"))
    return made.output.strip()


def answers(url: str) -> bool:
    with suppress(OSError):
        return bool(urlopen(url, timeout=5).status == 200)
    return False
