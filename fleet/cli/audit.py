"""`phifleet audit`: who did what, and whether the record was tampered with."""

from __future__ import annotations

import json
from datetime import datetime

import click
from rich.table import Table

from fleet.cli.artifacts import wide_console
from fleet.cli.context import Context
from fleet.errors import RegistryError


@click.group()
def audit() -> None:
    """Read the record of who did what, and verify that nobody has changed it."""


@audit.command("list")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="Newest entries shown.")
@click.option("--json", "as_json", is_flag=True, help="One JSON array.")
@click.pass_obj
def list_command(context: Context, limit: int, as_json: bool) -> None:
    """List the newest entries, newest first."""
    with context.client() as client:
        rows = client.call("GET", "/audit/newest", limit=limit)["items"]
    if as_json:
        click.echo(json.dumps(rows))
        return
    table = Table("entry", "at (UTC)", "who", "action", "subject", "details", box=None)
    for row in rows:
        details = ", ".join(f"{name}={value}" for name, value in (row["details"] or {}).items() if value is not None)
        at = f"{datetime.fromisoformat(row['at']):%Y-%m-%d %H:%M:%S}"
        table.add_row(str(row["id"]), at, row["who"], row["action"], row["subject"], details)
    wide_console().print(table)


@audit.command("verify")
@click.pass_obj
def verify_command(context: Context) -> None:
    """Verify that each entry is as it was written, and that none was taken out."""
    with context.client() as client:
        found = client.call("GET", "/audit/head")
    if found["broken"]:
        raise RegistryError("the audit was tampered with:\n  " + "\n  ".join(found["broken"][:20]))
    click.echo(f"{found['entries']} entries, each as it was written; the newest has the hash {found['hash']}")
    if found["signed"] is not None:
        click.echo(f"the signed metadata vouches for the first {found['signed']} of them")
