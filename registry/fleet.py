"""Moving an alias of many adapters of a tenant at once: one transaction, so that readers see only old or new.

The moves are written first, then the aliases are set by what was written, each from where its move says that it was: if
one is not there any more, somebody moved it meanwhile, and nothing changes at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, and_, exists, func, insert, literal, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, aliased

from registry import freshness
from registry.aliases import COPIED, MOVED, ROLLED_BACK
from registry.errors import NameRefused, PromotionRefused
from registry.living import living
from registry.models import (
    Adapter,
    AdapterVersion,
    Alias,
    AliasMove,
    Event,
    SharedBase,
    Tenant,
    Tombstone,
    User,
    UtcTime,
)
from registry.names import LATEST, TenantId, check_plain, check_user, check_words
from registry.protection import check_movable

_COLUMNS = ("tenant_id", "adapter_id", "name", "kind", "from_id", "to_id", "actor", "reason", "at", "fleet_id")
_NOBODY = ("no adapter's alias would move", "see `lora list`, or change --where")
_CONDITIONS = "user=NAME, user=START*, adapter=NAME, base=DIGEST, since=TIME and until=TIME, such as since=2026-03-01"


@dataclass(frozen=True)
class Where:
    """Which adapters are meant: those that every given condition holds for."""

    user: str = ""  # a name, or the beginning of one and a *
    adapter: str = ""
    base: str = ""  # digest of the base of the version that is moved to, or its beginning
    since: datetime | None = None  # when that version was made
    until: datetime | None = None

    @classmethod
    def parse(cls, conditions: Sequence[str]) -> "Where":
        """Read conditions such as `user=a*` and `since=2026-03-01`.  Raises NameRefused."""
        given: dict[str, Any] = {}  # strings, and moments
        for text in conditions:
            name, _, value = text.partition("=")
            if name in given or not value:
                raise NameRefused("condition", text, f"each once: {_CONDITIONS}")
            given[name] = _read(text, name, value)
        return cls(**given)

    def terms(self, made: type[AdapterVersion | Alias] = AdapterVersion) -> list[ColumnElement[bool]]:
        """The conditions, on a user, an adapter, a version and its base; `made` tells when the version was."""
        terms: list[ColumnElement[bool]] = []
        if self.user.endswith("*"):
            terms.append(User.name.startswith(self.user.removesuffix("*"), autoescape=True))
        elif self.user:
            terms.append(User.name == self.user)
        if self.adapter:
            terms.append(Adapter.name == self.adapter)
        if self.base:
            terms.append(SharedBase.digest.startswith(self.base, autoescape=True))
        if self.since:
            terms.append(made.created_at >= self.since)
        if self.until:
            terms.append(made.created_at < self.until)
        return terms


@dataclass(frozen=True)
class FleetMove:
    """What was moved: the number to take it back by, how many adapters' aliases, and how many of them it made."""

    fleet_id: int
    count: int
    made: int


def promote_all(
    session: Session,
    tenant: TenantId,
    alias: str,
    source: str,
    where: Where,
    *,
    actor: str,
    reason: str,
    now: datetime,
    force: bool = False,
    override: bool = False,
) -> FleetMove:
    """Point an alias of each adapter that is meant at what another of its aliases points to.

    Versions that the gate refused are left out unless forced.  Raises AliasProtected, and PromotionRefused for nobody.
    """
    check_plain("alias", source)
    fleet_id = _begin(session, tenant, alias, actor, reason, now, override)
    wanted, current = aliased(Alias), aliased(Alias)
    words = _words(alias, MOVED, current.version_id, wanted.version_id, actor, reason, now, fleet_id)
    chosen = (
        select(literal(tenant), wanted.adapter_id, *words)
        .where(
            wanted.tenant_id == tenant,
            wanted.name == source,
            or_(current.version_id.is_(None), current.version_id != wanted.version_id),
            living(),
            *where.terms(),
            *([] if force else [AdapterVersion.state == "accepted"]),
        )
        .join(Adapter, and_(Adapter.tenant_id == tenant, Adapter.id == wanted.adapter_id))
        .join(User, and_(User.tenant_id == tenant, User.id == Adapter.user_id))
        .join(AdapterVersion, and_(AdapterVersion.tenant_id == tenant, AdapterVersion.id == wanted.version_id))
        .join(SharedBase, SharedBase.id == AdapterVersion.base_id)
        .outerjoin(
            current,
            and_(current.tenant_id == tenant, current.adapter_id == wanted.adapter_id, current.name == alias),
        )
    )
    session.execute(insert(AliasMove).from_select(_COLUMNS, chosen))
    return _carry_out(session, tenant, alias, fleet_id, _NOBODY)


def roll_back_all(
    session: Session,
    tenant: TenantId,
    alias: str,
    fleet_id: int | None = None,
    *,
    actor: str,
    reason: str,
    now: datetime,
    override: bool = False,
) -> FleetMove:
    """Take a fleet's move back, by default the last of that alias, for every adapter whose last move it still is.

    An alias that it made stays where it is: there is nothing before it; and so does one whose earlier version retention
    has removed.  Raises AliasProtected, PromotionRefused.
    """
    number = _begin(session, tenant, alias, actor, reason, now, override)
    undone = fleet_id or _last(session, tenant, alias)
    later, done = aliased(AliasMove), aliased(AliasMove)
    words = _words(alias, ROLLED_BACK, done.to_id, done.from_id, actor, reason, now, number)
    moved_since = exists().where(later.adapter_id == done.adapter_id, later.name == alias, later.id > done.id)
    chosen = select(literal(tenant), done.adapter_id, *words).where(
        done.tenant_id == tenant,
        done.name == alias,
        done.fleet_id == undone,
        done.kind == MOVED,
        done.from_id.is_not(None),
        ~moved_since,
        ~exists().where(Tombstone.version_id == done.from_id),
    )
    session.execute(insert(AliasMove).from_select(_COLUMNS, chosen))
    why = f"nothing of move {undone} can be taken back: what it made has no version before it, or one that is gone"
    return _carry_out(session, tenant, alias, number, (f"{why}, or has moved since", "see `lora history TENANT/USER`"))


def _begin(
    session: Session, tenant: TenantId, alias: str, actor: str, reason: str, now: datetime, override: bool
) -> int:
    """Check what was said, wait for another fleet's move of this tenant, and give this one its number."""
    check_plain("alias", alias)
    check_words("actor", actor)
    check_words("reason", reason)
    check_movable(session, tenant, alias, override)
    # Not FOR UPDATE: that would hold up whoever publishes, since their rows point to the tenant's.
    session.execute(select(Tenant.id).where(Tenant.id == tenant).with_for_update(key_share=True))
    event = Event(
        tenant_id=tenant, kind="fleet moved", subject=str(tenant), at=now,
        body={"alias": alias, "actor": actor, "reason": reason},
    )  # fmt: skip
    session.add(event)
    session.flush()
    return event.id


def _words(alias: str, kind: str, start: Any, end: Any, *told: Any) -> list[ColumnElement[Any]]:  # columns, and facts
    """The columns of a move after the adapter's, in their order."""
    actor, reason, now, fleet_id = told
    return [literal(alias), literal(kind), start, end, literal(actor), literal(reason), literal(now, UtcTime()),
            literal(fleet_id)]  # fmt: skip


def _carry_out(session: Session, tenant: TenantId, alias: str, fleet_id: int, nobody: tuple[str, str]) -> FleetMove:
    """Set the aliases by the moves that were written; `nobody` says why there are none, and what to do.

    Raises PromotionRefused for none, and unless every one is where it was.
    """
    mine = (AliasMove.tenant_id == tenant, AliasMove.name == alias, AliasMove.fleet_id == fleet_id)
    count = session.scalars(select(func.count()).select_from(AliasMove).where(*mine)).one()
    if not count:
        raise PromotionRefused(f"fleet@{alias}", *nobody)
    moved = (Alias.tenant_id == tenant, Alias.name == alias, Alias.adapter_id == AliasMove.adapter_id)
    target = (AdapterVersion.tenant_id == tenant, AdapterVersion.id == AliasMove.to_id)
    if alias == LATEST:
        _wait_for_publishers(session, tenant, fleet_id)
    copied = {name: getattr(AdapterVersion, name) for name in COPIED}
    there = update(Alias).where(*moved, Alias.version_id == AliasMove.from_id, *mine, *target)
    there = there.values(version_id=AliasMove.to_id, **copied)
    pointing = (AliasMove.tenant_id, AliasMove.adapter_id, AliasMove.name, AliasMove.to_id, *copied.values())
    new = select(*pointing).join(AdapterVersion, and_(*target)).where(*mine)
    columns = ("tenant_id", "adapter_id", "name", "version_id", *copied)
    # 100,000 rows are not to be looked for in the session, and SQLAlchemy forgets how many it inserted.
    options = {"synchronize_session": False, "preserve_rowcount": True}
    try:
        set_ = _rows(session.execute(there, execution_options=options))
        new = new.where(AliasMove.from_id.is_(None))
        made = _rows(session.execute(insert(Alias).from_select(columns, new), execution_options=options))
        set_ += made
    except IntegrityError:  # somebody made one of these aliases meanwhile
        set_, made = -1, 0
    if set_ != count:
        why = "somebody moved one of them meanwhile, so nothing was changed"
        raise PromotionRefused(f"fleet@{alias}", why, "run it again")
    # Under the aliases' locks: no collection can come between.
    removed = exists().where(Tombstone.tenant_id == AliasMove.tenant_id, Tombstone.version_id == AliasMove.to_id)
    if session.scalar(select(AliasMove.id).where(*mine, removed).limit(1)) is not None:
        why = "retention has removed a version that one of them would point to, so nothing was changed"
        raise PromotionRefused(f"fleet@{alias}", why, "run it again")
    if alias == LATEST:
        freshness.latests_moved(session, tenant, alias, fleet_id)
    return FleetMove(fleet_id, count, made)


def _wait_for_publishers(session: Session, tenant: TenantId, fleet_id: int) -> None:
    """Lock the aliases in the order in which whoever publishes many versions does: else each waits for the other."""
    of_fleet = (AliasMove.tenant_id == Alias.tenant_id, AliasMove.fleet_id == fleet_id)
    moved = and_(*of_fleet, AliasMove.adapter_id == Alias.adapter_id, AliasMove.name == Alias.name)
    there = select(Alias.adapter_id).join(AliasMove, moved).where(Alias.tenant_id == tenant, Alias.name == LATEST)
    session.execute(there.order_by(Alias.adapter_id).with_for_update(of=Alias)).all()


def _rows(result: Any) -> int:  # SQLAlchemy says Result where an insert or update gives a CursorResult
    return int(result.rowcount)


def _last(session: Session, tenant: TenantId, alias: str) -> int:
    """The last fleet's move of an alias.  Raises PromotionRefused where there was none."""
    mine = (AliasMove.tenant_id == tenant, AliasMove.name == alias, AliasMove.fleet_id.is_not(None))
    moved = select(AliasMove.fleet_id).where(*mine, AliasMove.kind == MOVED)
    found = session.scalar(moved.order_by(AliasMove.fleet_id.desc()).limit(1))
    if found is None:
        raise PromotionRefused(f"fleet@{alias}", "no fleet was moved", "if it was another alias, pass --alias")
    return found


def _read(text: str, name: str, value: str) -> object:
    """One condition's value, checked.  Raises NameRefused."""
    refused = NameRefused("condition", text, _CONDITIONS)
    if name in ("since", "until"):
        try:
            return datetime.fromisoformat(value).astimezone(UTC)
        except (ValueError, OverflowError):  # no moment, or before or after all that UTC can say
            raise refused from None
    if name == "base" and len(value) <= 64 and value.isascii() and value.isalnum():
        return value
    if name == "user":
        check_user(value.removesuffix("*")) if value != "*" else None
        return value
    if name == "adapter":
        return check_plain("adapter", value)
    raise refused
