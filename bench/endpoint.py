"""The endpoint against its own runtime's bare loop, pair by pair, and a long beginning that was seen before."""

from __future__ import annotations

import http.client
import json
import statistics
import time
from typing import Any
from urllib.parse import urlsplit

from agent.contract.manifest import Toolchain
from agent.endpoint.openai.chat import render
from bench.bare import bare
from bench.figures import Figure
from bench.serving import PRECISIONS, Served, serving

#: Pairs, tokens of an answer, and turns of the shared beginning.
SIZES = dict.fromkeys(Toolchain, (13, 128, 3)) | {Toolchain.MLX: (3, 24, 1)}
#: Tokens of the shared beginning, about.
SHARED = 1000
#: A number first, so that no prompt begins as one before it: the bare loop re-uses no prefix, so the endpoint must not.
PROMPT = "Number {n}. Write a long story about a lighthouse keeper, the sea, and a storm. Tell every detail."


def figures() -> list[Figure]:
    """Medians over the pairs, for each runtime."""
    return [figure for toolchain in PRECISIONS for figure in _of(toolchain)]


def _of(toolchain: Toolchain) -> list[Figure]:
    count, tokens, turns = SIZES[toolchain]
    with serving(toolchain) as served, bare(toolchain.value, served.artifact.files) as peer:
        pairs = []
        for number in range(count + 1):
            text = PROMPT.format(n=number)
            prompt = render(served.artifact.manifest, [{"role": "user", "content": text}])
            # The one that is not asked rests, and each goes first every other time.
            if number % 2:
                ours, theirs = stream(served, text, tokens), peer.ask([prompt], tokens)
            else:
                theirs, ours = peer.ask([prompt], tokens), stream(served, text, tokens)
            pairs.append((ours, theirs))
        prefix = _prefix(served, turns)
    pairs = pairs[1:]
    speed = statistics.median(ours["tokens_per_s"] / theirs["tokens_per_s"] for ours, theirs in pairs)
    added = statistics.median(ours["ttft_ms"] - theirs["ttft_ms"][0] for ours, theirs in pairs)
    name = served.label
    return [
        Figure(
            f"one stream over HTTP, {name}",
            statistics.median(ours["tokens_per_s"] for ours, _ in pairs),
            "tokens/s",
            "its bare loop",
            statistics.median(theirs["tokens_per_s"] for _, theirs in pairs),
            speed,
            at_least=0.97,
        ),
        Figure(f"added time to first token, {name}", added, "ms", at_most=5),
        *prefix,
    ]


def _prefix(served: Served, turns: int) -> list[Figure]:
    """Time to first token of a prompt whose first thousand tokens are another's, against that other's."""
    ratios, first, second = [], [], []
    for turn in range(turns):
        system = f"Turn {turn}. " + "You answer like a lighthouse keeper who has seen many storms. " * (SHARED // 13)
        times = [stream(served, question, 4, system)["ttft_ms"] for question in ("Who are you?", "What have you seen?")]
        ratios.append(times[1] / times[0])
        first.append(times[0])
        second.append(times[1])
    return [
        Figure(
            f"first token after a shared beginning of {SHARED} tokens, {served.label}",
            statistics.median(second),
            "ms",
            "the first that had it",
            statistics.median(first),
            statistics.median(ratios),
            at_most=0.2,
        )
    ]


def stream(served: Served, text: str, tokens: int, system: str = "") -> dict[str, float]:
    """One answer, by the plainest client that there is."""
    messages = [{"role": "system", "content": system}] if system else []
    body: dict[str, Any] = {
        "model": served.model,
        "messages": [*messages, {"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    connection = http.client.HTTPConnection(urlsplit(served.url).netloc, timeout=300)
    began = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    times, count = [], 0
    for line in connection.getresponse():
        if line.startswith(b"data: {"):
            chunk = json.loads(line[6:])
            if any(choice["delta"].get("content") for choice in chunk["choices"]):
                times.append(time.perf_counter())
            count = (chunk.get("usage") or {}).get("completion_tokens", count)
    connection.close()
    return {
        "ttft_ms": 1000 * (times[0] - began),
        "tokens": count,
        "tokens_per_s": (count - 1) / max(1e-9, times[-1] - times[0]),
    }
