"""Legal holds: while one is on a user or a tenant, nothing of theirs is collected or forgotten."""

from datetime import datetime

from sqlalchemy import ColumnElement, Exists, delete, exists, or_, select
from sqlalchemy.orm import Session

from registry.errors import NotFound, UnderHold
from registry.models import Hold, Tenant, User
from registry.names import TenantId, UserId, check_words
from registry.queries import find_or_add, note


def hold(session: Session, tenant: TenantId, user: str | None, *, actor: str, reason: str, now: datetime) -> None:
    """Put a user, or (None) a whole tenant, under hold; one that is stays as it was.  Raises NotFound."""
    check_words("actor", actor)
    check_words("reason", reason)
    whom = _locked(session, tenant, user)
    find_or_add(
        session,
        select(Hold).where(Hold.tenant_id == tenant, _on(whom)),
        lambda: Hold(tenant_id=tenant, user_id=whom, actor=actor, reason=reason, at=now),
    )
    note(session, tenant, "put under hold", whom or tenant, {"actor": actor, "reason": reason}, now)


def unhold(session: Session, tenant: TenantId, user: str | None, *, actor: str, reason: str, now: datetime) -> None:
    """Lift a hold.  Raises NotFound where there is none."""
    check_words("actor", actor)
    check_words("reason", reason)
    whom = _locked(session, tenant, user)
    lifted = delete(Hold).where(Hold.tenant_id == tenant, _on(whom)).returning(Hold.id)
    if session.scalar(lifted) is None:
        raise NotFound("hold on", user or "this tenant", "see `lora hold TENANT` for those there are")
    note(session, tenant, "hold lifted", whom or tenant, {"actor": actor, "reason": reason}, now)


def holds(session: Session, tenant: TenantId) -> list[tuple[Hold, str | None]]:
    """The holds of a tenant, each with its user's name (None: the whole tenant), the oldest first."""
    rows = (
        select(Hold, User.name)
        .outerjoin(User, User.id == Hold.user_id)
        .where(Hold.tenant_id == tenant)
        .order_by(Hold.at, Hold.id)
    )
    return [row.tuple() for row in session.execute(rows)]


def keep_holds(session: Session, tenant: TenantId) -> None:
    """See that no hold is put on a tenant or its users, or lifted, before this transaction ends."""
    session.execute(select(Tenant.id).where(Tenant.id == tenant).with_for_update(read=True))


def check_free(session: Session, tenant: TenantId, user: UserId, whom: str) -> None:
    """That nothing holds a user, and that nobody puts a hold on them or the tenant before this transaction ends.

    Raises UnderHold, which calls the user `whom`.
    """
    keep_holds(session, tenant)
    session.execute(select(User.id).where(User.tenant_id == tenant, User.id == user).with_for_update())
    on = or_(Hold.user_id == user, Hold.user_id.is_(None))
    found = session.scalar(select(Hold).where(Hold.tenant_id == tenant, on).order_by(Hold.user_id.is_(None)).limit(1))
    if found is not None:
        raise UnderHold(whom if found.user_id else whom.partition("/")[0], found.actor, found.reason)


def held() -> Exists:
    """The condition that the user of a statement's rows, or the tenant, is under hold."""
    return exists().where(Hold.tenant_id == User.tenant_id, or_(Hold.user_id == User.id, Hold.user_id.is_(None)))


def _locked(session: Session, tenant: TenantId, user: str | None) -> UserId | None:
    """Wait for whoever collects or forgets there now; gives the user's id.  Raises NotFound."""
    # Not FOR UPDATE: that would hold up whoever publishes, since their rows point to the tenant's.
    session.execute(select(Tenant.id).where(Tenant.id == tenant).with_for_update(key_share=True))
    if user is None:
        return None
    found = session.scalar(select(User.id).where(User.tenant_id == tenant, User.name == user).with_for_update())
    if found is None:
        raise NotFound("user", user, "see `lora list TENANT` for those there are")
    return found


def _on(user: UserId | None) -> ColumnElement[bool]:
    return Hold.user_id.is_(None) if user is None else Hold.user_id == user
