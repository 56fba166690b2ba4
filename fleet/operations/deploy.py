"""Deploying: which artifacts fit which devices, what is published, and the signed order that each device gets."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from pydantic import ValidationError

from agent.contract.base import explain
from agent.contract.manifest import Manifest
from agent.contract.messages import ArtifactRef, Desired, ServedNames, SignedDesired, TransferLimits, Window
from agent.contract.profile import DeviceProfile, HealthLimits
from fleet.core.deployments import TABLE, Stage, usual_deadline_s
from fleet.core.fit import gate_incompatibilities, incompatibilities
from fleet.core.rollout_spec import DEFAULT_ALIASES
from fleet.errors import ConflictError, UsageError
from fleet.operations.artifacts import publish, refuse_withdrawn
from fleet.operations.fleet import Fleet
from fleet.profiles_loader import load_profile
from fleet.registry import Actor, Registry
from fleet.registry.devices import facts_of
from fleet.registry.models import DeploymentRow, DeviceRow

FOLLOW_POLL_S = 0.25


@dataclass(frozen=True, slots=True)
class DeployOptions:
    """What the operator says about a deployment beside artifact and devices. None: as the profile has it.

    Raises:
        UsageError: an alias is none.
    """

    probation_s: float | None = None
    deadline_s: float | None = None
    not_before: datetime | None = None
    not_after: datetime | None = None
    force: str | None = None
    aliases: tuple[str, ...] = DEFAULT_ALIASES
    #: Chunks may be fetched at once, whatever the profile says of windows and of metered networks.
    transfer_now: bool = False

    def __post_init__(self) -> None:
        """See the class."""
        try:
            ServedNames(aliases=self.aliases)
        except ValidationError as error:
            raise UsageError(
                f"these aliases cannot be: {explain(error)}; they are of lower case letters, digits, '.', '_' and '-'"
            ) from None


@dataclass(frozen=True, slots=True)
class _Fit:
    """The artifacts that fit each device, and for the devices that none fits, a sentence a reason."""

    chosen: Mapping[str, Sequence[Manifest]] = field(default_factory=dict)
    incompatibilities: Sequence[str] = ()


def deploy(
    fleet: Fleet, artifacts: Sequence[Manifest], devices: Sequence[DeviceRow], options: DeployOptions, actor: Actor
) -> list[DeploymentRow]:
    """Publish the artifacts and record a signed order for each device, all or none.

    Several artifacts are variants of one model. A device is ordered those that fit it, in the order given.

    Raises:
        UsageError: none fits a device, and it was not forced; says every reason. Or they are of different models, one
            was withdrawn, or a device was revoked.
        StoreError: an artifact's files are not what was built.
        RepositoryError: it cannot be signed.
    """
    refuse_unless_one_model(artifacts)
    refuse_withdrawn(fleet, artifacts)
    profiles = profiles_of(devices)
    fit = _fit(artifacts, devices, profiles)
    if fit.incompatibilities and options.force is None:
        lines = "\n  ".join(fit.incompatibilities)
        raise UsageError(f"it does not fit:\n  {lines}\nforce it with --force REASON if you know better")
    _check_window(options, actor, fleet.settings.order_validity_s)
    _publish(fleet, _to_publish(artifacts, fit), fit, options, actor)

    def draft(device: str, sequence: int, deployment: str) -> Desired:
        identity, chosen = (device, sequence, deployment), fit.chosen.get(device, artifacts)
        variants = [(ArtifactRef(id=manifest.id, digest=manifest.digest), manifest.size) for manifest in chosen]
        return make_order(identity, variants, profiles[device], options, actor, fleet.settings.order_validity_s)

    ids = [device.id for device in devices]
    return fleet.registry.deployments.create(ids, draft, fleet.repository.sign_desired, actor)


def select_devices(registry: Registry, devices: Sequence[str], profile: str | None = None) -> list[DeviceRow]:
    """Return the devices that are named, and all of a profile.

    Raises:
        UsageError: one is not there, no device has the profile, or nothing was named.
    """
    found = {name: registry.devices.get(name) for name in devices}
    if profile is not None:
        # One that was revoked keeps none of its kind from an update; who names it is told.
        of_profile = [row for row in registry.devices.all(profile) if row.revoked_at is None]
        if not of_profile:
            raise UsageError(f"no device has the profile {profile}")
        found |= {row.id: row for row in of_profile}
    if not found:
        raise UsageError("name the devices with --device ID, or all of a kind with --profile NAME")
    return list(found.values())


def profile_of(device: DeviceRow) -> DeviceProfile:
    """Return the device's profile: as it came with phifleet, or as it was when the device was added from a file.

    Raises:
        ProfileError: the profile is no longer there.
    """
    if device.profile_document is not None:
        return DeviceProfile.model_validate(device.profile_document)
    return load_profile(device.profile)


def profiles_of(devices: Iterable[DeviceRow]) -> dict[str, DeviceProfile]:
    """Return the profile of each device by its id; one that many devices have is read once.

    Raises:
        ProfileError: a profile is no longer there.
    """
    known: dict[str, DeviceProfile] = {}
    found: dict[str, DeviceProfile] = {}
    for device in devices:
        if device.profile_document is not None:  # it is this device's own, whatever it is called
            found[device.id] = profile_of(device)
            continue
        if device.profile not in known:
            known[device.profile] = profile_of(device)
        found[device.id] = known[device.profile]
    return found


def follow(
    registry: Registry, deployments: Sequence[str], timeout_s: float | None = None
) -> Iterator[list[DeploymentRow]]:
    """Yield the deployments as they are now, a few times a second, until all are over or the time is up.

    What comes last is how they ended.
    """
    began = time.monotonic()
    while True:
        rows = [registry.deployments.get(deployment) for deployment in deployments]
        yield rows
        over = not any(TABLE[Stage(row.stage)].outstanding for row in rows)
        if over or (timeout_s is not None and time.monotonic() - began > timeout_s):
            return
        time.sleep(FOLLOW_POLL_S)


def cancel_orders(fleet: Fleet, devices: Sequence[str], actor: Actor) -> list[DeploymentRow]:
    """Cancel what devices were ordered and have not ended; returns each one's newest order now.

    What no device can have seen is withdrawn. Else the device may have begun, and is ordered what it serves: it keeps
    that, and ends the other.

    Raises:
        UsageError: a device is not there, has nothing to be cancelled, or serves nothing that it could keep.
    """
    registry = fleet.registry
    rows, newest = registry.devices.some(devices), registry.deployments.newest(devices)
    under_way = {
        row.id: newest[row.id] for row in rows if row.id in newest and TABLE[Stage(newest[row.id].stage)].outstanding
    }
    idle = [row.id for row in rows if row.id not in under_way]
    if idle:
        raise ConflictError(f"nothing is under way that could be cancelled: {', '.join(idle[:20])}")
    unseen = [name for name, order in under_way.items() if order.published_at is None]
    seen = {name: _served(row) for row in rows if (name := row.id) not in unseen}
    _order_back(fleet, seen, "serves nothing that was published, so there is nothing to keep", actor)
    registry.deployments.withdraw(unseen, "it was cancelled", actor)
    now = registry.deployments.newest(devices)
    return [now[row.id] for row in rows]


def roll_back(fleet: Fleet, devices: Sequence[str], actor: Actor) -> list[DeploymentRow]:
    """Order devices to run what they had committed to before what they serve now; returns the orders.

    Raises:
        UsageError: a device is not there, or the fleet knows of nothing before.
    """
    rows = fleet.registry.devices.some(devices)
    before: dict[str, str | None] = {}
    for row in rows:
        history = fleet.registry.deployments.history(row.id, 100)
        committed = [one.served_digest for one in history if one.stage == Stage.COMMITTED and one.served_digest]
        before[row.id] = next((digest for digest in committed if digest != _served(row)), None)
    return _order_back(fleet, before, "has committed to nothing else before", actor)


def _served(row: DeviceRow) -> str | None:
    return (row.reported or {}).get("digest")


def _order_back(fleet: Fleet, digests: Mapping[str, str | None], without: str, actor: Actor) -> list[DeploymentRow]:
    """Order each device a digest that was published; all or none. ``without``: what a device lacks that has none."""
    published, withdrawn = fleet.registry.artifacts.published(), fleet.registry.artifacts.withdrawals()
    lacking = [name for name, digest in digests.items() if digest not in published or digest in withdrawn]
    if lacking:
        raise ConflictError(f"{', '.join(lacking[:20])} {without}")
    if not digests:
        return []
    profiles = profiles_of(fleet.registry.devices.some(list(digests)))
    sizes, aliases = fleet.registry.artifacts.sizes(), _aliases(fleet.registry, list(digests))

    def draft(device: str, sequence: int, deployment: str) -> Desired:
        digest = digests[device] or ""
        variants = [(ArtifactRef(id=published[digest], digest=digest), sizes[digest])]
        validity = fleet.settings.order_validity_s
        options = DeployOptions(aliases=aliases.get(device, DEFAULT_ALIASES))
        return make_order((device, sequence, deployment), variants, profiles[device], options, actor, validity)

    return fleet.registry.deployments.create(list(digests), draft, fleet.repository.sign_desired, actor)


def _aliases(registry: Registry, devices: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the aliases that each device was last ordered, where it was ordered any."""
    found: dict[str, tuple[str, ...]] = {}
    for device, row in registry.deployments.newest(devices, with_envelopes=True).items():
        order = ordered(row.envelope)
        if order.names is not None:
            found[device] = order.names.aliases
    return found


def ordered(envelope: bytes) -> Desired:
    """Return the order inside an envelope of the registry, whose signature was this fleet's own."""
    return Desired.from_json(base64.b64decode(SignedDesired.from_json(envelope).payload))


def refuse_unless_one_model(artifacts: Sequence[Manifest], what: str = "variants") -> None:
    """Variants serve the same purpose, so they are of one model; ``what`` begins the sentence where they are not.

    Raises:
        UsageError: they are not; names each with its model.
    """
    if len({manifest.model.name for manifest in artifacts}) != 1:
        names = ", ".join(f"{manifest.id} of {manifest.model.name}" for manifest in artifacts)
        raise UsageError(f"{what} must be of one model, and these are not: {names}")


def _fit(artifacts: Sequence[Manifest], devices: Sequence[DeviceRow], profiles: Mapping[str, DeviceProfile]) -> _Fit:
    chosen: dict[str, Sequence[Manifest]] = {}
    reasons: list[str] = []
    for device in devices:
        profile, facts = profiles[device.id], facts_of(device)
        wrong = {
            manifest.id: incompatibilities(manifest, profile, facts) + gate_incompatibilities(manifest, profile)
            for manifest in artifacts
        }
        fitting = [manifest for manifest in artifacts if not wrong[manifest.id]]
        if fitting:
            chosen[device.id] = fitting
        else:
            reasons += [f"{device.id}: {artifact}: {why}" for artifact, whys in wrong.items() for why in whys]
    return _Fit(chosen, reasons)


def _to_publish(artifacts: Sequence[Manifest], fit: _Fit) -> list[Manifest]:
    """What fits no device, or no gate, is not signed in the others' company, unless that was forced."""
    if fit.incompatibilities:
        return list(artifacts)
    ordered = {manifest.digest for chosen in fit.chosen.values() for manifest in chosen}
    return [manifest for manifest in artifacts if manifest.digest in ordered]


def _publish(fleet: Fleet, artifacts: Sequence[Manifest], fit: _Fit, options: DeployOptions, actor: Actor) -> None:
    publish(fleet, artifacts, actor, options.force if fit.incompatibilities else None)
    if fit.incompatibilities:
        details = {"reason": options.force, "incompatibilities": list(fit.incompatibilities)}
        fleet.registry.audit.record(actor, "deployment.force", artifacts[0].id, details)


def make_order(
    identity: tuple[str, int, str],
    variants: Sequence[tuple[ArtifactRef, int]],
    profile: DeviceProfile,
    options: DeployOptions,
    actor: Actor,
    validity_s: float,
) -> Desired:
    """Return the order for one device, to be signed.

    ``identity`` is its id, the sequence number, and the deployment's id; ``variants`` are artifacts with their bytes.
    """
    device, sequence, deployment = identity
    size = sum(size for _, size in variants)
    return Desired(
        device=device,
        sequence=sequence,
        deployment=deployment,
        issued_at=actor.at,
        expires_at=actor.at + timedelta(seconds=validity_s),
        artifacts=tuple(ref for ref, _ in variants),
        limits=HealthLimits.model_validate(profile.health.model_dump()),
        transfer=TransferLimits(
            window_bytes=profile.delivery.window_bytes,
            max_bytes_per_s=profile.delivery.max_bytes_per_s,
            windows=() if options.transfer_now else profile.delivery.windows,
            mirrors=profile.delivery.mirrors,
            metered_bytes=None if options.transfer_now else profile.delivery.metered_bytes,
        ),
        probation_s=profile.probation_s if options.probation_s is None else options.probation_s,
        window=Window(not_before=options.not_before, not_after=options.not_after),
        deadline_s=_deadline_s(options, profile, size, actor),
        names=ServedNames(aliases=options.aliases),
    )


def _check_window(options: DeployOptions, actor: Actor, validity_s: float) -> None:
    opens, closes = options.not_before, options.not_after
    if opens is not None and opens >= actor.at + timedelta(seconds=validity_s):
        raise UsageError(f"the window opens at {opens.isoformat()}, when the order has expired")
    if closes is not None and closes <= max(actor.at, opens or actor.at):
        raise UsageError(f"the window closes at {closes.isoformat()}, before it opens or before now")


def _deadline_s(options: DeployOptions, profile: DeviceProfile, size: int, actor: Actor) -> float:
    """Waiting for the window is no delay of the device's: the usual deadline counts from its opening."""
    if options.deadline_s is not None:
        return options.deadline_s
    opens_in_s = ((options.not_before or actor.at) - actor.at).total_seconds()
    return usual_deadline_s(size, profile.delivery.rate, opens_in_s)
