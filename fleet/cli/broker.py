"""`phifleet broker`: what a broker needs to serve this fleet."""

from __future__ import annotations

from pathlib import Path

import click

from fleet.cli.context import Context
from fleet.operations.broker_config import BrokerKind, BrokerOptions, write_broker_config
from fleet.operations.fleet import Fleet


@click.group()
def broker() -> None:
    """Write what a broker needs to serve this fleet."""


@broker.command("config")
@click.argument("hosts", metavar="HOST...", nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the files.")
@click.option(
    "--for",
    "kind",
    type=click.Choice([kind.value for kind in BrokerKind]),
    default=BrokerKind.MOSQUITTO.value,
    show_default=True,
)
@click.option("--port", type=click.IntRange(1, 65_535), default=8883, show_default=True, help="That it listens on.")
@click.option("--folder", default="", help="Where its files will be, if not where its package expects them.")
@click.pass_obj
def config_command(context: Context, hosts: tuple[str, ...], out: Path, kind: str, port: int, folder: str) -> None:
    """Write configuration, rights and certificates for a broker that devices reach as HOST, and for the controller."""
    options = BrokerOptions(BrokerKind(kind), hosts, port, folder)
    with Fleet(context.settings) as fleet:
        for path in write_broker_config(fleet, options, out):
            click.echo(path)
    click.echo(
        f"broker/ is for {options.place}, and controller/ for /etc/phifleet; docs/operations.md has the commands",
        err=True,
    )
