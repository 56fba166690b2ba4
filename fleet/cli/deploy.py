"""`phifleet deploy`: order devices to run an artifact."""

from __future__ import annotations

import contextlib
import difflib
import json
import time
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import click
from rich.console import Console
from rich.live import Live

from agent.contract.manifest import Manifest
from agent.contract.messages import ArtifactRef, Desired, TransferLimits, Window
from agent.contract.profile import DeviceProfile, HealthLimits
from fleet.cli.context import Context, actor
from fleet.cli.describe import describe_deployment, held
from fleet.cli.status import HELD, view
from fleet.core.deployments import TABLE, Stage
from fleet.core.fit import gate_incompatibilities, incompatibilities
from fleet.errors import DeploymentError, UsageError
from fleet.home import Home
from fleet.profiles_loader import load_profile
from fleet.registry import Actor, Registry
from fleet.registry.models import DeploymentRow, DeviceRow
from fleet.registry.registry import facts_of
from fleet.store.folder import list_artifacts, load, validate
from fleet.trust.repository import Repository


class Moment(click.ParamType[datetime]):
    """A date and time in ISO 8601; local time where it names no zone."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        """See the class."""
        try:
            return datetime.fromisoformat(value).astimezone(UTC)
        except ValueError:
            self.fail(f"{value!r} is no date and time like 2026-12-24T02:00 or 2026-12-24T02:00+01:00", param, ctx)


MOMENT = Moment()
WAIT_POLL_S = 0.25
#: A running controller publishes within half a second.
UNPUBLISHED_HINT_S = 5.0


@dataclass(frozen=True, slots=True)
class DeployOptions:
    """What the operator says about a deployment beside artifact and devices. None: as the profile has it."""

    probation_s: float | None = None
    deadline_s: float | None = None
    not_before: datetime | None = None
    not_after: datetime | None = None
    force: str | None = None


@click.command()
@click.argument("artifacts", metavar="ARTIFACT...", nargs=-1, required=True)
@click.option("--device", "devices", multiple=True, help="A device's id; may be repeated.")
@click.option("--profile", help="All devices of this profile.")
@click.option("--probation", "probation_s", type=click.FloatRange(0), help="Seconds of health before commit.")
@click.option("--deadline", "deadline_s", type=click.FloatRange(1), help="Seconds for the whole deployment.")
@click.option("--not-before", type=MOMENT, help="When devices may change their model, from; fetching begins at once.")
@click.option("--not-after", type=MOMENT, help="When devices may change their model, until.")
@click.option("--force", metavar="REASON", help="Deploy although it does not fit; the reason is recorded.")
@click.option("--wait", is_flag=True, help="Show the progress until all have ended; exit 9 unless all committed.")
@click.option("--timeout", "timeout_s", type=click.FloatRange(1), help="With --wait: seconds, at most.")
@click.option("--json", "as_json", is_flag=True, help="One JSON array on standard output.")
@click.pass_obj
def deploy(
    context: Context,
    /,
    artifacts: tuple[str, ...],
    devices: tuple[str, ...],
    profile: str | None,
    wait: bool,
    timeout_s: float | None,
    as_json: bool,
    **wishes: Any,
) -> None:
    """Order devices to run ARTIFACT: its id, its digest, or the beginning of either.

    Several are variants of one model: a device proves those that it can run, and serves the fastest. What is not
    published yet is published first. A running `phifleet serve` passes the orders on.
    """
    with contextlib.closing(context.open_registry()) as registry:
        targets = _targets(registry, devices, profile)
        variants = [find(context.home, text) for text in artifacts]
        orders = order(context, registry, variants, targets, DeployOptions(**wishes))
        if not as_json:
            for row in orders:
                click.echo(f"{row.device}: ordered {row.artifact} as {row.id}")
        waiting: set[str] = set()
        if wait:
            orders = _wait(registry, orders, timeout_s, Console(stderr=True, quiet=as_json))
            waiting = {row.id for row in orders if held(registry.device(row.device), row)}
    if as_json:
        click.echo(json.dumps([describe_deployment(row) for row in orders]))
    if wait:
        _raise_unless_committed(orders, waiting)


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
    context: Context,
    registry: Registry,
    variants: Manifest | Sequence[Manifest],
    devices: Sequence[DeviceRow],
    wishes: DeployOptions,
) -> list[DeploymentRow]:
    """Publish the variants and record a signed order for each device, all or none.

    A device is ordered those variants that fit it, in the order given.

    Raises:
        UsageError: none fits a device, and it was not forced; says every reason. Or they are of different models.
        BuildError: its files are not what was built.
        RepositoryError: it cannot be signed.
    """
    manifests = [variants] if isinstance(variants, Manifest) else list(variants)
    if len({manifest.model.name for manifest in manifests}) != 1:
        names = ", ".join(f"{manifest.id} of {manifest.model.name}" for manifest in manifests)
        raise UsageError(f"variants must be of one model, and these are not: {names}")
    profiles = {device.id: profile_of(device) for device in devices}
    fitting, reasons = _fitting(manifests, devices, profiles)
    if reasons and wishes.force is None:
        lines = "\n  ".join(reasons)
        raise UsageError(f"it does not fit:\n  {lines}\nforce it with --force REASON if you know better")
    who, repository = actor(), Repository(context.home)
    published = repository.published()
    if not reasons:  # what fits no device, or no gate, is not signed in the others' company
        ordered = {manifest.digest for chosen in fitting.values() for manifest in chosen}
        manifests = [manifest for manifest in manifests if manifest.digest in ordered]
    for manifest in manifests:
        if manifest.digest not in published:
            validate(context.home, manifest)
    _check_window(wishes, who, context.settings.order_validity_s)
    for manifest in manifests:
        repository.publish(manifest)
        registry.record_artifact(manifest, who, forced=wishes.force if reasons else None)
    if reasons:
        registry.audit(who, "deployment.force", manifests[0].id, {"reason": wishes.force, "incompatibilities": reasons})

    def draft(device: str, sequence: int, deployment: str) -> Desired:
        identity, chosen = (device, sequence, deployment), fitting.get(device, manifests)
        return _desired(identity, chosen, profiles[device], wishes, who, context.settings.order_validity_s)

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


def _fitting(
    manifests: Sequence[Manifest], devices: Sequence[DeviceRow], profiles: dict[str, DeviceProfile]
) -> tuple[dict[str, list[Manifest]], list[str]]:
    """What fits each device; and for the devices that nothing fits, why."""
    fitting: dict[str, list[Manifest]] = {}
    reasons: list[str] = []
    for device in devices:
        profile = profiles[device.id]
        wrong = {
            manifest.id: incompatibilities(manifest, profile, facts_of(device))
            + gate_incompatibilities(manifest, profile)
            for manifest in manifests
        }
        fitting[device.id] = [manifest for manifest in manifests if not wrong[manifest.id]]
        if not fitting[device.id]:
            del fitting[device.id]
            reasons += [f"{device.id}: {artifact}: {why}" for artifact, whys in wrong.items() for why in whys]
    return fitting, reasons


def _desired(
    identity: tuple[str, int, str],
    manifests: Sequence[Manifest],
    profile: DeviceProfile,
    wishes: DeployOptions,
    who: Actor,
    validity_s: float,
) -> Desired:
    device, sequence, deployment = identity
    return Desired(
        device=device,
        sequence=sequence,
        deployment=deployment,
        issued_at=who.at,
        expires_at=who.at + timedelta(seconds=validity_s),
        artifacts=tuple(ArtifactRef(id=manifest.id, digest=manifest.digest) for manifest in manifests),
        limits=HealthLimits.model_validate(profile.health.model_dump()),
        transfer=TransferLimits(window_bytes=profile.delivery.window_bytes),
        probation_s=profile.probation_s if wishes.probation_s is None else wishes.probation_s,
        window=Window(not_before=wishes.not_before, not_after=wishes.not_after),
        deadline_s=_deadline_s(wishes, who),
    )


def _check_window(wishes: DeployOptions, who: Actor, validity_s: float) -> None:
    opens, closes = wishes.not_before, wishes.not_after
    if opens is not None and opens >= who.at + timedelta(seconds=validity_s):
        raise UsageError(f"the window opens at {opens.isoformat()}, when the order has expired")
    if closes is not None and closes <= max(who.at, opens or who.at):
        raise UsageError(f"the window closes at {closes.isoformat()}, before it opens or before now")


def _deadline_s(wishes: DeployOptions, who: Actor) -> float:
    """Waiting for the window is no delay of the device's: the usual deadline counts from its opening."""
    if wishes.deadline_s is not None:
        return wishes.deadline_s
    usual = float(Desired.model_fields["deadline_s"].default)
    return usual + max(0.0, ((wishes.not_before or who.at) - who.at).total_seconds())


@contextlib.contextmanager
def _table(console: Console) -> Iterator[Live]:
    try:
        with Live(console=console, auto_refresh=False) as live:
            yield live
    finally:
        if not console.is_terminal:  # there Live ends its last line itself
            console.line()


def _wait(
    registry: Registry, orders: Sequence[DeploymentRow], timeout_s: float | None, console: Console
) -> list[DeploymentRow]:
    began, hinted = time.monotonic(), False
    with _table(console) as live:
        while True:
            rows = [registry.deployment(row.id) for row in orders]
            live.update(view([(registry.device(row.device), row) for row in rows], console.width), refresh=True)
            waited = time.monotonic() - began
            if not any(TABLE[Stage(row.stage)].outstanding for row in rows) or (timeout_s and waited > timeout_s):
                return rows
            if not hinted and waited > UNPUBLISHED_HINT_S and any(row.stage == Stage.QUEUED for row in rows):
                hinted = True
                live.console.print("no controller has published it yet: is `phifleet serve` running on this home?")
            time.sleep(WAIT_POLL_S)


def _raise_unless_committed(orders: Sequence[DeploymentRow], waiting: Container[str]) -> None:
    def line(row: DeploymentRow) -> str:
        why = f"{row.failure_code}: {row.failure_message}" if row.failure_code else HELD if row.id in waiting else ""
        return f"{row.device}: {row.stage}" + (f" ({why})" if why else "")

    failed = [row for row in orders if row.stage != Stage.COMMITTED]
    if failed:
        lines = "; ".join(map(line, failed))
        raise DeploymentError(f"{len(failed)} of {len(orders)} not committed: {lines}")
