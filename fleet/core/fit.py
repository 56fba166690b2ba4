"""Whether an artifact fits a device: its profile, and the facts that the device has told."""

from __future__ import annotations

from collections.abc import Iterator

from agent.contract.manifest import RUNTIME_OF, Manifest, Precision, Target, Toolchain
from agent.contract.messages import Facts
from agent.contract.profile import Architecture, DeviceProfile
from fleet.core.licenses import not_admitted

MIB = 1024 * 1024

_ARCHITECTURES = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}


def incompatibilities(manifest: Manifest, profile: DeviceProfile, facts: Facts | None) -> tuple[str, ...]:
    """Return each reason why the artifact should not go to such a device; none: it fits.

    Without facts the profile decides.
    """
    reasons = [*_profile_misfits(manifest, profile)]
    if facts is not None:
        reasons += _fact_misfits(manifest, profile, facts)
    return tuple(reasons)


def unmeasurable(toolchain: Toolchain, precision: Precision) -> str | None:
    """Why a build machine, which has a CPU for certain, cannot say what such an artifact loses; None where it can."""
    if toolchain is Toolchain.ONNX_GENAI and precision is Precision.BF16:
        return "ONNX Runtime has no BF16 kernels for a CPU"
    return None


def gate_incompatibilities(manifest: Manifest, profile: DeviceProfile) -> tuple[str, ...]:
    """Where the measured loss is past the profile's quality gate, or nothing was measured that it could be held to."""
    gate, quality, foreign = profile.quality, manifest.quality, manifest.foreign
    limits = (
        ("KL divergence", gate.kl_divergence_max, quality.kl_divergence if quality else None),
        ("perplexity ratio", gate.perplexity_ratio_max, quality.perplexity_ratio if quality else None),
        ("KL divergence on foreign text", gate.foreign_kl_divergence_max, foreign.kl_divergence if foreign else None),
    )
    held = [(name, limit, found) for name, limit, found in limits if limit is not None]
    missing = [name for name, _, found in held if found is None]
    if missing:
        why = unmeasurable(manifest.toolchain, manifest.precision)
        advice = f"{why}, so that force alone is left" if why else "build it again without --no-measure"
        what = "loss" if quality is None else " and ".join(missing)
        return (f"its {what} was not measured, and profile {profile.name} has a quality gate: {advice}",)
    return tuple(
        f"its {name} of {found:.4g} is past the {limit:g} that profile {profile.name} allows"
        for name, limit, found in held
        if found is not None and not found <= limit  # NaN is no pass
    )


def _profile_misfits(manifest: Manifest, profile: DeviceProfile) -> Iterator[str]:
    """Yield what the profile has not, or does not admit: licence, accelerator, recipe, memory, disk."""
    if why := not_admitted(manifest.model.license, profile.admission.licenses):
        yield f"{why} by profile {profile.name}"
    if manifest.target is not Target.CPU and manifest.target not in profile.accelerators:
        there = ", ".join(["cpu", *profile.accelerators])
        yield f"it was built for {manifest.target}, and profile {profile.name} has {there}"
    recipes = [(recipe.toolchain, recipe.precision, recipe.target) for recipe in profile.recipes]
    if (manifest.toolchain, manifest.precision, manifest.target) not in recipes:
        listed = ", ".join(sorted({"/".join(recipe) for recipe in recipes}))
        made = f"{manifest.toolchain}/{manifest.precision}/{manifest.target}"
        yield f"it is {made}, and the recipes of profile {profile.name} are {listed}"
    need = manifest.memory.at_context(manifest.context)
    if need > profile.memory_bytes:
        yield (
            f"it takes {need / MIB:.0f} MiB of memory at a context of {manifest.context} tokens, "
            f"and profile {profile.name} allows {profile.memory_bytes / MIB:.0f} MiB"
        )
    if manifest.size > profile.disk_bytes:
        yield (
            f"it takes {manifest.size / MIB:.0f} MiB of disk, "
            f"and profile {profile.name} allows {profile.disk_bytes / MIB:.0f} MiB"
        )


def _fact_misfits(manifest: Manifest, profile: DeviceProfile, facts: Facts) -> Iterator[str]:
    machine = _ARCHITECTURES.get(facts.machine.lower(), facts.machine.lower())
    if profile.arch not in (Architecture.ANY, machine):
        yield f"the device is {facts.machine}, and profile {profile.name} is for {profile.arch}"
    need = manifest.memory.at_context(manifest.context)
    if need > facts.memory_total_bytes:
        yield f"it takes {need / MIB:.0f} MiB of memory, and the device has {facts.memory_total_bytes / MIB:.0f} MiB"
    if manifest.size > facts.disk_free_bytes:
        yield f"it takes {manifest.size / MIB:.0f} MiB, and the device has {facts.disk_free_bytes / MIB:.0f} MiB free"
    runtimes = [runtime for runtime in facts.runtimes if runtime.name == RUNTIME_OF[manifest.toolchain]]
    if facts.runtimes and not any(runtime.usable for runtime in runtimes):
        reason = next((f": {runtime.reason}" for runtime in runtimes if runtime.reason), "")
        yield f"no runtime for {manifest.toolchain} is usable on the device{reason}"
