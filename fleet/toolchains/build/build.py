"""One artifact: checkpoint, profile and recipe in; files, chunks and a manifest out."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.contract.base import canonical_json, sha256_hex
from agent.contract.chunk_index import INDEX_FILE, with_index
from agent.contract.manifest import ArtifactFile, Manifest, Probe, Target, artifact_digest
from agent.contract.profile import DeviceProfile, Recipe
from agent.platform.files import reason, sync_folder, sync_tree, write_atomic
from fleet.core.allocation import named
from fleet.core.plan_memory import memory_need
from fleet.core.plan_size import predicted_bytes, recorded
from fleet.delivery.chunking import chunk_file
from fleet.errors import BuildError, UsageError
from fleet.home import Home
from fleet.store.folder import BESIDE, FolderStore
from fleet.store.half_made import half_made
from fleet.toolchains.checkpoint.chat import render
from fleet.toolchains.checkpoint.checkpoint import Checkpoint
from fleet.toolchains.drivers import process
from fleet.toolchains.drivers.base import Converted, ConvertJob, SpeakJob, installed_versions
from fleet.toolchains.drivers.registry import driver_of
from fleet.toolchains.progress import Progress, ProgressCallback, silent
from fleet.toolchains.quality import calibration
from fleet.toolchains.recovery.choices import kept

PROBE_PROMPT = "What is the capital of France?"
PROBE_ANSWER = "Paris"


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """A build that was decided, and its name. The same inputs and versions have the same id."""

    id: str
    model: Checkpoint
    profile: DeviceProfile
    recipe: Recipe
    options: dict[str, Any]
    versions: dict[str, str]
    context: int
    calibration: tuple[str, ...] = ()
    after: Manifest | None = None

    @property
    def runs_here(self) -> bool:
        """Whether its runtime can be asked on a build machine, which has a CPU for certain."""
        return self.recipe.target in (Target.CPU, Target.METAL, Target.GPU, Target.NPU, Target.QNN)

    @property
    def peak_memory_bytes(self) -> int:
        """Estimate: of converting, or of loading what came out where that takes more."""
        converting = driver_of(self.recipe.toolchain).peak_memory_bytes(self.recipe, self.model)
        if not self.runs_here:
            return converting
        need = memory_need(self.model.shape, self._resolved, self.size_bytes, self.context)
        return max(converting, need.at_context(self.context))

    @property
    def size_bytes(self) -> int:
        """Predicted, of the artifact."""
        return predicted_bytes(self.model.shape, self._resolved)

    @property
    def _resolved(self) -> Recipe:
        return self.recipe.model_copy(update={"options": self.options})


def plan_build(model: Checkpoint, profile: DeviceProfile, recipe: Recipe, after: Manifest | None = None) -> BuildPlan:
    """Return what would be built, without building.

    ``after`` is the artifact of an earlier checkpoint: each matrix gets the width that it has there, and not what a
    budget would choose now, so that a delta from it is small.

    Raises:
        BuildError: the toolchain is not installed.
        UsageError: ``after`` is of another toolchain or precision, or does not say its widths.
        ProfileError: the toolchain cannot build this recipe.
    """
    driver = driver_of(recipe.toolchain)
    options = driver.resolve(recipe, model)
    texts: tuple[str, ...] = ()
    if options.get("calibration"):
        found = calibration.load(str(options["calibration"]), model.chat)
        texts, options = found.texts, options | {"calibration": found.label}
    versions = installed_versions(driver, options)
    context = min(profile.context, model.facts.max_context)
    inputs = {
        "model": model.facts.source_digest,
        "name": model.name,
        "toolchain": recipe.toolchain,
        "precision": recipe.precision,
        "target": recipe.target,
        "options": recorded(options),
        "versions": versions,
        "context": context,
    }
    if widths := _widths(after, recipe, options):
        inputs["widths"] = widths
    key = sha256_hex(canonical_json(inputs))[:12]
    name = f"{model.name}-{recipe.toolchain}-{recipe.precision}-{recipe.target}-{key}"
    return BuildPlan(name, model, profile, recipe, options, versions, context, texts, after)


def _widths(after: Manifest | None, recipe: Recipe, options: dict[str, Any]) -> dict[str, str]:
    if after is None:
        return {}
    if (after.toolchain, after.precision, after.target) != (recipe.toolchain, recipe.precision, recipe.target):
        raise UsageError(
            f"{after.id} is {after.toolchain} {after.precision} {after.target}, and the recipe "
            f"{recipe.toolchain} {recipe.precision} {recipe.target}: choose the same one, or leave --after out"
        )
    if not options.get("budget"):
        return {}
    recorded_widths = after.recipe.get("allocated", {}).get("matrices")
    if not recorded_widths:
        raise UsageError(
            f"{after.id} does not say which width each matrix has: it was built without a budget, or before this was "
            "kept. Build it again, after removing its folder, or leave --after out"
        )
    return named(recorded_widths)


def build(
    model: Checkpoint, profile: DeviceProfile, recipe: Recipe, home: Home, *,
    progress: ProgressCallback = silent, threads: int | None = None, after: Manifest | None = None,
) -> Manifest:  # fmt: skip
    """Build an artifact, or return the one that is there already.

    Raises:
        BuildError: a toolchain is missing, failed, or was killed, or the disk has no room; nothing half-made is left.
        ModelError: the toolchain found the checkpoint wrong.
        ProfileError: the toolchain cannot build this recipe.
    """
    plan = plan_build(model, profile, recipe, after)
    if found := find_built(plan, home):
        progress(Progress("already built", 1.0))
        return found
    try:
        with half_made(home.artifacts, plan.id) as half:
            _check_room(plan, home)
            return _build_into(half, plan, home, progress, threads or process.cores())
    except OSError as error:
        raise BuildError(f"cannot write the artifact in {home.artifacts}: {reason(error, home.artifacts)}") from None


def find_built(plan: BuildPlan, home: Home) -> Manifest | None:
    """Return the artifact of this plan, if it is there.

    The card of a checkpoint is no input of the build, so its licence may have been corrected since; the manifest gets
    it.

    Raises:
        StoreError: it cannot be read, or is damaged.
    """
    store = FolderStore(home.artifacts)
    found = store.get(plan.id)
    if found is not None and found.model.license != plan.model.facts.license:
        found = found.model_copy(update={"model": plan.model.facts})
        store.save_manifest(found)
    return found


def choices_file(plan: BuildPlan, home: Home) -> Path | None:
    """Where it is kept what each width costs each matrix, for this plan and others of another budget; None: none does.

    Whether it is there says whether a build has measured it.
    """
    if not plan.options.get("budget"):
        return None
    inputs = {
        "model": plan.model.facts.source_digest,
        "toolchain": plan.recipe.toolchain,
        "options": recorded({name: one for name, one in plan.options.items() if name not in ("budget", "recover")}),
        "versions": plan.versions,
    }
    return home.root / "cache" / "choices" / f"{sha256_hex(canonical_json(inputs))[:32]}.json"


def expected_loss(plan: BuildPlan, home: Home) -> float | None:
    """Return what the plan's budget is expected to cost, in nats a token, where a build has measured the widths.

    None where none has, the recipe has no budget, or it is less than the smallest widths take.
    """
    path = choices_file(plan, home)
    found = kept(path) if path is not None else None
    try:
        return found.spend(plan.options["budget"]).loss if found is not None else None
    except BuildError:
        return None


def _check_room(plan: BuildPlan, home: Home) -> None:
    """The least that it takes: what a toolchain writes on the way comes on top."""
    free = shutil.disk_usage(home.artifacts).free
    if plan.size_bytes > free:
        raise BuildError(
            f"the artifact will take {plan.size_bytes / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free in "
            f"{home.artifacts}; make room there, or name another folder with --home"
        )


def _build_into(half: Path, plan: BuildPlan, home: Home, progress: ProgressCallback, threads: int) -> Manifest:
    made, scratch = half / "artifact", half / "scratch"
    files = made / "files"
    files.mkdir(parents=True)
    scratch.mkdir()
    log = home.logs / f"{plan.id}.log"
    job = ConvertJob(
        toolchain=plan.recipe.toolchain, source=plan.model.path.resolve(), out=files.resolve(),
        scratch=scratch.resolve(), beside=(made / BESIDE).resolve(), name=plan.model.name,
        precision=plan.recipe.precision, target=plan.recipe.target,
        options=plan.options, context=plan.context, threads=threads, calibration=plan.calibration,
        widths=_widths(plan.after, plan.recipe, plan.options), choices=choices_file(plan, home),
    )  # fmt: skip
    converted = process.convert(job, log, progress)
    shutil.rmtree(scratch, ignore_errors=True)
    asked = made / BESIDE if (made / BESIDE).is_dir() else files
    probes = _probe(plan, asked, converted, log, progress, threads)
    manifest, index = with_index(_manifest(plan, _chunked(files, progress), converted, probes))
    if index is not None:
        write_atomic(made / INDEX_FILE, index)
    write_atomic(made / "manifest.json", manifest.to_json())
    sync_tree(made)
    return _put_in_place(made, home, manifest)


def _put_in_place(made: Path, home: Home, manifest: Manifest) -> Manifest:
    try:
        made.rename(home.artifacts / manifest.id)
    except OSError:
        # Someone else built the same meanwhile: the same inputs, so theirs is as good.
        if found := FolderStore(home.artifacts).get(manifest.id):
            return found
        raise
    sync_folder(home.artifacts)
    return manifest


def _probe(
    plan: BuildPlan, files: Path, converted: Converted, log: Path, progress: ProgressCallback, threads: int
) -> tuple[Probe, ...]:
    """Return the default probe; a model that knows the answer here must know it on the device."""
    if not plan.runs_here:
        return (Probe(prompt=PROBE_PROMPT),)
    progress(Progress("asking the artifact"))
    job = SpeakJob(
        toolchain=plan.recipe.toolchain, folder=files.resolve(), entry=converted.entry, context=plan.context,
        prompt=render(plan.model.chat, PROBE_PROMPT), max_tokens=16, threads=threads,
    )  # fmt: skip
    answer = process.speak(job, log, progress)
    return (Probe(prompt=PROBE_PROMPT, expect=(PROBE_ANSWER,) if PROBE_ANSWER in answer else ()),)


def _chunked(folder: Path, progress: ProgressCallback) -> tuple[ArtifactFile, ...]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    if not paths:
        raise BuildError(f"the toolchain wrote no files into {folder}")
    entries = []
    for done, path in enumerate(paths):
        progress(Progress("cutting into chunks", done / len(paths)))
        path.chmod(0o644)
        sha256, size, chunks = chunk_file(path)
        entries.append(ArtifactFile(path=path.relative_to(folder).as_posix(), size=size, sha256=sha256, chunks=chunks))
    return tuple(entries)


def _manifest(
    plan: BuildPlan, files: tuple[ArtifactFile, ...], converted: Converted, probes: tuple[Probe, ...]
) -> Manifest:
    size = sum(file.size for file in files)
    need = memory_need(plan.model.shape, plan.recipe, size, plan.context)
    return Manifest(
        id=plan.id,
        digest=artifact_digest(plan.id, files),
        size=size,
        model=plan.model.facts,
        toolchain=plan.recipe.toolchain,
        versions=plan.versions,
        recipe=recorded(plan.options) | converted.notes | ({"after": plan.after.id} if plan.after else {}),
        precision=plan.recipe.precision,
        target=plan.recipe.target,
        profile=plan.profile.name,
        context=plan.context,
        entry=converted.entry,
        memory=need.model_copy(
            update={"kv_bytes_per_token": int(plan.model.shape.kv_elements_per_token * converted.kv_element_bytes)}
        ),
        chat=plan.model.chat,
        sampling=plan.model.sampling,
        probes=probes,
        files=files,
    )
