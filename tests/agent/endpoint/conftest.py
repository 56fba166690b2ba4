"""A real endpoint on loopback over a simulated model host."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import aiohttp
import pytest
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from agent.core.names import Names
from agent.endpoint import EndpointConfig, EndpointServer, FinishedRequest, Limits
from tests.simulators.inference import SimulatedInference, SimulatedStats

MODEL = "phi-test"
# Reading the system's certificates for every client would be most of the time of these tests.
PLAIN = partial(DefaultAsyncHttpxClient, verify=False)
HELLO: list[Any] = [{"role": "user", "content": "hello"}]


@dataclass
class Endpoint:
    """A running endpoint and the ways to talk to it."""

    server: EndpointServer
    inference: SimulatedInference
    stats: SimulatedStats
    finished: list[FinishedRequest]
    http: aiohttp.ClientSession
    openai: AsyncOpenAI
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").rsplit(":", 1)
        return host, int(port)

    async def post(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and JSON."""
        options = (
            {"data": body, "headers": {"Content-Type": "application/json"}} if isinstance(body, bytes | str) else {}
        )
        async with self.http.post(self.url + path, **(options or {"json": body})) as response:
            return response.status, await response.json()

    async def get(self, path: str, **options: Any) -> tuple[int, str]:
        """Status and text."""
        async with self.http.get(self.url + path, **options) as response:
            return response.status, await response.text()


Serve = Callable[..., Any]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """``await serve(inference, limits={...}, **config)`` gives an ``Endpoint``; all of them end with the test."""
    async with AsyncExitStack() as stack:

        async def start(
            inference: SimulatedInference | None = None,
            limits: dict[str, Any] | None = None,
            names: Names | None = None,
            **config: Any,
        ) -> Endpoint:
            inference = inference or SimulatedInference()
            stats = SimulatedStats()
            finished: list[FinishedRequest] = []
            settings = EndpointConfig(
                **{"port": 0, "drain_s": 0.5, "limits": replace(Limits(), **(limits or {})), **config}
            )
            server = EndpointServer(
                inference,
                settings,
                stats=lambda: stats,
                on_finished=finished.append,
                names=lambda: names or Names(),
            )
            await stack.enter_async_context(server)
            http = await stack.enter_async_context(aiohttp.ClientSession())
            key = config["keys"][0].secret if config.get("keys") else "none"
            client = AsyncOpenAI(
                base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=20, http_client=PLAIN()
            )
            stack.push_async_callback(client.close)
            return Endpoint(server, inference, stats, finished, http, client)

        yield start


@pytest.fixture
async def endpoint(serve: Serve) -> Endpoint:
    """One with everything at its default."""
    result: Endpoint = await serve()
    return result
