"""What the operator sees of the fleet, with the age of each figure; as JSON in the wire contract's field names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from fleet.core.deployments import WAITING, Stage
from fleet.core.freshness import ControllerPulse, Presence, age_s, confirmed_from, is_running, is_stale, presence
from fleet.registry import Registry
from fleet.registry.models import (
    AuditRow,
    ControllerRow,
    DeploymentRow,
    DeviceRow,
    EnrolmentTokenRow,
    HealthRollupRow,
    HealthRow,
    ReleaseRow,
    SelectorRow,
    TokenRow,
    WebhookRow,
)


@dataclass(frozen=True, slots=True)
class DeviceView:
    """A device, its newest deployment, and what of it still holds ``at`` the time of looking."""

    device: DeviceRow
    deployment: DeploymentRow | None
    presence: Presence
    at: datetime

    @property
    def paused(self) -> bool:
        """The person at the device holds new orders back."""
        return bool((self.device.reported or {}).get("paused"))

    @property
    def held(self) -> bool:
        """The newest order waits for that person."""
        return self.paused and self.deployment is not None and self.deployment.stage in (Stage.QUEUED, Stage.PUBLISHED)

    @property
    def health_age_s(self) -> float | None:
        """Seconds since the newest health report came; None without one."""
        return age_s(self.device.health_at, self.at)

    @property
    def health_stale(self) -> bool:
        """The report has missed three of its intervals: its figures are of the past."""
        return is_stale(self.device.health_at, self.device.health_interval_s, self.at)


@dataclass(frozen=True, slots=True)
class ControllerView:
    """A controller, and whether it runs."""

    row: ControllerRow
    running: bool
    age_s: float


@dataclass(frozen=True, slots=True)
class FleetView:
    """Everything at one moment; ``controllers``: those that run, or else the one that was heard of last."""

    at: datetime
    devices: Sequence[DeviceView]
    controllers: Sequence[ControllerView]

    @property
    def running(self) -> bool:
        """A controller runs, so what is shown is of now."""
        return any(controller.running for controller in self.controllers)


def fleet_view(registry: Registry, at: datetime, names: Sequence[str] = ()) -> FleetView:
    """Return the devices that are named, or all, by id.

    Raises:
        UsageError: one is not there.
    """
    rows = registry.controllers.all()
    devices = registry.devices.some(names) if names else registry.devices.all()
    newest = registry.deployments.newest([row.id for row in devices] if names else None)
    confirmed = confirmed_from(map(_pulse, rows), at)
    views = [
        DeviceView(row, newest.get(row.id), presence(row.online, row.presence_received_at, confirmed), at)
        for row in devices
    ]
    controllers = [ControllerView(row, is_running(_pulse(row), at), age_s(row.seen_at, at) or 0.0) for row in rows]
    return FleetView(at, views, [one for one in controllers if one.running] or controllers[:1])


def describe_fleet(view: FleetView) -> dict[str, Any]:
    """Return what `phifleet status --json` prints."""
    return {
        "at": view.at.isoformat(),
        "controller_running": view.running,
        "controllers": [describe_controller(controller) for controller in view.controllers],
        "devices": [describe_device(device) | {"health": device.device.health} for device in view.devices],
    }


def describe_controller(view: ControllerView) -> dict[str, Any]:
    """Return a controller."""
    row = view.row
    return {
        "controller": row.id,
        "host": row.host,
        "pid": row.pid,
        "version": row.version,
        "running": view.running,
        "started_at": row.started_at.isoformat(),
        "seen_at": row.seen_at.isoformat(),
        "seen_age_s": view.age_s,
        "stopped_at": _iso(row.stopped_at),
        "broker": row.broker,
        "broker_connected": view.running and row.connected_since is not None,
        "broker_connected_since": _iso(row.connected_since),
        "broker_error": row.broker_error,
    }


def describe_device(view: DeviceView) -> dict[str, Any]:
    """Return a device, with its newest deployment; ages are seconds, None where nothing ever came."""
    row, deployment = view.device, view.deployment
    return {
        "device": row.id,
        "profile": row.profile,
        "added_at": row.added_at.isoformat(),
        "revoked_at": _iso(row.revoked_at),
        "online": view.presence is Presence.ONLINE,
        "presence": view.presence.value,
        "presence_at": _iso(row.presence_at),
        "last_seen": _iso(row.last_seen),
        "last_seen_age_s": age_s(row.last_seen, view.at),
        "reported_age_s": age_s(deployment.reported_at, view.at) if deployment else None,
        "health_age_s": view.health_age_s,
        "health_stale": view.health_stale,
        "agent_version": row.agent_version,
        "paused": view.paused,
        "malformed_messages": row.malformed,
        "labels": row.labels or {},
        "cloned_at": _iso(row.cloned_at),
        "deployment": describe_deployment(deployment) if deployment else None,
    }


def describe_deployment(row: DeploymentRow) -> dict[str, Any]:
    """Return one deployment."""
    reason = {"code": row.failure_code, "message": row.failure_message} if row.failure_code else None
    waits = Stage(row.stage) in WAITING
    return {
        "deployment": row.id,
        "device": row.device,
        "sequence": row.sequence,
        "artifact": row.artifact,
        "ordered_digest": row.digest,
        "state": row.stage,
        "digest": row.served_digest,
        "runtime": row.runtime,
        "endpoint": row.endpoint,
        "progress": row.progress,
        "proof": row.proof,
        "failure": None if waits else reason,
        "waiting": reason if waits else None,
        "deadline_s": row.deadline_s,
        "due_at": _iso(row.due_at),
        "publish_error": row.publish_error,
        "created_at": row.created_at.isoformat(),
        "published_at": _iso(row.published_at),
        "reported_at": _iso(row.reported_at),
        "finished_at": _iso(row.finished_at),
    }


def age_text(seconds: float | None) -> str:
    """Return text such as ``4 s``, ``12 min``, ``3 h``, ``9 d``."""
    if seconds is None:
        return "-"
    for limit, unit, name in ((120, 1, "s"), (120 * 60, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86400:.0f} d"


def confirmed(registry: Registry, at: datetime) -> datetime | None:
    """Return the moment from which a presence that was received says how things are at ``at``.

    Raises:
        RegistryError: the database cannot be used.
    """
    return confirmed_from(map(_pulse, registry.controllers.all()), at)


def _pulse(row: ControllerRow) -> ControllerPulse:
    return ControllerPulse(row.seen_at, row.interval_s, row.connected_since, row.stopped_at is not None)


def _iso(at: datetime | None) -> str | None:
    return at.isoformat() if at else None


def summarize(registry: Registry, at: datetime) -> dict[str, Any]:
    """Return the controllers, and how many devices there are in which state."""
    rows = registry.controllers.all()
    by_presence, by_state = registry.inventory.summary(confirmed_from(map(_pulse, rows), at))
    views = [ControllerView(row, is_running(_pulse(row), at), age_s(row.seen_at, at) or 0.0) for row in rows]
    return {
        "at": at.isoformat(),
        "controller_running": any(view.running for view in views),
        "controllers": [describe_controller(view) for view in [one for one in views if one.running] or views[:1]],
        "devices": sum(by_presence.values()),
        "by_presence": by_presence,
        "by_state": by_state,
    }


def describe_audit(row: AuditRow) -> dict[str, Any]:
    """Return an entry of the audit."""
    return {
        "id": row.id,
        "at": row.at.isoformat(),
        "who": row.who,
        "action": row.action,
        "subject": row.subject,
        "details": row.details,
        "hash": row.hash,
    }


def describe_token(row: TokenRow) -> dict[str, Any]:
    """Return a token, without what it is."""
    return {
        "id": row.id,
        "name": row.name,
        "role": row.role,
        "scope": row.scope,
        "created_at": row.created_at.isoformat(),
        "created_by": row.created_by,
        "expires_at": _iso(row.expires_at),
        "revoked_at": _iso(row.revoked_at),
        "used_at": _iso(row.used_at),
    }


def describe_enrolment_token(row: EnrolmentTokenRow) -> dict[str, Any]:
    """Return an enrolment token, without what it is."""
    return {
        "id": row.id,
        "profile": row.profile,
        "labels": row.labels,
        "uses": row.uses,
        "used": row.used,
        "approval": row.approval,
        "created_at": row.created_at.isoformat(),
        "created_by": row.created_by,
        "expires_at": row.expires_at.isoformat(),
        "revoked_at": _iso(row.revoked_at),
    }


def describe_webhook(row: WebhookRow) -> dict[str, Any]:
    """Return a webhook, without its secret."""
    return {
        "id": row.id,
        "url": row.url,
        "events": row.events,
        "created_at": row.created_at.isoformat(),
        "created_by": row.created_by,
        "cursor": row.cursor,
        "failures": row.failures,
        "due_at": _iso(row.due_at),
        "delivered_at": _iso(row.delivered_at),
        "error": row.error,
    }


def describe_release(row: ReleaseRow) -> dict[str, Any]:
    """Return a release."""
    return {
        "release": row.name,
        "digests": row.digests,
        "created_at": row.created_at.isoformat(),
        "created_by": row.created_by,
    }


def describe_selector(row: SelectorRow) -> dict[str, Any]:
    """Return a saved selector."""
    return {
        "name": row.name,
        "selector": row.selector,
        "created_at": row.created_at.isoformat(),
        "created_by": row.created_by,
    }


def describe_health(row: HealthRow | HealthRollupRow) -> dict[str, Any]:
    """Return a health report, or five minutes of them."""
    figures = {name: getattr(row, name) for name in _FIGURES}
    return {"at": datetime.fromtimestamp(row.at / 1000, UTC).isoformat(), **figures}


_FIGURES = (
    "digest", "requests", "errors", "ttft_ms_p50", "ttft_ms_p95", "tpot_ms_p50", "tpot_ms_p95", "tokens_per_s",
    "memory_bytes", "restarts", "temperature_c",
)  # fmt: skip
