"""`phifleet completion`, and what the shell is offered: devices, profiles and artifacts of the configured fleet."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from fleet.settings import FleetSettings, load

SHELLS = ("bash", "zsh", "fish")
#: More than this no list in a terminal shows.
MOST = 500


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that completes commands, options, devices, profiles and artifacts in SHELL."""
    made = get_completion_class(shell)
    if made is None:
        raise click.ClickException(f"{shell} cannot be completed")
    click.echo(made(ctx.find_root().command, {}, "phifleet", "_PHIFLEET_COMPLETE").source())


def devices(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Ids of the devices; nothing where they cannot be read."""
    found: list[str] = []
    with contextlib.suppress(Exception):  # a completion never complains
        from fleet.operations.fleet import Fleet

        with Fleet(_settings(ctx)) as fleet:
            found = [row.id for row in fleet.registry.devices.all()]
    return _beginning(found, incomplete)


def profiles(_ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return names of the profiles that come with phifleet."""
    from fleet.profiles_loader import profile_paths

    found: list[str] = []
    with contextlib.suppress(Exception):
        found = list(profile_paths())
    return _beginning(found, incomplete)


def artifacts(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Ids of the artifacts that were built; their folders say so, and none is read."""
    found: list[str] = []
    with contextlib.suppress(Exception):
        found = [path.parent.name for path in (_settings(ctx).home / "artifacts").glob("*/manifest.json")]
    return _beginning(found, incomplete)


def _settings(ctx: click.Context) -> FleetSettings:
    """With --home and --config where they were typed before the command."""
    typed = ctx.find_root().params
    home, file = typed.get("home"), typed.get("config")
    return load({"home": Path(home) if home else None}, Path(file) if file else None)[0]


def _beginning(found: Iterable[str], incomplete: str) -> list[str]:
    return sorted(name for name in found if name.startswith(incomplete))[:MOST]
