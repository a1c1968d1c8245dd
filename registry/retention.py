"""What a tenant keeps: its policy, pinned versions, and which versions and datasets fall under neither.

A version is kept when any rule keeps it: it is among the newest, young enough, pinned, an alias points to it, it is its
adapter's last, or its user or tenant is under hold.  A dataset is kept when it is its user's newest, or a version
that is kept or a job that is open needs it.  Removing what is not kept is in `collection.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy import ColumnElement, Select, delete, exists, or_, select
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session, aliased

from registry.datasets import EXAMPLES
from registry.errors import NotFound, RetentionRefused, VersionGone
from registry.holds import held
from registry.jobs import BUSY
from registry.models import Adapter, AdapterVersion, Alias, Dataset, Facts, Job, Pin, RetentionPolicy, Tombstone, User
from registry.names import DEFAULT_ADAPTER, AdapterId, DatasetId, Reference, TenantId, VersionId, check_words
from registry.queries import find_or_add, note, version
from registry.session import reading
from registry.tenancy import Across, across
from registry.uploads import UPLOAD_LEASE


@dataclass(frozen=True)
class Expired:
    """A version or dataset that nothing keeps."""

    id: VersionId | DatasetId
    label: str  # for people
    prefix: str  # of its objects
    size: int  # bytes
    adapter_id: AdapterId | None = None  # of a version
    number: int | None = None  # the same


def set_policy(
    session: Session,
    tenant: TenantId,
    newest: int | None,
    days: int | None,
    *,
    actor: str,
    reason: str,
    now: datetime,
) -> None:
    """Keep the newest so many versions of each adapter and those younger than so many days; neither keeps everything.

    Raises RetentionRefused.
    """
    check_words("actor", actor)
    check_words("reason", reason)
    for what, value in (("newest", newest), ("days", days)):
        if value is not None and not 1 <= value <= 10**6:
            raise RetentionRefused(f"{what} is {value}", "give 1 to 1000000")
    facts: Facts = {"newest": newest, "days": days, "actor": actor, "reason": reason}
    mine = RetentionPolicy.tenant_id == tenant
    if newest or days:
        new = RetentionPolicy(tenant_id=tenant, **facts, at=now)
        found = find_or_add(session, select(RetentionPolicy).where(mine).with_for_update(), lambda: new)
        for name, value in (facts | {"at": now, "collected_at": None}).items():
            setattr(found, name, value)
    else:
        session.execute(delete(RetentionPolicy).where(mine))
    note(session, tenant, "retention set", tenant, facts, now)


def policy(session: Session, tenant: TenantId) -> RetentionPolicy | None:
    """What a tenant keeps; None where it keeps everything."""
    return session.scalar(select(RetentionPolicy).where(RetentionPolicy.tenant_id == tenant))


def pin(
    session: Session, tenant: TenantId, reference: Reference, *, actor: str, reason: str, now: datetime
) -> AdapterVersion:
    """Keep a version whatever the policy says.  Raises NotFound, VersionGone."""
    check_words("actor", actor)
    check_words("reason", reason)
    chosen = version(session, tenant, reference)
    lock_aliases(session, tenant, [chosen.adapter_id])  # a collection that has begun on it is over after this
    check_living(session, tenant, chosen, str(reference))
    find_or_add(
        session,
        select(Pin).where(Pin.tenant_id == tenant, Pin.version_id == chosen.id),
        lambda: Pin(version_id=chosen.id, tenant_id=tenant, actor=actor, reason=reason, at=now),
    )
    note(session, tenant, "version pinned", chosen.id, {"actor": actor, "reason": reason}, now)
    return chosen


def unpin(
    session: Session, tenant: TenantId, reference: Reference, *, actor: str, reason: str, now: datetime
) -> AdapterVersion:
    """Let a version go when the policy says so.  Raises NotFound for one that is not pinned."""
    check_words("actor", actor)
    check_words("reason", reason)
    chosen = version(session, tenant, reference)
    mine = (Pin.tenant_id == tenant, Pin.version_id == chosen.id)
    if session.scalar(delete(Pin).where(*mine).returning(Pin.version_id)) is None:
        raise NotFound("pin on", str(reference), "see `lora pin TENANT` for those there are")
    note(session, tenant, "version unpinned", chosen.id, {"actor": actor, "reason": reason}, now)
    return chosen


def pins(session: Session, tenant: TenantId) -> list[tuple[Pin, str, str, int]]:
    """The pinned versions of a tenant with user, adapter and number, the oldest pin first."""
    rows = (
        select(Pin, User.name, Adapter.name, AdapterVersion.number)
        .join(AdapterVersion, AdapterVersion.id == Pin.version_id)
        .join(Adapter, Adapter.id == AdapterVersion.adapter_id)
        .join(User, User.id == Adapter.user_id)
        .where(Pin.tenant_id == tenant)
        .order_by(Pin.at, Pin.version_id)
    )
    return [row.tuple() for row in session.execute(rows)]


def check_living(session: Session, tenant: TenantId, version: AdapterVersion, label: str) -> None:
    """Raises VersionGone for a version whose bytes are gone, or going."""
    mine = (Tombstone.tenant_id == tenant, Tombstone.version_id == version.id)
    found = session.scalar(select(Tombstone).where(*mine))
    if found is not None:
        raise VersionGone(label, f"{found.at:%Y-%m-%d}", found.reason)


def gone(session: Session, tenant: TenantId, adapter: AdapterId) -> dict[VersionId, datetime]:
    """The versions of an adapter that were removed, and when."""
    rows = (
        select(Tombstone.version_id, Tombstone.at)
        .join(AdapterVersion, AdapterVersion.id == Tombstone.version_id)
        .where(Tombstone.tenant_id == tenant, AdapterVersion.adapter_id == adapter)
    )
    return dict(session.execute(rows).tuples().all())


def lock_aliases(
    session: Session, tenant: TenantId, adapters: Sequence[AdapterId], wait: bool = True
) -> list[AdapterId]:
    """Lock adapters against new aliases and versions, and their aliases against moves; gives those that were free.

    Without `wait` an adapter whose row or alias somebody holds is left out: whoever collects holds up nobody.
    """
    mine = (Adapter.tenant_id == tenant, Adapter.id.in_(adapters))
    rows = select(Adapter.id).where(*mine).order_by(Adapter.id).with_for_update(skip_locked=not wait)
    free = list(session.scalars(rows))
    ours = (Alias.tenant_id == tenant, Alias.adapter_id.in_(free))
    names = select(Alias.adapter_id, Alias.name).where(*ours).order_by(Alias.adapter_id, Alias.name)
    locked = set(session.execute(names.with_for_update(skip_locked=not wait)).tuples())
    busy = {adapter for adapter, name in session.execute(names).tuples() if (adapter, name) not in locked}
    return [adapter for adapter in free if adapter not in busy]


def expired_versions(
    session: Session, tenant: TenantId, kept: RetentionPolicy, now: datetime, limit: int, since: AdapterId | None = None
) -> list[Expired]:
    """The versions that nothing keeps, of adapters that nobody is at now; by adapter, from one on, and number."""
    rows = _versions(tenant, kept, now).order_by(AdapterVersion.adapter_id, AdapterVersion.number)
    if since is not None:
        rows = rows.where(AdapterVersion.adapter_id >= since)
    asked = {version.adapter_id for version, *_ in session.execute(rows.limit(limit)).tuples()}
    # Looked at again under their locks: an alias may have moved to one of them meanwhile.
    free = lock_aliases(session, tenant, sorted(asked), wait=False)
    found = session.execute(rows.where(Adapter.id.in_(free)).limit(limit)).tuples()
    return [
        Expired(one.id, _label(user, adapter, one.number), one.prefix, one.size, one.adapter_id, one.number)
        for one, user, adapter in found
    ]


def expired_datasets(session: Session, tenant: TenantId, now: datetime, limit: int) -> list[Expired]:
    """The datasets that nothing keeps.  One that was the newest a moment ago may be on its way into a job: it stays."""
    newer = aliased(Dataset)
    superseded = exists().where(
        newer.tenant_id == Dataset.tenant_id, newer.user_id == Dataset.user_id, newer.added_at > Dataset.added_at,
        newer.added_at < now - UPLOAD_LEASE, newer.removed_at.is_(None),
    )  # fmt: skip
    open_job = exists().where(Job.tenant_id == Dataset.tenant_id, Job.dataset_id == Dataset.id, Job.state.in_(BUSY))
    buried = exists().where(Tombstone.tenant_id == AdapterVersion.tenant_id, Tombstone.version_id == AdapterVersion.id)
    needed = exists().where(
        AdapterVersion.tenant_id == Dataset.tenant_id, AdapterVersion.dataset_id == Dataset.id, ~buried
    )
    rows = (
        select(Dataset, User.name)
        .join(User, User.id == Dataset.user_id)
        .where(Dataset.tenant_id == tenant, Dataset.removed_at.is_(None), superseded, ~open_job, ~needed)
        .where(~held())
        .order_by(Dataset.added_at, Dataset.id)
        .limit(limit)
        .with_for_update(of=Dataset, skip_locked=True)
    )
    return [
        Expired(
            dataset.id,
            f"{user}'s dataset {dataset.digest[:12]}",
            dataset.key.removesuffix(f"/{EXAMPLES}"),
            dataset.size,
        )
        for dataset, user in session.execute(rows).tuples()
    ]


def due(engine: Engine, before: datetime) -> list[TenantId]:
    """The tenants whose policies nobody has looked at since, and those where a collection was interrupted."""
    with reading(engine) as session, across(session, Across.UPKEEP):
        late = or_(RetentionPolicy.collected_at.is_(None), RetentionPolicy.collected_at < before)
        found = set(session.scalars(select(RetentionPolicy.tenant_id).where(late)))
        left = select(Tombstone.tenant_id).where(Tombstone.cleared_at.is_(None)).distinct()
        return sorted(found | set(session.scalars(left)))


def rule(kept: RetentionPolicy) -> str:
    """A policy in words."""
    newest = [f"the newest {kept.newest}"] if kept.newest else []
    return " and ".join(newest + ([f"those of {kept.days} days"] if kept.days else []))


def _label(user: str, adapter: str, number: int) -> str:
    return f"{user}:{number}" if adapter == DEFAULT_ADAPTER else f"{user}/{adapter}:{number}"


def _versions(tenant: TenantId, kept: RetentionPolicy, now: datetime) -> Select[tuple[AdapterVersion, str, str]]:
    buried = exists().where(Tombstone.tenant_id == AdapterVersion.tenant_id, Tombstone.version_id == AdapterVersion.id)
    pinned = exists().where(Pin.tenant_id == AdapterVersion.tenant_id, Pin.version_id == AdapterVersion.id)
    named = exists().where(Alias.tenant_id == AdapterVersion.tenant_id, Alias.version_id == AdapterVersion.id)
    return (
        select(AdapterVersion, User.name, Adapter.name)
        .join(Adapter, Adapter.id == AdapterVersion.adapter_id)
        .join(User, User.id == Adapter.user_id)
        .where(AdapterVersion.tenant_id == tenant, *_outlived(kept, now))
        .where(AdapterVersion.number < Adapter.head, ~buried, ~pinned, ~named, ~held())
    )


def _outlived(kept: RetentionPolicy, now: datetime) -> list[ColumnElement[bool]]:
    newest = [AdapterVersion.number <= Adapter.head - kept.newest] if kept.newest else []
    return newest + ([AdapterVersion.created_at < _days_before(now, kept.days)] if kept.days else [])


def _days_before(now: datetime, days: int) -> datetime:
    """The moment so many days ago; not before 1970, where nothing was made and beyond which dates soon end."""
    return now - min(timedelta(days=days), now - datetime.fromtimestamp(0, UTC))
