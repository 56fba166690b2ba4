"""Reads device profiles: those that come with phifleet, or a file of the operator's."""

from __future__ import annotations

from pathlib import Path

from agent.contract.profile import DeviceProfile
from fleet.core.profiles import parse_profile, unknown_profile
from fleet.errors import ProfileError

_HERE = Path(__file__).resolve().parent
#: A wheel carries them inside the package; an editable install has them at the top of the repository.
_PLACES = (_HERE / "data" / "profiles", _HERE.parent / "profiles")


def profile_paths() -> dict[str, Path]:
    """Name to file of every profile that comes with phifleet, sorted by name."""
    folder = next((place for place in _PLACES if place.is_dir()), None)
    return {path.stem: path for path in sorted(folder.glob("*.toml"))} if folder else {}


def list_profiles() -> list[DeviceProfile]:
    """Return every profile that comes with phifleet, sorted by name.

    Raises:
        ProfileError: one of them is wrong.
    """
    return [read_profile(path) for path in profile_paths().values()]


def load_profile(name_or_path: str | Path) -> DeviceProfile:
    """Return a profile by its name, or from a file: anything that ends in ``.toml`` or has a folder in it.

    Raises:
        ProfileError: unknown (names near matches and all names), unreadable, or wrong.
    """
    text = str(name_or_path)
    if text.endswith(".toml") or Path(text).name != text:
        return read_profile(Path(text))
    paths = profile_paths()
    if text not in paths:
        raise unknown_profile(text, paths)
    return read_profile(paths[text])


def read_profile(path: Path) -> DeviceProfile:
    """Return the profile in one file.

    Raises:
        ProfileError: the file cannot be read, or is no profile.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ProfileError(f"{path}: not a text file in UTF-8") from None
    except OSError as error:
        raise ProfileError(f"{path}: cannot be read: {error.strerror or error}") from None
    return parse_profile(text, str(path))
