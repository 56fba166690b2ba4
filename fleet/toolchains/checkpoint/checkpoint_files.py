"""Reading a checkpoint's text files: every failure names the file and what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from fleet.core.plan_shape import ModelFile
from fleet.errors import ModelError

_AnyFile = TypeVar("_AnyFile", bound=ModelFile)


def local_path(model: str | Path) -> Path:
    """``model`` as a path, with ``~`` and ``~user`` resolved.

    Raises:
        ModelError: nobody here has that name.
    """
    try:
        return Path(model).expanduser()
    except RuntimeError:
        raise ModelError(
            f"{model}: {Path(model).parts[0]} is nobody's home here; pass the folder's full path"
        ) from None


def read_json(path: Path, *, needed: bool = False) -> dict[str, Any]:
    """Return the object in ``path``; an empty one where there is no such file and it is not ``needed``.

    Raises:
        ModelError: absent, unreadable, or no JSON object.
    """
    if not path.is_file():
        if needed:
            raise ModelError(f"{path} does not exist; a checkpoint's folder holds {path.name} and *.safetensors")
        return {}
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}; fetch it again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object; fetch it again")
    return value


def read_text(path: Path) -> str:
    """Return the text in ``path``.

    Raises:
        ModelError: absent, unreadable, no UTF-8, or with a byte order mark.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: cannot be read as UTF-8 text: {error}; fetch it again") from None
    if text.startswith("\ufeff"):
        raise ModelError(f"{path}: begins with a byte order mark, which toolchains do not read; save it without one")
    return text


def read_as(model: type[_AnyFile], path: Path) -> _AnyFile:
    """Return what ``model`` knows of the JSON in ``path``; its defaults where there is no such file.

    Raises:
        ModelError: no JSON object, or a field is wrong.
    """
    return model.parse(read_json(path), str(path))
