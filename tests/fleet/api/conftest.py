from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientResponse
from aiohttp.test_utils import TestClient, TestServer

from fleet.api.app import create_app
from fleet.core.roles import Role
from fleet.operations.fleet import Fleet
from fleet.settings import FleetSettings
from tests.fleet.world import World, make_world


@dataclass
class Api:
    """The API of a world, and a client of it."""

    world: World
    fleet: Fleet
    client: TestClient[Any, Any]
    tokens: dict[str, str]

    def token(self, role: Role, **more: Any) -> str:
        _, token = self.fleet.registry.tokens.create(f"{role.value}-1", role, self.world.actor, **more)
        return token

    async def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        role: Role = Role.ADMIN,
        token: str | None = None,
        **headers: str,
    ) -> ClientResponse:
        token = token or self.tokens.setdefault(role.value, "") or self.tokens.setdefault(role.value, "")
        if not token:
            token = self.tokens[role.value] = self.token(role)
        sent = {"Authorization": f"Bearer {token}"} | {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.client.request(method, f"/api/v1{path}", json=body, headers=sent)

    async def get(self, path: str, status: int = 200, **more: Any) -> Any:
        return await self._json(await self.ask("GET", path, **more), status)

    async def post(self, path: str, body: Any = None, status: int = 200, **more: Any) -> Any:
        return await self._json(await self.ask("POST", path, body, **more), status)

    async def _json(self, response: ClientResponse, status: int) -> Any:
        text = await response.text()
        assert response.status == status, text
        return json.loads(text) if text else None


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = make_world(tmp_path / "home")
    made.add("pi-1", "pi-2", "pi-3")
    yield made
    made.registry.close()


@asynccontextmanager
async def serving(world: World, **settings: Any) -> AsyncIterator[Api]:
    with Fleet(FleetSettings(home=world.home.root, **settings)) as fleet:
        async with TestClient(TestServer(create_app(fleet, clock=world.clock.now))) as client:
            yield Api(world, fleet, client, {})


@pytest.fixture
async def api(world: World) -> AsyncIterator[Api]:
    async with serving(world) as made:
        yield made
