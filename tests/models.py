"""Checkpoints and built artifacts for tests, made once and kept under ``.cache/`` of the repository.

What is kept is named after what it is made of, so a change of the code that makes it makes it anew. Functions for
whoever wants one, and session-scoped fixtures to be imported into a conftest.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from agent.contract.manifest import Manifest, Precision, Target, Toolchain
from agent.contract.profile import DeviceProfile, Recipe
from agent.platform.files import write_atomic
from fleet.home import Home
from fleet.profiles_loader import load_profile
from fleet.store import FolderStore
from fleet.toolchains.build.build import build
from fleet.toolchains.checkpoint import gguf_file, gguf_source, phi3_writer, sample_model, sample_source
from fleet.toolchains.checkpoint.checkpoint import Checkpoint, inspect
from fleet.toolchains.quality import calibration

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "models"


@dataclass(frozen=True)
class Built:
    """An artifact on disk; ``files`` is what the manifest's paths are relative to. Shared: do not write to it."""

    manifest: Manifest
    files: Path
    home: Home


#: Whether `make test-variants` runs, which is for what takes minutes and rarely finds anything.
EVERYTHING = os.environ.get("PHIFLEET_VARIANTS") == "all"
MINUTES = pytest.mark.skipif(not EVERYTHING, reason="minutes: `make test-variants` runs it")


def slow(*values: object) -> Any:
    """Return a parameter of a test that `make test` leaves to `make test-variants`."""
    return pytest.param(*values, marks=[pytest.mark.variants, MINUTES])


@functools.cache
def cache_key() -> str:
    made_by = b"".join(
        Path(str(module.__file__)).read_bytes() for module in (gguf_file, gguf_source, phi3_writer, sample_model)
    )
    return hashlib.sha256(made_by + sample_source.PACKAGE.encode()).hexdigest()[:12]


@functools.cache
def _home() -> Home:
    """Named after the code that builds: an artifact's id says which inputs and versions it has, not which phifleet."""
    folder = Path(build.__code__.co_filename).parent
    code = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    home = CACHE / f"home-{cache_key()}-{hashlib.sha256(code).hexdigest()[:12]}"
    for folder in CACHE.glob("*"):
        if (folder.name.startswith("home") and folder != home) or _is_stale(folder):
            shutil.rmtree(folder, ignore_errors=True)
    return Home(home)


def _is_stale(folder: Path) -> bool:
    return folder.name.startswith(("sample", "tiny")) and cache_key() not in folder.name


def kept_bytes() -> int:
    """Of what is not to be made again."""
    total = 0
    for folder in CACHE.glob("*"):
        if _is_stale(folder) or (folder.name.startswith("home") and cache_key() not in folder.name):
            continue
        for file in folder.rglob("*"):
            with contextlib.suppress(OSError):  # another run sweeps it
                total += file.stat().st_size
    return total


def sample_checkpoint() -> Path:
    """The speaking Phi-3-architecture checkpoint (538 MB); about 15 s the first time."""
    return _made_once(CACHE / f"sample-{cache_key()}", sample_model.make_sample)


def tiny_checkpoint(seed: int = 0) -> Path:
    """A random Phi-3 of 3 million weights with the sample's tokenizer; half a second the first time."""
    return _made_once(CACHE / f"tiny-{seed}-{cache_key()}", lambda folder: sample_model.make_tiny(folder, seed=seed))


def _made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """By whichever of the tests that run side by side comes first; the others wait for it."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / f".{folder.name}.lock"):
        if not folder.exists():
            make(folder)
    return folder


@functools.cache
def checkpoint(folder: Path) -> Checkpoint:
    return inspect(folder)


def few_texts() -> str:
    """A file of some 3,000 tokens for calibrated recipes: enough for the tiny checkpoint, at a tenth of the time."""
    path = CACHE / "few-texts.txt"
    passages = tomllib.loads((calibration.DATA / "plain.toml").read_text(encoding="utf-8"))["passages"]
    text = "".join(str(one["text"]) for one in passages[::2])[:10_000]
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        CACHE.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text.encode())
    return str(path)


def built(
    folder: Path,
    toolchain: Toolchain = Toolchain.ONNX_GENAI,
    precision: Precision = Precision.INT4,
    target: Target = Target.CPU,
    profile: DeviceProfile | None = None,
    **options: object,
) -> Built:
    """The artifact of a checkpoint; built at most once for the same inputs and toolchain versions."""
    home = _home()
    recipe = Recipe(toolchain=toolchain, precision=precision, target=target, options=options)
    what = hashlib.sha256(f"{folder} {recipe.model_dump_json()}".encode()).hexdigest()[:12]
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / f".build-{what}.lock"):  # tests that run side by side want the same
        manifest = build(checkpoint(folder), profile or load_profile("iot-x86"), recipe, home)
    return Built(manifest, FolderStore(home.artifacts).files(manifest.id), home)


def tiny_npu_artifact(precision: Precision = Precision.INT8, **options: object) -> Built:
    """The tiny checkpoint for Qualcomm's NPU, so that their simulator loads it, for a context of 512 tokens."""
    profile = load_profile("copilot-pc-qnn").model_copy(update={"context": 512})
    chosen: dict[str, object] = {"share_weights": False, "recover": False, **options}
    return built(tiny_checkpoint(), Toolchain.ONNX_QNN, precision, Target.QNN, profile, **chosen)


@pytest.fixture(scope="session")
def sample_dir() -> Path:
    return sample_checkpoint()


@pytest.fixture(scope="session")
def tiny_dir() -> Path:
    return tiny_checkpoint()


@pytest.fixture(scope="session")
def tiny_artifact(tiny_dir: Path) -> Built:
    """ONNX INT4 of the tiny checkpoint, 6 MB: loads in half a second and says random words."""
    return built(tiny_dir)


@pytest.fixture(scope="session")
def sample_artifact(sample_dir: Path) -> Built:
    """ONNX INT4 of the sample, 90 MB: answers."""
    return built(sample_dir)
