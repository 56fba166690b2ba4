"""A clock that a test sets: implements ports.Clock."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

#: The moment at which simulated worlds begin.
START = datetime(2026, 1, 15, 12, 0, 0, tzinfo=UTC)


class FakeClock:
    """Wall clock and monotonic seconds. `advance` moves both; `set` moves the wall clock alone, as a person would."""

    def __init__(self, now: datetime = START) -> None:
        self._now = now
        self._monotonic = 1000.0

    def now(self) -> datetime:
        return self._now

    def monotonic(self) -> float:
        return self._monotonic

    def advance(self, seconds: float = 0.0, **kwargs: float) -> None:
        """`advance(5)`, `advance(days=3)`: as the arguments of a timedelta."""
        step = timedelta(seconds=seconds, **kwargs)
        self._now += step
        self._monotonic += step.total_seconds()

    def set(self, now: datetime) -> None:
        self._now = now
