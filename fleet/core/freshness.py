"""How old a figure may be before it no longer says how things are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

#: A figure that has missed this many of its intervals is stale.
STALE_INTERVALS = 3
#: Of health reports, as long as no two have come.
DEFAULT_INTERVAL_S = 10.0
#: Retained presences come within moments of a connection, some of them before the broker has said that it is up.
CONNECT_GRACE = timedelta(seconds=10)


class Presence(StrEnum):
    """Whether a device is connected, as far as anybody knows now."""

    ONLINE = "online"
    OFFLINE = "offline"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class ControllerPulse:
    """A controller's last sign of life. ``connected_since`` None: the broker did not answer it then."""

    seen_at: datetime
    interval_s: float
    connected_since: datetime | None
    stopped: bool = False


def age_s(at: datetime | None, now: datetime) -> float | None:
    """Return the seconds since; never negative, as clocks of two machines differ."""
    return None if at is None else max(0.0, (now - at).total_seconds())


def is_stale(at: datetime | None, interval_s: float | None, now: datetime) -> bool:
    """Return whether what came at ``at`` has missed its intervals; also where it never came."""
    age = age_s(at, now)
    return age is None or age > STALE_INTERVALS * (interval_s or DEFAULT_INTERVAL_S)


def is_running(pulse: ControllerPulse, now: datetime) -> bool:
    """Return whether the controller can be taken to run now."""
    return not pulse.stopped and not is_stale(pulse.seen_at, pulse.interval_s, now)


def confirmed_from(pulses: Iterable[ControllerPulse], now: datetime) -> datetime | None:
    """Return the moment from which a presence that was received says how things are now; None where none does.

    Presence is retained at the broker, and its will is the broker's: it holds as long as a controller is connected
    to the broker that it was received from. A record from before that connection says nothing about now.
    """
    since = [pulse.connected_since for pulse in pulses if pulse.connected_since and is_running(pulse, now)]
    return min(since) - CONNECT_GRACE if since else None


def presence(online: bool, received_at: datetime | None, confirmed: datetime | None) -> Presence:
    """Return what is known of a device's connection; ``confirmed`` is ``confirmed_from`` the controllers.

    The registry says the same to a database (``inventory.presence_column``).
    """
    if confirmed is None:
        return Presence.UNKNOWN
    if not online:
        return Presence.OFFLINE
    return Presence.ONLINE if received_at is not None and received_at >= confirmed else Presence.UNKNOWN


def next_interval_s(before: float | None, gap_s: float) -> float:
    """Return how far apart reports come, from the last gap.

    A device that was away for an hour does not report once an hour: an interval grows by doubling at most.
    """
    return gap_s if before is None or gap_s <= 2 * before else 2 * before
