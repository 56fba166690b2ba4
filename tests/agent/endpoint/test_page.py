"""The chat page: what it is made of, and a person's way through it in a real browser."""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agent.endpoint import ApiKey
from tests.agent.endpoint.conftest import Endpoint, Serve
from tests.browser import CHROMIUM, Page, browse
from tests.simulators.inference import EVERYTHING, SimulatedInference
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
    for file in (one for one in FILES.iterdir() if one.is_file()):
        links = re.findall(r"https?://[^\"' )]+|//[a-z]+\.[a-z]", file.read_text())
        assert set(links) <= {"http://www.w3.org/2000/svg"}, file


def test_what_is_vendored_is_what_was_published():
    listed = dict(reversed(line.split()) for line in (FILES / "vendor/SHA256SUMS").read_text().splitlines())
    found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (FILES / "vendor").iterdir()}
    assert {name: found.get(name) for name in listed} == listed
    assert set(found) == {*listed, "SHA256SUMS", "README.md"}
    table = (FILES / "vendor/README.md").read_text()
    for name, version in (("marked.umd.js", r"marked v(\S+)"), ("purify.min.js", r"DOMPurify (\S+)")):
        stated = re.search(version, (FILES / "vendor" / name).read_text())
        assert stated and f"| {stated[1]} |" in table


@pytest.mark.parametrize(
    "name",
    ["vendor%2fmarked.umd.js", "vendor", "README.md", "marked.LICENSE", "..%2fapp.py", "page.py", "", "index.html%00"],
)
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
        assert not await page.run("window.hit")
        assert not [one for one in page.events if one["method"] == "Runtime.exceptionThrown"]


BODY = "document.querySelector('.turn:last-child .body')"


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
        last = "document.querySelector('.turn:last-child .body')"
        assert (await page.run(f"{last}.innerText")).startswith("Paris <img src=x onerror=alert(1)> & more")
        assert await page.run(f"{last}.querySelectorAll('img').length") == 0
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
        await page.run("document.getElementById('tokens').value = 0")
        await page.run(asking("Again"))
        await page.until("document.querySelector('.turn.error')?.textContent.includes('max_tokens')")
        endpoint.inference.manifest = None
        await page.until("document.getElementById('state').className === 'down'")


MARKDOWN = """# Title

Some **bold**, *soft*, `code` and a [link](https://example.org/a?b=1).

1. one
2. two
   - inner

> quoted

```python
print("<b>" & 1)
```

| a | b |
|---|:-:|
| 1 | ~~2~~ |

- [x] done
"""


async def put(page: Page, text: str = "Go") -> None:
    await page.until(READY)
    await page.run(asking(text))
    await page.until(ANSWERED)


@pytest.mark.browser
@NEEDS_CHROMIUM
async def test_markdown_is_rendered(serve: Serve, tmp_path: Path):
    endpoint = await serve(SimulatedInference(answer=list(MARKDOWN)))
    async with at(endpoint, tmp_path) as page:
        await put(page, "Show me **everything**")
        assert await page.run("document.querySelector('.turn.user').innerText") == "Show me **everything**"
        for selector, text in {
            "h1": "Title", "strong": "bold", "em": "soft", "p code": "code", "ol > li:first-child": "one",
            "ol ul li": "inner", "blockquote p": "quoted", "th:nth-child(2)": "b", "td del": "2",
            "pre code": 'print("<b>" & 1)',
        }.items():  # fmt: skip
            found = await page.run(f"{BODY}.querySelector('{selector}')?.textContent.trim()")
            assert found == text, selector
        link = f"{BODY}.querySelector('a')"
        assert await page.run(f"{link}.getAttribute('href')") == "https://example.org/a?b=1"
        assert await page.run(f"{link}.rel") == "noopener noreferrer nofollow"
        assert "☑ done" in await page.run(f"{BODY}.innerText")


#: Each would set ``window.hit``, run a script, load something or leave the page, were it let.
HOSTILE = {
    "a script": "<script>window.hit = 1</script>",
    "a script in a block": "\n\n<div>\n<script>window.hit = 1</script>\n</div>\n\n",
    "an image's error": "<img src=x onerror='window.hit = 1'>",
    "an image of Markdown": "![x](https://evil.example/x.png)",
    "an image that breaks out": '![x" onerror="window.hit=1](y)',
    "a javascript link": "[x](javascript:window.hit=1)",
    "a javascript link in capitals": "[x](JaVaScRiPt:window.hit=1)",
    "a javascript link with a tab": "[x](java&#x09;script:window.hit=1)",
    "a javascript link in entities": "[x](&#106;avascript:window.hit=1)",
    "a reference": "[x][1]\n\n[1]: javascript:window.hit=1",
    "an autolink": "<javascript:window.hit=1>",
    "a data link": "[x](data:text/html;base64,PHNjcmlwdD5oaXQ9MTwvc2NyaXB0Pg==)",
    "a data image": "![x](data:image/svg+xml,%3Csvg%20onload=%22hit=1%22%3E)",
    "a vbscript link": "[x](vbscript:hit)",
    "a file": "[x](file:///etc/passwd)",
    "a path of ours": "[x](/v1/models)",
    "a title": '[x](https://a.example "a\\" onmouseover=\\"window.hit=1")',
    "a link that breaks out": '[x](https://a.example/"onmouseover="window.hit=1)',
    "an svg": "<svg onload='window.hit=1'><script>window.hit=1</script></svg>",
    "MathML": "<math><mtext><table><mglyph><style><img src=x onerror='window.hit=1'>",
    "a frame": "<iframe srcdoc='<script>parent.hit=1</script>'></iframe>",
    "an object": "<object data='javascript:window.hit=1'></object><embed src='javascript:window.hit=1'>",
    "a form": "<form action='javascript:window.hit=1'><button>x</button></form>",
    "a style": "<style>@import 'https://evil.example/x.css'; body { display: none }</style>",
    "a meta": "<meta http-equiv='refresh' content='0;url=https://evil.example'>",
    "a base": "<base href='https://evil.example/'>",
    "an id of ours": "<a id='send' name='prompt'>x</a>",
    "nested": "<div><div><p><b onclick='window.hit=1'><a href='javascript:window.hit=1'>x</a></b></p></div></div>",
    "a comment": "<!--><img src=x onerror='window.hit=1'>-->",
    "CDATA": "<![CDATA[<img src=x onerror='window.hit=1'>]]>",
    "in a table": "| <img src=x onerror='window.hit=1'> |\n|---|\n| [x](javascript:window.hit=1) |",
    "in a heading": "# <img src=x onerror='window.hit=1'>",
    "a fence's language": '```x" onmouseover="window.hit=1\ncode\n```',
    "in code": "`<img src=x onerror='window.hit=1'>`",
    "a fence that does not end": "```\n<script>window.hit=1</script>",
    "zero bytes": "<scr\0ipt>window.hit=1</scr\0ipt>",
    "deep": ">" * 3000 + " deep",
    "deep lists": "".join("  " * n + "- x\n" for n in range(300)),
    "many marks": "*" * 20_000 + "_" * 20_000,
    "many brackets": "[" * 5_000 + "](" * 5_000,
}


@pytest.mark.browser
@NEEDS_CHROMIUM
async def test_hostile_markdown_does_nothing(serve: Serve, tmp_path: Path):
    inference = SimulatedInference()
    endpoint = await serve(inference)
    async with at(endpoint, tmp_path) as page:
        await page.until(READY)
        for name, text in HOSTILE.items():
            inference.answer = [text[at : at + 997] for at in range(0, len(text), 997)]
            await page.run("document.getElementById('clear').click()")
            await put(page)
            allowed = await page.run(f"[...{BODY}.querySelectorAll('*')].map(one => one.localName)")
            assert not set(allowed) - ELEMENTS, name
            attributes = await page.run(
                f"[...{BODY}.querySelectorAll('*')].flatMap(one => [...one.attributes].map(a => [a.name, a.value]))"
            )
            assert {key for key, _ in attributes} <= ATTRIBUTES, name
            hrefs = [value for key, value in attributes if key == "href"]
            assert all(href.startswith(("https://", "http://", "mailto:")) for href in hrefs), name
            # Whatever could be clicked or pointed at is.
            await page.run(
                f"{BODY}.querySelectorAll('*:not(a[href])').forEach(one => {{"
                "for (const kind of ['click', 'mouseover', 'focus']) one.dispatchEvent(new Event(kind)); })"
            )
            assert not await page.run("window.hit"), name
            assert await page.run("document.baseURI") == endpoint.url + "/"
        assert not [one for one in page.events if one["method"] == "Page.frameRequestedNavigation"]


ELEMENTS = {
    "a",
    "blockquote",
    "br",
    "button",
    "code",
    "del",
    "em",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
    "hr",
    "li",
    "ol",
    "p",
    "pre",
    "strong",
    "table",
    "tbody",
    "td",
    "th",
    "thead",
    "tr",
    "ul",
}
ATTRIBUTES = {"align", "class", "href", "rel", "start", "target", "title", "type"}


@pytest.mark.browser
@NEEDS_CHROMIUM
async def test_the_pages_policy_holds_even_where_the_page_has_a_fault(endpoint: Endpoint, tmp_path: Path):
    async with at(endpoint, tmp_path) as page:
        await page.until(READY)
        refused = "(() => { try { document.body.innerHTML = '<p>x</p>'; return ''; } catch (e) { return e.name; } })()"
        assert await page.run(refused) == "TypeError"
        evaluated = "(() => { try { return eval('1'); } catch (e) { return e.name; } })()"
        assert await page.run(f"new Promise(done => setTimeout(() => done({evaluated})))") in ("EvalError", "TypeError")


@pytest.mark.browser
@NEEDS_CHROMIUM
async def test_a_cut_answer_says_so(serve: Serve, tmp_path: Path):
    endpoint = await serve(SimulatedInference(answer="word " * 300, context=100))
    async with at(endpoint, tmp_path) as page:
        await page.until(READY)
        await page.run("document.getElementById('tokens').value = 7")
        await put(page)
        note = "document.querySelector('.turn:last-child .note')?.textContent"
        assert await page.run(note) == "The answer was cut after 7 tokens, the limit under Settings."


@pytest.mark.browser
@NEEDS_CHROMIUM
async def test_a_full_context_is_told_apart_from_the_limit(serve: Serve, tmp_path: Path):
    endpoint = await serve(SimulatedInference(answer=["x "] * 500, context=64))
    async with at(endpoint, tmp_path) as page:
        await page.until(READY)
        await page.run("document.getElementById('tokens').value = ''")
        await put(page)
        note = await page.run("document.querySelector('.turn:last-child .note')?.textContent")
        assert note == "The answer was cut: the context of 64 tokens is full. Begin a new conversation."


@pytest.mark.browser
@NEEDS_CHROMIUM
async def test_a_reload_keeps_the_conversation_and_its_system_prompt(serve: Serve, tmp_path: Path):
    endpoint = await serve(SimulatedInference(answer="**Paris**, cut here", capabilities=EVERYTHING))
    async with at(endpoint, tmp_path) as page:
        await page.until(READY)
        await page.run(
            "(s => {s.value = 'Be brief.'; s.dispatchEvent(new Event('change'))})(document.getElementById('system'))"
        )
        await put(page, "Capital?")
        assert endpoint.inference.requests[-1].prompt.startswith("<|system|>Be brief.<|end|>")
        assert endpoint.inference.requests[-1].sampling.temperature == 0.0  # the model's own: nothing was sent
        await page.call("Page.reload")
        await page.until("document.readyState === 'complete' && document.querySelectorAll('.turn').length === 2")
        assert await page.run("document.querySelector('.turn.assistant strong').textContent") == "Paris"
        await put(page, "And then?")
        await page.until("document.querySelectorAll('.turn.assistant').length === 2")
        prompt = endpoint.inference.requests[-1].prompt
        assert prompt.startswith("<|system|>Be brief.") and "Capital?" in prompt and "**Paris**" in prompt
        await page.run("document.getElementById('clear').click()")
        await page.call("Page.reload")
        await page.until(
            "document.readyState === 'complete' && document.getElementById('system').value === 'Be brief.'"
        )
        assert await page.run("document.querySelectorAll('.turn').length") == 0


@pytest.mark.browser
@NEEDS_CHROMIUM
async def test_thoughts_are_shown_closed_and_as_text(serve: Serve, tmp_path: Path):
    endpoint = await serve(SimulatedInference(answer="<think>It is <b>Paris</b>.</think>**Paris**"))
    async with at(endpoint, tmp_path) as page:
        await page.until(READY)
        await put(page, "Capital?")
        for reloaded in (False, True):
            shown = "document.querySelector('.turn.assistant .thoughts')"
            assert await page.run(f"{shown}.open") is False
            assert await page.run(f"{shown}.lastChild.textContent") == "It is <b>Paris</b>."
            assert await page.run(f"{shown}.querySelector('b') === null")
            assert await page.run("document.querySelector('.turn.assistant .body').innerText") == "Paris"
            if not reloaded:
                await page.call("Page.reload")
                await page.until(
                    "document.readyState === 'complete' && document.querySelectorAll('.turn').length === 2"
                )
        await put(page, "And then?")
        await page.until("document.querySelectorAll('.turn.assistant').length === 2")
        assert "It is" not in endpoint.inference.requests[-1].prompt


@pytest.mark.browser
@NEEDS_CHROMIUM
async def test_an_answer_and_its_code_can_be_copied(serve: Serve, tmp_path: Path):
    endpoint = await serve(SimulatedInference(answer=list("Run **this**:\n\n```sh\nls -l\n```\n")))
    async with at(endpoint, tmp_path) as page:
        await put(page)
        await page.run("window.copies = []; navigator.clipboard.writeText = async (text) => { copies.push(text); }")
        await page.run("document.querySelector('.turn:last-child pre button').click()")
        await page.run("document.querySelector('.turn:last-child .foot button').click()")
        await page.until("window.copies.length === 2")
        assert await page.run("window.copies") == ["ls -l", "Run **this**:\n\n```sh\nls -l\n```\n"]
