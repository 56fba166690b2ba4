"""A whole controller in this process, with its embedded broker: how it begins, and what it survives."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
import structlog
from pydantic import SecretStr

from agent.link import LinkError
from fleet.daemon import run as run_module
from fleet.daemon.run import end_session, link_settings, run_controller
from fleet.delivery.broker import EmbeddedBroker
from fleet.errors import BrokerError, RepositoryError
from fleet.registry.database import Database
from fleet.settings import FleetSettings
from tests.fleet.world import World, make_world
from tests.simulators.broker import free_port
from tests.waiting import until


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = make_world(tmp_path / "home")
    yield made
    made.registry.close()


def settings(world: World, **changes: Any) -> FleetSettings:
    return FleetSettings(**({"home": world.home.root, "broker_port": free_port()} | changes))


@asynccontextmanager
async def serving(wanted: FleetSettings):  # type: ignore[no-untyped-def]  # a list of entries
    """A controller that devices can reach; yields what it logs."""
    ready, stop = asyncio.Event(), asyncio.Event()
    with structlog.testing.capture_logs() as logs:
        task = asyncio.ensure_future(run_controller(wanted, stop, ready.set))
        waits = [asyncio.ensure_future(ready.wait()), task]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        try:
            yield logs
        finally:
            stop.set()
            await task


def said(logs: list[Any], event: str) -> list[Any]:
    return [entry for entry in logs if entry["event"] == event]


async def test_it_serves_and_ends_the_session_of_a_device(world: World) -> None:
    wanted = settings(world)
    async with serving(wanted) as logs:
        assert said(logs, "controller ready")
        await end_session(wanted, "pi-1")
    assert said(logs, "controller stopped")


async def test_a_home_without_a_repository_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match="make one with `phifleet init`"):
        await run_controller(FleetSettings(home=tmp_path), asyncio.Event())


async def test_a_broker_that_is_not_there_is_named_with_the_reason(world: World) -> None:
    port = free_port()
    wanted = settings(world, broker=f"mqtt://127.0.0.1:{port}", connect_timeout_s=0.5)
    with pytest.raises(BrokerError, match=rf"127\.0\.0\.1:{port}: .*refused.*\(waited 0\.5 s\)"):
        await run_controller(wanted, asyncio.Event())


async def test_a_broker_address_that_cannot_be_used_is_the_brokers_error(world: World, tmp_path: Path) -> None:
    wanted = settings(world, broker="mqtts://127.0.0.1:1", broker_ca=tmp_path / "nowhere.pem")
    with pytest.raises(BrokerError, match=r"nowhere\.pem"):
        await run_controller(wanted, asyncio.Event())


async def test_who_interrupts_does_not_wait_for_a_broker_that_is_away(world: World) -> None:
    stop = asyncio.Event()
    wanted = settings(world, broker=f"mqtt://127.0.0.1:{free_port()}", connect_timeout_s=600)
    asyncio.get_running_loop().call_later(0.2, stop.set)
    async with asyncio.timeout(30):
        await run_controller(wanted, stop)


async def test_an_embedded_broker_that_ends_is_started_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "BROKER_CHECK_S", 0.05)
    brokers: list[EmbeddedBroker] = []
    real_start, refusals = EmbeddedBroker.start, iter([BrokerError("port in use")])

    def start(self: EmbeddedBroker, timeout_s: float = 10.0) -> EmbeddedBroker:
        if brokers and (refused := next(refusals, None)):
            raise refused
        brokers.append(self)
        return real_start(self, timeout_s)

    monkeypatch.setattr(EmbeddedBroker, "start", start)
    wanted = settings(world)
    async with serving(wanted) as logs:
        await asyncio.to_thread(brokers[0]._broker.stop)
        await until(lambda: len(brokers) == 2 and brokers[0].running, "it runs again")
        await end_session(wanted, "pi-1")
    assert said(logs, "embedded broker does not start, trying again")[0]["error"] == "port in use"
    assert len(said(logs, "embedded broker ended, starting it again")) == 2


async def test_its_own_database_is_upgraded_and_that_is_told(world: World) -> None:
    world.registry.close()
    with closing(Database.unchecked(f"sqlite:///{world.home.database}")) as database:
        database.upgrade("0003")
    async with serving(settings(world)) as logs:
        pass
    (told,) = said(logs, "database upgraded")
    assert told["before"] == "0003" and Path(told["backup"]).exists()


def test_each_process_is_a_client_of_its_own_and_the_password_is_passed_on(world: World) -> None:
    wanted = settings(world, broker_username="fleet", broker_password=SecretStr("secret"))
    one, two = link_settings(wanted, "controller"), link_settings(wanted, "controller")
    assert one.client_id != two.client_id
    assert (one.username, one.password) == ("fleet", "secret")


async def test_a_session_at_a_broker_that_is_away_is_not_ended(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "EVICT_TIMEOUT_S", 0.3)
    with pytest.raises(LinkError):
        await end_session(settings(world, broker=f"mqtt://127.0.0.1:{free_port()}"), "pi-1")
