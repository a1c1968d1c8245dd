"""Garbage collection: the bytes of versions and datasets that nothing keeps any more.

Marked first, in one transaction with the look that found them: from then on a reader is told, and no alias can move
there.  Then the bytes go.  A crash anywhere leaves marks, which the next collection finishes; what a dataset leaves is
the sweep's, as an upload's.
"""

from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy import select, update
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from registry import retention, uploads
from registry.holds import held, keep_holds
from registry.models import Adapter, AdapterVersion, Dataset, RetentionPolicy, Tombstone, Upload, User
from registry.names import AdapterId, TenantId
from registry.queries import note
from registry.retention import Expired
from registry.session import reading, rehearsal, transaction
from registry.store import ObjectStore
from registry.tenancy import enter

_BATCH = 500  # versions, and datasets, marked in one transaction


@dataclass
class Collected:
    """What was collected, or would be."""

    versions: list[Expired] = field(default_factory=list)
    datasets: list[Expired] = field(default_factory=list)

    def __bool__(self) -> bool:
        """Whether it is anything at all."""
        return bool(self.versions or self.datasets)

    def take(self, more: "Collected") -> AdapterId | None:
        """Take in one batch more; gives the adapter that the next one begins with, if any."""
        self.versions += more.versions
        self.datasets += more.datasets
        return self.versions[-1].adapter_id if self.versions else None

    @property
    def size(self) -> int:
        """Bytes of all of it."""
        return sum(one.size for one in (*self.versions, *self.datasets))


def plan(engine: Engine, tenant: TenantId, now: datetime) -> Collected:
    """What a collection would remove now: it is marked, and the marks are taken back."""
    found, since = Collected(), None
    with rehearsal(engine) as session:
        while marked := _mark(session, tenant, now, since):
            since = found.take(marked)
    return found


def collect(engine: Engine, store: ObjectStore, tenant: TenantId, now: datetime) -> Collected:
    """Remove the bytes that a tenant's policy does not keep, and those that an earlier collection left.

    Safe to run again, and by several at once.
    """
    clear(engine, store, tenant, now)
    done, since = Collected(), None
    while True:
        with transaction(engine) as session:
            marked = _mark(session, tenant, now, since)
        if not marked:
            return done
        clear(engine, store, tenant, now)
        for dataset in marked.datasets:
            uploads.clear(engine, store, dataset.prefix, False, now)
        since = done.take(marked)


def clear(engine: Engine, store: ObjectStore, tenant: TenantId, now: datetime) -> None:
    """Remove the bytes of the versions that are marked, unless somebody has put their user under hold since."""
    with reading(engine) as session:
        enter(session, tenant)
        marked = (Tombstone.tenant_id == tenant, Tombstone.cleared_at.is_(None))
        rows = select(AdapterVersion.id, AdapterVersion.prefix).join(Tombstone).where(*marked, ~held())
        rows = rows.join(Adapter, Adapter.id == AdapterVersion.adapter_id).join(User, User.id == Adapter.user_id)
        left = session.execute(rows.order_by(AdapterVersion.prefix)).tuples().all()
    for _, prefix in left:
        store.clear(prefix)
    with transaction(engine) as session:
        enter(session, tenant)
        for start in range(0, len(left), _BATCH):
            ids = [version for version, _ in left[start : start + _BATCH]]
            cleared = update(Tombstone).where(Tombstone.tenant_id == tenant, Tombstone.version_id.in_(ids))
            session.execute(cleared.values(cleared_at=now))


def _mark(session: Session, tenant: TenantId, now: datetime, since: AdapterId | None = None) -> Collected:
    """Mark a batch of what nothing keeps: versions first, since datasets are kept for their sake."""
    enter(session, tenant)
    keep_holds(session, tenant)
    kept = retention.policy(session, tenant)
    if kept is None:
        return Collected()
    rule = f"kept are {retention.rule(kept)}"
    versions = retention.expired_versions(session, tenant, kept, now, _BATCH, since)
    for one in versions:
        session.add(Tombstone(version_id=one.id, tenant_id=tenant, reason=rule, at=now))
        served_name = one.prefix.rpartition("/")[2]
        body = {"number": one.number, "served_name": served_name, "reason": rule}
        note(session, tenant, "version removed", one.id, body, now)
    session.flush()
    datasets = retention.expired_datasets(session, tenant, now, _BATCH)
    for one in datasets:
        mine = (Dataset.tenant_id == tenant, Dataset.id == one.id)
        session.execute(update(Dataset).where(*mine).values(removed_at=now))
        session.add(Upload(prefix=one.prefix, tenant_id=tenant, job_id=None, sweeping=True, lease_until=now))
        note(session, tenant, "dataset removed", one.id, {"reason": rule}, now)
    looked = update(RetentionPolicy).where(RetentionPolicy.tenant_id == tenant)
    session.execute(looked.values(collected_at=now))
    return Collected(versions, datasets)
