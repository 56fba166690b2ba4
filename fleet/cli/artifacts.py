"""`phifleet artifacts`: what was built, how large, how lossy, how fast."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import click
from rich.console import Console
from rich.table import Table

from agent.contract.manifest import Manifest
from fleet.cli import completion
from fleet.core.frontier import choose, frontier
from fleet.errors import UsageError
from fleet.export.export import MODEL, PUBLIC_KEY, Papers, export, import_artifact
from fleet.export.mirror import mirror
from fleet.export.signing import SIGNATURE, signing_key
from fleet.home import Home
from fleet.operations.fleet import no_fleet
from fleet.profiles_loader import load_profile
from fleet.store import FolderStore, Listing, find
from fleet.store.deltas import make_delta

_WIDTH = 170


class HasHome(Protocol):
    """What these commands need of click's context object."""

    @property
    def home(self) -> Home:
        """The controller's folders."""
        ...


@click.group()
def artifacts() -> None:
    """Artifacts that were built: list, show, compare, export, mirror, import, delta."""


@artifacts.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON array instead of a table.")
@click.pass_obj
def list_command(obj: HasHome, as_json: bool) -> None:
    """List the artifacts with their loss, and their speed on the machine that built them."""
    listing = _listed(obj.home)
    if as_json:
        click.echo(json.dumps([row(manifest) for manifest in listing.manifests]))
    elif listing.manifests:
        wide_console().print(table(listing.manifests))
    elif not listing.damaged:
        click.echo("no artifacts yet; `phifleet build` makes one")


@artifacts.command("show")
@click.argument("artifact", shell_complete=completion.artifacts)
@click.option("--json", "as_json", is_flag=True, help="The signed manifest as it is.")
@click.pass_obj
def show_command(obj: HasHome, artifact: str, as_json: bool) -> None:
    """Show one artifact, by id, digest, or the beginning of either."""
    manifest = find(FolderStore(obj.home.artifacts), artifact)
    if as_json:
        click.echo(manifest.to_json().decode())
        return
    for name, value in {**row(manifest), "digest": manifest.digest, "context": manifest.context}.items():
        click.echo(f"{name:20} {_shown(value)}")
    for title, values in (("recipe", manifest.recipe), ("built with", manifest.versions)):
        click.echo(f"{title:20} " + ", ".join(f"{name} {value}" for name, value in sorted(values.items())))
    if manifest.quality:
        click.echo(f"{'scored on':20} {manifest.quality.tokens} tokens of {manifest.quality.evaluation}")
    if manifest.foreign:
        click.echo(f"{'foreign text':20} {manifest.foreign.tokens} tokens of {manifest.foreign.evaluation}")
    if manifest.speed:
        click.echo(f"{'timed on':20} {manifest.speed.machine}")
    for delta in manifest.deltas:
        click.echo(f"{'delta':20} {delta.name}, {delta.wire_bytes / 1e6:.1f} MB")


@artifacts.command("compare")
@click.argument("wanted", nargs=-1)
@click.option("--model", help="Those of this model only: its name, or the beginning of its source digest.")
@click.option(
    "--profile", shell_complete=completion.profiles, help="Judge them by a profile's limits, and name the best."
)
@click.option("--plot", type=click.Path(path_type=Path), help="Draw loss over size into FILE.png and FILE.svg.")
@click.option("--json", "as_json", is_flag=True, help="One JSON array instead of a table.")
@click.pass_obj
def compare_command(
    obj: HasHome, wanted: tuple[str, ...], model: str | None, profile: str | None, plot: Path | None, as_json: bool
) -> None:
    """Compare artifacts (all, or those named) by loss and size; * marks the frontier."""
    listing = _listed(obj.home)
    chosen = [find(FolderStore(obj.home.artifacts), one) for one in wanted] or list(listing.manifests)
    if not chosen and listing.damaged:
        raise UsageError(f"{obj.home.root} holds no artifact that can be read; see above")
    if not chosen:
        raise UsageError(f"{obj.home.root} holds no artifacts; `phifleet build` makes one, --home names another folder")
    chosen = _of_one_model(chosen, model)
    _check_texts(chosen)
    limits = load_profile(profile) if profile else None
    edge = {one.id for one in frontier(chosen)}
    choice = choose(chosen, limits) if limits else None
    best = choice.best.id if choice and choice.best else None
    misses = {one.manifest.id: one.misses for one in choice.judged} if choice else {}
    ordered = sorted(chosen, key=lambda one: (one.size, one.id))
    if as_json:
        rows = [row(one) | {"frontier": one.id in edge, "best": one.id == best} for one in ordered]
        if limits:
            rows = [one | {"misses": list(misses[one["id"]])} for one in rows]
        click.echo(json.dumps(rows))
    else:
        wide_console().print(table(ordered, edge=edge, best=best))
        for one in ordered:
            for miss in misses.get(one.id, ()):
                click.echo(f"{one.id}: {miss}")
    if plot:
        for one in ordered:
            if one.quality is None:
                click.echo(f"not drawn, for it was not measured: {one.id}", err=True)
        from fleet.cli.plot import draw

        for path in draw(ordered, plot):
            click.echo(f"wrote {path}", err=True)


@artifacts.command("export")
@click.argument("artifact", shell_complete=completion.artifacts)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--bom", is_flag=True, help="With a bill of materials: bom.cdx.json, CycloneDX 1.6.")
@click.option("--card", is_flag=True, help="With a model card: README.md.")
@click.option("--sign", is_flag=True, help="With an OpenSSF model signature over all of it: model.sig.")
@click.option(
    "--key",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Sign with this ECDSA key (PEM). [default: the home's own, made when first needed]",
)
@click.option("--oci", is_flag=True, help="FOLDER is an OCI image layout (CNCF ModelPack) as well.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
@click.pass_obj
def export_command(  # noqa: PLR0913, PLR0917 - a click command has as many parameters as it has flags
    obj: HasHome, artifact: str, folder: Path, bom: bool, card: bool, sign: bool, key: Path | None, oci: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Write ARTIFACT into the new FOLDER, for others: FOLDER/model has its files and the papers that are asked for.

    Every byte is compared with what was built.
    """
    if key is not None and not sign:
        raise UsageError("--key is the key of a signature: add --sign")
    manifest = find(FolderStore(obj.home.artifacts), artifact)
    papers = Papers(bom=bom, card=card, key=(key or signing_key(obj.home)) if sign else None, oci=oci)
    exported = export(FolderStore(obj.home.artifacts), manifest, folder, papers)
    if as_json:
        click.echo(json.dumps({
            "artifact": manifest.id, "folder": str(exported.folder), "files": list(exported.files),
            "tag": exported.tag, "digest": exported.digest,
        }))  # fmt: skip
        return
    click.echo(f"wrote {manifest.id} into {exported.folder / MODEL}: {', '.join(exported.files)}")
    if sign:
        click.echo(
            f"signed; `model_signing verify key {exported.folder / MODEL} --signature "
            f"{exported.folder / MODEL / SIGNATURE} --public_key {exported.folder / PUBLIC_KEY}` verifies it"
        )
    if oci:
        click.echo(f"{exported.folder} is an OCI image layout; `skopeo copy oci:{exported.folder}:{exported.tag} ...` "
                   f"copies it ({exported.digest})")  # fmt: skip


@artifacts.command("delta")
@click.argument("artifact", shell_complete=completion.artifacts)
@click.option(
    "--from",
    "base",
    metavar="BASE",
    shell_complete=completion.artifacts,
    help="The artifact that devices have now. [default: none; ARTIFACT compressed]",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
@click.pass_obj
def delta_command(obj: HasHome, artifact: str, base: str | None, as_json: bool) -> None:
    """Make what tells ARTIFACT to devices that have BASE: an update after training on takes a fraction of the bytes.

    Without --from, ARTIFACT is compressed for devices that have none. Deploy ARTIFACT then. A device without BASE
    fetches it whole.
    """
    from fleet.cli.build import bar
    from fleet.toolchains.drivers.process import cores
    from fleet.toolchains.progress import Progress

    store = FolderStore(obj.home.artifacts)
    old = find(store, base) if base is not None else None
    with bar("delta") as tell:

        def progress(share: float) -> None:
            tell(Progress("comparing", share))

        manifest = make_delta(store, find(store, artifact), old, threads=cores(), progress=progress)
    delta = manifest.deltas[-1]
    if as_json:
        click.echo(json.dumps({
            "artifact": manifest.id, "base": delta.base, "digest": delta.digest, "bytes": delta.wire_bytes,
            "artifact_bytes": manifest.size,
        }))  # fmt: skip
        return
    click.echo(
        f"{manifest.id} {delta.name}: {delta.wire_bytes / 1e6:.1f} MB of {manifest.size / 1e6:.1f} MB "
        f"({delta.wire_bytes / manifest.size:.1%}); `phifleet deploy` it, also where it is deployed already"
    )


@artifacts.command("mirror")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.argument("wanted", nargs=-1, metavar="[ARTIFACT]...", shell_complete=completion.artifacts)
@click.option("--json", "as_json", is_flag=True, help="One JSON array instead of lines.")
@click.pass_obj
def mirror_command(obj: HasHome, folder: Path, wanted: tuple[str, ...], as_json: bool) -> None:
    """Write artifacts (all, or those named) into FOLDER as devices read them from a web server: DIGEST/PATH.

    What is whole there is left alone. Name the server's address under `mirrors` of a profile's [delivery].
    """
    store = FolderStore(obj.home.artifacts)
    chosen = [find(store, one) for one in wanted] or list(_listed(obj.home).manifests)
    done: list[dict[str, Any]] = []

    def tell(manifest: Manifest, there: bool) -> None:
        done.append({"artifact": manifest.id, "digest": manifest.digest, "bytes": manifest.size, "there": there})
        if not as_json:
            click.echo(f"{'there already' if there else 'wrote'}: {manifest.digest}/  {manifest.id}")

    mirror(store, chosen, folder, tell)
    if as_json:
        click.echo(json.dumps(done))
    elif not done:
        click.echo("no artifacts yet; `phifleet build` makes one")
    else:
        click.echo(f'serve {folder} by HTTP, and say so in a profile:  mirrors = ["https://HOST/{{digest}}/{{path}}"]')


@artifacts.command("import")
@click.argument("source", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--tag", help="Of the artifact in an OCI image layout that holds several.")
@click.option("--json", "as_json", is_flag=True, help="The manifest, as `show --json` prints it.")
@click.pass_obj
def import_command(obj: HasHome, source: Path, tag: str | None, as_json: bool) -> None:
    """Take an artifact that `export` wrote, in the folder SOURCE, into this home.

    Every file is compared with its manifest. Who made it is for you to know: verify its signature first.
    """
    manifest, there = import_artifact(FolderStore(obj.home.artifacts), source, tag)
    if as_json:
        click.echo(manifest.to_json().decode())
        return
    verb = "already here:" if there else "imported"
    click.echo(f"{verb} {manifest.id}: {manifest.size / 1e6:.1f} MB, digest {manifest.digest[:16]}")


def _listed(home: Home) -> Listing:
    """Return every artifact; what cannot be read is told.

    Raises:
        UsageError: the home is not there, such as one that was mistyped.
    """
    if not home.root.is_dir():
        raise UsageError(no_fleet(home))
    listing = FolderStore(home.artifacts).list()
    for problem in listing.damaged:
        click.echo(f"warning: {problem}", err=True)
    return listing


def _of_one_model(chosen: list[Manifest], model: str | None) -> list[Manifest]:
    """A loss is against a model's own FP32: across models there is nothing to compare."""
    there = {one.model.source_digest: f"{one.model.name} ({one.model.source_digest[:12]})" for one in chosen}
    listed = ", ".join(sorted(there.values()))
    if model is not None:
        chosen = [one for one in chosen if model == one.model.name or one.model.source_digest.startswith(model)]
    models = {one.model.source_digest for one in chosen}
    if not models:
        raise UsageError(f"no artifact is of model {model}; there are those of {listed}")
    if len(models) > 1:
        raise UsageError(f"these artifacts are of several models, name one with --model: {listed}")
    return chosen


def row(manifest: Manifest) -> dict[str, Any]:
    """Return what is listed of an artifact; None where it was not measured."""
    quality, speed = manifest.quality, manifest.speed
    measured = ("kl_divergence", "kl_divergence_p99", "perplexity", "perplexity_ratio", "same_top_token")
    timed = ("ttft_ms", "tpot_ms", "peak_memory_bytes")
    return {
        "id": manifest.id,
        "model": manifest.model.name,
        "toolchain": manifest.toolchain,
        "precision": manifest.precision,
        "target": manifest.target,
        "bytes": manifest.size,
        **{name: getattr(quality, name) if quality else None for name in measured},
        "foreign_kl_divergence": manifest.foreign.kl_divergence if manifest.foreign else None,
        **{name: getattr(speed, name) if speed else None for name in timed},
        "profile": manifest.profile,
    }


def wide_console(*, stderr: bool = False) -> Console:
    """As wide as the tables: an id that is cut is of no use, and a terminal breaks lines by itself."""
    console = Console(stderr=stderr, soft_wrap=True)
    return Console(stderr=stderr, soft_wrap=True, width=max(console.width, _WIDTH))


def table(manifests: Any, *, edge: set[str] | None = None, best: str | None = None) -> Table:
    """Size, loss and speed, one line each; ``edge`` holds the ids on the frontier."""
    shown = Table(box=None)
    shown.add_column("id", no_wrap=True)
    for name in (
        "MB",
        "KL divergence",
        "foreign",
        "p99",
        "perplexity",
        "ratio",
        "same top",
        "TTFT ms",
        "TPOT ms",
        "MiB",
    ):
        shown.add_column(name, justify="right", no_wrap=True)
    for one in manifests:
        quality, speed = one.quality, one.speed
        mark = (" [bold green]best[/]" if one.id == best else "") + (" *" if edge and one.id in edge else "")
        loss = ["-"] * 6
        if quality:
            loss = [
                f"{quality.kl_divergence:.4f} ± {quality.kl_divergence_se:.4f}",
                f"{one.foreign.kl_divergence:.4f}" if one.foreign else "-", f"{quality.kl_divergence_p99:.2f}",
                f"{quality.perplexity:.2f}", f"{quality.perplexity_ratio:.3f}", f"{quality.same_top_token:.1%}",
            ]  # fmt: skip
        times = ["-"] * 3
        if speed:
            times = [f"{speed.ttft_ms:.0f}", f"{speed.tpot_ms:.1f}", f"{speed.peak_memory_bytes / 2**20:.0f}"]
        shown.add_row(one.id + mark, f"{one.size / 1e6:.1f}", *loss, *times)
    return shown


def _shown(value: Any) -> str:
    if value is None:
        return "not measured"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _check_texts(manifests: list[Manifest]) -> None:
    texts: dict[str, list[str]] = {}
    for one in manifests:
        if one.quality:
            texts.setdefault(one.quality.evaluation, []).append(one.id)
    if len(texts) > 1:
        lines = "\n".join(f"  {text}: {', '.join(ids)}" for text, ids in sorted(texts.items()))
        raise UsageError(
            "these artifacts were scored on different texts, and do not compare; name those of one text, or build them "
            f"again with the same --eval-text:\n{lines}"
        )
