"""`phifleet audit`: who did what, and whether the record was tampered with."""

from __future__ import annotations

import json

import click
from rich.table import Table

from fleet.cli.artifacts import wide_console
from fleet.cli.context import Context
from fleet.errors import RegistryError
from fleet.operations.fleet import Fleet


@click.group()
def audit() -> None:
    """Read the record of who did what, and verify that nobody has changed it."""


@audit.command("list")
@click.option("--limit", type=click.IntRange(1, 100_000), default=50, show_default=True, help="Newest entries shown.")
@click.option("--json", "as_json", is_flag=True, help="One JSON array.")
@click.pass_obj
def list_command(context: Context, limit: int, as_json: bool) -> None:
    """List the newest entries, newest first."""
    with Fleet(context.settings) as fleet:
        rows = fleet.registry.audit.trail(limit)
    if as_json:
        entries = [
            {
                "id": row.id,
                "at": row.at.isoformat(),
                "who": row.who,
                "action": row.action,
                "subject": row.subject,
                "details": row.details,
                "hash": row.hash,
            }
            for row in rows
        ]
        click.echo(json.dumps(entries))
        return
    table = Table("entry", "at (UTC)", "who", "action", "subject", "details", box=None)
    for row in rows:
        details = ", ".join(f"{name}={value}" for name, value in (row.details or {}).items() if value is not None)
        table.add_row(str(row.id), f"{row.at:%Y-%m-%d %H:%M:%S}", row.who, row.action, row.subject, details)
    wide_console().print(table)


@audit.command("verify")
@click.pass_obj
def verify_command(context: Context) -> None:
    """Verify that each entry is as it was written, and that none was taken out."""
    with Fleet(context.settings) as fleet:
        wrong, (entries, head) = fleet.registry.audit.broken(), fleet.registry.audit.head()
    if wrong:
        raise RegistryError("the audit was tampered with:\n  " + "\n  ".join(wrong[:20]))
    click.echo(f"{entries} entries, each as it was written; the newest has the hash {head}")
