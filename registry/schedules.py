"""Each user's schedule: set, listed, paused, removed, and fired once by whichever tick comes first."""

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, Select, case, select, update
from sqlalchemy.orm import Session

from registry.errors import NotFound, ScheduleRefused
from registry.models import Adapter, Facts, Schedule, Tenant, User
from registry.names import AdapterId, Reference, TenantId, UserId, check_user
from registry.queries import Holder, find_or_add, note
from registry.tenancy import Across, across, enter
from registry.timing import Quiet, Timing

_LIMITS = {"priority": (-99, 99), "min_examples": (1, 10**9), "min_bytes": (1, 1 << 40), "max_versions": (1, 1000)}


@dataclass(frozen=True)
class Terms:
    """What a schedule asks for besides its timing."""

    quiet: Quiet | None = None
    priority: int = 0  # of its jobs: a step is worth an hour of waiting
    min_examples: int | None = None  # new ones since the last training; with `min_bytes` too, either is enough
    min_bytes: int | None = None  # of new examples
    max_versions: int | None = None  # in any 24 hours
    paused: bool = False

    def check(self) -> "Terms":
        """Itself.  Raises ScheduleRefused for a number that is out of bounds."""
        for name, (least, most) in _LIMITS.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ScheduleRefused(f"{name}={value}", "is out of bounds", f"give {least} to {most}")
        return self


@dataclass(frozen=True)
class Filter:
    """Which schedules are listed: by users' names (`a*` for a beginning), state and moment; by pages."""

    user: str | None = None
    paused: bool | None = None
    held: bool = False
    due_before: datetime | None = None
    limit: int | None = None
    offset: int = 0

    def terms(self) -> list[ColumnElement[bool]]:
        """As conditions.  Raises NameRefused for what no user's name begins with."""
        found: list[ColumnElement[bool]] = []
        if self.user is not None:
            beginning = self.user.removesuffix("*")
            if beginning:
                check_user(beginning)
            begins = User.name.startswith(beginning, autoescape=True)
            found.append(begins if self.user.endswith("*") else User.name == self.user)
        if self.paused is not None:
            found.append(Schedule.paused.is_(self.paused))
        if self.held:
            found.append(Schedule.held.is_not(None))
        if self.due_before is not None:
            found.append(Schedule.next_due_at <= self.due_before)
        return found


@dataclass(frozen=True)
class Due:
    """A schedule that fired: whose adapter is to be trained, on which base, with which recipe, on what conditions."""

    reference: Reference
    base: str
    recipe: Facts
    tenant_id: TenantId
    adapter_id: AdapterId
    terms: Terms
    next_due_at: datetime | None  # after this time
    held: str | None = None  # why it makes no job now


def put(
    session: Session,
    tenant: TenantId,
    holder: Holder,
    timing: Timing,
    base: str,
    recipe: Facts,
    now: datetime,
    terms: Terms = Terms(),
) -> Schedule:
    """Give an adapter its schedule, in place of the one it had.  One that waits for data is looked at once, soon."""
    terms.check()
    wanted: Facts = {
        "timing": timing.text, "time_zone": timing.time_zone, "base": base, "recipe": recipe,
        "quiet": terms.quiet.text if terms.quiet else None, "priority": terms.priority,
        "max_versions": terms.max_versions, "paused": terms.paused, "min_examples": terms.min_examples,
        "min_bytes": terms.min_bytes, "held": None, "next_due_at": timing.next_due(now) or now,
    }  # fmt: skip
    new = Schedule(adapter_id=holder.adapter.id, tenant_id=tenant, **wanted)
    found = find_or_add(session, _of(tenant, holder), lambda: new)
    for name, value in wanted.items():
        setattr(found, name, value)
    note(session, tenant, "schedule set", holder.adapter.id, {"timing": timing.text}, now)
    session.flush()
    return found


def schedules(
    session: Session, tenant: TenantId | None = None, wanted: Filter = Filter()
) -> list[tuple[Reference, Schedule]]:
    """The schedules of one tenant or (for the operator) of all, by tenant, user and adapter."""
    asked = _with_owner().order_by(Tenant.name, User.name, Adapter.name).limit(wanted.limit).offset(wanted.offset)
    if tenant is not None:
        rows = session.execute(asked.where(Schedule.tenant_id == tenant, *wanted.terms())).all()
    else:
        with across(session, Across.OVERVIEW):
            rows = session.execute(asked.where(*wanted.terms())).all()
    return [(Reference(tenant_, user, adapter), schedule) for schedule, tenant_, user, adapter in rows]


def pause(session: Session, tenant: TenantId, holder: Holder, paused: bool, now: datetime) -> Schedule:
    """Stop a schedule from firing, or let it fire again from its next moment on.  Raises NotFound."""
    found = _one(session, tenant, holder)
    found.paused = paused
    if not paused:
        found.next_due_at = Timing(found.timing, found.time_zone).next_due(now) or now
    note(session, tenant, "schedule paused" if paused else "schedule resumed", holder.adapter.id, {}, now)
    return found


def remove(session: Session, tenant: TenantId, holder: Holder, now: datetime) -> None:
    """Take an adapter's schedule away.  Raises NotFound."""
    session.delete(_one(session, tenant, holder))
    note(session, tenant, "schedule removed", holder.adapter.id, {}, now)


def wake(session: Session, tenant: TenantId, user: UserId, now: datetime) -> None:
    """New data came for a user: the schedules that wait for it are due, and the next tick looks how much it is.

    Also one that is not asleep: a tick that fired it may have looked too early, and puts it to sleep when it commits.
    It is waited for, so whoever adds data calls this before taking locks that a tick needs.
    """
    adapters = select(Adapter.id).where(Adapter.tenant_id == tenant, Adapter.user_id == user)
    waiting = (Schedule.tenant_id == tenant, Schedule.timing == "data", Schedule.adapter_id.in_(adapters))
    in_turn = select(Schedule.adapter_id).where(*waiting).order_by(Schedule.adapter_id).with_for_update()
    sooner = case((Schedule.next_due_at <= now, Schedule.next_due_at), else_=now)
    session.execute(
        update(Schedule).where(*waiting, Schedule.adapter_id.in_(in_turn)).values(next_due_at=sooner),
        execution_options={"synchronize_session": False},
    )


def due_bases(session: Session, now: datetime) -> list[str]:
    """The bases that the schedules due now name."""
    with across(session, Across.TICK):
        due = select(Schedule.base).where(Schedule.next_due_at <= now, Schedule.paused.is_(False)).distinct()
        return sorted(session.scalars(due))


def due_on_growth(session: Session, now: datetime, limit: int) -> list[tuple[TenantId, AdapterId]]:
    """Whose schedules are due now if there is enough new data: of those that `fire` would take."""
    with across(session, Across.TICK):
        due = select(Schedule).where(Schedule.next_due_at <= now, Schedule.paused.is_(False))
        found = session.scalars(due.order_by(Schedule.next_due_at, Schedule.adapter_id).limit(limit)).all()
    return [(one.tenant_id, one.adapter_id) for one in found if one.min_examples or one.min_bytes]


def fire(session: Session, now: datetime, limit: int = 1000) -> list[Due]:
    """Take schedules that are due and set their next moment, in one transaction with what the caller does.

    One that was missed while everything was down fires once, not once for each moment missed.  One that is due in its
    quiet hours is `held` until they end.  In order of tenant, so that ticks at once never wait in a ring.
    """
    due = (Schedule.next_due_at <= now, Schedule.paused.is_(False))
    fired = []
    with across(session, Across.TICK):
        asked = _with_owner().where(*due).order_by(Schedule.next_due_at, Schedule.adapter_id).limit(limit)
        rows = session.execute(asked.with_for_update(of=Schedule, skip_locked=True))
        for schedule, tenant, user, adapter in rows.tuples():
            one = _fired(schedule, Reference(tenant, user, adapter), now)
            schedule.next_due_at, schedule.held = one.next_due_at, one.held
            if not one.held:
                schedule.last_fired_at = now
                note(session, schedule.tenant_id, "schedule fired", schedule.adapter_id, {}, now)
            fired.append(one)
        session.flush()
    return sorted(fired, key=lambda one: (one.tenant_id, one.adapter_id))


def hold(session: Session, due: Due, why: str, until: datetime | None) -> Due:
    """A schedule that fired makes no job: it is due again at that moment, and says why."""
    enter(session, due.tenant_id)
    mine = (Schedule.tenant_id == due.tenant_id, Schedule.adapter_id == due.adapter_id)
    session.execute(update(Schedule).where(*mine).values(next_due_at=until, held=why))
    return replace(due, next_due_at=until, held=why)


def _fired(schedule: Schedule, reference: Reference, now: datetime) -> Due:
    """What comes of a schedule that is due."""
    timing = Timing(schedule.timing, schedule.time_zone)
    quiet = Quiet(schedule.quiet) if schedule.quiet else None
    terms = Terms(quiet, schedule.priority, schedule.min_examples, schedule.min_bytes, schedule.max_versions)
    due = Due(
        reference, schedule.base, schedule.recipe, schedule.tenant_id, schedule.adapter_id, terms, timing.next_due(now)
    )
    until = quiet.until(now, schedule.time_zone) if quiet else None
    if until is None:
        return due
    return replace(due, next_due_at=until, held=f"quiet hours until {until.astimezone(UTC):%Y-%m-%d %H:%M} UTC")


def _with_owner() -> Any:  # a select of four entities: SQLAlchemy's type for it helps nobody
    return (
        select(Schedule, Tenant.name, User.name, Adapter.name)
        .join(Adapter, Adapter.id == Schedule.adapter_id)
        .join(User, User.id == Adapter.user_id)
        .join(Tenant, Tenant.id == Schedule.tenant_id)
    )


def _of(tenant: TenantId, holder: Holder) -> Select[tuple[Schedule]]:
    """An adapter's schedule, locked: of two who change it at once the later comes after the other, whole."""
    mine = (Schedule.tenant_id == tenant, Schedule.adapter_id == holder.adapter.id)
    return select(Schedule).where(*mine).with_for_update().execution_options(populate_existing=True)


def _one(session: Session, tenant: TenantId, holder: Holder) -> Schedule:
    found = session.scalar(_of(tenant, holder))
    if found is None:
        raise NotFound("schedule of", f"{holder.user.name}/{holder.adapter.name}", "set one: lora schedule set")
    return found
