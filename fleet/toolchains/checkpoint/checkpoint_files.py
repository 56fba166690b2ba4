"""Reading a checkpoint's text files: every failure names the file and what to do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, TypeVar

from fleet.core.licenses import UNKNOWN
from fleet.core.plan_shape import ModelFile
from fleet.errors import ModelError
from fleet.toolchains.checkpoint.oci_source import OCI_LAYOUT, from_layout

#: Characters of a model card that are looked at.
_HEAD = 16384
_AnyFile = TypeVar("_AnyFile", bound=ModelFile)


def local_path(model: str | Path) -> Path:
    """``model`` as a path, with ``~`` and ``~user`` resolved; for ``oci-layout:DIR[:TAG]`` where it was unpacked.

    Raises:
        ModelError: nobody here has that name, or the layout is damaged.
    """
    try:
        if str(model).startswith(OCI_LAYOUT):
            return from_layout(str(model).removeprefix(OCI_LAYOUT))
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


def license_of(path: Path) -> str:
    """Return the licence that the head of the checkpoint's README.md names, as it is written there.

    A card that says `other` names it in `license_name`. Source: https://huggingface.co/docs/hub/model-cards.
    """
    card = path / "README.md"
    text = card.read_text(encoding="utf-8-sig", errors="replace")[:_HEAD] if card.is_file() else ""
    head = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    fields = head[1] if head else text
    name = _yaml_value(fields, "license")
    if name == "other":
        name = _yaml_value(fields, "license_name") or name
    return name or UNKNOWN


def _yaml_value(text: str, name: str) -> str | None:
    """Of a field with one value, or a list's first, quoted or not; a licence's name needs no more of YAML."""
    found = re.search(rf"^{name}:[ \t]*(?:\n[ \t]*-[ \t]+|\[[ \t]*)?[\"']?([^\s\"'#,\]]+)", text, re.MULTILINE)
    return found[1] if found else None
