"""Time for a device that may have no clock: never before the newest time that was verified."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from agent.core.ports import Clock
from agent.platform.files import PRIVATE, write_atomic

#: A clock this far past the newest signature is more likely wrong than the repository is abandoned.
IMPLAUSIBLE = timedelta(days=366)


class VerifiedClock:
    """Implements ``ports.Clock`` over a clock that may be wrong.

    The lower bound is when the newest ``timestamp.json`` was signed, and moves on with the monotonic clock, so
    time passes on a device whose wall clock says 1970. It is kept on disk with the ids of the keys that vouched
    for it: when the root of trust replaces these keys, their word no longer counts, or whoever stole one could
    set every device's clock forward for good (what TUF calls recovery from a fast-forward attack).
    """

    def __init__(self, clock: Clock, path: Path, floor: datetime) -> None:
        self._clock = clock
        self._path = path
        self._floor = floor
        self._bound, self._keyids = self._load()
        self._since = clock.monotonic()

    def now(self) -> datetime:
        """UTC; the wall clock or the lower bound, whichever is later."""
        return max(self._clock.now(), self.bound())

    def monotonic(self) -> float:
        """Seconds, never going back."""
        return self._clock.monotonic()

    def bound(self) -> datetime:
        """It is at least this late."""
        return self._bound + timedelta(seconds=max(0.0, self._clock.monotonic() - self._since))

    def verified(self, signed_at: datetime, keyids: Sequence[str]) -> None:
        """A document that these keys signed proves that it is at least this late.

        Raises:
            OSError: the disk refuses.
        """
        if signed_at <= self._bound and sorted(keyids) == self._keyids:
            return
        self._bound, self._keyids = max(signed_at, self.bound()), sorted(keyids)
        self._since = self._clock.monotonic()
        self._save()

    def distrust(self, keyids: Sequence[str]) -> bool:
        """Drop the lower bound unless these keys vouch for it; True if it was dropped."""
        if not self._keyids or sorted(keyids) == self._keyids:
            return False
        self._bound, self._keyids, self._since = self._floor, [], self._clock.monotonic()
        return True

    def looks_wrong(self) -> bool:
        """The wall clock is far past the newest verified time."""
        return self._clock.now() - self.bound() > IMPLAUSIBLE

    def explain(self) -> str:
        """For the message about something that has expired: what time this device takes it to be, and why."""
        wall, bound = self._clock.now(), self.bound()
        if self.looks_wrong():
            days = (wall - bound).days
            return (
                f"the clock of this device says {wall:%Y-%m-%d}, {days} days after the newest signature it has "
                f"verified ({bound:%Y-%m-%d}): the clock is what is wrong; set it, and try again"
            )
        if wall < bound:
            known = bound.isoformat(timespec="seconds")
            return f"it is at least {known}, though the clock of this device says {wall:%Y-%m-%d}"
        return f"it is {wall.isoformat(timespec='seconds')}"

    def _load(self) -> tuple[datetime, list[str]]:
        try:
            document = json.loads(self._path.read_bytes())
            bound = datetime.fromisoformat(document["verified_at"]).astimezone(UTC)
            keyids = [str(keyid) for keyid in document["keyids"]]
        except (OSError, ValueError, KeyError, TypeError):
            return self._floor, []  # a lost bound is won again with the next refresh
        return max(bound, self._floor), keyids

    def _save(self) -> None:
        document = {"verified_at": self._bound.isoformat(), "keyids": self._keyids}
        write_atomic(self._path, json.dumps(document).encode(), PRIVATE)
