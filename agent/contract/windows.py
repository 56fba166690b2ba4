"""Weekly times at which something may happen, such as ``mon-fri 22:00-05:00 Europe/Paris``. Pure: no clock.

Profiles and rollouts have them, and orders, which is why this is the contract's.

Days are those on which a window opens; one that closes at or before its opening time closes on the next day. Times are
of the zone's wall clock, so a window keeps its hours when summer time begins or ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from typing import Annotated, Self
from zoneinfo import ZoneInfo

from pydantic import AfterValidator, Field, StringConstraints

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_TEXT = re.compile(r"(?P<days>[a-z,-]+)\s+(?P<begins>\d\d:\d\d)-(?P<ends>\d\d:\d\d)(?:\s+(?P<zone>[A-Za-z0-9_+/-]+))?")
FORM = "write DAYS HH:MM-HH:MM ZONE, such as mon-fri 22:00-05:00 Europe/Paris, or daily 02:00-04:00 UTC"


WindowText = Annotated[
    str,
    StringConstraints(max_length=128),
    AfterValidator(lambda text: str(WeeklyWindow.parse(text))),
    Field(description="such as `daily 22:00-05:00 Europe/Paris`"),
]
"""A weekly window as it is written, in its plainest form."""

TransferWindows = Annotated[
    tuple[WindowText, ...], Field(max_length=16, description="when chunks may be fetched; none: at any time")
]


@dataclass(frozen=True, slots=True)
class WeeklyWindow:
    """``days`` from 0, Monday; ``zone`` is of the IANA database."""

    days: frozenset[int]
    begins: time
    ends: time
    zone: str = "UTC"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read one.

        Raises:
            ValueError: it is none; says what is wrong, and the form.
        """
        found = _TEXT.fullmatch(text.strip())
        if found is None:
            raise ValueError(f"{text!r} is no window: {FORM}")
        zone = found["zone"] or "UTC"
        try:
            ZoneInfo(zone)
            begins, ends = (time.fromisoformat(found[name]) for name in ("begins", "ends"))
        except (ValueError, OSError, LookupError):  # a zone that is not there is a KeyError
            raise ValueError(f"{text!r} is no window: no such time or time zone; {FORM}") from None
        return cls(_days(found["days"], text), begins, ends, zone)

    def __str__(self) -> str:
        days = "daily" if len(self.days) == len(DAYS) else ",".join(DAYS[day] for day in sorted(self.days))
        return f"{days} {self.begins:%H:%M}-{self.ends:%H:%M} {self.zone}"

    def is_open(self, at: datetime) -> bool:
        """Whether ``at``, which has a zone, is within it."""
        return any(opens <= at < closes for opens, closes in self._around(at))

    def next_opening(self, at: datetime) -> datetime:
        """Return when it opens next, or ``at`` if it is open, in UTC."""
        if self.is_open(at):
            return at.astimezone(UTC)
        return min(opens for opens, _ in self._around(at) if opens > at)

    def closes(self, at: datetime) -> datetime:
        """Return when it closes, in UTC; it is open at ``at``."""
        return max(closes for opens, closes in self._around(at) if opens <= at < closes)

    def _around(self, at: datetime) -> Iterator[tuple[datetime, datetime]]:
        """Yield the openings from the day before on for nine days, and their ends, in UTC."""
        zone = ZoneInfo(self.zone)
        today = at.astimezone(zone).date()
        for offset in range(-1, 9):
            day = today + timedelta(days=offset)
            if day.weekday() in self.days:
                end = day if self.ends > self.begins else day + timedelta(days=1)
                yield tuple(  # type: ignore[misc] # of two
                    datetime.combine(date, hour, zone).astimezone(UTC)
                    for date, hour in ((day, self.begins), (end, self.ends))
                )


def parsed(texts: Iterable[str]) -> list[WeeklyWindow]:
    """Read several; raises as ``WeeklyWindow.parse`` does."""
    return [WeeklyWindow.parse(text) for text in texts]


def open_from(windows: Sequence[WeeklyWindow], at: datetime) -> datetime:
    """Return when one of them opens next, in UTC, or ``at`` if one is open, or there is none at all."""
    return min((window.next_opening(at) for window in windows), default=at)


def open_until(windows: Sequence[WeeklyWindow], at: datetime) -> datetime | None:
    """Return when the last of those that are open at ``at``, or follow without a gap, closes; UTC.

    None: there is no window at all, or they leave no gap within a week.
    """
    until, horizon = at, at + timedelta(days=len(DAYS))
    while windows and until < horizon:
        later = max((window.closes(until) for window in windows if window.is_open(until)), default=until)
        if later <= until:
            return until.astimezone(UTC)
        until = later
    return None


def _days(text: str, whole: str) -> frozenset[int]:
    if text == "daily":
        return frozenset(range(len(DAYS)))
    days: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first not in DAYS or (last or first) not in DAYS:
            raise ValueError(f"{whole!r} is no window: {part!r} is no day; {FORM}")
        begin, end = DAYS.index(first), DAYS.index(last or first)
        days |= {day % len(DAYS) for day in range(begin, (end if end >= begin else end + len(DAYS)) + 1)}
    return frozenset(days)
