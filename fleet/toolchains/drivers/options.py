"""Options of recipes: defaults, and what each may be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fleet.core.plan_shape import ModelShape
from fleet.errors import ProfileError
from fleet.toolchains.checkpoint.checkpoint import Checkpoint

#: An option's default, and its allowed values; a type allows all of it, None beside it allows None too.
Option = tuple[Any, tuple[Any, ...]]


def complete(what: str, given: Mapping[str, Any], known: Mapping[str, Option]) -> dict[str, Any]:
    """``given`` with the defaults of ``known`` filled in; ``what`` names the recipe in messages.

    Raises:
        ProfileError: an option is unknown, or has a value that it cannot have.
    """
    if unknown := sorted(set(given) - set(known)):
        raise ProfileError(f"{what} has no option {', '.join(unknown)}; it has {', '.join(sorted(known)) or 'none'}")
    options = {}
    for name, (default, allowed) in known.items():
        value = given.get(name, default)
        if not any(_is(value, one) for one in allowed):
            listed = ", ".join(one.__name__ if isinstance(one, type) else repr(one) for one in allowed)
            raise ProfileError(f"{what}: option {name} cannot be {value!r}; it can be {listed}")
        options[name] = value
    return options


def check_calibration(what: str, options: Mapping[str, Any], users: Sequence[str]) -> None:
    """Whether something reads the calibration text that is named; ``users`` are the options that do.

    Raises:
        ProfileError: nothing does, and the manifest would say calibrated of what is not.
    """
    if options.get("calibration") and not any(options[name] for name in users):
        raise ProfileError(f"{what}: nothing uses the calibration; leave it out, or set {' or '.join(users)}")


def check_budget(
    what: str, budget: float, bounds: tuple[float, float], options: Mapping[str, Any], chosen: Sequence[str],
    model: Checkpoint,
) -> None:  # fmt: skip
    """Whether widths can be chosen within a budget of bits a weight; ``chosen`` are the options that it stands for.

    Raises:
        ProfileError: out of bounds, beside an option that it stands for, without calibration, or for another network.
    """
    low, high = bounds
    if not low <= budget <= high:
        raise ProfileError(f"{what}: budget is bits a weight, from {low:g} to {high:g}, not {budget:g}")
    if named := [name for name in chosen if options.get(name)]:
        raise ProfileError(f"{what}: budget chooses for every matrix; leave out {', '.join(named)}")
    if not options.get("calibration"):
        raise ProfileError(f"{what}: budget needs a calibration: 'bundled', or a text file")
    if model.facts.architecture != "Phi3ForCausalLM":
        raise ProfileError(f"{what}: budget is for Phi3ForCausalLM, not for {model.facts.architecture}")


def check_groups(what: str, shape: ModelShape, group: int, offered: Sequence[int]) -> None:
    """Whether every row divides into groups of so many weights; -1 is a whole row.

    Raises:
        ProfileError: one does not; says which of ``offered`` fit.
    """
    if misfit := shape.misfit(group, offered):
        raise ProfileError(f"{what}: {misfit}")


def check_all_used(
    what: str, parts: Iterable[str], matches: Callable[[str, str], bool], names: Mapping[str, str]
) -> None:
    """Whether each of ``parts`` is the first that matches some of ``names``, whose values are what people are told.

    Raises:
        ProfileError: one is not, and would do nothing.
    """
    parts = list(parts)
    used = {next((part for part in parts if matches(part, name)), None) for name in names}
    for part in parts:
        if part in used:
            continue
        if any(matches(part, name) for name in names):
            raise ProfileError(f"{what}: those before {part} take all that it matches; put it first, or leave it out")
        raise ProfileError(f"{what}: nothing is named like {part}; there are {', '.join(sorted(set(names.values())))}")


def _is(value: Any, allowed: Any) -> bool:
    if isinstance(allowed, type):
        return isinstance(value, allowed) and value != "" and not (isinstance(value, bool) and allowed is not bool)
    return type(value) is type(allowed) and value == allowed
