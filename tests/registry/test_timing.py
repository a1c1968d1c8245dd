"""Moments of clocks, in every time zone there is, also where clocks change."""

from collections.abc import Callable
from datetime import UTC, datetime, time, timedelta
from zoneinfo import ZoneInfo, available_timezones

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.errors import ScheduleRefused
from registry.timing import Quiet, Timing

moments = st.datetimes(datetime(2025, 1, 1), datetime(2028, 1, 1), timezones=st.just(UTC))
zones = st.sampled_from(sorted(available_timezones() - {"localtime"}))
times = st.times().map(lambda found: f"{found:%H:%M}")


@given(moments, times, zones)
def test_a_time_of_day_comes_once_on_every_day_of_its_zone(moment: datetime, at: str, zone: str) -> None:
    """No day is left out and none has it twice, whatever the clocks do."""
    timing = Timing.cron(f"{int(at[3:])} {int(at[:2])} * * *", zone)

    days = []
    for _ in range(3):
        following = timing.after(moment)
        assert following > moment
        moment = following
        days.append(following.astimezone(ZoneInfo(zone)).date())

    assert days == [days[0] + timedelta(days=one) for one in range(3)]


@given(moments, times, times, zones)
def test_quiet_hours_end_at_their_end_and_soon(moment: datetime, begin: str, end: str, zone: str) -> None:
    """Whoever waits for it is let go within a day and the hours that clocks move by; outside nobody waits."""
    if begin == end:
        return
    quiet = Quiet.parse(f"{begin}-{end}")
    wall = f"{moment.astimezone(ZoneInfo(zone)):%H:%M}"
    inside = begin <= wall < end if begin < end else wall >= begin or wall < end

    until = quiet.until(moment, zone)

    assert (until is not None) == inside
    if until:
        assert moment < until <= moment + timedelta(hours=26)
        # At its end it is over; unless the clocks skipped that time of day, and then it is as much later.
        assert quiet.until(until, zone) is None or until.astimezone(ZoneInfo(zone)).time() != time.fromisoformat(end)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "22:00",
        "22:00-22:00",
        "24:00-06:00",
        "9:00-10:00",
        "22:00-06:30 ",
        "٠٩:٠٠-10:00",
    ],
)
def test_a_window_that_is_none_is_refused(text: str) -> None:
    """With an example of one that is."""
    with pytest.raises(ScheduleRefused, match="22:00-06:30"):
        Quiet.parse(text)


@pytest.mark.parametrize("make", [Timing.on_data, lambda zone: Timing.every("1h", zone)])
def test_every_timing_checks_its_time_zone(make: Callable[[str], Timing]) -> None:
    """It is that of its quiet hours."""
    with pytest.raises(ScheduleRefused, match="IANA"):
        make("Mars/Olympus")
