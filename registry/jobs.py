"""The queue: a job is claimed under a lease and a fence, and whoever lost the lease can change nothing any more."""

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, and_, exists, func, or_, select, update
from sqlalchemy.orm import Session, aliased

from registry.errors import LeaseLost
from registry.models import Adapter, AdapterVersion, Dataset, Facts, Job, SharedBase, Tenant, User
from registry.names import AdapterId, DatasetId, JobId, Reference, TenantId
from registry.queries import Holder, find_or_add, note
from registry.tenancy import Across, across, enter

MAX_ATTEMPTS = 3  # a job that ended in an error this often has failed
MAX_DEATHS = (
    5  # the same of one whose workers died: most of its neighbours, and most of whatever else kills, are innocent
)
SUSPECT = 2  # after so many deaths it is tried alone, so that nobody shares its blame
BUSY, OVER = ("queued", "running"), ("published", "refused")


@dataclass(frozen=True)
class Order:
    """What is to be trained: data, base, recipe, and the group of jobs it can share a cohort with."""

    dataset: Dataset
    base: SharedBase
    recipe: Facts
    recipe_digest: str
    group: str

    @property
    def fingerprint(self) -> str:
        """SHA-256 over dataset, base and recipe digests: with equal ones there is nothing new to train."""
        parts = (self.dataset.digest, self.base.digest, self.recipe_digest)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Enqueued:
    """The job of an order; `unchanged` when it is over already and nothing will be trained."""

    job_id: JobId
    state: str
    unchanged: bool
    number: int | None  # the version it gave, once it is over


@dataclass(frozen=True)
class ClaimedJob:
    """A job in one worker's hands until `lease_until`; `fence` proves it later."""

    id: JobId
    fence: int
    attempts: int
    lease_until: datetime
    tenant_id: TenantId
    adapter_id: AdapterId
    dataset_id: DatasetId
    base_id: uuid.UUID
    reference: Reference
    opaque: str  # stands for the user in keys
    dataset_key: str
    dataset_digest: str
    base_name: str
    base_revision: str
    base_quantised: str
    base_digest: str
    recipe: Facts
    recipe_digest: str
    group: str


def enqueue(session: Session, tenant: TenantId, holder: Holder, order: Order, now: datetime) -> Enqueued:
    """Ask for training.  The same data, base and recipe give the same job; one that failed is tried again."""
    mine = (Job.tenant_id == tenant, Job.adapter_id == holder.adapter.id, Job.fingerprint == order.fingerprint)
    job = find_or_add(session, select(Job).where(*mine).with_for_update(), lambda: _new_job(tenant, holder, order, now))
    if job.state == "failed":
        job.state, job.attempts, job.error, job.finished_at, job.created_at = "queued", 0, None, None, now
        note(session, tenant, "job queued again", job.id, {"fingerprint": order.fingerprint}, now)
    elif job.created_at == now:
        note(session, tenant, "job queued", job.id, {"fingerprint": order.fingerprint}, now)
    session.flush()
    made = (AdapterVersion.tenant_id == tenant, AdapterVersion.job_id == job.id)
    number = session.scalar(select(AdapterVersion.number).where(*made))
    return Enqueued(job.id, job.state, job.state in OVER, number)


def _new_job(tenant: TenantId, holder: Holder, order: Order, now: datetime) -> Job:
    return Job(
        tenant_id=tenant, adapter_id=holder.adapter.id, dataset_id=order.dataset.id, base_id=order.base.id,
        recipe=order.recipe, recipe_digest=order.recipe_digest, fingerprint=order.fingerprint,
        cohort_group=order.group, state="queued", created_at=now,
    )  # fmt: skip


def claim(
    session: Session,
    worker: str,
    lease: timedelta,
    limit: int,
    now: datetime,
    only: Sequence[JobId] | None = None,
    group: str | None = None,
) -> list[ClaimedJob]:
    """Take up to `limit` waiting jobs of one group, the oldest job's or the one that is named; one of an adapter.

    Jobs whose worker died count as waiting; an adapter that is in work elsewhere waits, and so does a job that was put
    off, unless `only` asks for it.  A job whose workers died again and again is taken alone, and not where a group is
    named: a cohort is at work there.
    Concurrent claims share nothing out twice (SKIP LOCKED on PostgreSQL, one writer at a time on SQLite).
    """
    wanted = and_(_due(now), ~_in_work(now)) if only is None else and_(_waiting(now), Job.id.in_(only))
    if group is not None:
        wanted = and_(wanted, Job.cohort_group == group, ~_suspect())
    with across(session, Across.CLAIM):
        oldest = select(Job).where(wanted).order_by(Job.created_at, Job.id).with_for_update(skip_locked=True)
        while (first := session.scalar(oldest.limit(1))) is not None:
            alike = session.scalars(oldest.where(Job.cohort_group == first.cohort_group).limit(limit)).all()
            taken = apart(first, list({job.adapter_id: job for job in reversed(alike)}.values()))
            for job in taken:
                _take(session, job, worker, now + lease, now)
            session.flush()
            if running := [job.id for job in taken if job.state == "running"]:
                return _claimed(session, running)
    return []


def apart(first: Job, alike: Sequence[Job]) -> list[Job]:
    """Those of a claim that may share a cohort: the first alone where it is suspected of killing workers."""
    suspects = {job.id for job in (first, *alike) if job.state == "running" and job.attempts >= SUSPECT}
    return [first] if first.id in suspects else [job for job in alike if job.id not in suspects]


def waiting(session: Session, now: datetime) -> dict[str, int]:
    """How many jobs a claim could take now, those of dead workers among them, by cohort group."""
    free = (_due(now), ~_in_work(now))
    with across(session, Across.CLAIM):
        counted = select(Job.cohort_group, func.count()).where(*free).group_by(Job.cohort_group)
        return dict(session.execute(counted).tuples().all())


def _waiting(now: datetime) -> ColumnElement[bool]:
    return or_(Job.state == "queued", and_(Job.state == "running", Job.lease_until < now))


def _suspect() -> ColumnElement[bool]:
    return and_(Job.state == "running", Job.attempts >= SUSPECT)


def _due(now: datetime) -> ColumnElement[bool]:
    """Waiting, and not put off."""
    return and_(_waiting(now), or_(Job.lease_until.is_(None), Job.lease_until < now))


def _in_work(now: datetime) -> ColumnElement[bool]:
    """Another job of the adapter is in a living worker's hands: its versions come in the order they were asked for."""
    other = aliased(Job)
    alive = (other.state == "running", other.lease_until >= now)
    return exists().where(other.adapter_id == Job.adapter_id, other.id != Job.id, *alive)


def renew(session: Session, jobs: Sequence[ClaimedJob], lease: timedelta, now: datetime) -> list[JobId]:
    """Extend the leases that are still held; returns their jobs.  What is missing belongs to somebody else.

    Rows are locked in the order in which `together.py` locks them: a heartbeat and a publisher of the same jobs meet.
    """
    held: list[JobId] = []
    for job in sorted(jobs, key=lambda job: (job.tenant_id, job.id)):
        enter(session, job.tenant_id)
        kept = update(Job).where(*_held(job)).values(lease_until=now + lease).returning(Job.id)
        held += session.scalars(kept).all()
    return held


def fail(session: Session, job: ClaimedJob, reason: str, now: datetime) -> None:
    """Give a job up for good, with the reason.  Raises LeaseLost."""
    close(session, job, "failed", now, reason)
    note(session, job.tenant_id, "job failed", job.id, {"reason": reason}, now)


def release(session: Session, job: ClaimedJob, now: datetime, error: str | None = None) -> None:
    """Put a job back for others: as if it had not been claimed, or with the error that counts as an attempt.

    Raises LeaseLost.
    """
    attempts = job.attempts if error else job.attempts - 1
    _change(
        session, job, {"state": "queued", "lease_until": None, "worker": None, "attempts": attempts, "error": error}
    )
    note(session, job.tenant_id, "job released", job.id, {"error": error}, now)


def put_off(session: Session, job: ClaimedJob, reason: str, until: datetime, now: datetime) -> None:
    """Put a job back that this worker is too small for: no attempt is counted, and it is left alone for a while.

    Raises LeaseLost.
    """
    values = {"state": "queued", "lease_until": until, "worker": None, "attempts": job.attempts - 1, "error": reason}
    _change(session, job, values)
    note(session, job.tenant_id, "job put off", job.id, {"reason": reason}, now)


def close(session: Session, job: ClaimedJob, state: str, now: datetime, error: str | None = None) -> None:
    """End a job under its fence.  Raises LeaseLost when somebody else has it."""
    _change(session, job, {"state": state, "finished_at": now, "lease_until": None, "error": error})


def _change(session: Session, job: ClaimedJob, values: Mapping[str, object]) -> None:
    enter(session, job.tenant_id)
    if session.scalar(update(Job).where(*_held(job)).values(**values).returning(Job.id)) is None:
        raise LeaseLost(str(job.id), job.fence)


def _held(job: ClaimedJob) -> tuple[Any, ...]:  # SQLAlchemy's conditions
    return (Job.tenant_id == job.tenant_id, Job.id == job.id, Job.fence == job.fence, Job.state == "running")


def _take(session: Session, job: Job, worker: str, until: datetime, now: datetime) -> None:
    most = MAX_DEATHS if job.state == "running" else MAX_ATTEMPTS
    if job.attempts >= most:
        job.state, job.finished_at, job.lease_until = "failed", now, None
        job.error = f"given up after {most} attempts: {job.error or 'its worker died'}; mend it, then train again"
        note(session, job.tenant_id, "job failed", job.id, {"reason": job.error}, now)
        return
    job.state, job.worker, job.lease_until = "running", worker, until
    job.attempts, job.fence = job.attempts + 1, job.fence + 1
    waited = (now - job.created_at).total_seconds() if job.attempts == 1 else None
    body = {"worker": worker, "fence": job.fence, "waited": waited}
    note(session, job.tenant_id, "job claimed", job.id, body, now)


def _claimed(session: Session, ids: Sequence[JobId]) -> list[ClaimedJob]:
    rows = session.execute(
        select(Job, Tenant.name, User.name, User.opaque, Adapter.name, Dataset, SharedBase)
        .join(Adapter, Adapter.id == Job.adapter_id)
        .join(User, User.id == Adapter.user_id)
        .join(Tenant, Tenant.id == Job.tenant_id)
        .join(Dataset, Dataset.id == Job.dataset_id)
        .join(SharedBase, SharedBase.id == Job.base_id)
        .where(Job.id.in_(ids))
        .order_by(Job.created_at, Job.id)
    )
    claimed = []
    for job, tenant, user, opaque, adapter, dataset, base in rows.tuples():
        assert job.lease_until  # set by the claim
        claimed.append(
            ClaimedJob(
                job.id, job.fence, job.attempts, job.lease_until, job.tenant_id, job.adapter_id, job.dataset_id,
                job.base_id, Reference(tenant, user, adapter), opaque, dataset.key, dataset.digest, base.name,
                base.revision, base.quantised, base.digest, job.recipe, job.recipe_digest, job.cohort_group,
            )
        )  # fmt: skip
    return claimed
