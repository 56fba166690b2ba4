"""`phifleet db`: the tables of the database, and bringing them to another version."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import click

from fleet.cli.context import Context


@click.group()
def db() -> None:
    """Show and upgrade the tables of the controller's database."""


@db.command("current")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.pass_obj
def current_command(context: Context, as_json: bool) -> None:
    """Say which revision of the tables the database has, and which this phifleet works with."""
    from fleet.registry.upgrading import schema_of

    found = schema_of(_url(context))
    if as_json:
        click.echo(json.dumps({"revision": found.revision, "works_with": found.head, "known": found.known}))
        return
    click.echo(f"the database has {found.revision or 'no tables of a fleet'}; this phifleet works with {found.head}")
    if not found.current and found.known and found.revision is not None:
        click.echo("upgrade it with `phifleet db upgrade`")


@db.command("upgrade")
@click.argument("revision", default="head")
@click.pass_obj
def upgrade_command(context: Context, revision: str) -> None:
    """Bring the tables to REVISION, which is the newest unless it is named. A SQLite file is copied first.

    Stop the controllers before: one of an earlier version cannot work with later tables.
    """
    from fleet.registry.upgrading import upgrade

    done = upgrade(_url(context), datetime.now(UTC), revision)
    if not done.changed:
        click.echo(f"the database has {done.after} already")
        return
    click.echo(f"the database went from {done.before or 'nothing'} to {done.after}")
    if done.backup is not None:
        click.echo(f"as it was before: {done.backup}")


def _url(context: Context) -> str:
    """Of a fleet that is there.

    Raises:
        UsageError: the home holds none, and no database is named.
    """
    from fleet.operations.fleet import require_fleet

    require_fleet(context.settings)
    return context.settings.database_url
