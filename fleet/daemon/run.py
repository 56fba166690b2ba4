"""Everything a controller is made of, out of its settings: the broker, two links, the registry, the servers."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime

import structlog

from agent.link import LinkError, LinkSettings, MqttLink
from agent.platform import systemd
from fleet.daemon.barring import BarredDevices, KnownDevices
from fleet.daemon.controller import Controller, Part
from fleet.daemon.ingest import BATCH
from fleet.daemon.renewals import Renewals
from fleet.delivery.broker import EmbeddedBroker
from fleet.delivery.chunk_server import ChunkServer
from fleet.delivery.metadata import MetadataServer
from fleet.errors import BrokerError, RepositoryError
from fleet.home import Home
from fleet.registry import open_registry
from fleet.registry.upgrading import upgrade_own_file
from fleet.settings import EMBEDDED, FleetSettings
from fleet.store import FolderStore
from fleet.trust.ca import DeviceCA
from fleet.trust.repository import Repository

BROKER_CHECK_S = 2.0
EVICT_TIMEOUT_S = 10.0
CONNECT_CHECK_S = 0.05
#: A broker takes a controller that is cut off for gone after one and a half of it.
KEEPALIVE_S = 10

_log = structlog.get_logger(component="serve")


async def run_controller(
    settings: FleetSettings,
    stop: asyncio.Event,
    ready: Callable[[], None] | None = None,
    parts: Sequence[Part] = (),
) -> None:
    """Serve until ``stop``; ``ready`` is called when devices can be served. ``parts`` run beside its own.

    Raises:
        BrokerError: the broker cannot be reached or refuses, or the embedded one does not start.
        RegistryError: the database cannot be used.
        RepositoryError: there is no TUF repository in the home.
    """
    home = Home(settings.home)
    repository = Repository(home)
    if not repository.exists:
        raise RepositoryError(f"{home.root} has no repository of signed metadata; make one with `phifleet init`")
    _upgrade(settings)
    with contextlib.closing(open_registry(settings.database_url)) as registry:
        repository.sign_audit(registry.audit.head)
        try:
            # Two connections: chunks wait for a slow broker on the one, and orders never behind them on the other.
            control, bulk = (MqttLink(link_settings(settings, role)) for role in ("controller", "chunks"))
            async with _broker(settings), control, bulk:
                await _connected(control, settings.connect_timeout_s, stop)
                if stop.is_set():
                    return
                barred = BarredDevices()
                group, known = registry.shared("group"), KnownDevices(registry, barred)
                servers = (
                    ChunkServer(
                        bulk,
                        FolderStore(home.artifacts).open,
                        group=group,
                        admission=known.refusal,
                        bytes_per_s=settings.upload_bytes_per_s,
                    ),
                    MetadataServer(control, repository, group=group, admission=known.refusal),
                    Renewals(
                        control,
                        registry,
                        DeviceCA(home),
                        known.refusal,
                        group=group,
                        days=settings.device_certificate_days,
                        clock=lambda: datetime.now(UTC),
                        monotonic=time.monotonic,
                    ),
                )
                controller = Controller(
                    control,
                    registry,
                    repository,
                    servers,
                    ca=DeviceCA(home),
                    barred=barred,
                    evict=functools.partial(end_session, settings),
                    notify=_notifier(ready),
                    parts=parts,
                    certificates=settings.certificates,
                )
                await controller.run(stop)
        except LinkError as error:
            raise BrokerError(str(error)) from None


def _upgrade(settings: FleetSettings) -> None:
    done = upgrade_own_file(settings.database_url, datetime.now(UTC))
    if done is not None:
        _log.info("database upgraded", before=done.before, after=done.after, backup=str(done.backup))


def link_settings(settings: FleetSettings, role: str) -> LinkSettings:
    """Return how the controller connects.

    Each process is a client of its own: a second one must not push the first out.
    """
    return LinkSettings(
        url=settings.broker_url,
        client_id=f"phifleet-{role}-{secrets.token_hex(4)}",
        ca_file=settings.broker_ca,
        cert_file=settings.broker_cert,
        key_file=settings.broker_key,
        username=settings.broker_username,
        password=settings.broker_password.get_secret_value() if settings.broker_password else None,
        proxy=settings.broker_proxy.get_secret_value() if settings.broker_proxy else None,
        alpn=settings.broker_alpn,
        keepalive_s=KEEPALIVE_S,
        receive_maximum=BATCH,
    )


async def end_session(settings: FleetSettings, client_id: str) -> None:
    """Take over the session that a client has at the broker, and end it.

    Raises:
        LinkError: the broker does not accept a connection with this client id.
    """
    async with MqttLink(dataclasses.replace(link_settings(settings, "revoke"), client_id=client_id)) as link:
        await link.wait_connected(EVICT_TIMEOUT_S)


def _notifier(ready: Callable[[], None] | None) -> Callable[[str], bool]:
    def notify(message: str) -> bool:
        if message == "READY=1" and ready is not None:
            ready()
        return systemd.notify(message)

    return notify


async def _connected(link: MqttLink, timeout_s: float, stop: asyncio.Event) -> None:
    """Until the broker answers, or ``stop``: an operator who interrupts does not wait for a broker that is away.

    Raises:
        BrokerError: it has not answered in time; says every reason there was, as a refusal may be followed by silence.
    """
    reasons: dict[str, None] = {}
    end = asyncio.get_running_loop().time() + timeout_s
    while not link.connected and not stop.is_set():
        if link.reason:
            reasons[link.reason] = None
        if asyncio.get_running_loop().time() > end:
            raise BrokerError(f"broker {link.address}: {'; '.join(reasons)} (waited {timeout_s:g} s)")
        await asyncio.sleep(CONNECT_CHECK_S)


@contextlib.asynccontextmanager
async def _broker(settings: FleetSettings) -> AsyncIterator[None]:
    """The embedded broker, if it is asked for; one that dies is started again, and the link connects again."""
    if settings.broker != EMBEDDED:
        yield
        return
    broker = EmbeddedBroker(port=settings.broker_port)
    await asyncio.to_thread(broker.start)
    _log.info("embedded broker started", url=broker.url)
    watch = asyncio.create_task(_keep_running(broker))
    try:
        yield
    finally:
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
        await asyncio.to_thread(broker.stop)


async def _keep_running(broker: EmbeddedBroker) -> None:
    while True:
        await asyncio.sleep(BROKER_CHECK_S)
        if broker.running:
            continue
        _log.error("embedded broker ended, starting it again", url=broker.url)
        try:
            await asyncio.to_thread(broker.stop)
            await asyncio.to_thread(broker.start)
        except BrokerError as error:
            _log.error("embedded broker does not start, trying again", error=str(error))
