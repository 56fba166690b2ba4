"""Devices and deployments as JSON: the field names are those of the wire contract where it has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from fleet.core.deployments import Stage
from fleet.registry import Registry
from fleet.registry.models import DeploymentRow, DeviceRow


@dataclass(frozen=True, slots=True)
class DeviceView:
    """A device and its newest deployment."""

    device: DeviceRow
    deployment: DeploymentRow | None

    @property
    def paused(self) -> bool:
        """The person at the device holds new orders back."""
        return bool((self.device.reported or {}).get("paused"))

    @property
    def held(self) -> bool:
        """The newest order waits for that person."""
        return self.paused and self.deployment is not None and self.deployment.stage in (Stage.QUEUED, Stage.PUBLISHED)


def device_views(registry: Registry, names: Sequence[str] = ()) -> list[DeviceView]:
    """The devices that are named, or all, by id.

    Raises:
        UsageError: one is not there.
    """
    devices = [registry.devices.get(name) for name in names] if names else registry.devices.all()
    newest = registry.deployments.newest()
    return [DeviceView(row, newest.get(row.id)) for row in devices]


def describe_fleet(views: Sequence[DeviceView], at: datetime) -> dict[str, Any]:
    """What `phifleet status --json` prints."""
    return {
        "at": at.isoformat(),
        "devices": [describe_device(view) | {"health": view.device.health} for view in views],
    }


def describe_device(view: DeviceView) -> dict[str, Any]:
    """A device, with its newest deployment."""
    row = view.device
    return {
        "device": row.id,
        "profile": row.profile,
        "added_at": row.added_at.isoformat(),
        "online": row.online,
        "last_seen": row.last_seen.isoformat() if row.last_seen else None,
        "agent_version": row.agent_version,
        "paused": view.paused,
        "malformed_messages": row.malformed,
        "deployment": describe_deployment(view.deployment) if view.deployment else None,
    }


def describe_deployment(row: DeploymentRow) -> dict[str, Any]:
    """One deployment."""
    failure = {"code": row.failure_code, "message": row.failure_message} if row.failure_code else None
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
        "failure": failure,
        "created_at": row.created_at.isoformat(),
        "finished_at": row.finished_at.isoformat() if row.finished_at else None,
    }
