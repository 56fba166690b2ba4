"""`phifleet deploy`: order devices to run an artifact."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import click
from rich.console import Console
from rich.live import Live

from fleet.api.client import Client
from fleet.cli import completion
from fleet.cli.context import Context, actor
from fleet.cli.status import HELD, table
from fleet.core.deployments import TABLE, Stage
from fleet.core.rollout_spec import DEFAULT_ALIASES
from fleet.errors import DeploymentError
from fleet.operations.deploy import DeployOptions, follow, select_devices
from fleet.operations.deploy import deploy as deploy_artifacts
from fleet.operations.fleet import Fleet
from fleet.operations.names import variants
from fleet.operations.views import DeviceView, age_text, describe_deployment, fleet_view
from fleet.registry.models import DeploymentRow


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
alias_option = click.option(
    "--alias",
    "aliases",
    metavar="NAME",
    multiple=True,
    default=DEFAULT_ALIASES,
    show_default=True,
    help="What applications may call the model by; more than once.",
)
REMOTE_POLL_S = 1.0
#: A running controller publishes within half a second.
UNPUBLISHED_HINT_S = 5.0


@click.command()
@click.argument("artifacts", metavar="ARTIFACT...", nargs=-1, required=True, shell_complete=completion.artifacts)
@click.option(
    "--device", "devices", multiple=True, shell_complete=completion.devices, help="A device's id; may be repeated."
)
@click.option("--profile", shell_complete=completion.profiles, help="All devices of this profile.")
@click.option("--probation", "probation_s", type=click.FloatRange(0), help="Seconds of health before commit.")
@click.option("--deadline", "deadline_s", type=click.FloatRange(1), help="Seconds for the whole deployment.")
@alias_option
@click.option("--not-before", type=MOMENT, help="When devices may change their model, from; fetching begins at once.")
@click.option("--not-after", type=MOMENT, help="When devices may change their model, until.")
@click.option(
    "--transfer-now", is_flag=True, help="Fetch at once, whatever the profile says of windows and of metered networks."
)
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
    **options: Any,
) -> None:
    """Order devices to run ARTIFACT: its id, its digest, or the beginning of either.

    Several are variants of one model: a device proves those that it can run, and serves the fastest. What is not
    published yet is published first. A running `phifleet serve` passes the orders on.
    """
    if context.settings.server is not None:
        with context.client() as client:
            _deploy_remote(client, artifacts, devices, profile, _Following(wait, timeout_s, as_json), options)
        return
    with Fleet(context.settings) as fleet:
        targets = select_devices(fleet.registry, devices, profile)
        deployments = deploy_artifacts(fleet, variants(fleet, artifacts), targets, DeployOptions(**options), actor())
        if not as_json:
            for row in deployments:
                click.echo(_ordered(row.device, row.artifact, row.id, row.deadline_s))
        views = _views(fleet, deployments)
        if wait:
            views = _wait(fleet, [row.id for row in deployments], timeout_s, Console(stderr=True, quiet=as_json))
    if as_json:
        click.echo(json.dumps([describe_deployment(view.deployment) for view in views if view.deployment]))
    if wait:
        _raise_unless_committed(views)


def _ordered(device: str, artifact: str, deployment: str, deadline_s: float) -> str:
    return f"{device}: ordered {artifact} as {deployment}, within {age_text(deadline_s)} at most"


@contextlib.contextmanager
def _live(console: Console) -> Iterator[Live]:
    try:
        with Live(console=console, auto_refresh=False) as live:
            yield live
    finally:
        if not console.is_terminal:  # there Live ends its last line itself
            console.line()


def _views(fleet: Fleet, deployments: Sequence[DeploymentRow]) -> list[DeviceView]:
    """Return the devices as they are now, each beside the deployment that is followed."""
    view = fleet_view(fleet.registry, datetime.now(UTC), [row.device for row in deployments])
    return [replace(device, deployment=row) for device, row in zip(view.devices, deployments, strict=True)]


def _wait(fleet: Fleet, deployments: Sequence[str], timeout_s: float | None, console: Console) -> list[DeviceView]:
    began, hinted = time.monotonic(), False
    views: list[DeviceView] = []
    with _live(console) as live:
        for rows in follow(fleet.registry, deployments, timeout_s):
            views = _views(fleet, rows)
            live.update(table(views, console.width), refresh=True)
            late = time.monotonic() - began > UNPUBLISHED_HINT_S
            if late and not hinted and any(row.stage == Stage.QUEUED for row in rows):
                hinted = True
                live.console.print("no controller has published it yet: is `phifleet serve` running on this home?")
    return views


def _raise_unless_committed(views: Sequence[DeviceView]) -> None:
    failed = [_line(view) for view in views if view.deployment and view.deployment.stage != Stage.COMMITTED]
    if failed:
        raise DeploymentError(f"{len(failed)} of {len(views)} not committed: {'; '.join(failed)}")


def _line(view: DeviceView) -> str:
    row = view.deployment
    assert row is not None  # noqa: S101 - of a deployment that was waited for
    why = f"{row.failure_code}: {row.failure_message}" if row.failure_code else HELD if view.held else ""
    return f"{row.device}: {row.stage}" + (f" ({why})" if why else "")


@dataclass(frozen=True, slots=True)
class _Following:
    """How the order is followed."""

    wait: bool
    timeout_s: float | None
    as_json: bool


def _deploy_remote(
    client: Client,
    artifacts: Sequence[str],
    devices: Sequence[str],
    profile: str | None,
    following: _Following,
    options: dict[str, Any],
) -> None:
    given = {name: value.isoformat() if isinstance(value, datetime) else value for name, value in options.items()}
    order = {"artifacts": list(artifacts), "devices": list(devices), "profile": profile, **given}
    rows = client.call("POST", "/deployments", order)["items"]
    if not following.as_json:
        for row in rows:
            click.echo(_ordered(row["device"], row["artifact"], row["deployment"], row["deadline_s"]))
    end = time.monotonic() + (following.timeout_s or float("inf"))
    while following.wait and time.monotonic() < end and any(TABLE[Stage(row["state"])].outstanding for row in rows):
        time.sleep(REMOTE_POLL_S)
        rows = [client.call("GET", f"/deployments/{row['deployment']}") for row in rows]
    if following.as_json:
        click.echo(json.dumps(rows))
    failed = [row for row in rows if row["state"] != Stage.COMMITTED]
    if following.wait and failed:
        lines = [f"{row['device']}: {row['state']}" + _why(row["failure"]) for row in failed]
        raise DeploymentError(f"{len(failed)} of {len(rows)} not committed: {'; '.join(lines)}")


def _why(failure: dict[str, Any] | None) -> str:
    return f" ({failure['code']}: {failure['message']})" if failure else ""
