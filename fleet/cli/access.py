"""`phifleet token` and `phifleet webhook`: who may use the API, and whom it tells."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import click
from rich.table import Table

from fleet.api.server import DEFAULT
from fleet.cli.artifacts import wide_console
from fleet.cli.context import Context
from fleet.core.roles import Role
from fleet.settings import FleetSettings


@click.group()
def token() -> None:
    """Make and revoke tokens of the API."""


@token.command("create")
@click.argument("name")
@click.option("--role", type=click.Choice([role.value for role in Role]), required=True, help="What it may do.")
@click.option("--scope", help="A selector: no other device is shown or changed.")
@click.option("--days", type=click.FloatRange(0, min_open=True), help="After which it expires; never unless given.")
@click.pass_obj
def create_token(context: Context, name: str, role: str, scope: str | None, days: float | None) -> None:
    """Make a token called NAME. It is printed this once on standard output; the database keeps its hash."""
    expires = (datetime.now(UTC) + timedelta(days=days)).isoformat() if days else None
    body = {"name": name, "role": role, "scope": scope, "expires_at": expires}
    with context.client() as client:
        made = client.call("POST", "/tokens", body)
    click.echo(f"token {made['id']} for {name}, {role}" + (f", until {expires[:16]} UTC" if expires else ""), err=True)
    click.echo(made["token"])


@token.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON array.")
@click.pass_obj
def list_tokens(context: Context, as_json: bool) -> None:
    """List the tokens, newest first."""
    with context.client() as client:
        rows = client.call("GET", "/tokens")["items"]
    if as_json:
        click.echo(json.dumps(rows))
        return
    table = Table("id", "name", "role", "scope", "made (UTC)", "by", "used", "good until", box=None)
    for row in rows:
        until = "revoked" if row["revoked_at"] else (row["expires_at"] or "it is revoked")[:16]
        made = (row["created_at"][:16], row["created_by"], (row["used_at"] or "never")[:16])
        table.add_row(row["id"], row["name"], row["role"], row["scope"] or "all devices", *made, until)
    wide_console().print(table)


@token.command("revoke")
@click.argument("token_id", metavar="ID")
@click.pass_obj
def revoke_token(context: Context, token_id: str) -> None:
    """Let the token ID be good no more."""
    with context.client() as client:
        client.call("DELETE", f"/tokens/{token_id}")
    click.echo(f"token {token_id} is revoked")


@click.command()
@click.option(
    "--role", type=click.Choice([role.value for role in Role]), default="admin", show_default=True, help="On the page."
)
@click.option("--scope", help="A selector: no other device is shown or changed.")
@click.pass_obj
def dashboard(context: Context, role: str, scope: str | None) -> None:
    """Print a link that opens the fleet's page in a browser, signed in. It is good once, within ten minutes.

    A running `phifleet serve` with `api` in its settings serves the page.
    """
    with context.client() as client:
        made = client.call("POST", "/links", {"role": role, "scope": scope})
    if context.settings.server is None and context.settings.api is None:
        click.echo(f"the page is there while `phifleet serve --api {DEFAULT}` runs", err=True)
    click.echo(page_url(context.settings) + made["path"])


def page_url(settings: FleetSettings) -> str:
    """Return where the page is: at the server that is set, or where a controller with these settings serves it."""
    if settings.server is not None:
        return settings.server.rstrip("/")
    return f"{'https' if settings.api_cert else 'http'}://{settings.api or DEFAULT}"


@click.group()
def webhook() -> None:
    """Send what is written into the audit to other programs, signed as Standard Webhooks has it."""


@webhook.command("create")
@click.argument("url")
@click.option("--event", "events", multiple=True, default=("*",), show_default=True, help="Such as rollout.*.")
@click.pass_obj
def create_webhook(context: Context, url: str, events: tuple[str, ...]) -> None:
    """Send to URL what happens from now on. The secret of the signatures is printed this once."""
    with context.client() as client:
        made = client.call("POST", "/webhooks", {"url": url, "events": list(events)})
    click.echo(f"webhook {made['id']} to {url}", err=True)
    click.echo(made["secret"])


@webhook.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON array.")
@click.pass_obj
def list_webhooks(context: Context, as_json: bool) -> None:
    """List the webhooks, and how each does."""
    with context.client() as client:
        rows = client.call("GET", "/webhooks")["items"]
    if as_json:
        click.echo(json.dumps(rows))
        return
    table = Table("id", "url", "events", "last delivery (UTC)", "failures", "error", box=None)
    for row in rows:
        delivered = (row["delivered_at"] or "never")[:16]
        error = row["error"] or ""
        table.add_row(row["id"], row["url"], ", ".join(row["events"]), delivered, str(row["failures"]), error)
    wide_console().print(table)


@webhook.command("delete")
@click.argument("webhook_id", metavar="ID")
@click.pass_obj
def delete_webhook(context: Context, webhook_id: str) -> None:
    """Send the webhook ID nothing more."""
    with context.client() as client:
        client.call("DELETE", f"/webhooks/{webhook_id}")
    click.echo(f"webhook {webhook_id} is deleted")
