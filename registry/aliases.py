"""Moving what an alias points to, and remembering every move.

A move is a compare-and-set: `expected` is the version number that the alias must still point to, 0 where there must be
no alias yet, None to move it whatever it points to.
"""

from datetime import datetime
from typing import Any

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from registry import freshness
from registry.errors import AliasMoved, PromotionRefused
from registry.models import AdapterVersion, Alias, AliasMove
from registry.names import LATEST, AdapterId, Reference, TenantId, VersionId, check_plain, check_words
from registry.protection import check_movable
from registry.queries import find_or_add, holder, note, version
from registry.retention import check_living

MOVED, ROLLED_BACK = "moved", "rolled back"  # the kinds of a move: what going back once more depends on
COPIED = ("base_id", "created_at", "gain", "loss")  # of a version, into the alias that points to it


def promote(
    session: Session,
    tenant: TenantId,
    reference: Reference,
    alias: str,
    *,
    actor: str,
    reason: str,
    now: datetime,
    force: bool = False,
    expected: int | None = None,
    override: bool = False,
) -> AdapterVersion:
    """Point an alias at the version that a reference means.

    Raises PromotionRefused for one the gate refused, VersionGone for one that retention has removed, AliasProtected,
    and AliasMoved when it does not point to what is expected.
    """
    _check(session, tenant, alias, actor, reason, override)
    chosen = version(session, tenant, reference)
    if chosen.state == "refused" and not force:
        raise PromotionRefused(str(reference), f"the gate refused it ({chosen.reason})", "retrain or pass --force")
    move(session, tenant, chosen, alias, actor=actor, reason=reason, now=now, expected=expected)
    check_living(session, tenant, chosen, str(reference))  # under the alias's lock: no collection can come between
    return chosen


def rollback(
    session: Session,
    tenant: TenantId,
    reference: Reference,
    alias: str,
    *,
    actor: str,
    reason: str,
    now: datetime,
    expected: int | None = None,
    override: bool = False,
) -> AdapterVersion:
    """Point an alias back at the version it pointed to before its last move.

    Raises PromotionRefused at the first, VersionGone where that was removed, AliasProtected, AliasMoved when it does
    not point to what is expected.
    """
    _check(session, tenant, alias, actor, reason, override)
    adapter_id = holder(session, tenant, reference.user, reference.adapter).adapter.id
    session.scalar(_locked(tenant, adapter_id, alias))  # before the history is read: nobody adds to it meanwhile
    target = _before(session, tenant, adapter_id, alias)
    if target is None:
        where = f"{reference.label}@{alias}"
        raise PromotionRefused(where, "it has no earlier version to go back to", "see `lora history`")
    mine = (AdapterVersion.tenant_id == tenant, AdapterVersion.id == target)
    chosen = session.scalars(select(AdapterVersion).where(*mine)).one()
    move(
        session, tenant, chosen, alias, actor=actor, reason=reason, now=now, kind=ROLLED_BACK, expected=expected
    )  # fmt: skip
    check_living(session, tenant, chosen, f"{reference.label}:{chosen.number}")
    return chosen


def move(
    session: Session,
    tenant: TenantId,
    chosen: AdapterVersion,
    alias: str,
    *,
    actor: str,
    reason: str,
    now: datetime,
    kind: str = MOVED,
    expected: int | None = None,
) -> None:
    """Point an alias at a version and write the move down.  Raises AliasMoved."""
    made: list[Alias] = []

    def make() -> Alias:
        made.append(Alias(tenant_id=tenant, adapter_id=chosen.adapter_id, name=alias, **_pointing(chosen)))
        return made[0]

    found = find_or_add(session, _locked(tenant, chosen.adapter_id, alias), make)
    earlier = None if made and found is made[0] else found.version_id
    _check_expected(session, tenant, alias, earlier, expected)
    if earlier == chosen.id:
        return
    for name, value in _pointing(chosen).items():
        setattr(found, name, value)
    if alias == LATEST:
        session.connection().execute(freshness.latest_moved(tenant, chosen))
    _write_down(session, tenant, chosen, alias, earlier, kind=kind, actor=actor, reason=reason, now=now)
    session.flush()


def _pointing(chosen: AdapterVersion) -> dict[str, Any]:  # columns of unlike types
    """What the row of an alias says when it points to that version."""
    return {"version_id": chosen.id, **{name: getattr(chosen, name) for name in COPIED}}


def _write_down(
    session: Session, tenant: TenantId, chosen: AdapterVersion, alias: str, earlier: VersionId | None,
    *, kind: str, actor: str, reason: str, now: datetime,
) -> None:  # fmt: skip
    session.add(
        AliasMove(
            tenant_id=tenant, adapter_id=chosen.adapter_id, name=alias, kind=kind, from_id=earlier, to_id=chosen.id,
            actor=actor, reason=reason, at=now,
        )
    )  # fmt: skip
    body = {"alias": alias, "number": chosen.number, "actor": actor}
    note(session, tenant, "alias moved", chosen.id, body, now)


def _check(session: Session, tenant: TenantId, alias: str, actor: str, reason: str, override: bool) -> None:
    check_plain("alias", alias)
    check_words("actor", actor)
    check_words("reason", reason)
    check_movable(session, tenant, alias, override)


def _locked(tenant: TenantId, adapter: AdapterId, alias: str) -> Select[tuple[Alias]]:
    """The alias's row as it is now, locked: whoever else moves it waits."""
    mine = (Alias.tenant_id == tenant, Alias.adapter_id == adapter, Alias.name == alias)
    return select(Alias).where(*mine).with_for_update().execution_options(populate_existing=True)


def _check_expected(session: Session, tenant: TenantId, alias: str, at: VersionId | None, expected: int | None) -> None:
    if expected is None:
        return
    mine = (AdapterVersion.tenant_id == tenant, AdapterVersion.id == at)
    found = session.scalar(select(AdapterVersion.number).where(*mine)) if at else 0
    if found != expected:
        raise AliasMoved(alias, expected, found or 0)


def _before(session: Session, tenant: TenantId, adapter: AdapterId, alias: str) -> VersionId | None:
    """Where an alias pointed before; going back twice goes back two, not to and fro."""
    moves = session.scalars(
        select(AliasMove)
        .where(AliasMove.tenant_id == tenant, AliasMove.adapter_id == adapter, AliasMove.name == alias)
        .order_by(AliasMove.id)
    )
    path: list[VersionId] = []
    for step in moves:
        if step.kind == ROLLED_BACK:
            path.pop()
        else:
            path.append(step.to_id)
    return path[-2] if len(path) > 1 else None
