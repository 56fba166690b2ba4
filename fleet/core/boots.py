"""Which of a device's messages is the newer one, and whether two agents speak under one name.

Every message of an agent since 0.2 names the run it is of (``Boot``): an id drawn at its start, a number that grows
with every start, and a counter. Messages may come late, twice, in another order, and by another controller, so what
is recorded is kept unless the message is newer:

* of the run that is known: newer if its counter is above the one that the same topic had. The will has no counter:
  the broker publishes it when the connection is lost, so it holds for the run that is known and for no other.
* of a run with a higher number: newer; that run is the known one from now on.
* of another run: older. If such a run goes on speaking for a while, there are two cases. Where the known run speaks as
  well, two agents have one identity (a copied disk, say): the device is *cloned*, and the higher number is believed.
  Where it has fallen silent, the numbers of the device began anew (its state folder and its clock were lost): the run
  that speaks is believed.

Agents before 0.2 name no run. Of them, a report whose time is before the recorded one's is older.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Self

from agent.contract.messages import Boot

#: Live messages of another run, and the seconds that they must span, before it is more than a few late ones.
RIVAL_MESSAGES = 5
RIVAL_SPAN_S = 20.0
#: A run that has not spoken for this long is counted from the beginning.
RIVAL_FORGOTTEN_S = 900.0


class Note(StrEnum):
    """What a message has revealed, beside its content."""

    CLONED = "two agents speak as this device"
    RENUMBERED = "the device numbers its starts anew"


@dataclass(frozen=True, slots=True)
class Rival:
    """A run that is not the known one and speaks. Times are seconds of the controller's clock."""

    id: str
    number: int
    messages: int
    first_at: float
    last_at: float


@dataclass(frozen=True, slots=True)
class Runs:
    """What is remembered of a device. ``counters``: the newest of each topic, of the known run."""

    id: str | None = None
    number: int = 0
    counters: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    heard_at: float = 0.0
    rival: Rival | None = None
    #: When it was last seen that two agents speak.
    cloned_at: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As it is stored."""
        rival = None
        if self.rival is not None:
            rival = {name: getattr(self.rival, name) for name in Rival.__dataclass_fields__}
        return {
            "id": self.id,
            "number": self.number,
            "counters": dict(self.counters),
            "heard_at": self.heard_at,
            "rival": rival,
            "cloned_at": self.cloned_at,
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any] | None) -> Self:
        """Back from what is stored; nothing is known where nothing is."""
        if not stored:
            return cls()
        rival = Rival(**stored["rival"]) if stored.get("rival") else None
        return cls(**{**stored, "rival": rival})


@dataclass(frozen=True, slots=True)
class Judged:
    """Whether the message is to be recorded, what to remember now, and what else it has revealed."""

    newer: bool
    runs: Runs
    note: Note | None = None


def judge(runs: Runs, boot: Boot | None, topic: str, *, live: bool, at: float) -> Judged:
    """Return whether a message is newer than what is recorded.

    ``topic`` is the last level of its topic, ``live`` False for what the broker had retained, ``at`` the controller's
    time in seconds.
    """
    if boot is None:
        return Judged(live or runs.id is None, runs)
    if runs.id is None or (boot.id != runs.id and boot.number > runs.number):
        return Judged(True, _known(runs, boot, topic, live=live, at=at))
    if boot.id == runs.id:
        return _same_run(runs, boot, topic, live=live, at=at)
    return _other_run(runs, boot, topic, at=at) if live and boot.counter is not None else Judged(False, runs)


def _known(runs: Runs, boot: Boot, topic: str, *, live: bool, at: float) -> Runs:
    """The run of ``boot`` is the known one now; what was known before may yet turn out to be another agent."""
    counters = {} if boot.counter is None else {topic: boot.counter}
    rival = runs.rival if runs.rival is not None and runs.rival.id != boot.id else None
    return Runs(boot.id, boot.number, counters, at if live else 0.0, rival, runs.cloned_at)


def _same_run(runs: Runs, boot: Boot, topic: str, *, live: bool, at: float) -> Judged:
    if boot.counter is None:
        return Judged(True, runs)
    if boot.counter <= runs.counters.get(topic, -1):
        return Judged(False, runs)
    counters = {**runs.counters, topic: boot.counter}
    heard_at = max(at, runs.heard_at) if live else runs.heard_at
    # Not by `replace`: this is the way of nearly every message, and that takes as long as reading one.
    return Judged(True, Runs(runs.id, runs.number, counters, heard_at, runs.rival, runs.cloned_at))


def _other_run(runs: Runs, boot: Boot, topic: str, *, at: float) -> Judged:
    rival = runs.rival
    if rival is None or rival.id != boot.id or at - rival.last_at > RIVAL_FORGOTTEN_S:
        rival = Rival(boot.id, boot.number, 0, at, at)
    rival = replace(rival, messages=rival.messages + 1, last_at=max(at, rival.last_at))
    if rival.messages < RIVAL_MESSAGES or rival.last_at - rival.first_at < RIVAL_SPAN_S:
        return Judged(False, replace(runs, rival=rival))
    if runs.heard_at > rival.first_at:
        note = None if runs.cloned_at is not None and at - runs.cloned_at < RIVAL_FORGOTTEN_S else Note.CLONED
        return Judged(False, replace(runs, rival=rival, cloned_at=at), note)
    fresh = replace(runs, rival=None, cloned_at=None)
    return Judged(True, _known(fresh, boot, topic, live=True, at=at), Note.RENUMBERED)
