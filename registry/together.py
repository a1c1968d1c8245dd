"""Publishing many jobs at once: the order of `publishing.py`, with two transactions for all, not three for each.

What is unusual (a job published before, an upload begun before, an adapter's second job) goes the way of one.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import groupby

from sqlalchemy import delete, select, update
from sqlalchemy.engine import Engine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from registry import aliases, freshness
from registry.errors import LeaseLost, RegistryError
from registry.jobs import ClaimedJob
from registry.models import Adapter, AdapterVersion, Alias, Evaluation, Job, Upload
from registry.names import LATEST, AdapterId, JobId, TenantId
from registry.protection import is_protected
from registry.publishing import (
    Finished,
    Published,
    as_published,
    overtaken,
    place,
    publish,
    signed,
    told,
    upload,
    version_row,
)
from registry.queries import note
from registry.session import transaction
from registry.signing import Signer
from registry.store import ObjectStore
from registry.tenancy import enter
from registry.uploads import UPLOAD_LEASE

_UPLOADERS = 4  # threads: a store is waited for

Outcome = Published | RegistryError  # of one job: what it became, or why it did not


@dataclass(frozen=True)
class _Parcel:
    """One job's files on their way."""

    job: ClaimedJob
    finished: Finished
    digest: str
    prefix: str


def publish_together(
    engine: Engine,
    store: ObjectStore,
    work: Sequence[tuple[ClaimedJob, Finished]],
    now: datetime,
    signer: Signer | None = None,
) -> dict[JobId, Outcome]:
    """Make the files of many jobs versions, each once, and tell of each what became of it.

    One whose job went to another worker, or whose files the store does not take, does not hold up the others.  Raises
    DatabaseUnavailable, with nobody published or everybody.
    """
    found: dict[JobId, Outcome] = {}
    parcels = [_Parcel(job, finished, *place(job, finished)) for job, finished in work]
    parcels.sort(key=lambda parcel: (parcel.job.tenant_id, parcel.job.id))  # all lock in one order: no deadlock
    fresh = _declare(engine, parcels, now)
    uploaded = _upload(store, fresh, found, signer)
    with transaction(engine) as session:
        committed: dict[JobId, Outcome] = {}
        for tenant, own in groupby(uploaded, key=lambda parcel: parcel.job.tenant_id):
            committed |= _commit(session, tenant, list(own), now)
    found |= committed
    for job, finished in work:
        if job.id not in found:
            found[job.id] = _alone(engine, store, job, finished, now, signer)
    return found


def _alone(
    engine: Engine, store: ObjectStore, job: ClaimedJob, finished: Finished, now: datetime, signer: Signer | None
) -> Outcome:
    try:
        return publish(engine, store, job, finished, now, signer)
    except RegistryError as error:
        return error


def _declare(engine: Engine, parcels: Sequence[_Parcel], now: datetime) -> list[_Parcel]:
    """Write down the intents of those that nothing was done for yet, one an adapter; returns them.

    Not of those whose job is in other hands, cancelled, or gone with its user.
    """
    fresh: list[_Parcel] = []
    with transaction(engine) as session:
        for tenant, own in groupby(parcels, key=lambda parcel: parcel.job.tenant_id):
            enter(session, tenant)
            some = list({parcel.job.adapter_id: parcel for parcel in _ours(session, tenant, list(own))}.values())
            begun = select(Upload.prefix).where(
                Upload.tenant_id == tenant, Upload.prefix.in_([parcel.prefix for parcel in some])
            )
            known = set(session.scalars(begun)) | _published_jobs(session, tenant, some)
            new = [parcel for parcel in some if parcel.prefix not in known and str(parcel.job.id) not in known]
            session.add_all(
                Upload(
                    prefix=parcel.prefix, tenant_id=tenant, job_id=parcel.job.id, sweeping=False,
                    lease_until=now + UPLOAD_LEASE,
                )
                for parcel in new
            )  # fmt: skip
            session.flush()
            fresh += new
    return fresh


def _ours(session: Session, tenant: TenantId, parcels: Sequence[_Parcel]) -> list[_Parcel]:
    """Those whose jobs nobody takes or cancels until the transaction ends; as `jobs.check_fence`, for many."""
    fences = select(Job.id, Job.fence).where(Job.tenant_id == tenant, Job.id.in_([one.job.id for one in parcels]))
    now = dict(session.execute(fences.order_by(Job.id).with_for_update(read=True)).tuples().all())
    return [one for one in parcels if now.get(one.job.id) == one.job.fence]


def _published_jobs(session: Session, tenant: TenantId, parcels: Sequence[_Parcel]) -> set[str]:
    jobs = [parcel.job.id for parcel in parcels]
    mine = (AdapterVersion.tenant_id == tenant, AdapterVersion.job_id.in_(jobs))
    return {str(job) for job in session.scalars(select(AdapterVersion.job_id).where(*mine))}


def _upload(
    store: ObjectStore, parcels: Sequence[_Parcel], found: dict[JobId, Outcome], signer: Signer | None
) -> list[_Parcel]:
    """Sign and upload by a few threads; returns those that the store took, and notes the trouble of the others."""

    def send(parcel: _Parcel) -> _Parcel | RegistryError:
        try:
            if signer:
                files = signed(store, parcel.prefix, parcel.finished.files, signer)
                parcel = replace(parcel, finished=replace(parcel.finished, files=files))
            upload(store, parcel.prefix, parcel.finished.files)
        except RegistryError as error:
            return error
        return parcel

    with ThreadPoolExecutor(_UPLOADERS, "upload") as threads:
        sent = list(threads.map(send, parcels))
    found |= {parcel.job.id: one for parcel, one in zip(parcels, sent, strict=True) if isinstance(one, RegistryError)}
    return [one for one in sent if isinstance(one, _Parcel)]


def _commit(session: Session, tenant: TenantId, parcels: Sequence[_Parcel], now: datetime) -> dict[JobId, Outcome]:
    """One tenant's part of the transaction that makes the versions exist."""
    enter(session, tenant)
    held, asked_at = _still_ours(session, tenant, parcels)
    lost: dict[JobId, Outcome] = {
        parcel.job.id: LeaseLost(str(parcel.job.id), parcel.job.fence) for parcel in parcels if parcel not in held
    }
    if not held:
        return lost
    for state in ("published", "refused"):
        over = [parcel.job.id for parcel in held if parcel.finished.accepted == (state == "published")]
        ended = update(Job).where(Job.tenant_id == tenant, Job.id.in_(over))
        session.execute(ended.values(state=state, finished_at=now, lease_until=None, error=None))
    heads = _next_numbers(session, tenant, [parcel.job.adapter_id for parcel in held])
    versions = {
        parcel.job.id: version_row(
            parcel.job, parcel.finished, parcel.digest, parcel.prefix, heads[parcel.job.adapter_id], now
        )
        for parcel in held
    }
    session.add_all(versions.values())
    session.flush()
    _record(session, tenant, held, versions, asked_at, now)
    _point_at(session, tenant, held, versions, asked_at, now)
    return lost | {job: as_published(version) for job, version in versions.items()}


def _still_ours(
    session: Session, tenant: TenantId, parcels: Sequence[_Parcel]
) -> tuple[list[_Parcel], Mapping[JobId, datetime]]:
    """Those whose job is still in our hands and whose upload the sweeper has not begun on; both stay locked.

    And when each job was asked for.
    """
    ours = select(Job.id, Job.fence, Job.created_at).where(
        Job.tenant_id == tenant, Job.id.in_([parcel.job.id for parcel in parcels]), Job.state == "running"
    )
    rows = session.execute(ours.order_by(Job.id).with_for_update()).tuples().all()
    fences = {job: fence for job, fence, _ in rows}
    held = [parcel for parcel in parcels if fences.get(parcel.job.id) == parcel.job.fence]
    mine = (Upload.tenant_id == tenant, Upload.prefix.in_([parcel.prefix for parcel in held]))
    settled = set(session.scalars(delete(Upload).where(*mine, Upload.sweeping.is_(False)).returning(Upload.prefix)))
    return [parcel for parcel in held if parcel.prefix in settled], {job: at for job, _, at in rows}


def _next_numbers(session: Session, tenant: TenantId, adapters: Sequence[AdapterId]) -> Mapping[AdapterId, int]:
    """Raise every adapter's head.  The locks make publishers of one adapter wait in line: numbers have no gaps."""
    mine = (Adapter.tenant_id == tenant, Adapter.id.in_(adapters))
    session.execute(select(Adapter.id).where(*mine).order_by(Adapter.id).with_for_update())
    raised = update(Adapter).where(*mine).values(head=Adapter.head + 1).returning(Adapter.id, Adapter.head)
    return dict(session.execute(raised, execution_options={"synchronize_session": False}).tuples().all())


def _record(
    session: Session,
    tenant: TenantId,
    parcels: Sequence[_Parcel],
    versions: Mapping[JobId, AdapterVersion],
    asked_at: Mapping[JobId, datetime],
    now: datetime,
) -> None:
    """Scores and events."""
    for parcel in parcels:
        version, finished = versions[parcel.job.id], parcel.finished
        session.add_all(
            Evaluation(tenant_id=tenant, version_id=version.id, subject=subject, metrics=dict(metrics))
            for subject, metrics in finished.scores.items()
        )
        body = told(version.number, finished, now - asked_at[parcel.job.id])
        note(session, tenant, "version published", version.id, body, now)


def _point_at(
    session: Session,
    tenant: TenantId,
    parcels: Sequence[_Parcel],
    versions: Mapping[JobId, AdapterVersion],
    asked_at: Mapping[JobId, datetime],
    now: datetime,
) -> None:
    """Move `latest` to the accepted versions: of adapters that have none all at once, of others one by one."""
    accepted = {versions[parcel.job.id]: parcel for parcel in parcels if parcel.finished.accepted}
    if not accepted or is_protected(session, tenant, LATEST):
        return
    adapters = [version.adapter_id for version in accepted]
    mine = (Alias.tenant_id == tenant, Alias.adapter_id.in_(adapters), Alias.name == LATEST)
    pointed = set(session.scalars(select(Alias.adapter_id).where(*mine)))
    first = {
        version: parcel.finished.reason for version, parcel in accepted.items() if version.adapter_id not in pointed
    }
    try:
        with session.begin_nested():
            for version, reason in first.items():
                aliases.begin(session, tenant, version, LATEST, actor="gate", reason=reason, now=now)
    except IntegrityError:  # somebody pointed one there meanwhile
        first = {}
    freshness.begun(session, tenant, list(first))
    for version, parcel in sorted(accepted.items(), key=lambda one: one[0].adapter_id):  # locks in one order
        if version not in first:
            _move_on(session, parcel, version, asked_at[parcel.job.id], now)


def _move_on(session: Session, parcel: _Parcel, version: AdapterVersion, asked_at: datetime, now: datetime) -> None:
    """Move `latest` of an adapter that had one, unless it points to a version that was asked for later."""
    job = parcel.job
    live = session.scalar(aliases.locked(job.tenant_id, job.adapter_id, LATEST))
    if live is None or not overtaken(session, job, live, asked_at):
        reason = parcel.finished.reason
        aliases.move(session, job.tenant_id, version, LATEST, actor="gate", reason=reason, now=now)
