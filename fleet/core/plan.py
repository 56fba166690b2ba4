"""Model and profile in; candidates out, each a legal plan with its size and memory, or a refusal with its reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from agent.contract.manifest import MemoryNeed, Target, Toolchain
from agent.contract.profile import DeviceProfile, Recipe
from fleet.core.plan_memory import MIB, memory_need
from fleet.core.plan_shape import ModelShape
from fleet.core.plan_size import predicted_bytes
from fleet.core.rules import Case, Refusal, refusals
from fleet.errors import ProfileError

#: Of the refusals that are found here; all others are in ``rules``.
OPTIONS_RULE = "toolchain-options"
MEMORY_RULE = "memory-budget"
DISK_RULE = "disk-budget"
#: Completes a recipe's options as its toolchain would; raises ProfileError where the toolchain has no such option.
Resolve = Callable[[Recipe], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One of a profile's recipes for one model. ``seconds`` is the transfer's at the profile's bandwidth."""

    profile: str
    recipe: Recipe
    options: Mapping[str, Any]
    context: int
    size_bytes: int
    memory: MemoryNeed
    seconds: float
    refusals: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def legal(self) -> bool:
        """Whether nothing refuses it."""
        return not self.refusals

    @property
    def peak_memory_bytes(self) -> int:
        """Weights, KV cache of the whole context and what the runtime takes; the formula is in plan_memory.py."""
        return self.memory.at_context(self.context)


def candidates(shape: ModelShape, profile: DeviceProfile, resolve: Resolve | None = None) -> tuple[Candidate, ...]:
    """Return every recipe of the profile, judged, in its order of preference. Nothing is built or read."""
    return tuple(judge(shape, profile, recipe, resolve) for recipe in profile.recipes)


def judge(shape: ModelShape, profile: DeviceProfile, recipe: Recipe, resolve: Resolve | None = None) -> Candidate:
    """Return one recipe, which need not be of the profile's own."""
    context = min(profile.context, shape.max_context)
    options, wrong = _resolved(recipe, resolve)
    # Of options that are refused there is no size: that of the defaults is shown.
    sized = recipe.model_copy(update={"options": {} if wrong else dict(options)})
    size = predicted_bytes(shape, sized)
    memory = memory_need(shape, sized, size, context)
    found = refusals(Case(shape, recipe, context, profile, options))
    if wrong and not found:  # a rule of ours says why better than the toolchain does
        found = (wrong,)
    return Candidate(
        profile=profile.name, recipe=recipe, options=options, context=context, size_bytes=size, memory=memory,
        seconds=size / profile.delivery.rate,
        refusals=found + _over_budget(profile, size, memory, context),
        notes=_notes(shape, recipe, profile),
    )  # fmt: skip


def first_legal(found: tuple[Candidate, ...]) -> Candidate:
    """Return the one to build.

    Raises:
        ProfileError: all are refused; says why of each.
    """
    for candidate in found:
        if candidate.legal:
            return candidate
    if not found:
        raise ProfileError("the profile has no recipes")
    lines = [f"  {describe(one.recipe)}: {one.refusals[0].reason}" for one in found]
    raise ProfileError(f"profile {found[0].profile}: no toolchain can give what it asks for:\n" + "\n".join(lines))


def describe(recipe: Recipe) -> str:
    """Return text such as ``openvino int4 npu (symmetric=True)``."""
    options = ", ".join(f"{name}={value}" for name, value in recipe.options.items())
    return f"{recipe.toolchain} {recipe.precision} {recipe.target}" + (f" ({options})" if options else "")


def as_json(candidate: Candidate) -> dict[str, Any]:
    """For machines; bytes and tokens."""
    return {
        "profile": candidate.profile,
        "toolchain": candidate.recipe.toolchain,
        "precision": candidate.recipe.precision,
        "target": candidate.recipe.target,
        "options": dict(candidate.options),
        "legal": candidate.legal,
        "context": candidate.context,
        "size_bytes": candidate.size_bytes,
        "memory": candidate.memory.model_dump(mode="json"),
        "peak_memory_bytes": candidate.peak_memory_bytes,
        "transfer_seconds": round(candidate.seconds, 1),
        "refusals": [{"rule": one.rule, "reason": one.reason, "source": one.source} for one in candidate.refusals],
        "notes": list(candidate.notes),
    }


def choose_recipes(
    profile: DeviceProfile, toolchain: str | None = None, precision: str | None = None, target: str | None = None
) -> list[Recipe]:
    """Return the profile's recipes that match what is named, in its order of preference; None matches all.

    Raises:
        ProfileError: none matches; lists what the profile has.
    """
    matching = []
    for recipe in profile.recipes:
        wanted = ((toolchain, recipe.toolchain), (precision, recipe.precision), (target, recipe.target))
        if all(name is None or name == found for name, found in wanted):
            matching.append(recipe)
    if matching:
        return matching
    asked = " ".join(part for part in (toolchain, precision, target) if part)
    raise ProfileError(f"profile {profile.name} has no recipe for {asked}; it has {_numbered(profile)}")


def recipe_number(profile: DeviceProfile, number: int) -> Recipe:
    """Return the profile's recipe with this number, from 1 in its order of preference.

    It tells recipes apart that differ in options only.

    Raises:
        ProfileError: there are fewer; lists them.
    """
    if not 1 <= number <= len(profile.recipes):
        raise ProfileError(f"profile {profile.name} has no recipe {number}; it has {_numbered(profile)}")
    return profile.recipes[number - 1]


def _numbered(profile: DeviceProfile) -> str:
    return ", ".join(f"{number}: {describe(one)}" for number, one in enumerate(profile.recipes, 1))


def _resolved(recipe: Recipe, resolve: Resolve | None) -> tuple[Mapping[str, Any], Refusal | None]:
    if resolve is None:
        return recipe.options, None
    try:
        return resolve(recipe), None
    except ProfileError as error:
        return recipe.options, Refusal(OPTIONS_RULE, str(error), "the toolchain's own list of options")


def _over_budget(profile: DeviceProfile, size: int, memory: MemoryNeed, context: int) -> tuple[Refusal, ...]:
    found = []
    peak = memory.at_context(context)
    if peak > profile.memory_bytes:
        found.append(Refusal(
            MEMORY_RULE,
            f"takes {peak / MIB:.0f} MiB at {context} tokens (weights {memory.weights_bytes / MIB:.0f}, KV cache "
            f"{memory.kv_bytes_per_token * context / MIB:.0f}, runtime {memory.overhead_bytes / MIB:.0f}), the profile "
            f"allows {profile.memory_bytes / MIB:.0f} MiB",
            "the formula in docs/support-matrix.md",
        ))  # fmt: skip
    if 2 * size > profile.disk_bytes:
        found.append(Refusal(
            DISK_RULE,
            f"takes {2 * size / MIB:.0f} MiB, twice {size / MIB:.0f} for an update keeps two artifacts; the profile "
            f"allows {profile.disk_bytes / MIB:.0f} MiB",
            "the profile's disk_bytes",
        ))  # fmt: skip
    return tuple(found)


def _notes(shape: ModelShape, recipe: Recipe, profile: DeviceProfile) -> tuple[str, ...]:
    notes = []
    if shape.max_context < profile.context:
        notes.append(f"the model's context is {shape.max_context}, shorter than the profile's {profile.context}")
    if recipe.toolchain is Toolchain.MLX and recipe.target is Target.CPU:
        notes.append("MLX has no fast kernels for CPUs: some ten tokens a second from a small model; for tests")
    return tuple(notes)
