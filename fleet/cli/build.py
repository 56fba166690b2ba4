"""``phifleet sample-model`` and ``phifleet build``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from agent.contract.manifest import Manifest, Precision, Target, Toolchain
from fleet.home import Home
from fleet.profiles_loader import load_profile
from fleet.toolchains import progress as work
from fleet.toolchains.build import choose_recipe
from fleet.toolchains.checkpoint import resolve_model
from fleet.toolchains.jobs import Request, build_all
from fleet.toolchains.sample_model import SampleReport, make_sample


class HasHome(Protocol):
    """What these commands need of click's context object."""

    @property
    def home(self) -> Home:
        """The controller's folders."""
        ...


@click.command("sample-model")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
def sample_model(folder: Path, as_json: bool) -> None:
    """Make a small speaking model of Phi-3's architecture in FOLDER, without any model hub."""
    with bar("sample model") as progress:
        report = make_sample(folder, progress=progress)
    if as_json:
        click.echo(json.dumps({name: getattr(report, name) for name in report.__slots__}, default=str))
        return
    for line in describe_sample(report):
        click.echo(line)


def describe_sample(report: SampleReport) -> list[str]:
    """What was made, in lines for people."""
    difference = "not checked" if report.logits_difference is None else f"{report.logits_difference:g}"
    return [
        f"{report.folder}: {report.name}, Phi3ForCausalLM, float32, {report.bytes / 1e6:.0f} MB",
        f"  made of {report.source} ({report.license}): {report.parameters / 1e6:.1f} million weights, "
        f"{report.layers} layers of {report.hidden}, {report.vocabulary} tokens, context {report.context}",
        f"  largest difference of its logits to the source's: {difference}",
        f"  asked for the capital of France it says: {report.answer}",
        f"  took {report.seconds:.1f} s",
    ]


@click.command("build")
@click.option(
    "--model", required=True, help="A checkpoint's folder, or a hub id such as microsoft/Phi-4-mini-instruct."
)
@click.option("--profile", "profiles", required=True, multiple=True, help="A profile's name or file; may be repeated.")
@click.option("--toolchain", type=click.Choice([str(one) for one in Toolchain]), help="Of the profile's recipes.")
@click.option("--precision", type=click.Choice([str(one) for one in Precision]), help="Of the profile's recipes.")
@click.option("--target", type=click.Choice([str(one) for one in Target]), help="Of the profile's recipes.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line on standard output, for each artifact.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Builds side by side, at most.")
@click.pass_obj
def build(
    obj: HasHome, model: str, profiles: tuple[str, ...], toolchain: str | None, precision: str | None,
    target: str | None, as_json: bool, jobs: int,
) -> None:  # fmt: skip
    """Quantize a model for one or more device profiles.

    The profile's first recipe is taken that matches what is named. An artifact that is there is not built again, so an
    interrupted run goes on where it was.
    """
    loaded = [load_profile(name) for name in profiles]
    requests = [Request(profile, choose_recipe(profile, toolchain, precision, target)) for profile in loaded]
    with bars() as lines:
        checkpoint = resolve_model(model, progress=lines("checkpoint"))
        outcomes = build_all(checkpoint, requests, obj.home, jobs=jobs, progress=lambda i: lines(_title(requests[i])))
    for outcome in outcomes:
        if outcome.manifest is not None:
            click.echo((_as_json if as_json else _as_text)(outcome.manifest, outcome.reused))
    failed = [outcome.error for outcome in outcomes if outcome.error is not None]
    for error in failed[1:]:
        click.echo(f"error: {error}", err=True)
    if failed:
        raise failed[0]


def _title(request: Request) -> str:
    recipe = request.recipe
    return f"{request.profile.name} {recipe.toolchain} {recipe.precision} {recipe.target}"


def _as_text(manifest: Manifest, there: bool) -> str:
    verb = "already built" if there else "built"
    return f"{verb} {manifest.id}: {manifest.size / 1e6:.1f} MB, digest {manifest.digest[:16]}"


def _as_json(manifest: Manifest, there: bool) -> str:
    return json.dumps(
        {
            "id": manifest.id, "digest": manifest.digest, "model": manifest.model.name, "toolchain": manifest.toolchain,
            "precision": manifest.precision, "target": manifest.target, "bytes": manifest.size,
            "profile": manifest.profile, "reused": there,
        }
    )  # fmt: skip


@contextmanager
def bar(title: str) -> Iterator[work.ProgressCallback]:
    """A progress bar on standard error, one line, that shows the phase it is in."""
    with bars() as lines:
        yield lines(title)


@contextmanager
def bars() -> Iterator[Callable[[str], work.ProgressCallback]]:
    """Progress bars on standard error: each call with a title adds a line, and returns what moves it."""
    columns = (
        TextColumn("[bold]{task.fields[title]}"),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:

        def line(title: str) -> work.ProgressCallback:
            task = shown.add_task("", total=None, title=title)

            def tell(step: work.Progress) -> None:
                total = None if step.fraction is None else 1.0
                text = f"{step.phase} {step.detail}".rstrip()
                shown.update(task, description=text, total=total, completed=step.fraction or 0)

            return tell

        yield line
