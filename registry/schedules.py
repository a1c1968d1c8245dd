"""When each user's adapter is due: set, listed, paused, removed, and fired once by whichever tick comes first."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from croniter import CroniterError, croniter
from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from registry.errors import NotFound, ScheduleRefused
from registry.models import Adapter, Facts, Schedule, Tenant, User
from registry.names import Reference, TenantId
from registry.queries import Holder, note
from registry.tenancy import Across, across

SHORTEST, LONGEST = timedelta(seconds=60), timedelta(days=3650)  # one tick; far within what dates can hold
_MOST_CRON = 120  # characters
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_INTERVAL = re.compile(r"([0-9]{1,9})([smhd])")
# What cron itself knows; croniter takes more, such as R for a moment by chance, another each time it is asked.
_MONTHS, _DAYS = "jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec", "mon|tue|wed|thu|fri|sat|sun"
_FIELD = re.compile(rf"(?:[0-9*/,L#-]|{_MONTHS}|{_DAYS})+", re.IGNORECASE)


@dataclass(frozen=True)
class Timing:
    """Either a cron expression read in a time zone, or an interval."""

    text: str  # "cron 0 3 * * *" or "every 6h"
    time_zone: str = "UTC"

    @classmethod
    def cron(cls, expression: str, time_zone: str = "UTC") -> "Timing":
        """Five cron fields in an IANA time zone.  Raises ScheduleRefused."""
        fields = expression.split()
        known = len(fields) == 5 and len(expression) <= _MOST_CRON and all(map(_FIELD.fullmatch, fields))
        if not known or not croniter.is_valid(expression):
            why = f"is not a cron expression of at most {_MOST_CRON} characters"
            raise ScheduleRefused(expression[:80], why, "give five fields, for example '0 3 * * *'")
        try:
            ZoneInfo(time_zone)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise ScheduleRefused(
                time_zone[:80], "is no time zone", "give an IANA name such as Europe/Berlin"
            ) from None
        timing = cls(f"cron {' '.join(fields)}", time_zone)
        timing.after(datetime.now(UTC))  # one that never comes, such as 30 February, is refused now
        return timing

    @classmethod
    def every(cls, interval: str) -> "Timing":
        """An interval such as 90m, 6h or 1d.  Raises ScheduleRefused."""
        match = _INTERVAL.fullmatch(interval)
        if not match or not SHORTEST <= timedelta(seconds=_seconds(interval)) <= LONGEST:
            why = "is not an interval of 60s to 3650d"
            raise ScheduleRefused(interval[:80], why, "give one such as 90m, 6h or 1d")
        return cls(f"every {interval}")

    def after(self, moment: datetime) -> datetime:
        """The next due moment after `moment`, in UTC.

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
class Due:
    """A schedule that fired: whose adapter is to be trained, on which base, with which recipe."""

    reference: Reference
    base: str
    recipe: Facts


def put(
    session: Session, tenant: TenantId, holder: Holder, timing: Timing, base: str, recipe: Facts, now: datetime
) -> Schedule:
    """Give an adapter its schedule, in place of the one it had."""
    found = session.scalar(_of(tenant, holder))
    if found is None:
        found = Schedule(adapter_id=holder.adapter.id, tenant_id=tenant)
        session.add(found)
    found.timing, found.time_zone, found.paused = timing.text, timing.time_zone, False
    found.base, found.recipe, found.next_due_at = base, recipe, timing.after(now)
    note(session, tenant, "schedule set", holder.adapter.id, {"timing": timing.text}, now)
    session.flush()
    return found


def schedules(session: Session, tenant: TenantId | None = None) -> list[tuple[Reference, Schedule]]:
    """Every schedule, of one tenant or (for the operator) of all, by tenant, user and adapter."""
    asked = _with_owner().order_by(Tenant.name, User.name, Adapter.name)
    if tenant is not None:
        rows = session.execute(asked.where(Schedule.tenant_id == tenant)).all()
    else:
        with across(session, Across.OVERVIEW):
            rows = session.execute(asked).all()
    return [(Reference(tenant_, user, adapter), schedule) for schedule, tenant_, user, adapter in rows]


def pause(session: Session, tenant: TenantId, holder: Holder, paused: bool, now: datetime) -> Schedule:
    """Stop a schedule from firing, or let it fire again from its next moment on.  Raises NotFound."""
    found = _one(session, tenant, holder)
    found.paused = paused
    if not paused:
        found.next_due_at = Timing(found.timing, found.time_zone).after(now)
    note(session, tenant, "schedule paused" if paused else "schedule resumed", holder.adapter.id, {}, now)
    return found


def remove(session: Session, tenant: TenantId, holder: Holder, now: datetime) -> None:
    """Take an adapter's schedule away.  Raises NotFound."""
    session.delete(_one(session, tenant, holder))
    note(session, tenant, "schedule removed", holder.adapter.id, {}, now)


def due_bases(session: Session, now: datetime) -> list[str]:
    """The bases that the schedules due now name."""
    with across(session, Across.TICK):
        due = select(Schedule.base).where(Schedule.next_due_at <= now, Schedule.paused.is_(False)).distinct()
        return sorted(session.scalars(due))


def fire(session: Session, now: datetime, limit: int = 1000) -> list[Due]:
    """Take the schedules that are due and set their next moment, in one transaction with what the caller does.

    One that was missed while everything was down fires once, not once for each moment missed.
    """
    due = (Schedule.next_due_at <= now, Schedule.paused.is_(False))
    fired = []
    with across(session, Across.TICK):
        asked = _with_owner().where(*due).order_by(Schedule.next_due_at).limit(limit)
        rows = session.execute(asked.with_for_update(of=Schedule, skip_locked=True))
        for schedule, tenant, user, adapter in rows.tuples():
            schedule.last_fired_at = now
            schedule.next_due_at = Timing(schedule.timing, schedule.time_zone).after(now)
            note(session, schedule.tenant_id, "schedule fired", schedule.adapter_id, {}, now)
            fired.append(Due(Reference(tenant, user, adapter), schedule.base, schedule.recipe))
        session.flush()
    return fired


def _with_owner() -> Any:  # a select of four entities: SQLAlchemy's type for it helps nobody
    return (
        select(Schedule, Tenant.name, User.name, Adapter.name)
        .join(Adapter, Adapter.id == Schedule.adapter_id)
        .join(User, User.id == Adapter.user_id)
        .join(Tenant, Tenant.id == Schedule.tenant_id)
    )


def _of(tenant: TenantId, holder: Holder) -> Select[tuple[Schedule]]:
    return select(Schedule).where(Schedule.tenant_id == tenant, Schedule.adapter_id == holder.adapter.id)


def _one(session: Session, tenant: TenantId, holder: Holder) -> Schedule:
    found = session.scalar(_of(tenant, holder))
    if found is None:
        raise NotFound("schedule of", f"{holder.user.name}/{holder.adapter.name}", "set one: lora schedule set")
    return found


def _seconds(interval: str) -> int:
    match = _INTERVAL.fullmatch(interval)
    assert match  # checked when it was set
    return int(match[1]) * _UNITS[match[2]]
