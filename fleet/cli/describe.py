"""Devices and deployments as JSON, for the commands that print them."""

from __future__ import annotations

from typing import Any

from fleet.core.deployments import Stage
from fleet.registry.models import DeploymentRow, DeviceRow


def describe(row: DeviceRow, order: DeploymentRow | None) -> dict[str, Any]:
    """A device as JSON."""
    return {
        "device": row.id,
        "profile": row.profile,
        "added_at": row.added_at.isoformat(),
        "online": row.online,
        "last_seen": row.last_seen.isoformat() if row.last_seen else None,
        "agent_version": row.agent_version,
        "paused": paused(row),
        "malformed_messages": row.malformed,
        "deployment": describe_deployment(order) if order else None,
    }


def paused(row: DeviceRow) -> bool:
    """The person at the device holds new orders back."""
    return bool((row.reported or {}).get("paused"))


def held(row: DeviceRow, order: DeploymentRow | None) -> bool:
    """Whether this order waits for that person."""
    return paused(row) and order is not None and order.stage in (Stage.QUEUED, Stage.PUBLISHED)


def describe_deployment(row: DeploymentRow) -> dict[str, Any]:
    """A deployment as JSON."""
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
