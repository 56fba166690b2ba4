"""Device profiles out of TOML text, with errors that a person who wrote the file can act on. No IO here."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from agent.contract.profile import DeviceProfile
from fleet.errors import ProfileError


def parse_profile(text: str, name: str) -> DeviceProfile:
    """Return the profile in ``text``; ``name`` is the file's, for messages.

    Raises:
        ProfileError: not TOML, or a field is missing, unknown or wrong; names file, field and what is allowed.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ProfileError(f"{name}: not TOML: {error}") from None
    try:
        return DeviceProfile.model_validate(document)
    except ValidationError as error:
        problems = [_explain(problem) for problem in error.errors(include_url=False)]
        raise ProfileError(f"{name}: " + "; ".join(dict.fromkeys(problems))) from None


def unknown_profile(name: str, known: Iterable[str]) -> ProfileError:
    """Return the error for a name that no profile has: near matches first, then all names."""
    names = sorted(known)
    near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
    near += [other for other in names if name and name.lower() in other and other not in near]
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return ProfileError(f"no profile is named {name!r}.{hint} Profiles: {', '.join(names) or 'none installed'}")


def _explain(problem: ErrorDetails) -> str:
    where = ".".join(str(step) for step in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return _explain_unknown_field(problem["loc"])
    if problem["type"] == "missing":
        return f"field {where} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    prefix = f"field {where}: " if where else ""
    allowed = problem["msg"].startswith("Input should be")
    text = "must be " + message.removeprefix("Input should be ") if allowed else message
    found = f" (found {problem['input']!r:.80})" if where else ""
    return f"{prefix}{text}{found}"


def _explain_unknown_field(location: tuple[int | str, ...]) -> str:
    *parents, field = location
    allowed = sorted(_fields_at(tuple(parents)))
    near = difflib.get_close_matches(str(field), allowed, n=1)
    hint = f", did you mean {near[0]}?" if near else ""
    where = ".".join(str(step) for step in location)
    return f"field {where} is unknown{hint} (allowed here: {', '.join(allowed)})"


def _fields_at(parents: tuple[int | str, ...]) -> Iterable[str]:
    model: type[BaseModel] = DeviceProfile
    for step in parents:
        if isinstance(step, str):
            model = _model_of(model.model_fields[step].annotation) or model
    return model.model_fields


def _model_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and get_origin(annotation) is None and issubclass(annotation, BaseModel):
        return annotation
    for inner in get_args(annotation):
        if found := _model_of(inner):
            return found
    return None
