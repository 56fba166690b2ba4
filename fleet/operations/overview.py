"""The whole fleet at a glance: how inference runs on each device, in columns, and what needs attention."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any

from fleet.core.deployments import Stage
from fleet.core.freshness import Presence, age_s
from fleet.core.rollouts import STATES, State
from fleet.operations.views import DeviceView, fleet_view
from fleet.registry import Registry
from fleet.registry.models import RolloutRow
from fleet.registry.rollouts import read

#: Entries that are listed; all are counted.
LISTED = 200
#: How long a rollout that ended is news.
NEWS_S = 86_400.0
_FIGURES = {"tpot_ms": "tpot_ms_p50", "ttft_ms": "ttft_ms_p50", "tokens_per_s": "tokens_per_s"}
_ENDED_BADLY = {Stage.FAILED: "failed", Stage.ROLLED_BACK: "was rolled back"}
_WAITS = {
    State.APPROVING: "waits for a person to approve its next wave",
    State.PAUSED: "is paused",
    State.STOPPING: "stopped itself",
    State.TAKING_BACK: "is taking its devices back",
    State.TAKEN_BACK: "was stopped and has taken its devices back",
    State.INCOMPLETE: "ended, and left devices behind",
}


def overview(registry: Registry, at: datetime, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the devices that are named, or all, in columns; without rollouts and controllers if they are named.

    Raises:
        RegistryError: the database cannot be used.
    """
    view = fleet_view(registry, at, names or ()) if names is None or names else None
    devices = [] if view is None else [one for one in view.devices if one.device.revoked_at is None]
    columns: dict[str, Any] = {"at": at.isoformat(), "devices": [one.device.id for one in devices]}
    for column, values in (
        ("profile", [one.device.profile for one in devices]),
        ("artifact", [str((one.device.reported or {}).get("artifact") or "") for one in devices]),
        ("state", [one.deployment.stage if one.deployment else "none" for one in devices]),
    ):
        known = {value: place for place, value in enumerate(sorted(set(values)))}
        columns[f"{column}s"], columns[column] = list(known), [known[value] for value in values]
    columns["presence"] = [one.presence.value for one in devices]
    for name, field in _FIGURES.items():
        columns[name] = [(one.device.health or {}).get(field) for one in devices]
    columns["health_age_s"] = [one.health_age_s for one in devices]
    columns["stale"] = [one.health_stale for one in devices]
    found = [] if names is not None else list(_of_rollouts(registry.rollouts.page(None, 100), at))
    found += [entry for one in devices for entry in _of_device(one)]
    return columns | {"attention": found[:LISTED], "attention_count": len(found)}


def _of_rollouts(rows: Iterable[RolloutRow], at: datetime) -> Iterator[dict[str, Any]]:
    for row in rows:
        rollout, age = read(row), age_s(row.created_at, at) or 0.0
        if rollout.state in _WAITS and (not STATES[rollout.state].final or age < NEWS_S):
            text = f"{row.id} {_WAITS[rollout.state]}" + (f": {rollout.reason}" if rollout.reason else "")
            yield {"kind": "rollout", "text": text, "rollout": row.id, "age_s": age}


def _of_device(view: DeviceView) -> Iterator[dict[str, Any]]:
    row, deployment = view.device, view.deployment

    def entry(kind: str, text: str, since: datetime | None) -> dict[str, Any]:
        return {"kind": kind, "text": f"{row.id} {text}", "device": row.id, "age_s": age_s(since, view.at)}

    if row.cloned_at is not None:
        yield entry("cloned", "speaks from two machines: its identity was copied", row.cloned_at)
    if deployment is not None and deployment.stage in _ENDED_BADLY:
        why = deployment.failure_message or "no reason was reported"
        text = f"{_ENDED_BADLY[Stage(deployment.stage)]} with {deployment.artifact}: {why}"
        yield entry("failed", text, deployment.finished_at or deployment.reported_at)
    if deployment is not None and deployment.publish_error:
        yield entry("unpublished", f"has an order that was not published: {deployment.publish_error}", None)
    if view.presence is Presence.OFFLINE and (row.last_seen or row.presence_at) is not None:
        yield entry("offline", "is offline", row.last_seen or row.presence_at)
    elif row.health_at is not None and view.health_stale and view.presence is Presence.ONLINE:
        yield entry("silent", "is online and has stopped to report its health", row.health_at)
    if view.held:
        yield entry("held", "holds its order back: the person at the device has paused it", None)
