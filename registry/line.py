"""The line: who is next, so that nobody starves and one tenant's many jobs never block another's few.

Every tenant has a meter, `served`: jobs handed out to it, each divided by the tenant's weight.  Whoever has been served
least is next (start-time fair queueing; Goyal, Vin and Cheng, 1996).  Inside a tenant, `in_line_since` decides.
"""

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from sqlalchemy import ColumnElement, and_, exists, func, or_, select, tuple_, update
from sqlalchemy.orm import Session, aliased

from registry.models import Job, Share
from registry.names import TenantId
from registry.shares import room


@dataclass(frozen=True)
class Turn:
    """A tenant with somebody waiting whom it may start."""

    tenant: TenantId
    weight: float
    served: float
    room: int  # jobs that its quotas let it start now
    since: datetime  # since when its next job counts as in line


def unclaimed(now: datetime) -> ColumnElement[bool]:
    """Not over, and in nobody's living hands; perhaps put off."""
    return and_(Job.finished_at.is_(None), or_(Job.state == "queued", Job.lease_until < now))


def ready(now: datetime) -> ColumnElement[bool]:
    """Waiting, and not put off."""
    return and_(Job.finished_at.is_(None), or_(Job.lease_until.is_(None), Job.lease_until < now))


def behind(now: datetime) -> ColumnElement[bool]:
    """Another job of the adapter is in work or before it in line: versions come in the order they were asked for.

    Of two claims at once, each sees the first job as it was before the other took it, and neither takes the second.
    """
    other = aliased(Job)
    alive = and_(other.state == "running", other.lease_until >= now)
    due = or_(other.lease_until.is_(None), other.lease_until < now)
    sooner = tuple_(other.in_line_since, other.id) < tuple_(Job.in_line_since, Job.id)
    rivals = (other.adapter_id == Job.adapter_id, other.id != Job.id, other.finished_at.is_(None))
    return exists().where(*rivals, or_(alive, and_(due, sooner)))


def keep_to_indexes(session: Session) -> None:
    """Have PostgreSQL read the line in its order for the rest of the transaction, instead of sorting all of it.

    The conditions of row-level security hide from the planner how many rows there are: it takes ten thousand for one.
    """
    if session.get_bind().dialect.name == "postgresql":
        session.execute(select(func.set_config("enable_sort", "off", True)))


def line(session: Session, wanted: ColumnElement[bool], seats: int, now: datetime, patient: bool = False) -> list[Turn]:
    """The tenants with a wanted job and room for it, whose turn it is first: for a claim's block alone.

    Who had nothing waiting for long comes back at most two cohorts ahead of the others, not with all that it missed.
    A tenant with limits is served by one claim at a time, or two would both use its last room: the others leave it
    out, or wait where they are `patient`.
    """
    mine = (Job.tenant_id == Share.tenant_id, wanted)
    head = select(Job.in_line_since).where(*mine).order_by(Job.in_line_since, Job.id).limit(1)
    since = head.correlate(Share).scalar_subquery().label("since")
    rows = [(one, at) for one, at in session.execute(select(Share, since)).tuples() if at is not None]
    if not rows:
        return []
    limited = [one.tenant_id for one, _ in rows if one.limited]
    mine_now = select(Share.tenant_id).where(Share.tenant_id.in_(limited)).order_by(Share.tenant_id)
    held = set(session.scalars(mine_now.with_for_update(skip_locked=not patient))) if limited else set()
    floor = max(one.served for one, _ in rows) - 2 * seats / min(one.weight for one, _ in rows)
    turns = [
        Turn(one.tenant_id, one.weight, max(one.served, floor), room(session, one, now), at)
        for one, at in rows
        if not one.limited or one.tenant_id in held
    ]
    return sorted((turn for turn in turns if turn.room > 0), key=lambda turn: (turn.served, turn.since))


def group_of_first(session: Session, tenant: TenantId, wanted: ColumnElement[bool]) -> str | None:
    """Which cohort group a tenant's next wanted job is of, if nobody took it meanwhile: for a claim's block alone."""
    mine = select(Job.cohort_group).where(Job.tenant_id == tenant, wanted)
    return session.scalars(mine.order_by(Job.in_line_since, Job.id).limit(1)).first()


def oldest(turns: Sequence[Turn]) -> datetime:
    """Since when the first of all is in line."""
    return min(turn.since for turn in turns)


def seat(session: Session, wanted: ColumnElement[bool], seats: int, turns: Sequence[Turn]) -> list[Job]:
    """Lock jobs for that many seats: what one tenant has no jobs for, the others get."""
    taken: list[Job] = []
    while turns and len(taken) < seats:
        given, left = allot(seats - len(taken), turns), []
        for turn in turns:
            count = given.get(turn.tenant, 0)
            mine = (Job.tenant_id == turn.tenant, wanted, Job.id.not_in([job.id for job in taken]))
            first = select(Job).where(*mine).order_by(Job.in_line_since, Job.id).limit(count)
            found = session.scalars(first.with_for_update(skip_locked=True)).all() if count else ()
            taken += found
            if len(found) == count:
                served, free = turn.served + count / turn.weight, turn.room - count
                left.append(replace(turn, served=served, room=free))
        if len(left) == len(turns):
            break
        turns = left
    return taken


def apart_from_others(session: Session, taken: Sequence[Job], now: datetime) -> list[Job]:
    """Those whose adapter no claim beside this one takes a job of: for a claim's block alone.

    Of two jobs of an adapter the later asked for may go first, being urgent.  A claim that does not see yet that the
    other is taken would take it: so each claim locks its adapters by name until it commits, and then looks again.
    """
    if not taken or session.get_bind().dialect.name != "postgresql":  # SQLite has one writer
        return list(taken)
    adapters = list({job.adapter_id for job in taken})
    keys = [int.from_bytes(adapter.bytes[:8], signed=True) for adapter in adapters]
    locked = session.execute(select(*(func.pg_try_advisory_xact_lock(key) for key in keys))).one()
    ours = {adapter for adapter, lock in zip(adapters, locked, strict=True) if lock}
    in_work = select(Job.adapter_id).where(Job.adapter_id.in_(ours), Job.state == "running", Job.lease_until >= now)
    ours -= set(session.scalars(in_work))
    return [job for job in taken if job.adapter_id in ours]


def allot(seats: int, turns: Sequence[Turn]) -> dict[TenantId, int]:
    """Seats to tenants, one at a time to whoever has been served least, as if each had enough jobs for its room."""
    given: dict[TenantId, int] = {}
    heap = [(turn.served, turn.since, place) for place, turn in enumerate(turns) if turn.room > 0]
    heapq.heapify(heap)
    for _ in range(seats):
        if not heap:
            break
        served, since, place = heap[0]
        turn = turns[place]
        given[turn.tenant] = given.get(turn.tenant, 0) + 1
        if given[turn.tenant] < turn.room:
            heapq.heapreplace(heap, (served + 1 / turn.weight, since, place))
        else:
            heapq.heappop(heap)
    return given


def count_served(session: Session, turns: Sequence[Turn], taken: Sequence[Job]) -> None:
    """Move the meters of those who were served: in one order, so that claims at once wait and never lock up."""
    counts = Counter(job.tenant_id for job in taken)
    for turn in sorted(turns, key=lambda turn: turn.tenant):
        if count := counts[turn.tenant]:
            # Another claim may have moved it meanwhile: what it is now, but not below where this turn began.
            from_here = func.max if session.get_bind().dialect.name == "sqlite" else func.greatest
            meter = from_here(Share.served, turn.served) + count / turn.weight
            session.execute(update(Share).where(Share.tenant_id == turn.tenant).values(served=meter))
