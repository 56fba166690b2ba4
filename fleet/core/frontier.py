"""Chooses among artifacts that were built and measured: the frontier of loss over size, and the best for a profile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from agent.contract.manifest import Manifest, Target
from agent.contract.profile import DeviceProfile
from fleet.core.fit import MIB, gate_incompatibilities, incompatibilities


@dataclass(frozen=True, slots=True)
class Judged:
    """One artifact. ``misses``: each limit of the profile that it does not keep; none: it may be chosen."""

    manifest: Manifest
    misses: tuple[str, ...]
    on_frontier: bool


@dataclass(frozen=True, slots=True)
class Choice:
    """``best`` is None when no artifact keeps every limit. ``judged`` is sorted by size."""

    best: Manifest | None
    judged: tuple[Judged, ...]


def frontier(manifests: Sequence[Manifest]) -> tuple[Manifest, ...]:
    """Of artifacts of one model: those measured that no other beats in both size and loss, sorted by size."""
    found: list[Manifest] = []
    for one in sorted(manifests, key=lambda one: (one.size, _loss(one))):
        if one.quality is not None and (not found or _loss(one) < _loss(found[-1])):
            found.append(one)
    return tuple(found)


def choose(manifests: Sequence[Manifest], profile: DeviceProfile) -> Choice:
    """Of what the profile's recipes make, the least loss within its size, memory, speed and quality limits.

    Of equals the smallest. Loss is the mean KL divergence. Speed counts where it was measured on what the artifact is
    for: on a CPU.
    """
    edge = {one.id for one in frontier(manifests)}
    judged = [Judged(one, tuple(_misses(one, profile)), one.id in edge) for one in manifests]
    fit = [one.manifest for one in judged if not one.misses]
    best = min(fit, key=lambda one: (_loss(one), one.size, one.id), default=None)
    return Choice(best, tuple(sorted(judged, key=lambda one: (one.manifest.size, one.manifest.id))))


def _loss(manifest: Manifest) -> float:
    return manifest.quality.kl_divergence if manifest.quality else float("inf")


def _misses(manifest: Manifest, profile: DeviceProfile) -> Iterator[str]:
    yield from incompatibilities(manifest, profile, None)
    if manifest.size <= profile.disk_bytes < 2 * manifest.size:
        yield f"it takes {manifest.size / MIB:.0f} MiB twice, and the disk is {profile.disk_bytes / MIB:.0f} MiB"
    if manifest.quality is None:
        yield "its loss was not measured"
        return
    yield from gate_incompatibilities(manifest, profile)
    if manifest.speed is not None and manifest.target is Target.CPU:
        yield from _speed_misses(manifest, profile)


def _speed_misses(manifest: Manifest, profile: DeviceProfile) -> Iterator[str]:
    speed, limits = manifest.speed, profile.health
    if speed is None:
        return
    rate = 1e3 / speed.tpot_ms if speed.tpot_ms > 0 else float("inf")
    if limits.tokens_per_s_min is not None and rate < limits.tokens_per_s_min:
        yield f"{rate:.1f} tokens/s on the build machine are under {limits.tokens_per_s_min:g}"
    if limits.ttft_ms_p95 is not None and speed.ttft_ms > limits.ttft_ms_p95:
        yield f"{speed.ttft_ms:.0f} ms to the first token on the build machine are past {limits.ttft_ms_p95:g}"
