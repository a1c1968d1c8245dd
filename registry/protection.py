"""Protected aliases: they move only when whoever moves them says that they mean to, the gate never."""

from datetime import datetime

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from registry.errors import AliasProtected, NotFound
from registry.models import ProtectedAlias
from registry.names import TenantId, check_plain, check_words
from registry.queries import find_or_add, note


def protect(session: Session, tenant: TenantId, alias: str, *, actor: str, reason: str, now: datetime) -> None:
    """Protect an alias of that name on every adapter of a tenant, those still to come among them."""
    check_plain("alias", alias)
    check_words("actor", actor)
    check_words("reason", reason)
    mine = (ProtectedAlias.tenant_id == tenant, ProtectedAlias.name == alias)
    find_or_add(
        session,
        select(ProtectedAlias).where(*mine),
        lambda: ProtectedAlias(tenant_id=tenant, name=alias, actor=actor, reason=reason, at=now),
    )
    note(session, tenant, "alias protected", tenant, {"alias": alias, "actor": actor, "reason": reason}, now)


def unprotect(session: Session, tenant: TenantId, alias: str, *, actor: str, reason: str, now: datetime) -> None:
    """Let an alias move freely again.  Raises NotFound for one that is not protected."""
    check_plain("alias", alias)
    check_words("actor", actor)
    check_words("reason", reason)
    mine = (ProtectedAlias.tenant_id == tenant, ProtectedAlias.name == alias)
    if session.scalar(delete(ProtectedAlias).where(*mine).returning(ProtectedAlias.name)) is None:
        raise NotFound("protected alias", alias, "see `lora protect TENANT` for those there are")
    note(session, tenant, "alias unprotected", tenant, {"alias": alias, "actor": actor, "reason": reason}, now)


def protected(session: Session, tenant: TenantId) -> list[ProtectedAlias]:
    """The protected aliases of a tenant, with who protected them and why, by name."""
    mine = select(ProtectedAlias).where(ProtectedAlias.tenant_id == tenant)
    return list(session.scalars(mine.order_by(ProtectedAlias.name)))


def is_protected(session: Session, tenant: TenantId, alias: str) -> bool:
    """Whether only somebody who means to may move it."""
    mine = (ProtectedAlias.tenant_id == tenant, ProtectedAlias.name == alias)
    return session.connection().scalar(select(ProtectedAlias.name).where(*mine)) is not None


def check_movable(session: Session, tenant: TenantId, alias: str, override: bool) -> None:
    """Raises AliasProtected, unless the mover overrides it."""
    mine = (ProtectedAlias.tenant_id == tenant, ProtectedAlias.name == alias)
    found = session.scalar(select(ProtectedAlias).where(*mine))
    if found is not None and not override:
        raise AliasProtected(alias, found.actor, found.reason)
