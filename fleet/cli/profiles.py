"""`phifleet profiles`: the device classes that artifacts are built for."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.table import Table

from agent.contract.profile import DeviceProfile, Recipe
from fleet.cli.artifacts import wide_console
from fleet.cli.plan import resolver
from fleet.core.phi_variants import VARIANTS
from fleet.core.plan import DISK_RULE, MEMORY_RULE, OPTIONS_RULE, describe, judge
from fleet.core.rules import Refusal
from fleet.errors import ProfileError
from fleet.profiles_loader import list_profiles, load_profile, profile_paths, read_profile


@click.group()
def profiles() -> None:
    """Device profiles: what a class of devices is, may hold and must reach."""


@profiles.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON array instead of a table.")
def list_command(as_json: bool) -> None:
    """List the profiles that come with phifleet."""
    found = list_profiles()
    if as_json:
        click.echo(json.dumps([profile.model_dump(mode="json") for profile in found]))
        return
    table = Table("name", "description", "class", "memory", "context", "recipes, in order of preference", box=None)
    for profile in found:
        table.add_row(
            profile.name,
            profile.description,
            profile.device_class,
            f"{profile.memory_bytes / 2**30:.1f} GiB",
            str(profile.context),
            recipe_names(profile),
        )
    wide_console().print(table)


@profiles.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="JSON instead of the file with its reasons.")
def show_command(name: str, as_json: bool) -> None:
    """Print a profile, with the reason for each field."""
    profile = load_profile(name)
    if as_json:
        click.echo(profile.model_dump_json(indent=2))
        return
    click.echo(profile_paths().get(name, Path(name)).read_text(encoding="utf-8"), nl=False)


@profiles.command("check")
@click.argument("file", type=click.Path(path_type=Path))
def check_command(file: Path) -> None:
    """Say whether FILE is a profile, and if not which field is wrong and what is allowed.

    Names each recipe, too, that none of the published Phis can have, whatever memory and disk there are.
    """
    profile = read_profile(file)
    refused = [(recipe, _refusal(profile, recipe)) for recipe in profile.recipes]
    for recipe, why in refused:
        if why is not None and why.rule == OPTIONS_RULE:
            raise ProfileError(f"{file}: recipe {describe(recipe)}: {why.reason}")
    click.echo(f"{file}: profile {profile.name} is valid: {recipe_names(profile)}")
    for recipe, why in refused:
        if why is not None:
            click.echo(f"no Phi can have {describe(recipe)}: {why.reason} ({why.source})")


def _refusal(profile: DeviceProfile, recipe: Recipe) -> Refusal | None:
    """Why every published Phi is refused this recipe, for another reason than its size; None where one is not."""
    judged = [judge(one.shape, profile, recipe, resolver(one.shape, one.name)) for one in VARIANTS]
    reasons = [next((why for why in one.refusals if why.rule not in (MEMORY_RULE, DISK_RULE)), None) for one in judged]
    if not all(reasons):
        return None
    return next((why for why in reasons if why and why.rule == OPTIONS_RULE), reasons[0])


def recipe_names(profile: DeviceProfile) -> str:
    """Return the profile's recipes in a line, each once, such as ``llamacpp int4 cpu, mlx int8 metal``."""
    names = [f"{recipe.toolchain} {recipe.precision} {recipe.target}" for recipe in profile.recipes]
    return ", ".join(dict.fromkeys(names))
