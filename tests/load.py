"""Clients that keep an endpoint busy and write down what they saw. For tests and benchmarks."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field

import aiohttp


@dataclass
class Seen:
    """Of one request: seconds, and how it ended. ``error`` is empty when all of it came."""

    began: float
    first: float = 0.0
    times: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str = ""
    text: str = ""

    @property
    def ttft_ms(self) -> float:
        return 1000 * (self.first - self.began)

    @property
    def gaps_ms(self) -> list[tuple[float, float]]:
        """``(when, milliseconds since the piece before)``."""
        return [(later, 1000 * (later - earlier)) for earlier, later in zip(self.times, self.times[1:], strict=False)]


async def stream(
    session: aiohttp.ClientSession, url: str, model: str, prompt: str, tokens: int, seen: Seen | None = None
) -> Seen:
    """One streamed chat completion; ``seen`` is filled while it comes."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    seen = seen or Seen(time.monotonic())
    finished = False
    try:
        async with session.post(f"{url}/v1/chat/completions", json=body) as response:
            if response.status != 200:
                seen.error = f"{response.status} {await response.text()}"
                return seen
            async for line in response.content:
                if line.startswith(b"data: [DONE]"):
                    finished = True
                elif line.startswith(b"data: "):
                    _take(seen, json.loads(line[6:]))
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        seen.error = f"{type(error).__name__}: {error}"
    if not finished and not seen.error:
        seen.error = "the stream ended early"
    return seen


def _take(seen: Seen, event: dict[str, object]) -> None:
    if "error" in event:
        seen.error = str(event["error"])
        return
    usage = event.get("usage")
    if isinstance(usage, dict):
        seen.tokens = usage["completion_tokens"]
    for choice in event.get("choices", ()):  # type: ignore[attr-defined]
        piece = choice["delta"].get("content")
        if piece:
            seen.times.append(time.monotonic())
            seen.first = seen.first or seen.times[-1]
            seen.text += piece


class Load:
    """``clients`` closed loops, until told to stop."""

    def __init__(self, url: str, model: str, clients: int, tokens: int = 24) -> None:
        self._url, self._model, self._clients, self._tokens = url, model, clients, tokens
        self._stop = asyncio.Event()
        self.seen: list[Seen] = []
        self.under_way: list[Seen] = []
        self._ended = asyncio.Condition()

    async def finished(self, count: int) -> None:
        """Return once ``count`` requests have ended, one way or the other."""
        async with asyncio.timeout(300), self._ended:
            await self._ended.wait_for(lambda: len(self.seen) >= count)

    async def run(self) -> None:
        timeout = aiohttp.ClientTimeout(total=180)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            await asyncio.gather(*(self._client(session, number) for number in range(self._clients)))

    def stop(self) -> None:
        """After the requests that are under way."""
        self._stop.set()

    async def _client(self, session: aiohttp.ClientSession, number: int) -> None:
        turn = 0
        while not self._stop.is_set():
            prompt = f"Client {number}, question {turn}: what is the capital of France?"
            seen = Seen(time.monotonic())
            self.under_way.append(seen)
            try:
                await stream(session, self._url, self._model, prompt, self._tokens, seen)
            finally:
                self.under_way.remove(seen)
            async with self._ended:
                self.seen.append(seen)
                self._ended.notify_all()
            turn += 1
