"""`phifleet serve`: the controller in the foreground, as systemd runs it."""

from __future__ import annotations

import asyncio
import gc
import secrets
import signal
import sys
from datetime import UTC, datetime

import click

from fleet.api.server import ApiServer
from fleet.api.webhooks import WebhookSender
from fleet.cli.context import Context
from fleet.daemon.controller import Part
from fleet.daemon.run import run_controller
from fleet.errors import BrokerError
from fleet.operations.fleet import Fleet
from fleet.operations.rollouts import Roller
from fleet.settings import FleetSettings

#: How soon another thread gets its turn; seconds.
SWITCH_INTERVAL_S = 0.0005


@click.command()
@click.option("--broker", help="embedded, or mqtt, mqtts, ws or wss://host:port.")
@click.option("--broker-port", type=click.IntRange(1, 65535), help="TCP port of the embedded broker, on loopback.")
@click.option("--database", help="sqlite:///... or postgresql://user@host/name.")
@click.option("--api", help="host:port of the HTTP API; with api_cert and api_key off loopback.")
@click.option("--show-config", is_flag=True, help="Print each setting and where it came from, and end.")
@click.pass_obj
def serve(
    context: Context,
    broker: str | None,
    broker_port: int | None,
    database: str | None,
    api: str | None,
    show_config: bool,
) -> None:
    """Serve metadata and chunks, publish orders, record what devices report; until interrupted."""
    context = context.overlay(broker=broker, broker_port=broker_port, database=database, api=api)
    if show_config:
        context.show_config()
        return
    asyncio.run(_until_signalled(context.settings))


async def _until_signalled(settings: FleetSettings) -> None:
    stop, ready, loop = asyncio.Event(), asyncio.Event(), asyncio.get_running_loop()
    signalled: list[int] = []
    # SQLite lets the interpreter go at each row: beside a thread that computes, as an overview of 10,000 devices does,
    # each row of a short answer would wait for the interval, which is 5 ms if nothing is said.
    sys.setswitchinterval(SWITCH_INTERVAL_S)

    def note(number: int) -> None:
        signalled.append(number)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            loop.add_signal_handler(number, note, number)
        except NotImplementedError:  # Windows
            signal.signal(number, lambda number, _: loop.call_soon_threadsafe(note, number))
    try:
        with Fleet(settings) as fleet:
            roller = Roller(fleet, f"roller-{secrets.token_hex(8)}", lambda: datetime.now(UTC))
            parts: list[Part] = [roller, WebhookSender(lambda: fleet.registry)]
            if settings.api is not None:
                parts.append(ApiServer(fleet))

            def begun() -> None:
                # What is there by now stays, and is ten times what a request makes: a collection that looked through
                # all of it would hold every answer up for a tenth of a second.
                gc.collect()
                gc.freeze()
                ready.set()

            await run_controller(settings, stop, begun, parts=parts)
    except BrokerError:
        if ready.is_set() or not stop.is_set():  # else nobody waits for that broker any more
            raise
    if signal.SIGINT in signalled and not ready.is_set():
        raise click.Abort
