"""The whole fleet at a glance: how inference runs on each device, in columns, and what needs attention."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Row

from fleet.core.deployments import WAITING, Stage
from fleet.core.freshness import Presence, age_s
from fleet.core.rollouts import STATES, State
from fleet.operations.views import confirmed
from fleet.registry import Registry
from fleet.registry.inventory import Standing
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


def overview(registry: Registry, at: datetime, names: Sequence[str] | None = None, ending: Sequence[str] = ()) -> str:
    """Return the devices that are named, or all, in columns, as JSON (``fleet.api.shapes.Overview``).

    Without rollouts and controllers if devices are named. ``ending`` are lines about what ends soon
    (``operations.ends``).

    Raises:
        RegistryError: the database cannot be used.
    """
    since = confirmed(registry, at)
    columns = registry.inventory.columns(at, since, names)
    for column in ("profile", "artifact", "state"):
        values = json.loads(columns[column])
        known = {value: place for place, value in enumerate(sorted(set(values)))}
        columns[f"{column}s"], columns[column] = json.dumps(list(known)), json.dumps([known[value] for value in values])
    found = [] if names is not None else list(_of_rollouts(registry.rollouts.page(None, 100), at))
    found[:0] = [{"kind": "ends", "text": text} for text in ending]
    wrong = [(one.device, kind) for one in registry.inventory.noteworthy(at, since, names) for kind in _wrong(one)]
    listed = wrong[: max(0, LISTED - len(found))]
    details = registry.inventory.details(list(dict.fromkeys(device for device, _ in listed)))
    entries = [_entry(details[device], kind, at) for device, kind in listed if device in details]
    columns |= {
        "at": json.dumps(at.isoformat()),
        "attention": json.dumps([*found[:LISTED], *entries], allow_nan=False),
        "attention_count": json.dumps(len(found) + len(wrong)),
    }
    return "{" + ", ".join(f"{json.dumps(name)}: {text}" for name, text in columns.items()) + "}"


def _of_rollouts(rows: Iterable[RolloutRow], at: datetime) -> Iterator[dict[str, Any]]:
    for row in rows:
        rollout, age = read(row), age_s(row.created_at, at) or 0.0
        if rollout.state in _WAITS and (not STATES[rollout.state].final or age < NEWS_S):
            text = f"{row.id} {_WAITS[rollout.state]}" + (f": {rollout.reason}" if rollout.reason else "")
            yield {"kind": "rollout", "text": text, "rollout": row.id, "age_s": age}


def _wrong(device: Standing) -> Iterator[str]:
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
    elif device.stale and device.reported and device.presence == Presence.ONLINE:
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
