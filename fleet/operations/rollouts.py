"""Rollouts as operators and the controller use them: planning, starting, moving, and saying why one stopped."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import structlog

from agent.contract.manifest import Manifest
from agent.contract.messages import ArtifactRef, Desired
from agent.contract.profile import DeviceProfile
from fleet.core.evidence import Verdict, detectable, judge
from fleet.core.fit import gate_incompatibilities, incompatibilities
from fleet.core.rollout_events import Assigned, Event, Progress, Started, Stopped, TakenBack, Ticked
from fleet.core.rollout_spec import RolloutSpec, Wave
from fleet.core.rollouts import STATES, Rollout, State, plan
from fleet.core.selectors import parse
from fleet.errors import FleetError, UsageError
from fleet.operations.artifacts import publish, refuse_withdrawn
from fleet.operations.deploy import DeployOptions, make_order, profiles_of, refuse_unless_one_model
from fleet.operations.fleet import Fleet
from fleet.operations.names import check_name, selector_text, variants
from fleet.registry import Actor, Registry
from fleet.registry.devices import facts_of
from fleet.registry.models import DeviceRow, RolloutDeviceRow
from fleet.registry.rollouts import Candidate, DeviceStage, read
from fleet.store.protocol import find

STEP_S = 1.0
#: Devices that are ordered in one step: signing takes a millisecond each, and other rollouts wait meanwhile.
MOST_ORDERS = 200
#: How often a dynamic rollout looks for devices that its selector means only now.
JOIN_EVERY = timedelta(seconds=30)
SYSTEM = "controller"

_log = structlog.get_logger(component="rollouts")


@dataclass(frozen=True, slots=True)
class WavePlan:
    """A wave before it begins: by profile and variant, how many devices, and the slowdown that so many can show.

    ``size_bytes`` is of the devices' artifacts together; what a device has of them already is not sent again.
    ``transfer_s`` is what the slowest of them takes at its profile's bandwidth.
    """

    wave: Wave
    cohorts: Mapping[str, int]
    detectable: Mapping[str, float | None]
    size_bytes: int = 0
    transfer_s: float = 0.0

    @property
    def devices(self) -> int:
        """In all."""
        return sum(self.cohorts.values())


@dataclass(frozen=True, slots=True)
class Plan:
    """What a rollout would do now. ``unfit``: devices that no variant fits, each with its reasons."""

    waves: Sequence[WavePlan]
    unfit: Mapping[str, str]
    taken: Sequence[str]

    @property
    def devices(self) -> int:
        """In all waves."""
        return sum(wave.devices for wave in self.waves)


def plan_rollout(fleet: Fleet, spec: RolloutSpec) -> Plan:
    """Say which devices each wave would take, with which variant, and what its gate could see.

    Raises:
        SelectorError: a selector cannot be read.
        UsageError: an artifact is not there, the variants are of different models, or one was withdrawn.
    """
    spec = _resolved(fleet, spec)
    manifests = _manifests(fleet, spec)
    candidates, unfit, rates = _candidates(fleet.registry, spec, manifests)
    sizes = {manifest.digest: manifest.size for manifest in manifests}
    taken = fleet.registry.rollouts.taken("", spec.priority)
    left = [one for one in candidates if one.device not in taken]
    waves: list[WavePlan] = []
    total = len(left)
    for wave in spec.waves:
        chosen = _take(fleet.registry, wave, left, total)
        names = {one.device for one in chosen}
        left = [one for one in left if one.device not in names]
        cohorts: defaultdict[str, int] = defaultdict(int)
        for one in chosen:
            cohorts[one.cohort] += 1
        seen = {
            name: detectable(count, spec.gate, len(cohorts)) if spec.gate else None for name, count in cohorts.items()
        }
        takes = [sizes[one.digest] for one in chosen]
        slowest = max((sizes[one.digest] / rates[one.device] for one in chosen), default=0.0)
        waves.append(WavePlan(wave, dict(cohorts), seen, sum(takes), slowest))
    return Plan(waves, unfit, sorted(taken & {one.device for one in candidates}))


def start_rollout(fleet: Fleet, name: str, spec: RolloutSpec, actor: Actor) -> Rollout:
    """Publish the variants, record the rollout, and let the controller begin.

    Raises:
        UsageError: no device is meant, some device has no variant that fits, or the name is taken.
        SelectorError: a selector cannot be read.
        StoreError: an artifact's files are not what was built.
        RepositoryError: it cannot be signed.
    """
    check_name("rollout", name)
    spec = _resolved(fleet, spec)
    manifests = _manifests(fleet, spec)
    found = plan_rollout(fleet, spec)
    if found.unfit:
        lines = "\n  ".join(f"{device}: {why}" for device, why in list(found.unfit.items())[:20])
        raise UsageError(
            f"{len(found.unfit)} devices have no variant that fits:\n  {lines}\nnarrow the selector, or add one"
        )
    if not found.devices:
        others = f"; {len(found.taken)} are in another rollout" if found.taken else ""
        raise UsageError(f"no device is meant by {spec.selector!r}{others}")
    publish(fleet, manifests, actor)
    fleet.registry.rollouts.create(plan(name, spec, actor.at), actor)
    started, _ = fleet.registry.rollouts.apply(name, Started(), actor)
    return started


def control_rollout(fleet: Fleet, name: str, event: Event, actor: Actor, expected: str | None = None) -> Rollout:
    """Pause, resume, approve or abort; the audit says who did. ``expected``: the tag that it must still have.

    Raises:
        UsageError: there is no such rollout, or it is not possible now.
        ChangedError: it has another tag.
    """
    after, _ = fleet.registry.rollouts.apply(name, event, actor, expected)
    fleet.registry.audit.record(actor, f"rollout.{type(event).__name__.removesuffix('Asked').lower()}", name)
    return after


class Roller:
    """Moves the rollouts that are under way, a step a second. One controller alone moves a rollout at a time."""

    def __init__(self, fleet: Fleet, owner: str, clock: Callable[[], datetime], step_s: float = STEP_S) -> None:
        self._fleet, self._owner, self._clock, self._step_s = fleet, owner, clock, step_s
        self._looked_at: dict[str, datetime] = {}

    async def run(self) -> None:
        """Move them, for ever. A fault costs one step of one rollout, and is logged."""
        while True:
            try:
                for rollout in await asyncio.to_thread(self._claim):
                    await asyncio.to_thread(self._step, rollout)
            except FleetError as error:
                _log.warning("rollouts not moved, trying again", error=str(error))
            await asyncio.sleep(self._step_s)

    def step_all(self) -> None:
        """One step of each; for those who have no event loop."""
        for rollout in self._claim():
            self._step(rollout)

    def _claim(self) -> list[str]:
        return self._fleet.registry.rollouts.claim(self._owner, self._clock())

    def _step(self, name: str) -> None:
        try:
            self._move(read(self._fleet.registry.rollouts.get(name)))
        except FleetError as error:
            _log.error("rollout not moved, trying again", rollout=name, error=str(error))

    def _move(self, rollout: Rollout) -> None:
        rollouts = self._fleet.registry.rollouts
        rollouts.settle(rollout.id, rollout.spec.retries if rollout.state is not State.TAKING_BACK else 0)
        match rollout.state:
            case State.OPENING:
                self._open(rollout)
                return
            case State.RUNNING | State.BAKING:
                self._take_those_who_joined(rollout)
            case State.STOPPING:
                rollouts.cancel_waiting(rollout.id, rollout.reason)
            case State.TAKING_BACK:
                self._take_back(rollout)
                self._apply(rollout, TakenBack(remaining=rollouts.remaining(rollout.id)))
        moved = self._apply(rollout, Progress(counts=rollouts.counts(rollout.id, rollout.wave)))
        moved = self._judge(moved)
        if moved.state is State.RUNNING:
            self._order(moved)
        if not STATES[moved.state].final:
            self._apply(moved, Ticked())

    def _apply(self, rollout: Rollout, event: Event) -> Rollout:
        if STATES[rollout.state].final:
            return rollout
        after, _ = self._fleet.registry.rollouts.apply(rollout.id, event, Actor(SYSTEM, self._clock()))
        if after.state is not rollout.state:
            reason = {"reason": after.reason} if after.reason else {}
            _log.info("rollout", rollout=rollout.id, state=after.state.value, wave=after.wave + 1, **reason)
        return after

    def _open(self, rollout: Rollout) -> None:
        registry, spec = self._fleet.registry, rollout.spec
        candidates, unfit, _ = _candidates(registry, spec, _manifests(self._fleet, spec))
        if unfit:
            _log.warning("devices without a variant that fits are left out", rollout=rollout.id, devices=len(unfit))
        taken = registry.rollouts.taken(rollout.id, spec.priority)
        left = [one for one in candidates if one.device not in taken]
        already = len(registry.rollouts.devices(rollout.id))
        chosen = _take(registry, spec.waves[rollout.wave], left, len(left) + already)
        registry.rollouts.assign(rollout.id, rollout.wave, chosen, self._clock())
        count = sum(row.wave == rollout.wave for row in registry.rollouts.devices(rollout.id))
        self._apply(rollout, Assigned(devices=count))

    def _take_those_who_joined(self, rollout: Rollout) -> None:
        """Let the last wave of a dynamic rollout have devices that are meant now and were not when it was opened."""
        spec, now = rollout.spec, self._clock()
        if not spec.dynamic or rollout.wave + 1 < len(spec.waves):
            return
        if now - self._looked_at.get(rollout.id, now - JOIN_EVERY) < JOIN_EVERY:
            return
        self._looked_at[rollout.id] = now
        registry = self._fleet.registry
        candidates, _, _ = _candidates(registry, spec, _manifests(self._fleet, spec))
        taken = registry.rollouts.taken(rollout.id, spec.priority)
        joined = [one for one in candidates if one.device not in taken]
        if spec.waves[-1].selector is not None:
            joined = _take(registry, spec.waves[-1], joined, len(joined))
        if joined:
            registry.rollouts.assign(rollout.id, rollout.wave, joined, now)
            _log.info("devices have joined", rollout=rollout.id, devices=len(joined))

    def _order(self, rollout: Rollout) -> None:
        """As many devices that wait as concurrency, rate and windows allow."""
        registry, spec, now = self._fleet.registry, rollout.spec, self._clock()
        most = 0 if spec.opens_at(now) else MOST_ORDERS
        if spec.concurrency is not None:
            most = min(most, spec.concurrency - len(registry.rollouts.devices(rollout.id, DeviceStage.ORDERED)))
        if spec.rate_per_minute is not None:
            lately = registry.rollouts.ordered_since(rollout.id, now - timedelta(minutes=1))
            most = min(most, int(spec.rate_per_minute) - lately)
        rows = registry.rollouts.to_order(rollout.id, most) if most > 0 else []
        if not rows:
            return
        served = {row.device: row.previous for row in rows if row.previous}
        registry.rollouts.note_before(rollout.id, registry.rollouts.figures_before(served, now))
        refs = _refs(self._fleet, {row.digest for row in rows})
        self._create(rollout, {row.device: refs[row.digest] for row in rows}, DeviceStage.ORDERED)

    def _take_back(self, rollout: Rollout) -> None:
        """Order those that have changed to go back, the one that changed last first."""
        registry = self._fleet.registry
        rows = registry.rollouts.devices(rollout.id, DeviceStage.ORDERED, DeviceStage.SUCCEEDED)
        published = registry.artifacts.published()
        withdrawn = registry.artifacts.withdrawals()
        stuck = [row for row in rows if row.previous not in published or row.previous in withdrawn]
        if stuck:
            why = "it served nothing before that the fleet has published"
            registry.rollouts.keep_as_is(rollout.id, [row.device for row in stuck], why)
            _log.warning("devices cannot go back", rollout=rollout.id, devices=len(stuck), error=why)
        back = sorted((row for row in rows if row not in stuck), key=_changed_at, reverse=True)[:MOST_ORDERS]
        orders = {row.device: ArtifactRef(id=published[row.previous or ""], digest=row.previous or "") for row in back}
        if orders:
            self._create(rollout, orders, DeviceStage.REVERTING)

    def _create(self, rollout: Rollout, orders: Mapping[str, ArtifactRef], stage: DeviceStage) -> None:
        fleet, spec, actor = self._fleet, rollout.spec, Actor(SYSTEM, self._clock())
        options = DeployOptions(
            probation_s=spec.probation_s,
            deadline_s=spec.device_deadline_s,
            not_before=spec.not_before if stage is DeviceStage.ORDERED else None,
            not_after=spec.not_after if stage is DeviceStage.ORDERED else None,
            aliases=spec.aliases,
        )
        profiles = profiles_of(fleet.registry.devices.some(list(orders)))
        sizes = fleet.registry.artifacts.sizes()

        def draft(device: str, sequence: int, deployment: str) -> Desired:
            identity = (device, sequence, deployment)
            validity = fleet.settings.order_validity_s
            variants = [(orders[device], sizes[orders[device].digest])]
            return make_order(identity, variants, profiles[device], options, actor, validity)

        also = fleet.registry.rollouts.mark_ordered(rollout.id, stage, actor.at)
        fleet.registry.deployments.create(list(orders), draft, fleet.repository.sign_desired, actor, also)

    def _judge(self, rollout: Rollout) -> Rollout:
        gate = rollout.spec.gate
        if gate is None or rollout.state not in (State.RUNNING, State.BAKING, State.APPROVING, State.PAUSED):
            return rollout
        evidence = self._fleet.registry.rollouts.evidence(rollout.id, gate)
        verdict = judge(evidence, gate)
        self._fleet.registry.rollouts.note_findings(rollout.id, describe_verdict(verdict))
        if not verdict.stop:
            return rollout
        return self._apply(rollout, Stopped(reason="; ".join(verdict.reasons)))


def describe_verdict(verdict: Verdict) -> dict[str, Any]:
    """As it is stored and shown."""
    return {
        "stop": verdict.stop,
        "findings": [
            {
                "cohort": finding.group,
                "metric": finding.metric.value if finding.metric else "deployments",
                "e": min(finding.e, 1e300),
                "bound": finding.bound,
                "stops": finding.stops,
                "text": finding.text,
            }
            for finding in verdict.findings
        ],
    }


def _resolved(fleet: Fleet, spec: RolloutSpec) -> RolloutSpec:
    """Return it with what its names mean now: a name that means something else later changes no rollout."""
    waves = tuple(
        wave if wave.selector is None else Wave(selector=selector_text(fleet, wave.selector)) for wave in spec.waves
    )
    digests = tuple(manifest.digest for manifest in variants(fleet, spec.artifacts))
    changes = {"selector": selector_text(fleet, spec.selector), "waves": waves, "artifacts": digests}
    return spec.model_copy(update=changes)


def _manifests(fleet: Fleet, spec: RolloutSpec) -> list[Manifest]:
    manifests = [find(fleet.artifacts, digest) for digest in spec.artifacts]
    refuse_unless_one_model(manifests)
    refuse_withdrawn(fleet, manifests)
    return manifests


def _refs(fleet: Fleet, digests: set[str]) -> dict[str, ArtifactRef]:
    published = fleet.registry.artifacts.published()
    return {digest: ArtifactRef(id=published[digest], digest=digest) for digest in digests}


def _candidates(
    registry: Registry, spec: RolloutSpec, manifests: Sequence[Manifest]
) -> tuple[list[Candidate], dict[str, str], dict[str, int]]:
    """Return the devices that are meant and do not run one of the variants yet.

    Those that none fits come with the reasons; last, what each device's link may be expected to carry, in bytes a
    second.
    """
    found = registry.inventory.select(parse(spec.selector))
    digests = {manifest.digest for manifest in manifests}
    rows = {row.id: row for row in registry.devices.all()} if found else {}
    profiles = profiles_of(rows[one.device] for one in found)
    candidates: list[Candidate] = []
    unfit: dict[str, str] = {}
    for one in found:
        if one.served in digests:
            continue
        variant, why = _variant(rows[one.device], manifests, profiles[one.device])
        if variant is None:
            unfit[one.device] = why
        else:
            candidates.append(Candidate(one.device, f"{one.profile}, {variant.id}", variant.digest, one.served))
    return candidates, unfit, {device: profile.delivery.rate for device, profile in profiles.items()}


def _variant(row: DeviceRow, manifests: Sequence[Manifest], profile: DeviceProfile) -> tuple[Manifest | None, str]:
    """Return the first variant that fits, or why none does."""
    reasons: list[str] = []
    for manifest in manifests:
        wrong = incompatibilities(manifest, profile, facts_of(row)) + gate_incompatibilities(manifest, profile)
        if not wrong:
            return manifest, ""
        reasons += [f"{manifest.id}: {why}" for why in wrong]
    return None, "; ".join(reasons)


def _take(registry: Registry, wave: Wave, left: Sequence[Candidate], total: int) -> list[Candidate]:
    """Return what a wave takes of the devices that are left: spread over the cohorts, so that each can be judged."""
    if wave.selector is not None:
        meant = {one.device for one in registry.inventory.select(parse(wave.selector))}
        return [one for one in left if one.device in meant]
    count = wave.take(total) or 0
    by_cohort: defaultdict[str, list[Candidate]] = defaultdict(list)
    for one in left:
        by_cohort[one.cohort].append(one)
    ordered = [one for _, one in sorted(_ranked(by_cohort), key=lambda ranked: ranked[0])]
    return ordered[:count]


def _ranked(by_cohort: Mapping[str, Sequence[Candidate]]) -> list[tuple[tuple[float, str], Candidate]]:
    """Return each device with its place, as a share of its cohort: any beginning has each cohort in proportion."""
    return [
        (((index + 0.5) / len(members), one.device), one)
        for members in by_cohort.values()
        for index, one in enumerate(members)
    ]


def _changed_at(row: RolloutDeviceRow) -> tuple[float, str]:
    return (row.ordered_at.timestamp() if row.ordered_at else 0.0, row.device)
