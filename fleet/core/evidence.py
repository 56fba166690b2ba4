"""Whether what a wave of devices measures is reason to stop: evidence that may be looked at after every report.

Each device is its own control: figures before the update against figures after it, of the same device. A device is
*worse* in a metric when after / before is above 1 + margin. If the update makes the median device no worse than the
margin, each comparison is worse with a chance of at most one half, whatever the noise, and then

    e = weighted mean over bets b of (1 + b)^worse * (1 - b)^better

is a test martingale's mixture: by Ville's inequality it ever reaches 1 / alpha with a chance of at most alpha, however
often it is looked at (Ramdas et al., "Game-theoretic statistics and safe anytime-valid inference", 2023). The gate's
alpha is divided over the metrics and over the groups (a profile and a variant) that are judged.

Deployments that fail are judged against the share that fails in a healthy fleet, by a likelihood ratio mixed over
larger shares (the same inequality), and by a plain cap for what is obvious.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Annotated, Self, TypeGuard

from pydantic import BaseModel, ConfigDict, Field

#: Larger bets count for more: a slower variant is slower on nearly every device.
_BETS = tuple(step / 20 for step in range(1, 20))
_LOG_WEIGHTS = tuple(math.log(bet / sum(_BETS)) for bet in _BETS)
_SHARES = 64
#: Effects that ``detectable`` tries, and the share of waves that must find one.
_EFFECTS = (0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 3.0)
POWER = 0.9
#: Of a figure that is taken seriously: what is beyond was not measured.
_LEAST, _MOST = 1e-6, 1e9


class Metric(StrEnum):
    """What is compared; lower is better in each."""

    TTFT = "ttft"
    TPOT = "tpot"
    ERRORS = "errors"
    RESTARTS = "restarts"


#: The part of alpha that each metric has: speed is what a variant changes most often.
_PARTS: Mapping[Metric, float] = MappingProxyType(
    {Metric.TTFT: 0.3, Metric.TPOT: 0.5, Metric.ERRORS: 0.1, Metric.RESTARTS: 0.1}
)
_WORDS: Mapping[Metric, str] = MappingProxyType(
    {
        Metric.TTFT: "slower to the first token",
        Metric.TPOT: "slower per token",
        Metric.ERRORS: "of a higher error share",
        Metric.RESTARTS: "of more worker restarts",
    }
)


class Gate(BaseModel):
    """What stops a rollout by itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    margin: Annotated[float, Field(gt=0, le=10, description="how much worse is no matter; 0.05 is 5%")] = 0.05
    alpha: Annotated[float, Field(gt=0, lt=0.5, description="the chance that a harmless update is stopped")] = 0.01
    min_pairs: Annotated[int, Field(ge=1, le=1000, description="devices of a group before it is judged")] = 8
    min_requests: Annotated[int, Field(ge=1, description="requests on each side before a device is compared")] = 5
    healthy_failure_share: Annotated[float, Field(gt=0, lt=0.5, description="of deployments, in a healthy fleet")] = (
        0.02
    )
    cap_failed: Annotated[int, Field(ge=1, description="failures that stop it at once")] = 3
    cap_of: Annotated[int, Field(ge=1, description="among so many first deployments of a wave")] = 5


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one device on one model. Milliseconds; None where nothing was measured."""

    requests: int
    errors: int = 0
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    restarts: int = 0


@dataclass(frozen=True, slots=True)
class Signs:
    """How many devices are worse, and how many are not; those that cannot be told apart are in neither."""

    worse: int = 0
    better: int = 0

    @property
    def pairs(self) -> int:
        """Devices that were compared."""
        return self.worse + self.better

    def __add__(self, other: Signs) -> Signs:
        return Signs(self.worse + other.worse, self.better + other.better)


@dataclass(frozen=True, slots=True)
class GroupEvidence:
    """Of one profile and variant: comparisons by metric, and deployments that have ended and that have failed."""

    signs: Mapping[Metric, Signs] = field(default_factory=lambda: MappingProxyType({}))
    ended: int = 0
    failed: int = 0
    #: Among the first ``Gate.cap_of`` that ended.
    first_failed: int = 0

    def with_pair(self, before: Figures, after: Figures, gate: Gate) -> Self:
        """Return the same with one more device."""
        compared = compare(before, after, gate)
        signs = {metric: self.signs.get(metric, Signs()) + compared.get(metric, Signs()) for metric in Metric}
        return type(self)(MappingProxyType(signs), self.ended, self.failed, self.first_failed)

    def with_outcomes(self, failed: Iterable[bool], gate: Gate) -> Self:
        """Return the same with deployments that have ended, in the order in which they did."""
        outcomes = list(failed)
        left = max(0, gate.cap_of - self.ended)
        return type(self)(
            self.signs,
            self.ended + len(outcomes),
            self.failed + sum(outcomes),
            self.first_failed + sum(outcomes[:left]),
        )


@dataclass(frozen=True, slots=True)
class Finding:
    """Of one group and metric: e, the bound that it must reach, and a sentence. ``metric`` None: deployments."""

    group: str
    metric: Metric | None
    e: float
    bound: float
    stops: bool
    text: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether to stop, and every finding, those that stop first."""

    findings: tuple[Finding, ...]

    @property
    def stop(self) -> bool:
        """One finding stops the rollout."""
        return any(finding.stops for finding in self.findings)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Sentences for people, of the findings that stop it."""
        return tuple(finding.text for finding in self.findings if finding.stops)


def compare(before: Figures, after: Figures, gate: Gate) -> dict[Metric, Signs]:
    """Return one device's comparisons; without those that have too few requests, or no figure, on a side."""
    if min(before.requests, after.requests) < gate.min_requests:
        return {}
    found: dict[Metric, Signs] = {}
    for metric, (old, new) in {
        Metric.TTFT: (before.ttft_ms, after.ttft_ms),
        Metric.TPOT: (before.tpot_ms, after.tpot_ms),
    }.items():
        if _measured(old) and _measured(new):
            found[metric] = _sign(math.log(new) - math.log(old) - math.log1p(gate.margin))
    shares = (before.errors / before.requests, after.errors / after.requests)
    # A single error among a few requests is no larger share yet: the margin is in percent of all requests.
    if abs(shares[1] - shares[0]) > gate.margin:
        found[Metric.ERRORS] = _sign(shares[1] - shares[0])
    if before.restarts != after.restarts:
        found[Metric.RESTARTS] = _sign(after.restarts - before.restarts)
    return found


def judge(evidence: Mapping[str, GroupEvidence], gate: Gate) -> Verdict:
    """Return whether to stop on what is known now; ``evidence`` by the name of each group."""
    groups = max(1, len(evidence))
    findings = [finding for name, group in evidence.items() for finding in _findings(name, group, gate, groups)]
    return Verdict(tuple(sorted(findings, key=lambda finding: (not finding.stops, -finding.e / finding.bound))))


@functools.lru_cache(maxsize=4096)  # a wave is judged after each report, and few counts of it have changed
def e_value(signs: Signs) -> float:
    """Evidence that devices are worse than the margin: 1 is none."""
    return _sum_exp(
        weight + signs.worse * math.log1p(bet) + signs.better * math.log1p(-bet)
        for weight, bet in zip(_LOG_WEIGHTS, _BETS, strict=True)
    )


@functools.lru_cache(maxsize=4096)
def failure_e_value(failed: int, ended: int, healthy_share: float) -> float:
    """Evidence that more deployments fail than in a healthy fleet."""
    step = (1 - healthy_share) / (_SHARES + 1)
    shares = [healthy_share + step * (index + 1) for index in range(_SHARES)]
    logs = [
        failed * math.log(share / healthy_share) + (ended - failed) * math.log((1 - share) / (1 - healthy_share))
        for share in shares
    ]
    return _sum_exp(log - math.log(_SHARES) for log in logs)


def bound(metric: Metric | None, gate: Gate, groups: int) -> float:
    """Return what e must reach.

    ``metric`` None: deployments, which have a twentieth of alpha, and the metrics the rest.
    """
    part = 0.05 if metric is None else 0.95 * _PARTS[metric]
    return groups / (gate.alpha * part)


def detectable(devices: int, gate: Gate, groups: int = 1, noise: float = 0.05) -> float | None:
    """Return the smallest slowdown per token, such as 0.2 for 20%, that nine waves in ten of so many devices find.

    ``noise`` is the spread of a figure on one side, as a share of it. None: such a wave finds none that is tried.
    """
    if devices < gate.min_pairs:
        return None
    # The more devices are worse, the larger e.
    least = bound(Metric.TPOT, gate, groups)
    needed = bisect_left(range(devices + 1), least, key=lambda worse: e_value(Signs(worse, devices - worse)))
    if needed > devices:
        return None
    for effect in _EFFECTS:
        distance = (math.log1p(effect) - math.log1p(gate.margin)) / (noise * math.sqrt(2))
        chance = 0.5 * (1 + math.erf(distance / math.sqrt(2)))
        if effect > gate.margin and _at_least(needed, devices, chance) >= POWER:
            return effect
    return None


def _findings(name: str, group: GroupEvidence, gate: Gate, groups: int) -> Iterable[Finding]:
    for metric, signs in group.signs.items():
        e, needed = e_value(signs), bound(metric, gate, groups)
        stops = signs.pairs >= gate.min_pairs and e >= needed
        text = (
            f"{name}: {signs.worse} of {signs.pairs} devices are over {gate.margin:.0%} {_WORDS[metric]} than before; "
            f"e = {_short(e)} {'≥' if stops else 'of'} {_short(needed)}"
        )
        if metric in (Metric.ERRORS, Metric.RESTARTS):
            text = text.replace(f"over {gate.margin:.0%} ", "")
        yield Finding(name, metric, e, needed, stops, text)
    e, needed = failure_e_value(group.failed, group.ended, gate.healthy_failure_share), bound(None, gate, groups)
    capped = group.first_failed >= gate.cap_failed
    text = f"{name}: {group.failed} of {group.ended} deployments failed"
    if capped:
        text += f", {group.first_failed} of the first {min(gate.cap_of, group.ended)}"
    yield Finding(name, None, e, needed, capped or e >= needed, f"{text}; e = {_short(e)} of {_short(needed)}")


def _sign(difference: float) -> Signs:
    return Signs(1, 0) if difference > 0 else Signs(0, 1)


def _measured(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value) and _LEAST < value < _MOST


def _sum_exp(logs: Iterable[float]) -> float:
    every = list(logs)
    if max(every) > 600:  # beyond a float, and beyond any bound
        return math.inf
    return sum(math.exp(log) for log in every)


def _at_least(needed: int, devices: int, chance: float) -> float:
    """Return the chance that ``needed`` of the devices are, where each is with this chance (a binomial's tail)."""
    if needed > devices:
        return 0.0
    if not 0 < chance < 1:
        return float(chance >= 1 or needed <= 0)
    # As logarithms: the number of ways to choose a thousand devices fits into no float.
    every, odds, rest = math.lgamma(devices + 1), math.log(chance), math.log1p(-chance)
    return math.fsum(
        math.exp(
            every - math.lgamma(worse + 1) - math.lgamma(devices - worse + 1) + worse * odds + (devices - worse) * rest
        )
        for worse in range(needed, devices + 1)
    )


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}" if value < 1e6 else "over a million"
