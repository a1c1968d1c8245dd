"""Asking for training: the same data, base and recipe are one job, however often they are asked for.

Many of one tenant are asked for together, in as many statements as one.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import and_, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from registry.errors import NotFound, QuotaReached
from registry.models import Adapter, AdapterVersion, Dataset, Facts, Job, SharedBase, User
from registry.names import AdapterId, JobId, Reference, TenantId
from registry.queries import Holder, find_or_add, note
from registry.shares import MADE, share

STEP = timedelta(hours=1)  # of waiting that one step of priority is worth
_MOST_BEHIND = timedelta(hours=1)  # a job of a clock that was wilder than that would put all later ones behind
_NO_END = 1 << 30  # room of a tenant without a quota
GIVEN_UP = ("failed", "cancelled")  # states of a job that waits again when it is asked for


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
class Asked:
    """An order for one adapter."""

    adapter_id: AdapterId
    order: Order
    priority: int = 0

    @property
    def key(self) -> "Key":
        """What there is one job of."""
        return self.adapter_id, self.order.fingerprint


Key = tuple[AdapterId, str]  # an adapter and a fingerprint


@dataclass(frozen=True)
class Enqueued:
    """The job of an order; `unchanged` when it is over already and nothing will be trained."""

    job_id: JobId
    state: str
    unchanged: bool
    number: int | None  # the version it gave, once it is over


def enqueue(
    session: Session, tenant: TenantId, holder: Holder, order: Order, now: datetime, priority: int = 0
) -> Enqueued:
    """Ask for training.  The same data, base and recipe give the same job; one that failed is tried again.

    A job that waits takes the higher priority of two.  Raises QuotaReached where as many wait as the tenant may have.
    """
    (found,) = enqueue_many(session, tenant, [Asked(holder.adapter.id, order, priority)], now)
    if isinstance(found, QuotaReached):
        raise found
    return found


def enqueue_many(
    session: Session, tenant: TenantId, asked: Sequence[Asked], now: datetime
) -> list[Enqueued | QuotaReached]:
    """As `enqueue` for each in turn, once for each adapter: those who come when the tenant's room is taken are told."""
    free, most = _room(session, tenant)
    known = _known(session, tenant, asked)
    let_in, refused = list[Asked](), dict[Key, QuotaReached]()
    for one in asked:
        if free <= 0:
            refused[one.key] = QuotaReached(most)
            continue
        let_in.append(one)
        free -= one.key not in known or known[one.key].state in GIVEN_UP
    new = sorted((one for one in let_in if one.key not in known), key=lambda one: one.key)  # as whoever does the same
    moments = _moments(session, tenant, let_in, now)
    found = known | _added(session, tenant, new, moments)
    for one in let_in:
        _settle(session, found[one.key], one, moments[one.adapter_id])
    session.flush()
    numbers = _numbers(session, tenant, [found[one.key] for one in let_in])
    return [refused.get(one.key) or _told(found[one.key], numbers) for one in asked]


def newest_datasets(
    session: Session, tenant: TenantId, wanted: Sequence[Reference]
) -> dict[Reference, tuple[AdapterId, Dataset] | NotFound]:
    """For each adapter of a tenant, which it is and the dataset that was added last for its user, if there is one."""
    users, adapters = {one.user for one in wanted}, {one.adapter for one in wanted}
    named = select(User.id).where(User.tenant_id == tenant, User.name.in_(users))
    place = func.row_number().over(partition_by=Dataset.user_id, order_by=(Dataset.added_at.desc(), Dataset.digest))
    living = (Dataset.tenant_id == tenant, Dataset.removed_at.is_(None), Dataset.user_id.in_(named))
    ranked = select(Dataset.id, Dataset.user_id, place.label("place")).where(*living).subquery()
    rows = session.execute(
        select(User.name, Adapter.name, Adapter.id, Dataset)
        .where(User.tenant_id == tenant, User.name.in_(users), Adapter.name.in_(adapters))
        .join(Adapter, Adapter.user_id == User.id)
        .outerjoin(ranked, and_(ranked.c.user_id == User.id, ranked.c.place == 1))
        .outerjoin(Dataset, Dataset.id == ranked.c.id)
    )
    found = {(user, adapter): (id_, dataset) for user, adapter, id_, dataset in rows.tuples()}
    return {one: _newest(one, *found.get((one.user, one.adapter), (None, None))) for one in wanted}


def _newest(
    wanted: Reference, adapter: AdapterId | None, dataset: Dataset | None
) -> tuple[AdapterId, Dataset] | NotFound:
    if adapter is None:
        return NotFound("adapter", wanted.label, f"add its data first: lora data add {wanted.label} FILE")
    if dataset is None:
        return NotFound("dataset of", wanted.label, f"add one: lora data add {wanted.label} FILE")
    return adapter, dataset


def place_in_line(asked_at: datetime, priority: int) -> datetime:
    """Since when a job counts as in line: a step of priority is worth an hour of waiting, so nobody waits for ever."""
    return asked_at - priority * STEP


def revive(session: Session, job: Job, now: datetime) -> None:
    """Let a job that was given up wait again, at the end of the line and with all its attempts."""
    job.state, job.attempts, job.errors, job.error = "queued", 0, 0, None
    job.finished_at = job.lease_until = None
    job.created_at, job.in_line_since = now, place_in_line(now, job.priority)
    note(session, job.tenant_id, "job queued again", job.id, {"fingerprint": job.fingerprint}, now)


def _room(session: Session, tenant: TenantId) -> tuple[int, int]:
    """How many more jobs may wait, and how many in all.

    Requests at once come one after the other, before they hold any job.
    """
    most = share(session, tenant).max_waiting
    if most is None:
        return _NO_END, _NO_END
    if session.get_bind().dialect.name == "postgresql":
        session.execute(select(func.pg_advisory_xact_lock(tenant.int & (1 << 63) - 1)))
    unfinished = (Job.tenant_id == tenant, Job.finished_at.is_(None), Job.state == "queued")
    return most - (session.scalar(select(func.count(Job.id)).where(*unfinished)) or 0), most


def _known(session: Session, tenant: TenantId, asked: Sequence[Asked]) -> dict[Key, Job]:
    """The jobs that there are already, locked."""
    adapters, fingerprints = {one.adapter_id for one in asked}, {one.order.fingerprint for one in asked}
    mine = (Job.tenant_id == tenant, Job.adapter_id.in_(adapters), Job.fingerprint.in_(fingerprints))
    jobs = session.scalars(select(Job).where(*mine).order_by(Job.id).with_for_update())
    return {(job.adapter_id, job.fingerprint): job for job in jobs}


def _moments(session: Session, tenant: TenantId, asked: Sequence[Asked], now: datetime) -> dict[AdapterId, datetime]:
    """When each adapter's job is asked for: after its others, also where this machine's clock is up to an hour behind.

    By this `latest` follows what was asked for last.
    """
    adapters = {one.adapter_id for one in asked}
    mine = (Job.tenant_id == tenant, Job.adapter_id.in_(adapters))
    last = session.execute(select(Job.adapter_id, func.max(Job.created_at)).where(*mine).group_by(Job.adapter_id))
    after = {adapter: at + datetime.resolution for adapter, at in last.tuples() if at < now + _MOST_BEHIND}
    return {adapter: max(now, after.get(adapter, now)) for adapter in adapters}


def _added(
    session: Session, tenant: TenantId, new: Sequence[Asked], moments: Mapping[AdapterId, datetime]
) -> dict[Key, Job]:
    """Jobs that there were none of; those that somebody else makes at this moment are theirs."""
    if not new:
        return {}
    made = {one.key: _new_job(tenant, one, moments[one.adapter_id]) for one in new}
    try:
        with session.begin_nested():
            session.add_all(made.values())
    except IntegrityError:
        return {one.key: _found_or_added(session, tenant, one, moments[one.adapter_id]) for one in new}
    return made


def _found_or_added(session: Session, tenant: TenantId, one: Asked, now: datetime) -> Job:
    adapter, fingerprint = one.key
    mine = (Job.tenant_id == tenant, Job.adapter_id == adapter, Job.fingerprint == fingerprint)
    return find_or_add(session, select(Job).where(*mine).with_for_update(), lambda: _new_job(tenant, one, now))


def _new_job(tenant: TenantId, one: Asked, now: datetime) -> Job:
    order = one.order
    return Job(
        tenant_id=tenant, adapter_id=one.adapter_id, dataset_id=order.dataset.id, base_id=order.base.id,
        recipe=order.recipe, recipe_digest=order.recipe_digest, fingerprint=order.fingerprint,
        cohort_group=order.group, state="queued", created_at=now, priority=one.priority,
        in_line_since=place_in_line(now, one.priority),
    )  # fmt: skip


def _settle(session: Session, job: Job, one: Asked, now: datetime) -> None:
    """A job that was found or made is as it was asked for."""
    if job.state in GIVEN_UP:
        revive(session, job, now)
    elif job.created_at == now:
        note(session, job.tenant_id, "job queued", job.id, {"fingerprint": job.fingerprint}, now)
    if job.state == "queued" and one.priority > job.priority:
        job.priority, job.in_line_since = one.priority, place_in_line(job.created_at, one.priority)


def _numbers(session: Session, tenant: TenantId, jobs: Sequence[Job]) -> Mapping[JobId, int]:
    """The versions of the jobs that are over."""
    over = [job.id for job in jobs if job.state in MADE]
    if not over:
        return {}
    made = (AdapterVersion.tenant_id == tenant, AdapterVersion.job_id.in_(over))
    return dict(session.execute(select(AdapterVersion.job_id, AdapterVersion.number).where(*made)).tuples().all())


def _told(job: Job, numbers: Mapping[JobId, int]) -> Enqueued:
    return Enqueued(job.id, job.state, job.state in MADE, numbers.get(job.id))
