"""What runs, who waits, who failed and what came out: the questions of whoever looks after the whole factory.

Of one tenant, or of all where none is named; then nothing is written, and no data, version or alias is seen.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice

from sqlalchemy import ColumnElement, case, func, select, true
from sqlalchemy.orm import Session

from registry.living import living
from registry.models import Adapter, AdapterVersion, Event, Facts, Job, Run, Tenant, User
from registry.names import TenantId
from registry.tenancy import Across, across

# Of an overview's events: numbers of jobs and versions (migration 0007 says the same to PostgreSQL).
COUNTED = ("job claimed", "job released", "job put off", "job failed", "version published")
LATE = timedelta(minutes=6)  # a transaction lasts no longer, so none appears below one that was read that long ago
_CHUNK = 1000  # events fetched at once


@dataclass(frozen=True)
class Waiting:
    """Jobs of one tenant that can share cohorts, and that no worker has."""

    tenant: str
    group: str
    jobs: int
    put_off: int  # of these: left alone for a while, since a worker was not fit for them
    oldest: datetime


@dataclass(frozen=True)
class Holding:
    """What one worker holds of one tenant."""

    worker: str
    tenant: str
    jobs: int
    lease_until: datetime  # the soonest of them


@dataclass(frozen=True)
class Failure:
    """A job that was given up."""

    tenant: str
    user: str
    adapter: str
    why: str
    at: datetime


@dataclass(frozen=True)
class Cost:
    """What one user's versions took; None where none of them was measured."""

    user: str
    versions: int
    tokens: int | None
    device_seconds: float | None


@dataclass(frozen=True)
class Happened:
    """One counted event."""

    tenant: str
    kind: str
    body: Facts


def waiting(session: Session, now: datetime, tenant: TenantId | None = None) -> list[Waiting]:
    """Who waits, by tenant and group, the longest waiting first; jobs whose worker died wait too."""
    dead = (Job.state == "running") & (Job.lease_until < now)
    put_off = func.sum(case(((Job.state == "queued") & (Job.lease_until >= now), 1), else_=0))
    oldest = func.min(Job.created_at)
    asked = (
        select(Tenant.name, Job.cohort_group, func.count(), put_off, oldest)
        .join(Tenant, Tenant.id == Job.tenant_id)
        .where(_of(tenant), (Job.state == "queued") | dead)
        .group_by(Tenant.name, Job.cohort_group)
        .order_by(oldest)
    )
    with _scope(session, tenant):
        return [Waiting(*row) for row in session.execute(asked).tuples()]


def holdings(session: Session, now: datetime, tenant: TenantId | None = None) -> list[Holding]:
    """Who holds how many jobs of whom, under leases that last."""
    asked = (
        select(func.coalesce(Job.worker, ""), Tenant.name, func.count(), func.min(Job.lease_until))
        .join(Tenant, Tenant.id == Job.tenant_id)
        .where(_of(tenant), Job.state == "running", Job.lease_until >= now)
        .group_by(Job.worker, Tenant.name)
        .order_by(Job.worker, Tenant.name)
    )
    with _scope(session, tenant):
        rows = session.execute(asked).tuples().all()
    return [Holding(worker, name, jobs, until or now) for worker, name, jobs, until in rows]


def failures(session: Session, since: datetime, tenant: TenantId | None = None, limit: int = 5000) -> list[Failure]:
    """Whose jobs were given up and have not been asked for again, the latest first."""
    asked = (
        select(Tenant.name, User.name, Adapter.name, func.coalesce(Job.error, ""), Job.finished_at)
        .join(Adapter, Adapter.id == Job.adapter_id)
        .join(User, User.id == Adapter.user_id)
        .join(Tenant, Tenant.id == Job.tenant_id)
        .where(_of(tenant), Job.state == "failed", Job.finished_at >= since)
        .order_by(Job.finished_at.desc())
        .limit(limit)
    )
    with _scope(session, tenant):
        rows = session.execute(asked).tuples().all()
    return [Failure(name, user, adapter, why, at or since) for name, user, adapter, why, at in rows]


def ended(session: Session, since: datetime, tenant: TenantId | None = None) -> dict[str, int]:
    """How many jobs came to each end."""
    asked = (
        select(Job.state, func.count())
        .where(_of(tenant), Job.state.in_(("published", "refused", "failed", "cancelled")), Job.finished_at >= since)
        .group_by(Job.state)
    )
    with _scope(session, tenant):
        return dict(session.execute(asked).tuples().all())


def device_seconds(session: Session, since: datetime) -> float:
    """How long devices were held by the cohorts that ended; of all tenants together."""
    ran = select(Run.facts).where(Run.finished_at >= since)
    return float(sum(facts.get("device_seconds", 0) for facts in session.scalars(ran)))


def costs(session: Session, tenant: TenantId, since: datetime | None = None) -> list[Cost]:
    """What a tenant's versions took, by user, the dearest first."""
    made = (AdapterVersion.tenant_id == tenant, AdapterVersion.created_at >= since if since else true())
    seconds = func.sum(AdapterVersion.device_seconds)
    rows = session.execute(
        select(User.name, func.count(), func.sum(AdapterVersion.tokens), seconds)
        .join(Adapter, Adapter.id == AdapterVersion.adapter_id)
        .join(User, User.id == Adapter.user_id)
        .where(*made, living())
        .group_by(User.name)
        .order_by(func.coalesce(seconds, 0).desc(), User.name)
    )
    return [Cost(user, versions, tokens and int(tokens), spent) for user, versions, tokens, spent in rows.tuples()]


class Tail:
    """The counted events of all tenants as they appear, each once: also one whose transaction ended after a later's."""

    def __init__(self) -> None:
        self._floor: int | None = None  # all events up to this id have been read, or were there before
        self._seen: dict[int, datetime] = {}  # those above it that have been read, and when; they may be about long ago

    def read(self, session: Session, now: datetime) -> list[Happened]:
        """What has happened since the last look; at the first look nothing."""
        with across(session, Across.OVERVIEW):
            if self._floor is None:
                self._floor = session.scalar(select(func.max(Event.id)).where(Event.kind.in_(COUNTED))) or 0
            above = select(Event.id).where(Event.id > self._floor, Event.kind.in_(COUNTED)).order_by(Event.id)
            new = [one for one in session.scalars(above) if one not in self._seen]
            found = [row for some in _chunks(new) for row in _events(session, some)]
        self._seen.update({event.id: now for event, _ in found})
        old = [one for one, at in self._seen.items() if at < now - LATE]
        self._floor = max([self._floor, *old])
        self._seen = {one: at for one, at in self._seen.items() if one > self._floor}
        return [Happened(tenant, event.kind, event.body) for event, tenant in found]


def _events(session: Session, ids: Sequence[int]) -> list[tuple[Event, str]]:
    with across(session, Across.OVERVIEW):
        asked = select(Event, Tenant.name).join(Tenant, Tenant.id == Event.tenant_id).where(Event.id.in_(ids))
        return [row.tuple() for row in session.execute(asked.order_by(Event.id))]


def _chunks(ids: Sequence[int]) -> Iterator[list[int]]:
    left = iter(ids)
    while chunk := list(islice(left, _CHUNK)):
        yield chunk


def _of(tenant: TenantId | None) -> ColumnElement[bool]:
    return Job.tenant_id == tenant if tenant is not None else true()


def _scope(session: Session, tenant: TenantId | None) -> AbstractContextManager[None]:
    return across(session, Across.OVERVIEW) if tenant is None else nullcontext()
