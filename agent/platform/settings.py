"""Settings of both programs: layers of files, environment and flags, and one answer to what is wrong with them.

No message ever holds a value: what a mistyped key holds may be a password. Shared with fleet/.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource
from pydantic_settings import SettingsError as SourceError

from agent.platform.config_files import unread

#: Variables that begin as settings do and are none: each is read where it is used.
OTHER_VARIABLES = frozenset(
    {
        "PHIFLEET_CONFIG",
        "PHIFLEET_AGENT_CONFIG",
        "PHIFLEET_VARIANTS",
        "PHIFLEET_BARE",
        "PHIFLEET_BARE_TESTS",
        "PHIFLEET_CLIENTS",
    }
)

#: Likeness of two words, of which one is the other mistyped. Two letters that changed places in AGENT give 0.8; FLEET_,
#: which begins another program's variables, is 0.77 like PHIFLEET_.
_NEARLY, _NEARLY_LONG = 0.75, 0.85

Settings = TypeVar("Settings", bound=BaseSettings)
Layers = dict[str, dict[str, Any]]


class SettingsError(Exception):
    """Settings cannot be used; the text names each that is wrong, where it came from, and what is allowed."""


def load(
    kind: type[Settings],
    prefix: str,
    files: Layers,
    flags: Mapping[str, Any],
    *,
    foreign: Collection[str] = (),
) -> tuple[Settings, dict[str, str]]:
    """Return the settings, and by name where each value came from; later layers go before earlier ones.

    ``prefix`` begins the names of environment variables; ``foreign`` are prefixes of another program's. Flags that are
    None were not given.

    Raises:
        SettingsError: a value is wrong, or a name is unknown, in a file or in the environment.
    """
    environment = f"{prefix}* in the environment"
    try:
        from_environment = EnvSettingsSource(kind)()
    except SourceError as error:
        raise SettingsError(f"{environment}: {error}") from None
    given = {name: value for name, value in flags.items() if value is not None}
    layers: Layers = {**files, environment: from_environment, "flag": given}
    values = {name: value for layer in layers.values() for name, value in layer.items()}
    source = {name: origin for origin, layer in layers.items() for name in layer}
    problems = list(_mistyped(kind, prefix, foreign))
    try:
        settings = kind(**values)
    except ValidationError as error:
        problems = [*_wrong(kind, error, source), *problems]
    if problems:
        raise SettingsError("; ".join(problems))
    return settings, source


def read_toml(path: Path, *, needed: bool = True) -> dict[str, Any]:
    """Return the values of a file; none of one that is not there and need not be.

    Raises:
        SettingsError: it is missing, cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not needed:
            return {}
        raise SettingsError(f"configuration file {path} does not exist") from None
    except OSError as error:
        raise SettingsError(f"configuration file {path}: {unread(error)}") from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"configuration file {path}: is not UTF-8 at byte {error.start}") from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"configuration file {path}: {error}") from None


def layers_of(named: Path | None, defaults: Iterable[Path]) -> Layers:
    """Return a file that is named takes the place of the default ones, which need not exist.

    Raises:
        SettingsError: one cannot be read.
    """
    if named is not None:
        return {str(named): read_toml(named)}
    return {str(path): found for path in defaults if (found := read_toml(path, needed=False))}


def unknown_name(name: str, known: Iterable[str]) -> str:
    """Return what to say of a name that is no setting: the nearest one, or all there are."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"


def _wrong(kind: type[BaseSettings], error: ValidationError, source: Mapping[str, str]) -> Iterable[str]:
    for problem in error.errors(include_input=False, include_url=False, include_context=False):
        location, message = problem["loc"], problem["msg"].removeprefix("Value error, ")
        name = str(location[0]) if location else ""
        if not name:
            yield message
            continue
        origin = source.get(name, "default")
        if name not in kind.model_fields:
            yield f"{origin}: unknown field {name}; {unknown_name(name, kind.model_fields)}"
        else:
            yield f"{origin}: {'.'.join(str(part) for part in location)}: {message}"


def _mistyped(kind: type[BaseSettings], prefix: str, foreign: Collection[str]) -> Iterable[str]:
    """Variables that were meant for this program and are no setting: ignored, they would leave a default in force
    unseen."""
    known = {f"{prefix}{name.upper()}" for name in kind.model_fields}
    for given in sorted(os.environ):
        name = given.upper()
        if name in known or name in OTHER_VARIABLES or any(name.startswith(other) for other in foreign):
            continue
        if name.startswith(prefix) or _is_nearly(name, prefix):
            yield f"environment: unknown variable {given}; {unknown_name(name, known)}"


def _is_nearly(name: str, prefix: str) -> bool:
    """Return whether the variable's name begins with a misspelling of the prefix, such as PHIFLEET_AGNET_."""
    words, meant = name.split("_"), prefix.rstrip("_").split("_")
    if len(words) <= len(meant) or words[: len(meant)] == meant:
        return False
    return all(
        difflib.SequenceMatcher(None, word, right).ratio() >= (_NEARLY_LONG if len(right) > 6 else _NEARLY)
        for word, right in zip(words, meant, strict=False)
    )
