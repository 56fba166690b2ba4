"""Measures what quantization cost: loss against the FP32 model, in the artifact's own runtime, and speed here.

The reference is made once for a model and an evaluation set, and kept by the model's digest. Each measurement runs in
a process of its own, as builds do.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from agent.contract.base import canonical_json, sha256_hex
from agent.contract.manifest import BuildSpeed, Chat, Manifest, Quality
from agent.platform.resources import available_bytes
from fleet.errors import BuildError
from fleet.store.folder import BESIDE
from fleet.toolchains.checkpoint.chat import render
from fleet.toolchains.drivers import process
from fleet.toolchains.progress import ProgressCallback, silent
from fleet.toolchains.quality import evaluation
from fleet.toolchains.quality.evaluation import Evaluation
from fleet.toolchains.quality.quality_job import MeasureJob
from fleet.toolchains.quality.reference import SEED, ReferenceJob

_KEEP_REFERENCES = 16


@dataclass(frozen=True, slots=True)
class Measured:
    """What an artifact loses on the set that was asked for and on ``foreign`` text, and how fast it is here.

    ``foreign`` is None where the artifact's context is too short for a passage.
    """

    quality: Quality
    foreign: Quality | None
    speed: BuildSpeed


def measure(
    checkpoint_dir: Path, artifact_dir: Path, manifest: Manifest, *, eval_text: Path | None = None, cache: Path,
    progress: ProgressCallback = silent, threads: int | None = None, foreign: bool = True,
) -> Measured:  # fmt: skip
    """Loss, and speed on this machine, of an artifact whose files are in ``artifact_dir`` (or in its ``files/``).

    ``cache`` is a folder for references; they are kept by the model's digest and the text's. An artifact for a device
    that is not here is run on the CPU: its weights, and so its loss, are the same, and its speed is the CPU's.
    ``foreign`` False: on the one set alone.

    Raises:
        BuildError: the runtime is missing, does not load the artifact, or crashed; or too little memory.
        UsageError: the evaluation text is empty, binary or too short.
    """
    chosen = evaluation.from_text(eval_text) if eval_text else evaluation.bundled()
    sets = [chosen, *([evaluation.foreign()] if foreign else ())]
    threads = threads or process.cores()
    against = {
        one.label: prepare(
            checkpoint_dir, manifest.model.source_digest, manifest.chat, one, cache, progress=progress, threads=threads
        )
        for one in sets
    }
    folders = (artifact_dir / name for name in (BESIDE, "files"))
    files = next((folder for folder in folders if folder.is_dir()), artifact_dir)
    job = MeasureJob(
        toolchain=manifest.toolchain, target=manifest.target, folder=files.resolve(), entry=manifest.entry,
        context=manifest.context, threads=threads, source=checkpoint_dir.resolve(), against=against,
    )  # fmt: skip
    answer = process.run("measure", job, cache / f"measure-{manifest.id}.log", progress)
    speed = BuildSpeed(
        machine=machine(), ttft_ms=answer["ttft_ms"], tpot_ms=answer["tpot_ms"],
        peak_memory_bytes=answer["peak_memory_bytes"],
    )  # fmt: skip
    found = {label: Quality.model_validate(one) for label, one in answer["qualities"].items()}
    return Measured(found[chosen.label], found.get(sets[1].label) if foreign else None, speed)


def prepare(
    checkpoint_dir: Path, source_digest: str, chat: Chat, chosen: Evaluation, cache: Path, *,
    progress: ProgressCallback = silent, threads: int | None = None,
) -> Path:  # fmt: skip
    """Return the reference's file, made now if it is not there. Call it once before measuring side by side.

    Raises:
        BuildError: the reference does not run, or its FP32 weights do not fit into memory.
    """
    key = sha256_hex(canonical_json([source_digest, chosen.digest, SEED, _version("transformers"), _version("torch")]))
    path = cache.resolve() / f"reference-{key[:32]}.npz"
    if path.is_file():
        path.touch()
        return path
    _check_memory(checkpoint_dir)
    cache.mkdir(parents=True, exist_ok=True)
    job = ReferenceJob(
        source=checkpoint_dir.resolve(), prompts=tuple(render(chat, prompt) for prompt in chosen.prompts),
        text=chosen.text, passages=chosen.passages, out=path, threads=threads or process.cores(),
    )  # fmt: skip
    process.run("reference", job, cache / f"reference-{key[:32]}.log", progress)
    _forget_old(cache)
    return path


def machine() -> str:
    """This machine, for the label on its measurements."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return f"{name}, {process.cores()} cores, {platform.system()} {platform.machine()}"


def _check_memory(checkpoint_dir: Path) -> None:
    from fleet.toolchains.checkpoint.safetensors_scan import read_tensors

    weights = sum(tensor.count for path in checkpoint_dir.glob("*.safetensors") for tensor in read_tensors(path))
    needed, free = 4 * weights * 1.15 + 2**30, available_bytes()
    if needed > free:
        raise BuildError(
            f"the FP32 reference of {checkpoint_dir} takes {needed / 2**30:.1f} GiB of memory, "
            f"and {free / 2**30:.1f} GiB are available; measure on a larger machine"
        )


def _forget_old(cache: Path) -> None:
    files = sorted(cache.glob("reference-*.npz"), key=lambda path: path.stat().st_mtime)
    for path in files[:-_KEEP_REFERENCES]:
        path.unlink(missing_ok=True)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        raise BuildError(f"measuring quality needs {package}: install phifleet[quantize]") from None
