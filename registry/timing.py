"""When something is due: cron expressions and intervals, and the hours of a day in which nothing is started."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from croniter import CroniterError, croniter

from registry.errors import ScheduleRefused

SHORTEST, LONGEST = timedelta(seconds=60), timedelta(days=3650)  # one tick; far within what dates can hold
_MOST_CRON = 120  # characters
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_INTERVAL = re.compile(r"([0-9]{1,9})([smhd])")
_WINDOW = re.compile(r"((?:[01][0-9]|2[0-3]):[0-5][0-9])-((?:[01][0-9]|2[0-3]):[0-5][0-9])")
# What cron itself knows; croniter takes more, such as R for a moment by chance, another each time it is asked.
_MONTHS, _DAYS = "jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec", "mon|tue|wed|thu|fri|sat|sun"
_FIELD = re.compile(rf"(?:[0-9*/,L#-]|{_MONTHS}|{_DAYS})+", re.IGNORECASE)


@dataclass(frozen=True)
class Timing:
    """A cron expression read in a time zone, an interval, or whenever new data comes."""

    text: str  # "cron 0 3 * * *", "every 6h" or "data"
    time_zone: str = "UTC"

    @classmethod
    def cron(cls, expression: str, time_zone: str = "UTC") -> "Timing":
        """Five cron fields in an IANA time zone.  Raises ScheduleRefused."""
        fields = expression.split()
        known = len(fields) == 5 and len(expression) <= _MOST_CRON and all(map(_FIELD.fullmatch, fields))
        if not known or not croniter.is_valid(expression):
            why = f"is not a cron expression of at most {_MOST_CRON} characters"
            raise ScheduleRefused(expression[:80], why, "give five fields, for example '0 3 * * *'")
        timing = cls(f"cron {' '.join(fields)}", check_zone(time_zone))
        timing.after(datetime.now(UTC))  # one that never comes, such as 30 February, is refused now
        return timing

    @classmethod
    def every(cls, interval: str, time_zone: str = "UTC") -> "Timing":
        """An interval such as 90m, 6h or 1d; the time zone is that of its quiet hours.  Raises ScheduleRefused."""
        match = _INTERVAL.fullmatch(interval)
        if not match or not SHORTEST <= timedelta(seconds=_seconds(interval)) <= LONGEST:
            why = "is not an interval of 60s to 3650d"
            raise ScheduleRefused(interval[:80], why, "give one such as 90m, 6h or 1d")
        return cls(f"every {interval}", check_zone(time_zone))

    @classmethod
    def on_data(cls, time_zone: str = "UTC") -> "Timing":
        """Whenever new data comes; the time zone is that of its quiet hours.  Raises ScheduleRefused."""
        return cls("data", check_zone(time_zone))

    def next_due(self, moment: datetime) -> datetime | None:
        """The next due moment after `moment`, in UTC; None where only new data makes it due."""
        return None if self.text == "data" else self.after(moment)

    def after(self, moment: datetime) -> datetime:
        """The next moment of a clock after `moment`, in UTC.

        Where clocks change, as in Vixie cron: a time of day comes once a day, the first time round, or as much later
        as the clock jumped; a job of every hour keeps its distance.
        """
        kind, _, rest = self.text.partition(" ")
        if kind == "every":
            return moment + timedelta(seconds=_seconds(rest))
        zone = ZoneInfo(self.time_zone)
        start = moment.astimezone(zone)
        walk = croniter(rest, start if rest.split()[1].startswith("*") else start.replace(tzinfo=None))
        try:
            while (following := walk.get_next(datetime).replace(tzinfo=zone)) <= moment:
                pass
        except CroniterError:
            raise ScheduleRefused(rest, "never comes", "give a date that exists") from None
        return following.astimezone(UTC)


@dataclass(frozen=True)
class Quiet:
    """A window of every day on the wall clock, in which nothing is started: `22:00-06:30`."""

    text: str

    @classmethod
    def parse(cls, text: str) -> "Quiet":
        """Read a window; it may span midnight.  Raises ScheduleRefused."""
        match = _WINDOW.fullmatch(text)
        if not match or match[1] == match[2]:
            fix = "give two times of day, for example 22:00-06:30"
            raise ScheduleRefused(text[:80], "is no window of quiet hours", fix)
        return cls(text)

    def until(self, moment: datetime, time_zone: str) -> datetime | None:
        """When the window ends that a moment is in, in UTC; None outside.

        Where clocks change it is the wall clock that counts: an end that is skipped comes as much later as the clock
        jumped, and of an end that comes twice it is the one ahead.
        """
        begin, end = (time.fromisoformat(one) for one in self.text.split("-"))
        zone = ZoneInfo(time_zone)
        local = moment.astimezone(zone)
        wall = local.time()
        inside = begin <= wall < end if begin < end else wall >= begin or wall < end
        if not inside:
            return None
        day = local.date() + timedelta(days=1 if wall >= end else 0)
        first, second = (datetime.combine(day, end, zone).replace(fold=fold).astimezone(UTC) for fold in (0, 1))
        return first if first > moment else second


def check_zone(name: str) -> str:
    """The name of a time zone, if there is one of that name.  Raises ScheduleRefused."""
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ScheduleRefused(name[:80], "is no time zone", "give an IANA name such as Europe/Berlin") from None
    return name


def _seconds(interval: str) -> int:
    match = _INTERVAL.fullmatch(interval)
    assert match  # checked when it was set
    return int(match[1]) * _UNITS[match[2]]
