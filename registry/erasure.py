"""Every row that tells of one user, and its deletion; a new table of users' rows has to be added here."""

from typing import Any

from sqlalchemy import Delete, Select, delete, exists, func, select
from sqlalchemy.orm import Session

from registry.models import (
    Adapter,
    AdapterVersion,
    Alias,
    AliasMove,
    Dataset,
    Evaluation,
    Event,
    Facts,
    Job,
    Pin,
    Schedule,
    Tombstone,
    User,
)
from registry.names import AdapterId, TenantId, UserId, VersionId

_CHUNK = 1000  # ids in one statement: databases bound how many they take


def delete_rows(session: Session, tenant: TenantId, user: UserId) -> Facts:
    """Delete a user's rows, the last to be pointed to last; returns what they were by kind, with bytes of objects."""
    data, weights = _bytes(session, tenant, user)
    deleted: Facts = {"events": _delete_events(session, tenant, user)}
    for kind, statement in _statements(tenant, user).items():
        deleted[kind] = {"count": _rows(session, statement)}
    deleted["datasets"]["bytes"], deleted["versions"]["bytes"] = data, weights
    return {kind: found for kind, found in deleted.items() if found["count"]}


def adapters_of(tenant: TenantId, user: UserId) -> Select[tuple[AdapterId]]:
    """The ids of a user's adapters."""
    return select(Adapter.id).where(Adapter.tenant_id == tenant, Adapter.user_id == user)


def _versions_of(tenant: TenantId, user: UserId) -> Select[tuple[VersionId]]:
    mine = (AdapterVersion.tenant_id == tenant, AdapterVersion.adapter_id.in_(adapters_of(tenant, user)))
    return select(AdapterVersion.id).where(*mine)


def _statements(tenant: TenantId, user: UserId) -> dict[str, Delete]:
    adapters, versions = adapters_of(tenant, user), _versions_of(tenant, user)
    weights = (AdapterVersion.tenant_id == tenant, AdapterVersion.adapter_id.in_(adapters))
    return {
        "scores": delete(Evaluation).where(Evaluation.tenant_id == tenant, Evaluation.version_id.in_(versions)),
        "aliases": delete(Alias).where(Alias.tenant_id == tenant, Alias.adapter_id.in_(adapters)),
        "alias moves": delete(AliasMove).where(AliasMove.tenant_id == tenant, AliasMove.adapter_id.in_(adapters)),
        "pins": delete(Pin).where(Pin.tenant_id == tenant, Pin.version_id.in_(versions)),
        "tombstones": delete(Tombstone).where(Tombstone.tenant_id == tenant, Tombstone.version_id.in_(versions)),
        "versions": delete(AdapterVersion).where(*weights),
        "schedules": delete(Schedule).where(Schedule.tenant_id == tenant, Schedule.adapter_id.in_(adapters)),
        "jobs": delete(Job).where(Job.tenant_id == tenant, Job.adapter_id.in_(adapters)),
        "datasets": delete(Dataset).where(Dataset.tenant_id == tenant, Dataset.user_id == user),
        "adapters": delete(Adapter).where(Adapter.tenant_id == tenant, Adapter.user_id == user),
        "users": delete(User).where(User.tenant_id == tenant, User.id == user),
    }


def _delete_events(session: Session, tenant: TenantId, user: UserId) -> dict[str, int]:
    """Delete the events whose subject is the user or anything of theirs."""
    adapters = adapters_of(tenant, user)
    jobs = select(Job.id).where(Job.tenant_id == tenant, Job.adapter_id.in_(adapters))
    datasets = select(Dataset.id).where(Dataset.tenant_id == tenant, Dataset.user_id == user)
    subjects, count = [str(user)], 0
    for ids in (adapters, _versions_of(tenant, user), jobs, datasets):
        subjects += map(str, session.scalars(ids))
    for start in range(0, len(subjects), _CHUNK):
        mine = (Event.tenant_id == tenant, Event.subject.in_(subjects[start : start + _CHUNK]))
        count += _rows(session, delete(Event).where(*mine))
    return {"count": count}


def _bytes(session: Session, tenant: TenantId, user: UserId) -> tuple[int, int]:
    """Bytes of the user's datasets and versions, less what retention has removed before."""
    mine = (Dataset.tenant_id == tenant, Dataset.user_id == user)
    data = select(func.sum(Dataset.size)).where(*mine, Dataset.removed_at.is_(None))
    own = (AdapterVersion.tenant_id == tenant, AdapterVersion.adapter_id.in_(adapters_of(tenant, user)))
    buried = exists().where(Tombstone.tenant_id == AdapterVersion.tenant_id, Tombstone.version_id == AdapterVersion.id)
    weights = select(func.sum(AdapterVersion.size)).where(*own, ~buried)
    return int(session.scalar(data) or 0), int(session.scalar(weights) or 0)


def _rows(session: Session, statement: Delete) -> int:
    # SQLAlchemy says Result where a deletion gives a CursorResult.
    result: Any = session.execute(statement, execution_options={"synchronize_session": False})
    return int(result.rowcount)
