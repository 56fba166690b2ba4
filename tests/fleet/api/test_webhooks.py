"""Webhooks against a real receiver: signed, in order, again until taken, and never in anyone's way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest
import structlog
from aiohttp import web
from aiohttp.test_utils import TestServer
from standardwebhooks import Webhook
from standardwebhooks.webhooks import WebhookVerificationError

from fleet.api.webhooks import WebhookSender
from fleet.core.retry import RetryPolicy
from fleet.core.roles import Role
from fleet.errors import RegistryError
from fleet.registry.models import WebhookRow
from tests.fleet.world import World
from tests.waiting import until


@dataclass
class Receiver:
    """Answers with the statuses in turn, then 204; keeps what it took. ``hang``: it never answers."""

    statuses: list[int] = field(default_factory=list)
    hang: bool = False
    got: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    asked: int = 0

    async def handle(self, request: web.Request) -> web.Response:
        self.asked += 1
        if self.hang:
            await asyncio.sleep(3600)
        status = self.statuses.pop(0) if self.statuses else 204
        if status < 300:
            self.got.append((dict(request.headers), await request.read()))
        return web.Response(status=status, headers={"Location": "http://127.0.0.1:1/"} if status == 302 else {})


@asynccontextmanager
async def listening(receiver: Receiver) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/hook", receiver.handle)
    async with TestServer(app, shutdown_timeout=0.1) as server:
        yield str(server.make_url("/hook"))


@asynccontextmanager
async def sending(world: World, timeout_s: float = 5.0) -> AsyncIterator[list[Any]]:
    policy = RetryPolicy(first_s=0.01, most_s=0.02)
    sender = WebhookSender(lambda: world.registry, world.clock.now, policy, timeout_s)
    with structlog.testing.capture_logs() as logs:
        task = asyncio.ensure_future(sender.run())
        try:
            yield logs
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def row(world: World, hook: WebhookRow) -> WebhookRow:
    return next(one for one in world.registry.webhooks.all() if one.id == hook.id)


def label(world: World, value: str) -> None:
    world.registry.devices.label("pi-1", {"n": value}, world.actor)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleet.api.webhooks.POLL_S", 0.01)


async def test_entries_come_in_order_signed_as_the_standard_has_it(world: World) -> None:
    receiver = Receiver()
    async with listening(receiver) as url:
        hook = world.registry.webhooks.create(url, ["device.*"], world.actor)
        world.clock.set(datetime.now(UTC))  # the standard refuses signatures that are old
        async with sending(world):
            for number in range(5):
                label(world, str(number))
            world.registry.tokens.create("other", Role.VIEWER, world.actor)  # concerns another pattern
            await until(lambda: len(receiver.got) == 5, "all came")
            await until(lambda: row(world, hook).cursor == world.registry.audit.head()[0], "it is up to date")
    verifier = Webhook(hook.secret)
    bodies = [verifier.verify(body, headers) for headers, body in _lower(receiver)]
    assert [body["data"]["details"]["n"] for body in bodies] == ["0", "1", "2", "3", "4"]
    assert {body["type"] for body in bodies} == {"device.label"}
    headers, body = _lower(receiver)[0]
    with pytest.raises(WebhookVerificationError):
        verifier.verify(body.replace(b"pi-1", b"pi-2"), headers)


async def test_what_is_not_taken_is_sent_again_and_nothing_overtakes_it(world: World) -> None:
    receiver = Receiver(statuses=[500, 302, 429])
    async with listening(receiver) as url:
        hook = world.registry.webhooks.create(url, ["*"], world.actor)
        async with sending(world) as logs:
            label(world, "first")
            label(world, "second")
            for failures in (1, 2, 3):
                await until(lambda failures=failures: row(world, hook).failures == failures, "it is refused")
                world.clock.advance(seconds=60)
            await until(lambda: len(receiver.got) == 3, "all are taken")
    words = (b"webhook.create", b"first", b"second")
    assert all(word in body for word, (_, body) in zip(words, receiver.got, strict=True))
    assert len([entry for entry in logs if entry["event"] == "webhook does not take what it is sent"]) == 1
    assert (row(world, hook).failures, row(world, hook).error) == (0, None)


async def test_one_that_hangs_or_is_away_holds_up_no_other(world: World) -> None:
    stuck, good = Receiver(hang=True), Receiver()
    async with listening(stuck) as slow, listening(good) as quick:
        hanging = world.registry.webhooks.create(slow, ["*"], world.actor)
        away = world.registry.webhooks.create("http://127.0.0.1:1/hook", ["*"], world.actor)
        world.registry.webhooks.create(quick, ["device.label"], world.actor)
        async with sending(world, timeout_s=0.3):
            for number in range(20):
                label(world, str(number))
            await until(lambda: len(good.got) == 20, "the good one has all")
            await until(lambda: row(world, hanging).failures and row(world, away).failures, "the others have failed")
    assert row(world, hanging).error == "no answer within 0.3 s"
    assert "ClientConnectorError" in str(row(world, away).error)


async def test_one_that_is_gone_is_sent_nothing_more(world: World) -> None:
    receiver = Receiver(statuses=[410])
    async with listening(receiver) as url:
        hook = world.registry.webhooks.create(url, ["*"], world.actor)
        async with sending(world) as logs:
            label(world, "x")
            await until(lambda: row(world, hook).due_at is None, "it is given up")
            label(world, "y")
            world.clock.advance(days=2)
            await asyncio.sleep(0.1)
    assert receiver.asked == 1
    assert any(entry.get("hint") == "it is sent nothing more" for entry in logs)


async def test_two_controllers_send_each_entry_once(world: World) -> None:
    receiver = Receiver()
    async with listening(receiver) as url:
        world.registry.webhooks.create(url, ["device.label"], world.actor)
        async with sending(world), sending(world):
            for number in range(10):
                label(world, str(number))
            await until(lambda: len(receiver.got) == 10, "all came")
            await asyncio.sleep(0.1)
    assert len({headers["webhook-id"] for headers, _ in _lower(receiver)}) == len(receiver.got) == 10


async def test_a_database_that_is_away_stops_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    receiver, claims, refusals = Receiver(), world.registry.webhooks.claim, iter(range(3))

    def claim(*arguments: Any) -> Any:
        if next(refusals, None) is not None:
            raise RegistryError("away")
        return claims(*arguments)

    monkeypatch.setattr(world.registry.webhooks, "claim", claim)
    async with listening(receiver) as url:
        world.registry.webhooks.create(url, ["*"], world.actor)
        async with sending(world):
            label(world, "x")
            await until(lambda: receiver.got, "it came")


async def test_a_delivery_that_cannot_be_written_down_is_made_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver, delivered, refusals = Receiver(), world.registry.webhooks.delivered, iter(range(1))

    def note(*arguments: Any) -> Any:
        if next(refusals, None) is not None:
            raise RegistryError("away")
        return delivered(*arguments)

    monkeypatch.setattr(world.registry.webhooks, "delivered", note)
    async with listening(receiver) as url:
        world.registry.webhooks.create(url, ["device.label"], world.actor)
        async with sending(world):
            label(world, "x")
            await until(lambda: len(receiver.got) == 1, "it came")
            world.clock.advance(minutes=5)  # the lease ends
            await until(lambda: len(receiver.got) == 2, "it came again, with the same id")
    assert len({headers["webhook-id"] for headers, _ in _lower(receiver)}) == 1


def _lower(receiver: Receiver) -> list[tuple[dict[str, str], bytes]]:
    return [({name.lower(): value for name, value in headers.items()}, body) for headers, body in receiver.got]
