"""`phifleet release` and `phifleet selector`: names for variants of a model, and for devices."""

from __future__ import annotations

import json

import click
from rich.table import Table

from fleet.cli import completion
from fleet.cli.artifacts import wide_console
from fleet.cli.context import Context


@click.group()
def release() -> None:
    """Name the variants of a model as one thing: each device gets the one that its profile is for."""


@release.command("create")
@click.argument("name")
@click.argument("artifacts", nargs=-1, required=True, shell_complete=completion.artifacts)
@click.pass_obj
def create_command(context: Context, name: str, artifacts: tuple[str, ...]) -> None:
    """Make release NAME of ARTIFACTS. It never changes; `deploy` and `rollout` take its name."""
    with context.client() as client:
        made = client.call("POST", "/releases", {"release": name, "artifacts": list(artifacts)})
    click.echo(f"release {made['release']} has {len(made['digests'])} variants")


@release.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON array.")
@click.pass_obj
def list_releases(context: Context, as_json: bool) -> None:
    """List the releases, newest first."""
    with context.client() as client:
        rows = client.call("GET", "/releases")["items"]
    if as_json:
        click.echo(json.dumps(rows))
        return
    table = Table("release", "made (UTC)", "by", "variants", box=None)
    for row in rows:
        variants = ", ".join(digest[:12] for digest in row["digests"])
        table.add_row(row["release"], row["created_at"][:16], row["created_by"], variants)
    wide_console().print(table)


@release.command("delete")
@click.argument("name")
@click.pass_obj
def delete_release(context: Context, name: str) -> None:
    """Forget release NAME; its artifacts stay."""
    with context.client() as client:
        client.call("DELETE", f"/releases/{name}")
    click.echo(f"release {name} is forgotten")


@click.group()
def selector() -> None:
    """Save selectors under names: other selectors mean them as @NAME, and find who belongs when they are asked."""


@selector.command("save")
@click.argument("name")
@click.argument("text", metavar="SELECTOR")
@click.pass_obj
def save_command(context: Context, name: str, text: str) -> None:
    """Save SELECTOR as @NAME, or give the name this meaning from now on."""
    with context.client() as client:
        client.call("PUT", f"/selectors/{name}", {"selector": text})
    click.echo(f"@{name} means {text}")


@selector.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON array.")
@click.pass_obj
def list_selectors(context: Context, as_json: bool) -> None:
    """List the saved selectors."""
    with context.client() as client:
        rows = client.call("GET", "/selectors")["items"]
    if as_json:
        click.echo(json.dumps(rows))
        return
    table = Table("name", "selector", "saved (UTC)", "by", box=None)
    for row in rows:
        table.add_row(f"@{row['name']}", row["selector"], row["created_at"][:16], row["created_by"])
    wide_console().print(table)


@selector.command("delete")
@click.argument("name")
@click.pass_obj
def delete_selector(context: Context, name: str) -> None:
    """Forget @NAME; rollouts that were started with it go on."""
    name = name.removeprefix("@")
    with context.client() as client:
        client.call("DELETE", f"/selectors/{name}")
    click.echo(f"@{name} is forgotten")
