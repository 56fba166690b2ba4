"""The fleet's page: what it is made of, who gets in, and each page and action in a real browser, in both themes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from agent.contract.enrolment import EnrolmentToken
from agent.contract.messages import State
from fleet.api.dashboard import FILES
from fleet.core.roles import Role
from fleet.export.export import Papers, export
from fleet.home import Home
from fleet.operations.links import make_link
from fleet.registry import Received, Recorder
from fleet.store.folder import FolderStore
from fleet.trust.ca import DeviceCA
from tests.browser import CHROMIUM, Page, browse
from tests.fleet.api.conftest import Api
from tests.fleet.api.test_enrolment import request_of
from tests.fleet.world import controller_runs, put_artifact, topic_of

NEEDS_CHROMIUM = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")
FOLDER = Path("fleet/api/page")


async def test_the_page_and_each_of_its_files_is_served_with_a_strict_policy(api: Api):
    for path in ["/", *(f"/static/{name}" for name in FILES)]:
        response = await api.client.get(path)
        assert response.status == 200
        policy = response.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "trusted-types 'none'" in policy
        again = await api.client.get(path, headers={"If-None-Match": response.headers["ETag"]})
        assert again.status == 304
    listed = {file.name for file in FOLDER.iterdir() if file.is_file()}
    assert listed <= set(FILES), "every file of the page is served"


@pytest.mark.parametrize("name", ["README.md", "preact.LICENSE", "..%2fapp.py", "vendor%2fhtm.umd.js", "app.py"])
async def test_no_other_file_is_served(api: Api, name: str):
    assert (await api.client.get(f"/static/{name}")).status == 404


def test_what_is_vendored_is_what_was_published_and_nothing_comes_from_outside():
    listed = dict(reversed(line.split()) for line in (FOLDER / "vendor/SHA256SUMS").read_text().splitlines())
    found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (FOLDER / "vendor").iterdir()}
    assert {name: found.get(name) for name in listed} == listed
    assert set(found) == {*listed, "SHA256SUMS", "README.md"}
    for file in FOLDER.iterdir():
        if file.is_file():
            assert set(re.findall(r"https?://[^\"' )]+", file.read_text())) <= {"http://www.w3.org/2000/svg"}, file


async def test_a_link_signs_in_once_and_is_no_token(api: Api):
    made = await api.post("/links", {"role": "operator"}, 201)
    code = made["path"].removeprefix("/#sign-in=")
    refused = await api.get("/me", 401, token=code)
    assert refused["code"] == "token.unknown"
    answer = await api.client.post("/api/v1/sign-in", json={"code": code})
    token = (await answer.json())["token"]
    me = await api.get("/me", token=token)
    assert (me["role"], me["scope"]) == ("operator", None)
    again = await api.client.post("/api/v1/sign-in", json={"code": code})
    assert again.status == 401
    assert (await again.json())["detail"].startswith("the link was used before")
    assert [one["name"] for one in (await api.get("/tokens"))["items"] if one["name"] == "sign-in"] == ["sign-in"]


async def test_a_link_that_expired_or_never_was_does_not_sign_in(api: Api):
    path, _ = make_link(api.fleet, Role.ADMIN, api.world.actor)
    api.world.clock.advance(minutes=11)
    for code, why in ((path.removeprefix("/#sign-in="), "expired"), ("phifleet_x", "no such link")):
        answer = await api.client.post("/api/v1/sign-in", json={"code": code})
        body = await answer.json()
        assert (answer.status, body["code"]) == (401, "link.refused") and why in body["detail"]
    answer = await api.client.post("/api/v1/sign-in", json={"codes": 1})
    assert (answer.status, (await answer.json())["code"]) == (422, "request.invalid")
    await api.post("/links", {"role": "viewer"}, 403, role=Role.RELEASER)
    refused = await api.post("/links", {"role": "viewer", "scope": "profile=="}, 422)
    assert refused["position"] == 8


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/tokens", {"name": "ci", "role": "viewer"}, "token"),
        ("/links", {"role": "viewer"}, "path"),
        ("/webhooks", {"url": "https://chat.example/hook"}, "secret"),
    ],
)
async def test_what_is_shown_once_is_kept_nowhere(api: Api, path: str, body: dict[str, Any], field: str):
    first = await api.ask("POST", path, body, Idempotency_Key="one")
    secret = (await first.json())[field]
    again = await api.ask("POST", path, body, Idempotency_Key="one")
    assert (again.status, (await again.json())["code"]) == (409, "idempotency.shown_once")
    api.world.registry.close()
    kept = b"".join(file.read_bytes() for file in api.world.home.root.glob("fleet.db*"))
    assert kept and (field == "secret" or secret.rpartition("=")[2].encode() not in kept), "a webhook's secret signs"


def something_happened(api: Api) -> None:
    """One device failed, one is offline, one is well; a label is markup."""
    world = api.world
    first, second = world.deploy("pi-1", "pi-2")
    failure = {"code": "runtime.load", "message": "<img src=x onerror=window.hit=1> said nothing"}
    messages: list[Any] = [
        world.presence("pi-1"), world.presence("pi-2"), world.presence("pi-3", online=False), world.facts("pi-1"),
        world.reported(first, State.FAILED, failure=failure), world.reported(second, State.TRANSFERRING),
    ]  # fmt: skip
    received = [Received(topic_of(one, one.device), one.to_json(), world.clock.now()) for one in messages]
    Recorder(world.registry).record(received)
    world.registry.devices.label("pi-2", {"site": "<b>lyon</b>"}, world.actor)
    controller_runs(world)


async def test_the_overview_has_a_column_for_each_figure_and_says_what_is_wrong(api: Api):
    something_happened(api)
    shown = await api.get("/overview")
    assert shown["devices"] == ["pi-1", "pi-2", "pi-3"]
    assert [shown["states"][place] for place in shown["state"]] == ["failed", "transferring", "none"]
    assert shown["presence"] == ["online", "online", "offline"]
    assert {entry["device"]: entry["kind"] for entry in shown["attention"]} == {"pi-1": "failed", "pi-3": "offline"}
    scoped = await api.get("/overview", token=api.token(Role.VIEWER, scope="name=pi-2"))
    assert (scoped["devices"], scoped["attention_count"]) == (["pi-2"], 0)
    nothing = await api.get("/overview", token=api.token(Role.VIEWER, scope="name=none"))
    assert nothing["devices"] == []


async def test_many_devices_are_labelled_at_once_or_none(api: Api):
    assert await api.post("/labels", {"selector": "name in (pi-1, pi-2)", "labels": {"site": "lyon"}}) == {"devices": 2}
    assert (await api.get("/devices/pi-2"))["labels"] == {"site": "lyon"}
    found = (await api.get("/devices?selector=label.site%3Dlyon"))["items"]
    assert [one["device"] for one in found] == ["pi-1", "pi-2"], "selectors see it"
    entry = (await api.get("/audit"))["items"][-1]
    assert (entry["action"], entry["subject"], entry["details"]["devices"]) == (
        "device.label",
        "2 devices",
        ["pi-1", "pi-2"],
    )
    await api.post("/labels", {"devices": ["pi-3", "nobody"], "labels": {"site": "lyon"}}, 404)
    assert (await api.get("/devices/pi-3"))["labels"] == {}
    await api.post("/labels", {"labels": {"a": "b"}}, 422)
    await api.post("/labels", {"devices": ["pi-3"], "labels": {"A B": "b"}}, 422)
    scoped = api.token(Role.OPERATOR, scope="name=pi-1")
    assert await api.post("/labels", {"selector": "has profile", "labels": {"site": None}}, token=scoped) == {
        "devices": 1
    }
    refused = await api.post("/labels", {"devices": ["pi-2"], "labels": {"site": None}}, 403, token=scoped)
    assert refused["code"] == "token.scope"


@asynccontextmanager
async def at(api: Api, tmp_path: Path, role: Role = Role.ADMIN) -> AsyncIterator[Page]:
    path, _ = make_link(api.fleet, role, api.world.actor)
    root = str(api.client.make_url("/")).rstrip("/")
    async with browse(root + path, tmp_path / "profile") as page:
        await page.size(1200, 800)
        await page.until("document.querySelector('header nav')")
        yield page
        urls = [one["params"]["request"]["url"] for one in page.events if one["method"] == "Network.requestWillBeSent"]
        assert all(url.startswith((root, "about:")) for url in urls)
        assert not await page.run("window.hit")
        said = [one for one in page.events if one["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
        assert not [one for one in said if "status of 4" not in json.dumps(one)], "errors in the console"


def shows(text: str) -> str:
    return f"document.querySelector('main')?.textContent.includes({json.dumps(text)})"


async def go(page: Page, place: str, text: str) -> None:
    await page.run(f"location.hash = {json.dumps(place)}")
    await page.until(shows(text))


async def press(page: Page, label: str, within: str = "main") -> None:
    """A button that can be seen."""
    seen = f"one.textContent === {json.dumps(label)} && one.offsetParent"
    await page.run(f"[...document.querySelectorAll('{within} button')].find((one) => {seen}).click()")


async def fill(page: Page, selector: str, text: str) -> None:
    """A field, as by typing."""
    typed = f"field.value = {json.dumps(text)}; field.dispatchEvent(new Event('input', {{ bubbles: true }}))"
    await page.run(f"(() => {{ const field = document.querySelector({json.dumps(selector)}); {typed}; }})()")


async def serious(page: Page) -> list[str]:
    """What axe finds that keeps people out."""
    source = resources.files("axe_core_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    await page.run(f"{source}; 0")
    found = await page.run("axe.run().then((result) => JSON.stringify(result.violations))")
    return [
        f"{one['id']}: {one['nodes'][0]['html']}"
        for one in json.loads(found)
        if one["impact"] in ("serious", "critical")
    ]


PAGES = [
    ("#/overview", "What needs attention"), ("#/devices", "pi-2"), ("#/devices/pi-1", "Inference over time"),
    ("#/devices?selector=profile%3D%3D", "^"), ("#/artifacts", "onnx_genai int4"),
    ("#/rollouts", "There was no rollout"), ("#/rollouts/new", "New rollout"), ("#/access", "New token"),
    ("#/enrolment", "New enrolment token"), ("#/audit", "Verify the record"), ("#/nothing", "no such page"),
]  # fmt: skip


@pytest.mark.browser
@NEEDS_CHROMIUM
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
async def test_each_page_keeps_nobody_out_and_hostile_text_does_nothing(api: Api, tmp_path: Path, dark: bool):
    something_happened(api)
    async with at(api, tmp_path) as page:
        assert await page.run("location.hash") == "", "the code is out of the address"
        for place, text in PAGES:
            await page.size(1200, 800, dark=dark)
            await go(page, place, text)
            assert await serious(page) == [], place
            await page.size(380, 800, dark=dark)
            wide = await page.run("document.documentElement.scrollWidth")
            assert wide <= 380, f"{place} is {wide} pixels wide on a phone"
        await go(page, "#/devices", "<b>lyon</b>")


@pytest.mark.browser
@NEEDS_CHROMIUM
async def test_actions_ask_first_say_how_many_devices_and_do_it(api: Api, tmp_path: Path):
    something_happened(api)

    async with at(api, tmp_path) as page:
        await go(page, "#/devices?selector=name%3Dpi-3", "pi-3")
        await press(page, "Label these devices")
        await page.until("document.querySelector('dialog[open]')")
        await fill(page, "dialog[open] input", "rack=7")
        await press(page, "Label these devices", "dialog[open]")
        await page.until(shows("rack=7"))
        await go(page, "#/devices/pi-2", "Cancel the order")
        await press(page, "Cancel the order")
        assert "this 1 device" in await page.run("document.querySelector('dialog[open]').textContent")
        await press(page, "Cancel the order", "dialog[open]")
        await page.until("!document.querySelector('dialog[open]')")
        assert any(row.action == "deployment.cancel" for row in api.world.registry.audit.trail(5))
        await press(page, "Revoke")
        await press(page, "Revoke", "dialog[open]")
        await page.until("document.querySelector('.facts').textContent.includes('revoked')")
        await go(page, "#/artifacts", "Withdraw")
        await press(page, "Withdraw")
        await press(page, "Withdraw", "dialog[open]")
        await page.until(shows("withdrawn"))
        await go(page, "#/access", "New token")
        await fill(page, "form.form input", "ci")
        await press(page, "Make a token")
        await page.until("document.querySelector('.secret')?.textContent.startsWith('phifleet_')")
        await fill(page, "form.form input[type=url]", "http://127.0.0.1:9/hook")
        await press(page, "Make a webhook")
        await page.until("[...document.querySelectorAll('.secret')].at(-1)?.textContent.startsWith('whsec_')")
        await go(page, "#/audit", "device.revoke")
        await press(page, "Verify the record")
        await page.until(shows("entries are as they were written"))
        await page.run("[...document.querySelectorAll('header button')].at(-1).click()")
        await page.until("document.querySelector('.sign-in')")


def carried(api: Api, tmp_path: Path) -> str:
    """An artifact that another controller built and exported lies in the folder; its id."""
    other = Home(tmp_path / "other")
    manifest = put_artifact(other, b"elsewhere", id="from-elsewhere")
    api.world.home.imports.mkdir()
    export(FolderStore(other.artifacts), manifest, api.world.home.imports / "carried", Papers(oci=True))
    return manifest.id


async def test_an_artifact_that_was_carried_here_is_taken_in_once(api: Api, tmp_path: Path):
    assert (await api.get("/imports"))["items"] == []
    artifact = carried(api, tmp_path)
    (api.world.home.imports / "nothing").mkdir()
    found = {one["name"]: one for one in (await api.get("/imports"))["items"]}
    assert (found["carried"]["artifact"], found["carried"]["there"]) == (artifact, False)
    assert "is no OCI image layout" in found["nothing"]["problem"]
    taken = await api.post("/imports", {"name": "carried"}, 201)
    assert (taken["artifact"], taken["published"]) == (artifact, False)
    assert (await api.post("/imports", {"name": "carried"}, 201))["digest"] == taken["digest"]
    entries = [row for row in api.world.registry.audit.trail(10) if row.action == "artifact.import"]
    assert [row.subject for row in entries] == [artifact], "what was here already is no event"
    assert {one["name"]: one["there"] for one in (await api.get("/imports"))["items"]}["carried"]


@pytest.mark.parametrize("name", ["..", ".", "absent", "carried/model", "/etc", "../home", "CARRIED"])
async def test_no_folder_outside_is_taken_in(api: Api, tmp_path: Path, name: str):
    carried(api, tmp_path)
    problem = await api.post("/imports", {"name": name}, 404)
    assert "holds no folder called" in problem["detail"]


async def test_bytes_that_were_changed_on_the_way_are_not_taken_in(api: Api, tmp_path: Path):
    artifact = carried(api, tmp_path)
    (api.world.home.imports / "carried" / "model" / "model.bin").write_bytes(b"ELSEWHERE")
    problem = await api.post("/imports", {"name": "carried"}, 500)
    assert "is not what its manifest says" in problem["detail"]
    assert artifact not in {one["artifact"] for one in (await api.get("/artifacts"))["items"]}


@pytest.mark.browser
@NEEDS_CHROMIUM
async def test_an_artifact_is_imported_and_a_release_says_who_gets_which(api: Api, tmp_path: Path):
    artifact = carried(api, tmp_path)
    async with at(api, tmp_path) as page:
        await go(page, "#/artifacts", "Built elsewhere")
        await page.until(shows(artifact))
        await press(page, "Import")
        assert "It changes no device" in await page.run("document.querySelector('dialog[open]').textContent")
        await press(page, "Import", "dialog[open]")
        await page.until(shows("here already"))
        await api.post("/releases", {"release": "autumn", "artifacts": [api.world.manifest.id]}, 201)
        await page.run("location.reload()")
        await page.until(shows("Who gets which"))
        await press(page, "Who gets which")
        await page.until(shows(f"3 devices: iot-x86, {api.world.manifest.id}"))
        assert await serious(page) == []


@pytest.mark.browser
@NEEDS_CHROMIUM
async def test_a_machine_is_enrolled_and_one_is_rejected(api: Api, tmp_path: Path):
    DeviceCA(api.world.home, api.world.clock.now).init()
    async with at(api, tmp_path) as page:
        await go(page, "#/enrolment", "New enrolment token")
        await page.until("document.querySelectorAll('form.form option').length > 8")
        await fill(page, "form.form input[type=number]", "2")
        await fill(page, "form.form label:nth-of-type(4) input", "site=lyon, line=3")
        await page.run("document.querySelector('form.form input[type=checkbox]').click()")
        await press(page, "Make a token")
        await page.until(
            "document.querySelector('pre.secret')?.textContent.includes('phifleet-agent enrol --url http')"
        )
        command = await page.run("document.querySelector('pre.secret').textContent")
        await page.until(shows("0 of 2"))
        assert await page.run("document.documentElement.scrollWidth <= innerWidth"), "the token breaks its line"
        secret = EnrolmentToken.parse(command.split()[-1]).secret
        for device in ("cam-1", "cam-2"):
            body = {"token": secret, "device": device, "csr": request_of(device)}
            assert (await (await api.client.post("/api/v1/enrolments", json=body)).json())["state"] == "waiting"
        await page.until(shows("cam-2"))
        assert await page.run("document.querySelectorAll('main table')[0].rows.length") == 3
        await press(page, "Accept")
        assert "becomes the device cam-1" in await page.run("document.querySelector('dialog[open]').textContent")
        await press(page, "Accept", "dialog[open]")
        await page.until("!document.body.textContent.includes('cam-1')")
        await press(page, "Reject")
        await press(page, "Reject", "dialog[open]")
        await page.until(shows("No machine waits"))
        await press(page, "Revoke")
        await press(page, "Revoke", "dialog[open]")
        await page.until(shows("revoked"))
        await go(page, "#/devices/cam-1", "lyon")


@pytest.mark.browser
@NEEDS_CHROMIUM
async def test_an_operator_accepts_machines_and_makes_no_tokens(api: Api, tmp_path: Path):
    async with at(api, tmp_path, Role.OPERATOR) as page:
        await go(page, "#/enrolment", "No machine waits")
        assert "token" not in await page.run(
            "[...document.querySelectorAll('main button')].map((b) => b.textContent).join()"
        )
        assert await page.run("document.querySelectorAll('main form').length") == 0


@pytest.mark.browser
@NEEDS_CHROMIUM
async def test_a_viewer_sees_no_action_and_a_used_link_says_so(api: Api, tmp_path: Path):
    something_happened(api)
    async with at(api, tmp_path, Role.VIEWER) as page:
        await go(page, "#/devices/pi-1", "Inference over time")
        assert await page.run("document.querySelectorAll('main button').length") == 0
        assert "Audit" not in await page.run("document.querySelector('header').textContent")
    path, _ = make_link(api.fleet, Role.VIEWER, api.world.actor)
    await api.client.post("/api/v1/sign-in", json={"code": path.removeprefix("/#sign-in=")})
    root = str(api.client.make_url("/")).rstrip("/")
    async with browse(root + path, tmp_path / "other") as page:
        await page.until("document.querySelector('[role=alert]')?.textContent.includes('was used before')")


@pytest.mark.browser
@NEEDS_CHROMIUM
async def test_a_controller_that_is_gone_is_said_on_every_page(api: Api, tmp_path: Path):
    async with at(api, tmp_path) as page:
        await page.until("document.querySelector('.trouble')?.textContent.includes('No controller runs')")
