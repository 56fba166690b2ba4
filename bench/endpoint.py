"""The endpoint against its own runtime's bare loop, pair by pair: streamed tokens/s, and time to first token."""

from __future__ import annotations

import http.client
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from agent.contract.messages import State
from agent.endpoint.chat import render
from bench.figures import Figure
from tests.models import Built, built, sample_checkpoint
from tests.rig import Rig

PAIRS, TOKENS = 15, 128
#: A number first, so that no prompt begins as one before it: the bare loop re-uses no prefix, so the endpoint must not.
PROMPT = "Number {n}. Write a long story about a lighthouse keeper, the sea, and a storm. Tell every detail."


def figures() -> list[Figure]:
    """Medians over the pairs."""
    artifact = built(sample_checkpoint())
    with _serving(artifact) as url, _bare(artifact.files) as bare:
        pairs = [(_stream(url, artifact, n), _ask(bare, artifact, n)) for n in range(PAIRS + 2)][2:]
    speed = statistics.median(ours["tokens_per_s"] / theirs["tokens_per_s"] for ours, theirs in pairs)
    added = statistics.median(ours["ttft_ms"] - theirs["ttft_ms"] for ours, theirs in pairs)
    return [
        Figure(
            "one stream over HTTP, ONNX INT4",
            statistics.median(ours["tokens_per_s"] for ours, _ in pairs),
            "tokens/s",
            "bare loop, same runtime",
            statistics.median(theirs["tokens_per_s"] for _, theirs in pairs),
            speed,
            at_least=0.95,
        ),
        Figure("added time to first token", added, "ms", at_most=10),
    ]


@contextmanager
def _serving(artifact: Built) -> Iterator[str]:
    with Rig() as rig:
        rig.take_over(artifact.manifest, artifact.files)
        rig.start_controller()
        rig.start_agent(PHIFLEET_AGENT_CANARY_INTERVAL_S="0")
        rig.order(artifact.manifest)
        reported = rig.settled(1)
        assert reported.state is State.COMMITTED
        rig.kill(rig.controller)  # nothing else runs while the endpoint is measured
        yield str(reported.endpoint)


@contextmanager
def _bare(folder: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "bench.bare_onnx", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


def _ask(bare: subprocess.Popen[str], artifact: Built, n: int) -> dict[str, float]:
    prompt = render(artifact.manifest, [{"role": "user", "content": PROMPT.format(n=n)}])
    assert bare.stdin is not None
    assert bare.stdout is not None
    bare.stdin.write(json.dumps({"prompt": prompt, "tokens": TOKENS}) + "\n")
    bare.stdin.flush()
    return dict(json.loads(bare.stdout.readline()))


def _stream(url: str, artifact: Built, n: int) -> dict[str, float]:
    body: dict[str, Any] = {
        "model": artifact.manifest.model.name,
        "messages": [{"role": "user", "content": PROMPT.format(n=n)}],
        "temperature": 0,
        "max_tokens": TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)
    began = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    times, tokens = [], 0
    for line in connection.getresponse():
        if line.startswith(b"data: {"):
            chunk = json.loads(line[6:])
            if any(choice["delta"].get("content") for choice in chunk["choices"]):
                times.append(time.perf_counter())
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    connection.close()
    return {
        "ttft_ms": 1000 * (times[0] - began),
        "tokens": tokens,
        "tokens_per_s": (tokens - 1) / (times[-1] - times[0]),
    }
