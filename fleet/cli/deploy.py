"""`phifleet deploy`: order devices to run an artifact."""

from __future__ import annotations

import contextlib
import difflib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import click
from rich.console import Console
from rich.live import Live

from agent.contract.manifest import Manifest
from agent.contract.messages import ArtifactRef, Desired, TransferLimits
from agent.contract.profile import DeviceProfile, HealthLimits
from fleet.cli.context import Context, actor
from fleet.cli.describe import describe_deployment
from fleet.cli.status import table
from fleet.core.deployments import TABLE, Stage
from fleet.core.fit import gate_misfits, misfits, unmeasured
from fleet.errors import DeploymentError, UsageError
from fleet.home import Home
from fleet.profiles_loader import load_profile
from fleet.registry import Actor, Registry
from fleet.registry.models import DeploymentRow, DeviceRow
from fleet.registry.registry import facts_of
from fleet.toolchains.artifacts import list_artifacts, load
from fleet.trust.repository import Repository

WAIT_POLL_S = 0.25


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the operator says about a deployment beside artifact and devices. None: as the profile has it."""

    probation_s: float | None = None
    deadline_s: float | None = None
    force: str | None = None


@click.command()
@click.argument("artifact")
@click.option("--device", "devices", multiple=True, help="A device's id; may be repeated.")
@click.option("--profile", help="All devices of this profile.")
@click.option("--probation", "probation_s", type=click.FloatRange(0), help="Seconds of health before commit.")
@click.option("--deadline", "deadline_s", type=click.FloatRange(1), help="Seconds for the whole deployment.")
@click.option("--force", metavar="REASON", help="Deploy although it does not fit; the reason is recorded.")
@click.option("--wait", is_flag=True, help="Show the progress until all have ended; exit 9 unless all committed.")
@click.option("--json", "as_json", is_flag=True, help="One JSON array on standard output.")
@click.pass_obj
def deploy(  # noqa: PLR0913, PLR0917 - a parameter for each flag
    context: Context,
    artifact: str,
    devices: tuple[str, ...],
    profile: str | None,
    probation_s: float | None,
    deadline_s: float | None,
    force: str | None,
    wait: bool,
    as_json: bool,
) -> None:
    """Order devices to run ARTIFACT: its id, its digest, or the beginning of either.

    The artifact is published first, if it is not yet. A running `phifleet serve` passes the orders on.
    """
    wishes = Wishes(probation_s, deadline_s, force)
    with contextlib.closing(context.open_registry()) as registry:
        targets = _targets(registry, devices, profile)
        manifest = find(context.home, artifact)
        if any(unmeasured(manifest, profile_of(target)) for target in targets):
            click.echo(f"warning: the loss of {manifest.id} was not measured; no quality gate was applied", err=True)
        orders = order(context, registry, manifest, targets, wishes)
        if not as_json:
            for row in orders:
                click.echo(f"{row.device}: ordered {row.artifact} as {row.id}")
        if wait:
            orders = _wait(registry, orders, quiet=as_json)
    if as_json:
        click.echo(json.dumps([describe_deployment(row) for row in orders]))
    if wait:
        _raise_unless_committed(orders)


def find(home: Home, text: str) -> Manifest:
    """The artifact by its id, its digest, or a beginning of either that only one has.

    Raises:
        UsageError: none, or several; names near matches.
    """
    try:
        return load(home, text)
    except UsageError:
        ids = [manifest.id for manifest in list_artifacts(home).manifests]
        near = difflib.get_close_matches(text, ids, n=3, cutoff=0.4)
        if not near or any(one.startswith(text) for one in ids):
            raise
        raise UsageError(f"no artifact is named {text}; did you mean {' or '.join(near)}?") from None


def order(
    context: Context, registry: Registry, manifest: Manifest, devices: Sequence[DeviceRow], wishes: Wishes
) -> list[DeploymentRow]:
    """Publish the artifact and record a signed order for each device, all or none.

    Raises:
        UsageError: it does not fit a device, and was not forced; says every reason.
        RepositoryError: it cannot be signed.
    """
    profiles = {device.id: profile_of(device) for device in devices}
    reasons = _reasons(manifest, devices, profiles)
    if reasons and wishes.force is None:
        lines = "\n  ".join(reasons)
        raise UsageError(f"{manifest.id} does not fit:\n  {lines}\nforce it with --force REASON if you know better")
    who = actor()
    repository = Repository(context.home)
    repository.publish(manifest)
    registry.record_artifact(manifest, who, forced=wishes.force if reasons else None)
    if reasons:
        details = {"reason": wishes.force, "misfits": reasons, "devices": [device.id for device in devices]}
        registry.audit(who, "deployment.force", manifest.id, details)

    def draft(device: str, sequence: int, deployment: str) -> Desired:
        identity = (device, sequence, deployment)
        return _desired(identity, manifest, profiles[device], wishes, who, context.settings.order_validity_s)

    return registry.deploy([device.id for device in devices], draft, repository.sign_desired, who)


def profile_of(device: DeviceRow) -> DeviceProfile:
    """The device's profile: as it came with phifleet, or as it was when the device was added from a file.

    Raises:
        ProfileError: the profile is no longer there.
    """
    if device.profile_document is not None:
        return DeviceProfile.model_validate(device.profile_document)
    return load_profile(device.profile)


def _targets(registry: Registry, devices: tuple[str, ...], profile: str | None) -> list[DeviceRow]:
    found = {name: registry.device(name) for name in devices}
    if profile is not None:
        of_profile = registry.devices(profile)
        if not of_profile:
            raise UsageError(f"no device has the profile {profile}")
        found |= {row.id: row for row in of_profile}
    if not found:
        raise UsageError("name the devices with --device ID, or all of a kind with --profile NAME")
    return list(found.values())


def _reasons(manifest: Manifest, devices: Sequence[DeviceRow], profiles: dict[str, DeviceProfile]) -> list[str]:
    reasons = [
        f"{device.id}: {why}" for device in devices for why in misfits(manifest, profiles[device.id], facts_of(device))
    ]
    gates = {profile.name: profile for profile in profiles.values()}
    return reasons + [why for profile in gates.values() for why in gate_misfits(manifest, profile)]


def _desired(
    identity: tuple[str, int, str],
    manifest: Manifest,
    profile: DeviceProfile,
    wishes: Wishes,
    who: Actor,
    validity_s: float,
) -> Desired:
    device, sequence, deployment = identity
    optional = {} if wishes.deadline_s is None else {"deadline_s": wishes.deadline_s}
    return Desired(
        device=device,
        sequence=sequence,
        deployment=deployment,
        issued_at=who.at,
        expires_at=who.at + timedelta(seconds=validity_s),
        artifacts=(ArtifactRef(id=manifest.id, digest=manifest.digest),),
        limits=HealthLimits.model_validate(profile.health.model_dump()),
        transfer=TransferLimits(window_bytes=profile.delivery.window_bytes),
        probation_s=profile.probation_s if wishes.probation_s is None else wishes.probation_s,
        **optional,
    )


def _wait(registry: Registry, orders: Sequence[DeploymentRow], quiet: bool) -> list[DeploymentRow]:
    console = Console(stderr=True, quiet=quiet)
    with Live(console=console, auto_refresh=False) as live:
        while True:
            rows = [registry.deployment(row.id) for row in orders]
            live.update(table([(registry.device(row.device), row) for row in rows]), refresh=True)
            if not any(TABLE[Stage(row.stage)].outstanding for row in rows):
                return rows
            time.sleep(WAIT_POLL_S)


def _raise_unless_committed(orders: Sequence[DeploymentRow]) -> None:
    failed = [row for row in orders if row.stage != Stage.COMMITTED]
    if failed:
        lines = "; ".join(
            f"{row.device}: {row.stage}" + (f" ({row.failure_code}: {row.failure_message})" if row.failure_code else "")
            for row in failed
        )
        raise DeploymentError(f"{len(failed)} of {len(orders)} not committed: {lines}")
