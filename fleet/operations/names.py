"""Names that operators give: releases for the variants of a model, and saved selectors for devices."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from agent.contract.manifest import Manifest
from fleet.core.selectors import parse
from fleet.errors import MissingError, UsageError
from fleet.operations.deploy import refuse_unless_one_model
from fleet.operations.fleet import Fleet
from fleet.registry import Actor
from fleet.registry.inventory import Found
from fleet.store import find

_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,62}")
_REFERENCE = re.compile(r'"(?:[^"\\]|\\.)*"|@([a-z0-9][a-z0-9.-]*)')
#: Of saved selectors that name saved selectors.
_MOST_NESTED = 10


def check_name(kind: str, name: str) -> str:
    """Return the name.

    Raises:
        UsageError: it cannot be one.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(f"{kind} {name!r}: lower case letters, digits, dots and dashes, 63 at most")
    return name


def create_release(fleet: Fleet, name: str, artifacts: Sequence[str], actor: Actor) -> list[Manifest]:
    """Give the variants of one model a name; returns them.

    Raises:
        UsageError: the name is taken or cannot be one, an artifact is not there, or they are of different models.
    """
    check_name("release", name)
    manifests = [find(fleet.artifacts, text) for text in dict.fromkeys(artifacts)]
    if not manifests:
        raise UsageError(f"release {name}: name at least one artifact")
    refuse_unless_one_model(manifests, f"release {name}: its variants")
    fleet.registry.releases.create(name, [manifest.digest for manifest in manifests], actor)
    return manifests


def variants(fleet: Fleet, names: Sequence[str]) -> list[Manifest]:
    """Return the artifacts that are named, by release, id, digest or the beginning of either, each once.

    Raises:
        UsageError: one is not there, or several are meant.
    """
    found: dict[str, Manifest] = {}
    for name in names:
        release = fleet.registry.releases.find(name)
        for manifest in [find(fleet.artifacts, text) for text in (release.digests if release else [name])]:
            found[manifest.digest] = manifest
    return list(found.values())


def save_selector(fleet: Fleet, name: str, selector: str, actor: Actor) -> None:
    """Give a selector a name, by which other selectors and commands mean it: ``@name``.

    Raises:
        UsageError: the name cannot be one, or the selector cannot be read or would mean itself.
    """
    check_name("selector", name)
    saved = {row.name: row.selector for row in fleet.registry.selectors.all()} | {name: selector}
    parse(expand(selector, saved))
    fleet.registry.selectors.save(name, selector, actor)


def selector_text(fleet: Fleet, text: str) -> str:
    """Return the selector with each ``@name`` replaced by what that means now.

    Raises:
        UsageError: a name is not there.
    """
    if "@" not in text:
        return text
    return expand(text, {row.name: row.selector for row in fleet.registry.selectors.all()})


def select(fleet: Fleet, selector: str, *, after: str | None = None, limit: int | None = None) -> list[Found]:
    """Return the devices that a selector means, by id; ``after`` and ``limit`` are for pages.

    Raises:
        UsageError: the selector cannot be read, or names a selector that is not saved.
    """
    return fleet.registry.inventory.select(parse(selector_text(fleet, selector)), after=after, limit=limit)


def expand(text: str, saved: Mapping[str, str], depth: int = 0) -> str:
    """Return the selector without names.

    Raises:
        UsageError: a name is not there, or names go round in a circle.
    """
    if depth > _MOST_NESTED:
        raise UsageError(f"saved selectors name each other more than {_MOST_NESTED} deep; is there a circle?")

    def replace(match: re.Match[str]) -> str:
        name = match[1]
        if name is None:
            return match[0]
        if name not in saved:
            known = ", ".join(f"@{one}" for one in sorted(saved)) or "none"
            raise MissingError(f"no selector is saved as @{name}; there are: {known}")
        return f"({expand(saved[name], saved, depth + 1)})"

    return _REFERENCE.sub(replace, text)
