"""The whole fleet at a glance: how inference runs on each device, in columns, and what needs attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Row

from fleet.core.deployments import WAITING, Stage
from fleet.core.freshness import Presence, age_s, is_stale
from fleet.core.rollouts import STATES, State
from fleet.operations.views import confirmed
from fleet.registry import Registry
from fleet.registry.inventory import FIGURES, Figures
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
_UNSAID = "no reason was reported"
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
    devices = registry.inventory.figures(confirmed(registry, at), names)
    stale = [is_stale(one.health_at, one.health_interval_s, at) for one in devices]
    columns: dict[str, Any] = {"at": at.isoformat(), "devices": [one.device for one in devices]}
    for column, values in (
        ("profile", [one.profile for one in devices]),
        ("artifact", [one.serves for one in devices]),
        ("state", [one.stage for one in devices]),
    ):
        known = {value: place for place, value in enumerate(sorted(set(values)))}
        columns[f"{column}s"], columns[column] = list(known), [known[value] for value in values]
    columns["presence"] = [one.presence for one in devices]
    for name in FIGURES:  # a hundredth of a millisecond is less than what a reading says, and half of the bytes
        columns[name] = [
            value if value is None else round(value, 2) for value in (getattr(one, name) for one in devices)
        ]
    columns["health_age_s"] = [age and round(age, 1) for age in (age_s(one.health_at, at) for one in devices)]
    columns["stale"] = stale
    found = [] if names is not None else list(_of_rollouts(registry.rollouts.page(None, 100), at))
    found[:0] = [{"kind": "ends", "text": text} for text in ending]
    wrong = [(one.device, kind) for one, old in zip(devices, stale, strict=True) for kind in _wrong(one, old)]
    listed = wrong[: max(0, LISTED - len(found))]
    details = registry.inventory.details(list(dict.fromkeys(device for device, _ in listed)))
    entries = [_entry(details[device], kind, at) for device, kind in listed if device in details]
    return columns | {"attention": [*found[:LISTED], *entries], "attention_count": len(found) + len(wrong)}


def _of_rollouts(rows: Iterable[RolloutRow], at: datetime) -> Iterator[dict[str, Any]]:
    for row in rows:
        rollout, age = read(row), age_s(row.created_at, at) or 0.0
        if rollout.state in _WAITS and (not STATES[rollout.state].final or age < NEWS_S):
            text = f"{row.id} {_WAITS[rollout.state]}" + (f": {rollout.reason}" if rollout.reason else "")
            yield {"kind": "rollout", "text": text, "rollout": row.id, "age_s": age}


def _wrong(device: Figures, stale: bool) -> Iterator[str]:
    """What a person should know of a device, by kind."""
    if device.cloned:
        yield "cloned"
    if device.stage in _ENDED_BADLY:
        yield "failed"
    if device.stage in WAITING:
        yield "waiting"
    if device.unpublished:
        yield "unpublished"
    if device.presence == Presence.OFFLINE and device.known:
        yield "offline"
    elif stale and device.health_at is not None and device.presence == Presence.ONLINE:
        yield "silent"
    if device.paused and device.stage in (Stage.QUEUED, Stage.PUBLISHED):
        yield "held"


def _entry(row: Row[Any], kind: str, at: datetime) -> dict[str, Any]:
    text, since = _TEXTS[kind](row)
    return {"kind": kind, "text": f"{row.id} {text}", "device": row.id, "age_s": age_s(since, at)}


#: By kind: what is said of a device, and since when it is so.
_TEXTS: dict[str, Callable[[Row[Any]], tuple[str, datetime | None]]] = {
    "cloned": lambda row: ("speaks from two machines: its identity was copied", row.cloned_at),
    "failed": lambda row: (
        f"{_ENDED_BADLY.get(row.stage, 'failed')} with {row.artifact}: {row.failure_message or _UNSAID}",
        row.finished_at or row.reported_at,
    ),
    "waiting": lambda row: (f"{_WAITS_FOR.get(row.stage, 'waits')}: {row.failure_message}", row.reported_at),
    "unpublished": lambda row: (f"has an order that was not published: {row.publish_error}", None),
    "offline": lambda row: ("is offline", row.last_seen or row.presence_at),
    "silent": lambda row: ("is online and has stopped to report its health", row.health_at),
    "held": lambda row: ("holds its order back: the person at the device has paused it", None),
}
