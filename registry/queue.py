"""What a person does to the queue: look who waits and why, cancel, and let what was given up wait again."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import datetime

from sqlalchemy import ColumnElement, Select, case, func, or_, select, true
from sqlalchemy.orm import Session

from registry.living import living
from registry.models import Adapter, Dataset, Job, Tenant, User
from registry.names import DatasetId, JobId, Reference, TenantId, check_words
from registry.orders import GIVEN_UP, revive
from registry.queries import Holder, note
from registry.shares import room, share
from registry.tenancy import Across, across

STATES = ("queued", "running", "failed", "cancelled", "published", "refused")
GONE = "retention has removed its data; ask for training on the newest: lora train"  # why a job is not tried again


@dataclass(frozen=True)
class Wanted:
    """Which jobs are meant: by state, by words of the reason, of which user; by pages."""

    states: Sequence[str] = ("queued", "running", "failed")
    reason: str | None = None
    user: str | None = None
    adapter: str | None = None
    limit: int | None = None
    offset: int = 0

    def terms(self) -> list[ColumnElement[bool]]:
        """As conditions on jobs, users and adapters.  Raises NameRefused for words that no reason can have."""
        found: list[ColumnElement[bool]] = [Job.state.in_(self.states)]
        if self.reason is not None:
            found.append(Job.error.icontains(check_words("reason", self.reason), autoescape=True))
        if self.user is not None:
            found.append(User.name == self.user)
        if self.adapter is not None:
            found.append(Adapter.name == self.adapter)
        return found


def listed(session: Session, tenant: TenantId | None, wanted: Wanted) -> list[tuple[Reference, Job]]:
    """Jobs of one tenant or (for the operator) of all: running ones, then the line, then who was over last."""
    place = case((Job.state == "running", 0), (Job.state == "queued", 1), else_=2)
    asked = (
        select(Job, Tenant.name, User.name, Adapter.name)
        .join(Adapter, Adapter.id == Job.adapter_id)
        .join(User, User.id == Adapter.user_id)
        .join(Tenant, Tenant.id == Job.tenant_id)
        .where(_of(tenant), *wanted.terms())
        .order_by(place, Job.finished_at.desc(), Job.in_line_since, Job.id)
        .limit(wanted.limit)
        .offset(wanted.offset)
    )
    with across(session, Across.OVERVIEW) if tenant is None else nullcontext():
        rows = session.execute(asked).tuples().all()
    return [(Reference(name, user, adapter), job) for job, name, user, adapter in rows]


def cancel(session: Session, tenant: TenantId, holder: Holder, reason: str, now: datetime) -> list[str]:
    """End the jobs of an adapter that wait or run; returns the states they were in.

    A running one's fence grows: its worker is told when it next renews its leases, and cannot publish from now on.
    """
    mine = (Job.tenant_id == tenant, Job.adapter_id == holder.adapter.id, Job.finished_at.is_(None))
    found = session.scalars(select(Job).where(*mine).order_by(Job.id).with_for_update()).all()
    states = [job.state for job in found]
    for job in found:
        job.state, job.finished_at, job.lease_until = "cancelled", now, None
        job.fence, job.error = job.fence + 1, reason
        note(session, tenant, "job cancelled", job.id, {"reason": reason}, now)
    session.flush()
    return states


def retry(session: Session, tenant: TenantId, wanted: Wanted, now: datetime) -> list[JobId]:
    """Let jobs that failed or were cancelled wait again, with all their attempts; returns them.

    The limit of waiting jobs does not hold here: somebody decided that these are to be tried.  One whose data retention
    has removed stays as it is, and says so.
    """
    given_up = replace(wanted, states=[one for one in wanted.states if one in GIVEN_UP])
    asked = (
        select(Job)
        .join(Adapter, Adapter.id == Job.adapter_id)
        .join(User, User.id == Adapter.user_id)
        .where(Job.tenant_id == tenant, *given_up.terms(), living())
        .order_by(Job.id)
    )
    found = session.scalars(asked.with_for_update(of=Job)).all()
    there = _keep_data(session, tenant, asked.with_only_columns(Job.dataset_id).order_by(None))
    for job in found:
        if job.dataset_id in there:
            revive(session, job, now)
        else:
            job.error = GONE
    session.flush()
    return [job.id for job in found if job.dataset_id in there]


def why_waiting(session: Session, tenant: TenantId, job: Job, now: datetime) -> str:
    """Why nobody has taken a queued job yet, in words."""
    if job.lease_until and job.lease_until >= now:
        return f"left alone until {job.lease_until:%Y-%m-%d %H:%M:%S} UTC: {job.error}"
    mine = (Job.tenant_id == tenant, Job.finished_at.is_(None), Job.id != job.id)
    of_adapter = select(Job.id).where(*mine, Job.adapter_id == job.adapter_id)
    sooner = Job.in_line_since < job.in_line_since
    if session.scalar(of_adapter.where(or_(Job.state == "running", sooner)).limit(1)):
        return "another job of the adapter is before it"
    if room(session, share(session, tenant), now) <= 0:
        return "its tenant is at a limit: see `lora queue quota`"
    ahead = session.scalar(select(func.count(Job.id)).where(*mine, Job.state == "queued", sooner))
    return f"in line: {ahead} jobs of its tenant are before it"


def _keep_data(session: Session, tenant: TenantId, datasets: Select[tuple[DatasetId]]) -> set[DatasetId]:
    """Those of some datasets that are there; no collection takes them before the transaction ends."""
    there = select(Dataset.id).where(
        Dataset.tenant_id == tenant, Dataset.id.in_(datasets), Dataset.removed_at.is_(None)
    )
    return set(session.scalars(there.order_by(Dataset.id).with_for_update(read=True, key_share=True)))


def _of(tenant: TenantId | None) -> ColumnElement[bool]:
    return Job.tenant_id == tenant if tenant is not None else true()
