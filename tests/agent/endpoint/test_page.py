"""The chat page: what it is made of, and a person's way through it in a real browser."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agent.endpoint import ApiKey
from tests.agent.endpoint.browser import CHROMIUM, Page, browse
from tests.agent.endpoint.conftest import Endpoint, Serve
from tests.simulators.inference import SimulatedInference
from tests.waiting import until

NEEDS_CHROMIUM = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")
FILES = Path("agent/endpoint/page")


async def test_the_page_and_its_files(endpoint: Endpoint):
    async with endpoint.http.get(endpoint.url + "/") as response:
        text = await response.text()
        assert response.headers["Content-Type"].startswith("text/html")
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
        tag = response.headers["ETag"]
    for name in re.findall(r'(?:src|href)="(static/[^"]+)"', text):
        assert (await endpoint.get(f"/{name}"))[0] == 200
    assert (await endpoint.get("/", headers={"If-None-Match": tag}))[0] == 304


def test_nothing_comes_from_outside():
    for file in FILES.iterdir():
        links = re.findall(r"https?://[^\"' )]+|//[a-z]+\.[a-z]", file.read_text())
        assert set(links) <= {"http://www.w3.org/2000/svg"}, file


@pytest.mark.parametrize("name", ["..%2fapp.py", "page.py", "", "index.html%00"])
async def test_no_other_file_is_served(endpoint: Endpoint, name: str):
    assert (await endpoint.get(f"/static/{name}"))[0] == 404


async def test_props(endpoint: Endpoint):
    async with endpoint.http.get(endpoint.url + "/props") as response:
        props = await response.json()
    assert props["ready"] and props["quantization"]["precision"] == "int4"
    assert props["quality"]["kl_divergence"] == 0.05
    assert props["context"] == 4096 and len(props["digest"]) == 64
    endpoint.inference.manifest = None
    endpoint.stats.state, endpoint.stats.reason = "failed", "it died 5 times"
    async with endpoint.http.get(endpoint.url + "/props") as response:
        assert await response.json() == {"ready": False, "state": "failed", "reason": "it died 5 times"}


@asynccontextmanager
async def at(endpoint: Endpoint, tmp_path: Path) -> AsyncIterator[Page]:
    async with browse(endpoint.url, tmp_path / "profile") as page:
        await page.size(1200, 760)
        yield page
        urls = [one["params"]["request"]["url"] for one in page.events if one["method"] == "Network.requestWillBeSent"]
        assert all(url.startswith((endpoint.url, "about:")) for url in urls)
        assert not [one for one in page.events if one["method"] == "Runtime.exceptionThrown"]


def asking(text: str) -> str:
    return f"document.getElementById('prompt').value = {text!r}; document.getElementById('ask').requestSubmit()"


READY = "document.getElementById('state').className === 'ready'"
ANSWERED = "!document.getElementById('send').hidden && document.querySelector('.turn:last-child.assistant')"


@pytest.mark.browser
@NEEDS_CHROMIUM
async def test_a_conversation(serve: Serve, tmp_path: Path):
    endpoint = await serve(SimulatedInference(answer="Paris <img src=x onerror=alert(1)> & more", delay_s=0.01))
    async with at(endpoint, tmp_path) as page:
        await page.until(READY)
        assert "INT4" in await page.run("document.getElementById('signed').innerText")
        await page.run(asking("Capital?"))
        await page.until(ANSWERED)
        last = "document.querySelector('.turn:last-child')"
        assert await page.run(f"{last}.textContent") == "Paris <img src=x onerror=alert(1)> & more"
        assert await page.run(f"{last}.childElementCount") == 0
        assert re.search(
            r"[\d.]+ tokens/s · first token", await page.run("document.getElementById('figures').innerText")
        )
        await page.run(asking("And then?"))
        await page.until("document.querySelectorAll('.turn.assistant').length === 2")
        await page.until(ANSWERED)
        assert endpoint.inference.requests[1].prompt.count("<|user|>") == 2


@pytest.mark.browser
@NEEDS_CHROMIUM
async def test_stop_errors_and_keys(serve: Serve, tmp_path: Path):
    endpoint = await serve(SimulatedInference(answer="word " * 2000, delay_s=0.01), keys=(ApiKey("me", "secret"),))
    async with at(endpoint, tmp_path) as page:
        await page.until("!document.getElementById('key-label').hidden")
        await page.run(
            "(k => {k.value = 'secret'; k.dispatchEvent(new Event('change'))})(document.getElementById('key'))"
        )
        await page.until(READY)
        await page.run(asking("Go on"))
        await page.until("document.querySelector('.turn.assistant')?.textContent.length > 20")
        await page.run("document.getElementById('stop').click()")
        await page.until(ANSWERED)
        await until(lambda: endpoint.finished, "the endpoint noticed that its reader left")
        assert endpoint.finished[0].error == "cancelled"
        await page.run("document.getElementById('tokens').value = -1")
        await page.run(asking("Again"))
        await page.until("document.querySelector('.turn.error')?.textContent.includes('max_tokens')")
        endpoint.inference.manifest = None
        await page.until("document.getElementById('state').className === 'down'")
