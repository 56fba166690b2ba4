"""How fast bytes may flow: a token bucket, for what a device asks for and what a controller sends. No IO, no clock."""

from __future__ import annotations

#: Seconds of the rate that may come at once: over any 10 seconds that is 4% more than the rate.
BURST_S = 0.4


class Bandwidth:
    """At most ``bytes_per_s``, measured over seconds; None for no limit. Times are monotonic seconds.

    A piece may be taken whenever anything is left, and is owed: so pieces of any size pass, at the right rate.
    """

    def __init__(self, bytes_per_s: float | None, now: float) -> None:
        self._rate = bytes_per_s
        self._left = 0.0
        self._at = now

    def wait_s(self, now: float) -> float:
        """Return the seconds until something may be taken; 0.0: now."""
        if self._rate is None:
            return 0.0
        self._left = min(self._left + self._rate * max(0.0, now - self._at), self._rate * BURST_S)
        self._at = now
        # Never less than a clock can tell apart, or who waits so long would find that it waits still.
        return 0.0 if self._left >= 0 else max(0.001, -self._left / self._rate)

    def take(self, size: int) -> None:
        """So many bytes flow."""
        self._left -= size if self._rate is not None else 0
