"""Every question to the registry, tenant first.  Nothing here commits; `lookups` that create say so in their names."""

import os
import secrets
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from sqlalchemy import ColumnElement, Select, Subquery, func, select, true
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from registry import freshness
from registry.errors import NotFound
from registry.living import living
from registry.models import (
    Adapter,
    AdapterVersion,
    Alias,
    AliasMove,
    Base,
    Dataset,
    Evaluation,
    Event,
    Facts,
    Freshness,
    Job,
    SharedBase,
    Tenant,
    User,
)
from registry.names import AdapterId, JobId, Reference, TenantId, check_plain
from registry.tenancy import Across, across, enter, enter_named

Row = TypeVar("Row", bound=Base)


@dataclass(frozen=True)
class Holder:
    """Whose adapter it is, with the rows' ids."""

    tenant_id: TenantId
    user: User
    adapter: Adapter


@dataclass(frozen=True)
class Listed:
    """One adapter of a tenant, with what `latest` points to (None before the first accepted version)."""

    user: str
    adapter: str
    head: int
    latest: AdapterVersion | None
    candidate: Facts | None  # its scores
    base: Facts | None  # the base's scores on the same examples


def tenant_id(session: Session, name: str) -> TenantId:
    """The id of a tenant, whose rows are all that the transaction sees from here on.  Raises NameRefused, NotFound."""
    enter_named(session, check_plain("tenant", name))
    found = session.scalar(select(Tenant.id).where(Tenant.name == name))
    if found is None:
        raise NotFound("tenant", name, "add data for it first: lora data add TENANT/USER FILE")
    enter(session, found)
    return found


def ensure_adapter(session: Session, reference: Reference, now: datetime) -> Holder:
    """The adapter that a reference names; tenant, user and adapter are made where they are new."""
    enter_named(session, reference.tenant)
    tenants = select(Tenant).where(Tenant.name == reference.tenant)
    tenant = find_or_add(session, tenants, lambda: Tenant(name=reference.tenant, created_at=now))
    enter(session, tenant.id)
    # Locked, so that nobody adds to a user whom somebody else is just beginning to forget.
    users = select(User).where(User.tenant_id == tenant.id, User.name == reference.user).with_for_update(read=True)
    user = find_or_add(
        session,
        users,
        lambda: User(tenant_id=tenant.id, name=reference.user, opaque=secrets.token_hex(16), created_at=now),
    )
    mine = (Adapter.tenant_id == tenant.id, Adapter.user_id == user.id)
    adapters = select(Adapter).where(*mine, Adapter.name == reference.adapter)
    adapter = find_or_add(
        session,
        adapters,
        lambda: _new_adapter(session, tenant.id, user, reference.adapter, now),
    )
    return Holder(tenant.id, user, adapter)


def _new_adapter(session: Session, tenant: TenantId, user: User, name: str, now: datetime) -> Adapter:
    made = Adapter(id=AdapterId(uuid.uuid4()), tenant_id=tenant, user_id=user.id, name=name, created_at=now)
    freshness.in_turn(session, user.id)
    newest = freshness.newest(session, tenant, user.id)
    session.add(Freshness(adapter_id=made.id, tenant_id=tenant, newest_id=newest))
    return made


def find_or_add(session: Session, wanted: Select[tuple[Row]], make: Callable[[], Row]) -> Row:
    """The one row that a unique constraint allows: found, or made unless somebody else makes it first."""
    found = session.scalar(wanted)
    if found is not None:
        return found
    try:
        with session.begin_nested():
            session.add(made := make())
        return made
    except IntegrityError:
        return session.scalars(wanted).one()


def holder(session: Session, tenant: TenantId, user: str, adapter: str) -> Holder:
    """An adapter and its user.  Raises NotFound."""
    row = session.execute(
        select(User, Adapter)
        .join(Adapter, Adapter.user_id == User.id)
        .where(User.tenant_id == tenant, User.name == user, Adapter.name == adapter)
    ).one_or_none()
    if row is None:
        raise NotFound("adapter", f"{user}/{adapter}", "see `lora list TENANT` for those there are")
    return Holder(tenant, *row.tuple())


def version(session: Session, tenant: TenantId, reference: Reference) -> AdapterVersion:
    """The version that a reference means now, by number or by alias.  Raises NotFound."""
    owned = (
        select(AdapterVersion)
        .join(Adapter, Adapter.id == AdapterVersion.adapter_id)
        .join(User, User.id == Adapter.user_id)
        .where(
            AdapterVersion.tenant_id == tenant,
            User.tenant_id == tenant,
            User.name == reference.user,
            Adapter.name == reference.adapter,
        )
    )
    found = session.scalar(
        owned.where(AdapterVersion.number == reference.number)
        if reference.number
        else owned.join(Alias, (Alias.adapter_id == Adapter.id) & (Alias.version_id == AdapterVersion.id)).where(
            Alias.name == reference.alias
        )
    )
    if found is None:
        raise reference.not_found()
    return found


def versions(session: Session, tenant: TenantId, adapter: AdapterId) -> list[AdapterVersion]:
    """Every version of an adapter, the newest first."""
    mine = (AdapterVersion.tenant_id == tenant, AdapterVersion.adapter_id == adapter)
    return list(session.scalars(select(AdapterVersion).where(*mine).order_by(AdapterVersion.number.desc())))


def aliases(session: Session, tenant: TenantId, adapter: AdapterId) -> dict[str, int]:
    """Each alias of an adapter and the version number it points to."""
    rows = session.execute(
        select(Alias.name, AdapterVersion.number)
        .join(AdapterVersion, AdapterVersion.id == Alias.version_id)
        .where(Alias.tenant_id == tenant, Alias.adapter_id == adapter)
        .order_by(Alias.name)
    )
    return dict(rows.tuples().all())


def alias_moves(session: Session, tenant: TenantId, adapter: AdapterId) -> list[AliasMove]:
    """Every move of an adapter's aliases, the newest first."""
    mine = (AliasMove.tenant_id == tenant, AliasMove.adapter_id == adapter)
    return list(session.scalars(select(AliasMove).where(*mine).order_by(AliasMove.id.desc())))


def scores(session: Session, tenant: TenantId, version: AdapterVersion) -> dict[str, Facts]:
    """What base, previous version and candidate scored when this version was judged; None where it was no number."""
    rows = session.execute(
        select(Evaluation.subject, Evaluation.metrics).where(
            Evaluation.tenant_id == tenant, Evaluation.version_id == version.id
        )
    )
    return dict(rows.tuples().all())


def lineage(session: Session, tenant: TenantId, version: AdapterVersion) -> tuple[Dataset, SharedBase, Job]:
    """What a version was made from: data, base and the job (recipe and code version are on the version itself)."""
    row = session.execute(
        select(Dataset, SharedBase, Job)
        .join(Job, Job.dataset_id == Dataset.id)
        .join(SharedBase, SharedBase.id == Job.base_id)
        .where(Job.tenant_id == tenant, Job.id == version.job_id)
    ).one()
    return row.tuple()


def listing(session: Session, tenant: TenantId, limit: int = 1000) -> list[Listed]:
    """The adapters of a tenant by user and name, with their latest versions and scores: one statement."""
    candidate, base = _score(tenant, "candidate"), _score(tenant, "base")
    rows = session.execute(
        select(User.name, Adapter.name, Adapter.head, AdapterVersion, candidate.c.metrics, base.c.metrics)
        .join(Adapter, Adapter.user_id == User.id)
        .outerjoin(Alias, (Alias.adapter_id == Adapter.id) & (Alias.name == "latest"))
        .outerjoin(AdapterVersion, AdapterVersion.id == Alias.version_id)
        .outerjoin(candidate, candidate.c.version_id == AdapterVersion.id)
        .outerjoin(base, base.c.version_id == AdapterVersion.id)
        .where(User.tenant_id == tenant, Adapter.tenant_id == tenant, living())
        .order_by(User.name, Adapter.name)
        .limit(limit)
    )
    return [Listed(*row) for row in rows.tuples()]


def tenants(session: Session) -> list[Tenant]:
    """Every tenant, by name: for the operator of the whole factory only."""
    with across(session, Across.OVERVIEW):
        return list(session.scalars(select(Tenant).order_by(Tenant.name)))


def newest_dataset(session: Session, tenant: TenantId, holder: Holder) -> Dataset:
    """The dataset that was added last for an adapter's user.  Raises NotFound."""
    found = session.scalar(
        select(Dataset)
        .where(Dataset.tenant_id == tenant, Dataset.user_id == holder.user.id, Dataset.removed_at.is_(None))
        .order_by(Dataset.added_at.desc(), Dataset.digest)
        .limit(1)
    )
    if found is None:
        raise NotFound("dataset of", holder.user.name, "add one: lora data add TENANT/USER FILE")
    return found


def dataset_key(session: Session, tenant: TenantId, holder: Holder, digest: str) -> str | None:
    """Where the user's dataset of that content lies, and will until the transaction ends; None where there is none."""
    mine = (Dataset.tenant_id == tenant, Dataset.user_id == holder.user.id, Dataset.digest == digest)
    kept = select(Dataset.key).where(*mine, Dataset.removed_at.is_(None))
    return session.scalar(kept.with_for_update(key_share=True))  # nobody waits who asks for training on it


def still_there(session: Session, tenant: TenantId, holder: Holder) -> bool:
    """Whether a user has not been forgotten, nor will be until the transaction ends."""
    mine = (User.tenant_id == tenant, User.id == holder.user.id)
    return session.scalar(select(User.id).where(*mine).with_for_update(read=True)) is not None


def ensure_dataset(
    session: Session,
    tenant: TenantId,
    holder: Holder,
    *,
    digest: str,
    key: str,
    examples: int,
    size: int,
    now: datetime,
) -> Dataset:
    """The user's dataset of that content; made where it is new, and the newest from now on."""
    mine = (Dataset.tenant_id == tenant, Dataset.user_id == holder.user.id, Dataset.digest == digest)
    found = find_or_add(
        session,
        select(Dataset).where(*mine),
        lambda: Dataset(
            tenant_id=tenant, user_id=holder.user.id, digest=digest, key=key, examples=examples, size=size, added_at=now
        ),
    )
    if found.removed_at:  # the same content once more, after retention had removed it
        found.key, found.removed_at = key, None
    found.added_at = now
    freshness.data_added(session, tenant, holder.user.id)
    note(session, tenant, "dataset added", found.id, {"digest": digest, "examples": examples}, now)
    session.flush()
    return found


def ensure_base(
    session: Session, *, name: str, revision: str, digest: str, parameters: int, now: datetime, quantised: str = ""
) -> SharedBase:
    """The base of that digest; made where it is new, and under the name it was asked for by last.

    A hub id stays where somebody asks by a folder, which only their machine may have.
    """
    found = find_or_add(
        session,
        select(SharedBase).where(SharedBase.digest == digest),
        lambda: SharedBase(
            digest=digest, name=name, revision=revision, quantised=quantised, parameters=parameters, created_at=now
        ),
    )
    if os.path.isabs(found.name) or not os.path.isabs(name):
        found.name, found.revision = name, revision
    session.flush()
    return found


def note(session: Session, tenant: TenantId, kind: str, subject: uuid.UUID, body: Facts, now: datetime) -> None:
    """Add an event."""
    session.add(Event(tenant_id=tenant, kind=kind, subject=str(subject), body=body, at=now))


def job(session: Session, tenant: TenantId, job_id: JobId) -> Job:
    """A job as it is now."""
    return session.scalars(select(Job).where(Job.tenant_id == tenant, Job.id == job_id)).one()


def job_counts(session: Session, tenant: TenantId | None = None) -> dict[str, int]:
    """How many jobs are in each state, of one tenant or (for the operator) of all."""
    counted = select(Job.state, func.count()).where(_of(tenant)).group_by(Job.state)
    with _scope(session, tenant):
        return dict(session.execute(counted).tuples().all())


def recent_jobs(session: Session, tenant: TenantId | None = None, limit: int = 20) -> list[tuple[Job, str, str, str]]:
    """The jobs that moved last, with tenant, user and adapter names; running and queued ones first."""
    busy = Job.state.in_(("running", "queued"))
    asked = (
        select(Job, Tenant.name, User.name, Adapter.name)
        .join(Adapter, Adapter.id == Job.adapter_id)
        .join(User, User.id == Adapter.user_id)
        .join(Tenant, Tenant.id == Job.tenant_id)
        .where(_of(tenant))
        .order_by(busy.desc(), func.coalesce(Job.finished_at, Job.created_at).desc())
        .limit(limit)
    )
    with _scope(session, tenant):
        return [row.tuple() for row in session.execute(asked)]


def _of(tenant: TenantId | None) -> ColumnElement[bool]:
    return Job.tenant_id == tenant if tenant is not None else true()


def _scope(session: Session, tenant: TenantId | None) -> AbstractContextManager[None]:
    return across(session, Across.OVERVIEW) if tenant is None else nullcontext()


def _score(tenant: TenantId, subject: str) -> Subquery:
    mine = (Evaluation.tenant_id == tenant, Evaluation.subject == subject)
    return select(Evaluation.version_id, Evaluation.metrics).where(*mine).subquery()
