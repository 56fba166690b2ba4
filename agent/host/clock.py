"""The host's clocks."""

from __future__ import annotations

import time
from datetime import UTC, datetime


class SystemClock:
    """Implements ``ports.Clock``; a lower bound lifts the wall clock of a device that woke up in 1970."""

    def __init__(self) -> None:
        self._floor = datetime.fromtimestamp(0, UTC)

    def now(self) -> datetime:
        """UTC, never before the newest verified time."""
        return max(datetime.now(UTC), self._floor)

    def monotonic(self) -> float:
        """Seconds."""
        return time.monotonic()

    def at_least(self, verified: datetime) -> None:
        """A signed document proves that it is at least this late."""
        self._floor = max(self._floor, verified)
