"""`phifleet plan`: what could be built for a profile, how large it gets, and what is refused and why."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.markup import escape
from rich.table import Table

from agent.contract.base import sha256_hex
from agent.contract.manifest import Chat, ModelFacts
from agent.contract.profile import DeviceProfile, Recipe
from fleet.cli import completion
from fleet.cli.artifacts import wide_console
from fleet.core.plan import Candidate, Resolve, as_json, candidates, describe, first_legal
from fleet.core.plan_memory import FORMULA
from fleet.core.plan_shape import ModelShape
from fleet.errors import BuildError
from fleet.home import Home
from fleet.profiles_loader import load_profile
from fleet.toolchains.build.build import expected_loss, plan_build
from fleet.toolchains.checkpoint.checkpoint import Checkpoint, resolve_model
from fleet.toolchains.checkpoint.checkpoint_shape import read_shape
from fleet.toolchains.drivers.registry import driver_of


@click.command("plan")
@click.option(
    "--model", required=True, help="A checkpoint's folder, or a published Phi such as phi-4-mini; nothing is fetched."
)
@click.option(
    "--profile",
    "profiles",
    required=True,
    multiple=True,
    shell_complete=completion.profiles,
    help="A profile's name or file; may be repeated.",
)
@click.option(
    "--loss",
    is_flag=True,
    help="Also what each budget is expected to cost, where a build has measured that; reads the checkpoint.",
)
@click.option("--json", "as_json_", is_flag=True, help="One JSON array instead of a table.")
@click.pass_context
def plan(ctx: click.Context, model: str, profiles: tuple[str, ...], loss: bool, as_json_: bool) -> None:
    """Show every recipe of the profiles for a model, with size and memory, or why it is refused.

    Nothing is built. Ends with an error when a profile has no recipe left.
    """
    loaded = [load_profile(name) for name in profiles]
    shape = read_shape(model)
    planned = [candidates(shape, profile, resolver(shape, model)) for profile in loaded]
    losses = _losses(model, loaded, planned, ctx.obj.home) if loss else None
    if as_json_:
        rows = [[{"recipe": n} | as_json(one) for n, one in enumerate(found, 1)] for found in planned]
        for of_profile, known in zip(rows, losses or (), strict=False):
            for row, expected in zip(of_profile, known, strict=True):
                row["expected_kl"] = expected
        click.echo(json.dumps([row for of_profile in rows for row in of_profile]))
    else:
        console = wide_console()
        console.print(f"{shape.name}: {shape.architecture}, {shape.parameters / 1e9:.2f} billion weights")
        console.print(_table(planned, losses))
        for line in _reasons(planned):
            console.print(line, highlight=False)
        console.print(f"memory: {FORMULA}", style="dim")
    for found in planned:
        first_legal(found)


def _losses(
    model: str, profiles: Sequence[DeviceProfile], planned: Sequence[tuple[Candidate, ...]], home: Home
) -> list[list[float | None]]:
    """Of each candidate, in nats a token; None: not known, or it has no budget."""
    checkpoint = resolve_model(model)

    def of(profile: DeviceProfile, one: Candidate) -> float | None:
        if not one.legal or not one.options.get("budget"):
            return None
        try:
            found = expected_loss(plan_build(checkpoint, profile, one.recipe), home)
        except BuildError:  # the toolchain is not installed here
            return None
        return None if found is None else round(found, 4)

    return [[of(profile, one) for one in found] for profile, found in zip(profiles, planned, strict=True)]


def resolver(shape: ModelShape, model: str) -> Resolve:
    """Completes options as each toolchain's driver does, without reading the weights."""
    checkpoint = Checkpoint(
        path=Path(model), config={},
        facts=ModelFacts(
            name=shape.name, architecture=shape.architecture, parameters=shape.parameters,
            source_digest=sha256_hex(b""), max_context=shape.max_context,
        ),
        shape=shape, chat=Chat(template=""), weights_bytes=shape.stored_bytes * shape.parameters,
    )  # fmt: skip

    def resolve(recipe: Recipe) -> Mapping[str, Any]:
        return driver_of(recipe.toolchain).resolve(recipe, checkpoint)

    return resolve


def _table(planned: list[tuple[Candidate, ...]], losses: list[list[float | None]] | None) -> Table:
    more = ("expected loss",) if losses is not None else ()
    table = Table("profile", "#", "recipe", "size", "memory", "context", *more, "verdict", box=None)
    for place, found in enumerate(planned):
        best = next((one for one in found if one.legal), None)
        for number, one in enumerate(found, 1):
            verdict = "[bold green]first choice[/]" if one is best else "[green]legal[/]"
            if not one.legal:
                verdict = f"[red]refused: {', '.join(why.rule for why in one.refusals)}[/]"
            table.add_row(
                one.profile, str(number), escape(describe(one.recipe)), f"{one.size_bytes / 1e6:.0f} MB",
                f"{one.peak_memory_bytes / 2**20:.0f} MiB", str(one.context),
                *([_nats(losses[place][number - 1])] if losses is not None else ()), verdict,
            )  # fmt: skip
    return table


def _nats(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.3f} nats"


def _reasons(planned: list[tuple[Candidate, ...]]) -> Iterator[str]:
    for one in (candidate for found in planned for candidate in found):
        where = escape(f"{one.profile}, {describe(one.recipe)}")
        for why in one.refusals:
            yield f"[red]{why.rule}[/]: {where}: {escape(why.reason)} [dim]({escape(why.source)})[/]"
        for note in one.notes:
            yield f"note: {where}: {note}"
