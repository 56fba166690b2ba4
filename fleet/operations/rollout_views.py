"""Rollouts, plans and their devices as people and programs read them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from fleet.core.rollouts import STATES
from fleet.operations.rollouts import Plan
from fleet.registry.models import RolloutDeviceRow, RolloutRow
from fleet.registry.rollouts import read


def describe_rollout(row: RolloutRow, at: datetime) -> dict[str, Any]:
    """Return what `phifleet rollout status --json` prints, without the devices."""
    one = read(row)
    opens = None if STATES[one.state].final else one.spec.opens_at(at)
    return {
        "rollout": one.id,
        "state": one.state.value,
        "final": STATES[one.state].final,
        "wave": one.wave + 1,
        "waves": [str(wave) for wave in one.spec.waves],
        "selector": one.spec.selector,
        "artifacts": list(one.spec.artifacts),
        "counts": one.counts.model_dump(),
        "left_behind": one.left_behind,
        "reason": one.reason,
        "priority": one.spec.priority,
        "created_at": row.created_at.isoformat(),
        "created_by": row.created_by,
        "due_at": one.due_at.isoformat() if one.due_at else None,
        "windows": list(one.spec.windows),
        "opens_at": opens.isoformat() if opens else None,
        "findings": row.findings,
        "at": at.isoformat(),
    }


def describe_plan(found: Plan) -> dict[str, Any]:
    """Return what `phifleet rollout plan --json` prints."""
    return {
        "devices": found.devices,
        "waves": [
            {
                "wave": str(wave.wave),
                "cohorts": dict(wave.cohorts),
                "detectable": dict(wave.detectable),
                "size_bytes": wave.size_bytes,
                "transfer_s": round(wave.transfer_s, 1),
            }
            for wave in found.waves
        ],
        "unfit": dict(found.unfit),
        "taken": list(found.taken),
    }


def describe_rollout_devices(rows: Sequence[RolloutDeviceRow]) -> list[dict[str, Any]]:
    """Return the devices, in their order."""
    return [
        {
            "device": row.device,
            "wave": row.wave + 1,
            "stage": row.stage,
            "cohort": row.cohort,
            "digest": row.digest,
            "previous": row.previous,
            "deployment": row.deployment,
            "reason": row.reason,
        }
        for row in rows
    ]
