"""The whole fleet at a glance: how inference runs on each device, in columns, and what needs attention."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Row

from fleet.core.deployments import WAITING, Stage
from fleet.core.freshness import Presence, age_s, is_stale, presence
from fleet.core.rollouts import STATES, State
from fleet.operations.views import pulses
from fleet.registry import Registry
from fleet.registry.inventory import FIGURES
from fleet.registry.models import RolloutRow
from fleet.registry.rollouts import read

#: Entries that are listed; all are counted.
LISTED = 200
#: How long a rollout that ended is news.
NEWS_S = 86_400.0
_WAITS_FOR = {
    Stage.WAITING_LINK: "waits for a link or a controller",
    Stage.WAITING_SPACE: "waits for room on its disk",
}
_ENDED_BADLY = {Stage.FAILED: "failed", Stage.ROLLED_BACK: "was rolled back"}
_WAITS = {
    State.APPROVING: "waits for a person to approve its next wave",
    State.PAUSED: "is paused",
    State.STOPPING: "stopped itself",
    State.TAKING_BACK: "is taking its devices back",
    State.TAKEN_BACK: "was stopped and has taken its devices back",
    State.INCOMPLETE: "ended, and left devices behind",
}


def overview(
    registry: Registry, at: datetime, names: Sequence[str] | None = None, ending: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the devices that are named, or all, in columns; without rollouts and controllers if they are named.

    ``ending`` are lines about what ends soon (``operations.ends``).

    Raises:
        RegistryError: the database cannot be used.
    """
    alive = pulses(registry)
    devices = [
        _Device(row, presence(row.online, row.presence_received_at, alive, at), at)
        for row in registry.inventory.figures(names)
    ]
    columns: dict[str, Any] = {"at": at.isoformat(), "devices": [one.row.id for one in devices]}
    for column, values in (
        ("profile", [one.row.profile for one in devices]),
        ("artifact", [one.row.serves or "" for one in devices]),
        ("state", [one.row.stage or "none" for one in devices]),
    ):
        known = {value: place for place, value in enumerate(sorted(set(values)))}
        columns[f"{column}s"], columns[column] = list(known), [known[value] for value in values]
    columns["presence"] = [one.presence.value for one in devices]
    for name in FIGURES:
        columns[name] = [getattr(one.row, name) for one in devices]
    columns["health_age_s"] = [age_s(one.row.health_at, at) for one in devices]
    columns["stale"] = [one.stale for one in devices]
    found = [] if names is not None else list(_of_rollouts(registry.rollouts.page(None, 100), at))
    found[:0] = [{"kind": "ends", "text": text} for text in ending]
    found += [entry for one in devices for entry in _of_device(one)]
    return columns | {"attention": found[:LISTED], "attention_count": len(found)}


def _of_rollouts(rows: Iterable[RolloutRow], at: datetime) -> Iterator[dict[str, Any]]:
    for row in rows:
        rollout, age = read(row), age_s(row.created_at, at) or 0.0
        if rollout.state in _WAITS and (not STATES[rollout.state].final or age < NEWS_S):
            text = f"{row.id} {_WAITS[rollout.state]}" + (f": {rollout.reason}" if rollout.reason else "")
            yield {"kind": "rollout", "text": text, "rollout": row.id, "age_s": age}


@dataclass(frozen=True, slots=True)
class _Device:
    row: Row[Any]
    presence: Presence
    at: datetime

    @property
    def stale(self) -> bool:
        return is_stale(self.row.health_at, self.row.health_interval_s, self.at)


def _of_device(device: _Device) -> Iterator[dict[str, Any]]:
    row = device.row

    def entry(kind: str, text: str, since: datetime | None) -> dict[str, Any]:
        return {"kind": kind, "text": f"{row.id} {text}", "device": row.id, "age_s": age_s(since, device.at)}

    if row.cloned_at is not None:
        yield entry("cloned", "speaks from two machines: its identity was copied", row.cloned_at)
    if row.stage in _ENDED_BADLY:
        why = row.failure_message or "no reason was reported"
        text = f"{_ENDED_BADLY[Stage(row.stage)]} with {row.artifact}: {why}"
        yield entry("failed", text, row.finished_at or row.reported_at)
    if row.stage in WAITING:
        yield entry("waiting", f"{_WAITS_FOR[Stage(row.stage)]}: {row.failure_message}", row.reported_at)
    if row.publish_error:
        yield entry("unpublished", f"has an order that was not published: {row.publish_error}", None)
    seen = row.last_seen or row.presence_at
    if device.presence is Presence.OFFLINE and seen is not None:
        yield entry("offline", "is offline", seen)
    elif row.health_at is not None and device.stale and device.presence is Presence.ONLINE:
        yield entry("silent", "is online and has stopped to report its health", row.health_at)
    if row.paused and row.stage in (Stage.QUEUED, Stage.PUBLISHED):
        yield entry("held", "holds its order back: the person at the device has paused it", None)
