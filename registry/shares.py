"""What a tenant may have of the factory: its weight beside others, and how many jobs and versions."""

from datetime import datetime, timedelta

from sqlalchemy import and_, func, or_, select
from sqlalchemy.orm import Session

from registry.errors import QuotaRefused
from registry.models import Facts, Job, Share
from registry.names import AdapterId, TenantId
from registry.queries import find_or_add, note

DAY = timedelta(hours=24)
MADE = ("published", "refused")  # states of a job that became a version
_NO_END = 1 << 30  # room of a tenant without a quota
_LIGHTEST, _HEAVIEST, _MOST = 0.01, 100.0, 1_000_000_000


def share(session: Session, tenant: TenantId) -> Share:
    """What a tenant may have, and what it had; made where it is new."""
    return find_or_add(session, select(Share).where(Share.tenant_id == tenant), lambda: Share(tenant_id=tenant))


def set_quota(session: Session, tenant: TenantId, changed: Facts, now: datetime) -> Share:
    """Change a tenant's weight or limits (None lifts one).  Raises QuotaRefused."""
    found = share(session, tenant)
    for name, value in changed.items():
        if name == "weight" and not _LIGHTEST <= value <= _HEAVIEST:
            raise QuotaRefused(name, value, f"give one of {_LIGHTEST:g} to {_HEAVIEST:g}; 1 is usual")
        if name != "weight" and value is not None and not 0 <= value <= _MOST:
            raise QuotaRefused(name, value, f"give 0 to {_MOST}, or lift all limits with --no-limits")
        setattr(found, name, value)
    note(session, tenant, "quota set", tenant, changed, now)
    session.flush()
    return found


def room(session: Session, share: Share, now: datetime) -> int:
    """How many more jobs a tenant may have started now: for a claim's block, or the tenant's own."""
    if not share.limited:
        return _NO_END
    alive = (Job.finished_at.is_(None), Job.state == "running", Job.lease_until >= now)
    counted = select(func.count(Job.id)).where(Job.tenant_id == share.tenant_id, *alive)
    running = session.scalar(counted) or 0
    free = _NO_END if share.max_running is None else share.max_running - running
    if share.max_versions is None:
        return free
    made = (Job.finished_at > now - DAY, Job.state.in_(MADE))
    done = session.scalar(select(func.count(Job.id)).where(Job.tenant_id == share.tenant_id, *made)) or 0
    return min(free, share.max_versions - done - running)


def full_until(session: Session, tenant: TenantId, adapter: AdapterId, most: int, now: datetime) -> datetime | None:
    """Until when an adapter has as many versions of the last 24 hours as it may; None where it has fewer.

    A job that waits or runs counts as the version that it will be.
    """
    mine = (Job.tenant_id == tenant, Job.adapter_id == adapter)
    recent = or_(Job.finished_at.is_(None), and_(Job.finished_at > now - DAY, Job.state.in_(MADE)))
    found = session.scalars(select(Job.finished_at).where(*mine, recent)).all()
    if len(found) < most:
        return None
    over = sorted(moment for moment in found if moment)
    return over[len(found) - most] + DAY if len(found) - most < len(over) else now + DAY
