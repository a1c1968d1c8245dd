"""The queue: a job is claimed under a lease and a fence, and whoever lost the lease can change nothing any more."""

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import groupby
from typing import Any

from sqlalchemy import ColumnElement, and_, func, or_, select, update
from sqlalchemy.orm import Session

from registry.errors import LeaseLost
from registry.line import (
    apart_from_others,
    behind,
    count_served,
    group_of_first,
    keep_to_indexes,
    line,
    oldest,
    ready,
    seat,
    unclaimed,
)
from registry.models import Adapter, Dataset, Facts, Job, Share, SharedBase, Tenant, User
from registry.names import AdapterId, DatasetId, JobId, Reference, TenantId
from registry.queries import note
from registry.shares import room
from registry.tenancy import Across, across, enter

MAX_ERRORS = 3  # a job that ended in an error this often has failed
MAX_DEATHS = 5  # so has one whose workers died: most of its neighbours, and of whatever else kills, are innocent
SUSPECT = 2  # after so many deaths it is tried with fewer others, and at last alone, so that nobody shares its blame
ALONE = 3  # at that suspicion
FIRST_PAUSE, LONGEST_PAUSE = timedelta(seconds=30), timedelta(hours=1)  # after a job broke its worker
PATIENCE = timedelta(minutes=10)  # how much longer another group may wait while a cohort fills up with its own
BUSY = ("queued", "running")


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
    errors: int = 0  # of its earlier attempts

    @property
    def suspect(self) -> bool:
        """Whether so many workers died under it, or it broke one, that nobody else should join it."""
        return self.errors > 0 or self.attempts - 1 >= SUSPECT


def claim(
    session: Session,
    worker: str,
    lease: timedelta,
    limit: int,
    now: datetime,
    only: Sequence[JobId] | None = None,
    group: str | None = None,
) -> list[ClaimedJob]:
    """Take up to `limit` waiting jobs that can share a cohort, and at most one of an adapter.

    The tenant whose turn it is says which group; the seats are shared out among all who wait for that group, within
    their quotas.  With `group` more of that group are taken, unless somebody of another waits much longer.
    Jobs whose worker died count as waiting; an adapter that is in work elsewhere waits, and so does a job that was put
    off, unless `only` asks for it.  Jobs whose workers died again and again are taken a few at a time, and not where a
    group is named: a cohort is at work there.
    Concurrent claims share nothing out twice (SKIP LOCKED on PostgreSQL, one writer at a time on SQLite).
    """
    wanted = and_(ready(now), ~behind(now)) if only is None else and_(unclaimed(now), Job.id.in_(only))
    if group is not None:
        wanted = and_(wanted, ~_suspect())
    with across(session, Across.CLAIM):
        keep_to_indexes(session)
        while turns := line(session, wanted, limit, now, patient=only is not None):
            chosen = group or group_of_first(session, turns[0].tenant, wanted)
            alike = and_(wanted, Job.cohort_group == chosen)
            sharing = line(session, alike, limit, now)
            if group and (not sharing or oldest(sharing) - oldest(turns) > PATIENCE):
                break
            seated = seat(session, alike, limit, sharing)
            taken = apart(seated if only is not None else apart_from_others(session, seated, now), limit)
            for job in taken:
                _take(session, job, worker, now + lease, now)
            session.flush()
            if running := [job for job in taken if job.state == "running"]:
                count_served(session, sharing, running)
                return _claimed(session, [job.id for job in running])
            if not taken and chosen:  # others are just taking them
                wanted = and_(wanted, Job.cohort_group != chosen)
    return []


def apart(seated: Sequence[Job], limit: int) -> list[Job]:
    """Those of a claim that may share a cohort with the first: the more workers died under them, the fewer.

    After two deaths or an error a quarter of the seats, after three deaths a sixteenth, then one by one; only with
    others as suspect.
    """
    level = _suspicion(seated[0]) if seated else 0
    alike = [job for job in seated if _suspicion(job) == level]
    return alike[: max(1, limit // 4**level if level < ALONE else 1)]


def _suspicion(job: Job) -> int:
    """0 for a job whose workers died by chance, if at all; one more with each further death, two with a further error.

    There are fewer errors than deaths until a job has failed, and the last is to be its own.
    """
    return max(0, job.attempts - job.errors - SUSPECT + 1, 2 * job.errors - 1)


def _suspect() -> ColumnElement[bool]:
    return or_(Job.errors > 0, Job.attempts - Job.errors >= SUSPECT)


def waiting(session: Session, now: datetime) -> dict[str, int]:
    """How many jobs a claim could take now, those of dead workers among them, by cohort group."""
    found: dict[str, int] = {}
    with across(session, Across.CLAIM):
        counted = select(Job.tenant_id, Job.cohort_group, func.count()).where(ready(now), ~behind(now))
        counts = session.execute(counted.group_by(Job.tenant_id, Job.cohort_group)).tuples().all()
        # After them, so that nobody is missing whose first job came meanwhile.
        free = {one.tenant_id: room(session, one, now) for one in session.scalars(select(Share)).all()}
        for tenant, group, count in counts:
            if (may := min(count, free[tenant])) > 0:
                free[tenant] -= may
                found[group] = found.get(group, 0) + may
    return found


def renew(session: Session, jobs: Sequence[ClaimedJob], lease: timedelta, now: datetime) -> list[JobId]:
    """Extend the leases that are still held; returns their jobs.  What is missing belongs to somebody else.

    Rows are locked in the order in which `together.py` locks them: a heartbeat and a publisher of the same jobs meet.
    """
    held: list[JobId] = []
    for tenant, own in groupby(sorted(jobs, key=lambda job: job.tenant_id), key=lambda job: job.tenant_id):
        enter(session, tenant)
        fences = {job.id: job.fence for job in own}
        ours = select(Job.id, Job.fence).where(Job.tenant_id == tenant, Job.id.in_(fences), Job.state == "running")
        locked = session.execute(ours.order_by(Job.id).with_for_update()).tuples()
        mine = [job for job, fence in locked if fences[job] == fence]
        session.execute(update(Job).where(Job.tenant_id == tenant, Job.id.in_(mine)).values(lease_until=now + lease))
        held += mine
    return held


def fail(session: Session, job: ClaimedJob, reason: str, now: datetime) -> None:
    """Give a job up for good, with the reason.  Raises LeaseLost."""
    close(session, job, "failed", now, reason)
    note(session, job.tenant_id, "job failed", job.id, {"reason": reason}, now)


def release(session: Session, job: ClaimedJob, now: datetime, error: str | None = None) -> None:
    """Put a job back for others: as if it had not been claimed, or with the error that it ended in.

    After an error it is left alone for a while, each time longer; the last one ends it.  Raises LeaseLost.
    """
    values: dict[str, object] = {"state": "queued", "worker": None, "error": error}
    if error:
        errors = job.errors + 1
        if errors >= MAX_ERRORS:
            fail(session, job, _given_up(f"{errors} errors, the last of them: {error}"), now)
            return
        values |= {"errors": errors, "lease_until": now + pause_after(job.id, errors)}
    else:
        values |= {"attempts": job.attempts - 1, "lease_until": None}
    _change(session, job, values)
    note(session, job.tenant_id, "job released", job.id, {"error": error}, now)


def pause_after(job: JobId, errors: int) -> timedelta:
    """How long a job is left alone after its errors: twice as long each time, an hour at most, half of it by lot.

    The lot is the job's own: jobs that broke together do not come back together.
    """
    longest = min(FIRST_PAUSE * float(2 ** (errors - 1)), LONGEST_PAUSE)
    lot = hashlib.sha256(f"{job} {errors}".encode()).digest()
    return longest * (0.5 + int.from_bytes(lot[:4], "big") / 2**33)


def put_off(session: Session, job: ClaimedJob, reason: str, until: datetime, now: datetime) -> None:
    """Put a job back that this worker is too small for: no attempt is counted, and it is left alone for a while.

    Raises LeaseLost.
    """
    values = {"state": "queued", "lease_until": until, "worker": None, "attempts": job.attempts - 1, "error": reason}
    _change(session, job, values)
    note(session, job.tenant_id, "job put off", job.id, {"reason": reason}, now)


def check_fence(session: Session, job: ClaimedJob) -> None:
    """That nobody has taken or cancelled a job since, nor will until the transaction ends.  Raises LeaseLost."""
    enter(session, job.tenant_id)
    ours = select(Job.id).where(Job.tenant_id == job.tenant_id, Job.id == job.id, Job.fence == job.fence)
    if session.scalar(ours.with_for_update(read=True)) is None:
        raise LeaseLost(str(job.id), job.fence)


def close(session: Session, job: ClaimedJob, state: str, now: datetime, error: str | None = None) -> datetime:
    """End a job under its fence; returns when it was asked for.  Raises LeaseLost when somebody else has it."""
    return _change(session, job, {"state": state, "finished_at": now, "lease_until": None, "error": error})


def _change(session: Session, job: ClaimedJob, values: Mapping[str, object]) -> datetime:
    enter(session, job.tenant_id)
    changed = update(Job).where(*_held(job)).values(**values).returning(Job.created_at)
    asked_at = session.connection().scalar(changed)
    if asked_at is None:
        raise LeaseLost(str(job.id), job.fence)
    return asked_at


def _held(job: ClaimedJob) -> tuple[Any, ...]:  # SQLAlchemy's conditions
    return (Job.tenant_id == job.tenant_id, Job.id == job.id, Job.fence == job.fence, Job.state == "running")


def _take(session: Session, job: Job, worker: str, until: datetime, now: datetime) -> None:
    if (deaths := job.attempts - job.errors) >= MAX_DEATHS:
        job.state, job.finished_at, job.lease_until = "failed", now, None
        job.error = _given_up(f"its worker died {deaths} times")
        note(session, job.tenant_id, "job failed", job.id, {"reason": job.error}, now)
        return
    job.state, job.worker, job.lease_until = "running", worker, until
    job.attempts, job.fence = job.attempts + 1, job.fence + 1
    waited = (now - job.created_at).total_seconds() if job.attempts == 1 else None
    body = {"worker": worker, "fence": job.fence, "waited": waited}
    note(session, job.tenant_id, "job claimed", job.id, body, now)


def _given_up(why: str) -> str:
    return f"given up after {why}; mend it, then train again or `lora queue retry`"


def _claimed(session: Session, ids: Sequence[JobId]) -> list[ClaimedJob]:
    rows = session.execute(
        select(Job, Tenant.name, User.name, User.opaque, Adapter.name, Dataset, SharedBase)
        .join(Adapter, Adapter.id == Job.adapter_id)
        .join(User, User.id == Adapter.user_id)
        .join(Tenant, Tenant.id == Job.tenant_id)
        .join(Dataset, Dataset.id == Job.dataset_id)
        .join(SharedBase, SharedBase.id == Job.base_id)
        .where(Job.id.in_(ids))
        .order_by(Job.in_line_since, Job.id)
    )
    claimed = []
    for job, tenant, user, opaque, adapter, dataset, base in rows.tuples():
        assert job.lease_until  # set by the claim
        claimed.append(
            ClaimedJob(
                job.id, job.fence, job.attempts, job.lease_until, job.tenant_id, job.adapter_id, job.dataset_id,
                job.base_id, Reference(tenant, user, adapter), opaque, dataset.key, dataset.digest, base.name,
                base.revision, base.quantised, base.digest, job.recipe, job.recipe_digest, job.cohort_group, job.errors,
            )
        )  # fmt: skip
    return claimed
