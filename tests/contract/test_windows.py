"""Weekly windows: what a person writes, and when they are open, over midnight and over summer time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.contract.windows import DAYS, WeeklyWindow, open_from, open_until
from fleet.core.rollout_spec import RolloutSpec

MONDAY = datetime(2026, 11, 23, tzinfo=UTC)


def at(day: int, hour: int, minute: int = 0) -> datetime:
    return MONDAY + timedelta(days=day, hours=hour, minutes=minute)


@pytest.mark.parametrize(
    ("text", "open_at", "closed_at"),
    [
        ("mon-fri 09:00-17:00 UTC", [at(0, 9), at(4, 16, 59)], [at(0, 8, 59), at(0, 17), at(5, 12)]),
        ("daily 02:00-04:00", [at(n, 3) for n in range(7)], [at(3, 4)]),
        ("fri 22:00-05:00 UTC", [at(4, 23), at(5, 4, 59)], [at(4, 4), at(5, 5), at(5, 22)]),
        ("sat-mon 10:00-11:00 UTC", [at(5, 10), at(6, 10), at(7, 10)], [at(4, 10), at(8, 10)]),
        ("tue,thu 10:00-11:00 UTC", [at(1, 10), at(3, 10)], [at(2, 10)]),
        ("mon 00:00-00:00 UTC", [at(0, 0), at(0, 23, 59)], [at(1, 0)]),
        ("mon 09:00-10:00 Asia/Tokyo", [at(0, 0, 30)], [at(0, 9, 30)]),
    ],
)
def test_when_it_is_open(text: str, open_at: list[datetime], closed_at: list[datetime]) -> None:
    window = WeeklyWindow.parse(text)
    assert [window.is_open(one) for one in open_at] == [True] * len(open_at)
    assert [window.is_open(one) for one in closed_at] == [False] * len(closed_at)


def test_it_keeps_its_hours_over_summer_time() -> None:
    """On 2026-10-25 Paris goes from +2 to +1."""
    window = WeeklyWindow.parse("daily 08:00-09:00 Europe/Paris")
    assert window.next_opening(datetime(2026, 10, 24, 12, tzinfo=UTC)) == datetime(2026, 10, 25, 7, tzinfo=UTC)
    assert window.is_open(datetime(2026, 10, 24, 6, 30, tzinfo=UTC))
    assert not window.is_open(datetime(2026, 10, 25, 6, 30, tzinfo=UTC))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is no window"),
        ("mon-fri", "write DAYS"),
        ("mon 9:00-17:00", "write DAYS"),
        ("mon 09:00-25:00", "no such time"),
        ("mon 09:00-10:00 Mars/Olympus", "no such time or time zone"),
        ("mon 09:00-10:00 ../etc/passwd", "is no window"),
        ("monday 09:00-10:00", "'monday' is no day"),
        ("mon- 09:00-10:00", ""),
        ("fri-xyz 09:00-10:00", "is no day"),
    ],
)
def test_what_is_none_says_why(text: str, why: str) -> None:
    if not why:
        assert WeeklyWindow.parse(text).days == {0}
        return
    with pytest.raises(ValueError, match=why):
        WeeklyWindow.parse(text)
    with pytest.raises(ValueError, match="windows"):
        RolloutSpec(selector="has profile", artifacts=("a",), windows=(text,))


windows = st.builds(
    lambda days, begin, end, zone: f"{','.join(days)} {begin:%H:%M}-{end:%H:%M} {zone}",
    st.lists(st.sampled_from(DAYS), min_size=1, max_size=7),
    st.times(),
    st.times(),
    st.sampled_from(["UTC", "Europe/Paris", "America/St_Johns", "Pacific/Auckland", "Asia/Kathmandu"]),
)
moments = st.datetimes(datetime(2020, 1, 1), datetime(2035, 1, 1)).map(lambda one: one.replace(tzinfo=UTC))


@given(windows, moments)
def test_it_opens_again_within_eight_days_and_is_open_then(text: str, moment: datetime) -> None:
    window = WeeklyWindow.parse(text)
    assert WeeklyWindow.parse(str(window)) == window
    opens = window.next_opening(moment)
    assert moment <= opens <= moment + timedelta(days=8, hours=2)
    assert window.is_open(opens)
    assert window.is_open(moment) == (opens == moment)


def test_a_rollout_with_two_windows_opens_with_the_first() -> None:
    spec = RolloutSpec(selector="has profile", artifacts=("a",), windows=("mon 10:00-11:00", "wed 10:00-11:00 UTC"))
    assert spec.windows == ("mon 10:00-11:00 UTC", "wed 10:00-11:00 UTC")
    assert spec.opens_at(at(0, 10, 30)) is None
    assert spec.opens_at(at(0, 12)) == at(2, 10)
    assert RolloutSpec(selector="has profile", artifacts=("a",)).opens_at(at(0, 12)) is None


def windows(*texts: str) -> list[WeeklyWindow]:
    return [WeeklyWindow.parse(text) for text in texts]


def test_several_windows_are_open_together_and_windows_without_a_gap_are_one() -> None:
    night = windows("daily 22:00-00:00 UTC", "daily 00:00-05:00 UTC", "mon 12:00-13:00 UTC")
    assert open_from(night, at(0, 23)) == at(0, 23)
    assert open_from(night, at(0, 6)) == at(0, 12)
    assert open_from(night, at(1, 6)) == at(1, 22)
    assert open_until(night, at(0, 23)) == at(1, 5)
    assert open_until(night, at(0, 12, 30)) == at(0, 13)


def test_no_window_and_windows_without_a_gap_leave_it_open_for_ever() -> None:
    assert open_from([], at(0, 3)) == at(0, 3)
    assert open_until([], at(0, 3)) is None
    assert open_until(windows("daily 00:00-00:00 UTC"), at(0, 3)) is None


@given(
    st.lists(
        st.builds(
            WeeklyWindow,
            st.frozensets(st.integers(0, 6), min_size=1),
            st.times().map(lambda one: one.replace(second=0, microsecond=0)),
            st.times().map(lambda one: one.replace(second=0, microsecond=0)),
            st.sampled_from(["UTC", "Europe/Paris", "America/St_Johns", "Pacific/Apia"]),
        ),
        min_size=1,
        max_size=4,
    ),
    st.datetimes(datetime(2026, 1, 1), datetime(2027, 12, 31), timezones=st.just(UTC)),
)
def test_what_opens_is_open_and_what_closes_is_closed(found: list[WeeklyWindow], when: datetime) -> None:
    opens = open_from(found, when)
    assert opens >= when and any(window.is_open(opens) for window in found)
    closes = open_until(found, opens)
    if closes is not None:
        assert closes > opens and not any(window.is_open(closes) for window in found)
        assert any(window.is_open(closes - timedelta(microseconds=1)) for window in found)
