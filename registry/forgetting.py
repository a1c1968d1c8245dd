"""Forgetting a user: everything of theirs goes, in an order that a crash at any point does not break.

begin    one transaction: the intent, the user's name off their row, open jobs cancelled under a new fence, schedules
         gone.  From here on nobody finds them, and their late worker's commit fails; who comes under the same name is
         somebody new.
bytes    the store below the user's prefix, then what this machine keeps.
rows     one transaction: every row of theirs, and what was deleted, by kind, onto the intent.
compact  the database's file, where deleted rows would stay readable.
receipt  the intent becomes the receipt: it holds nothing of theirs but a digest of their name.

Each step may be done again; `forget` and upkeep go on with what was interrupted.
"""

import hashlib
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import delete, func, select, update
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from registry.erasure import adapters_of, delete_rows
from registry.errors import NameRefused, NamesakeLeft, NotFound, NotYetForgotten
from registry.holds import check_free, keep_holds
from registry.jobs import BUSY
from registry.keys import user_prefix
from registry.living import NAMELESS
from registry.models import Adapter, AdapterVersion, Facts, Forgetting, Job, Schedule, Tenant, Upload, User
from registry.names import TenantId, check_user, check_words
from registry.queries import note, tenant_id
from registry.session import compact, reading, transaction
from registry.store import ObjectStore
from registry.tenancy import Across, across, enter

CANCELLED = "cancelled"
_COST = {"n": 2**14, "r": 8, "p": 1}  # of scrypt: a twentieth of a second for each name that somebody tries
CleanHere = Callable[[Sequence[str]], Facts]  # served names to what was removed from this machine, by kind


@dataclass(frozen=True)
class Wish:
    """Who is to be forgotten, by whom and why; `secret` keys the digest that the receipt keeps of their name."""

    tenant: str
    user: str
    secret: str
    actor: str
    reason: str

    def __post_init__(self) -> None:
        """Raises NameRefused, also for a reason that names the user: the receipt keeps it."""
        check_user(self.user)
        check_words("actor", self.actor)
        check_words("reason", self.reason)
        if _names(self.reason.casefold(), self.user.casefold()):
            raise NameRefused("reason", self.reason, "words that do not name the user: the receipt keeps them")


@dataclass(frozen=True)
class Receipt:
    """What was deleted of somebody, when, by whom and why; `person` answers whether it was them, and tells no name."""

    id: uuid.UUID
    tenant: str
    person: str
    actor: str
    reason: str
    begun_at: datetime
    finished_at: datetime | None
    deleted: Facts


def forget(engine: Engine, store: ObjectStore, wish: Wish, clean_here: CleanHere, now: datetime) -> Receipt:
    """Forget a user, or go on with it; once it is done, its receipt again.

    Raises NotFound, UnderHold, NotYetForgotten while an upload of theirs may still arrive, RegistryInUse, and
    NamesakeLeft where it went on with an earlier request and somebody new has come under that name since.
    """
    with transaction(engine) as session:
        tenant = tenant_id(session, wish.tenant)
        earlier = _known(session, tenant, wish, finished=False)
        found = earlier or _begin(session, tenant, wish, now)
        for finished in (False, True):  # somebody else may just have begun
            found = found or _known(session, tenant, wish, finished)
        if found is None:
            raise NotFound("user", f"{wish.tenant}/{wish.user}", f"see `lora list {wish.tenant}` for those there are")
    receipt = finish(engine, store, tenant, found.id, clean_here, now)
    if earlier and _is_there(engine, tenant, wish.user):
        raise NamesakeLeft(f"{wish.tenant}/{wish.user}", str(receipt.id))
    return receipt


def finish(
    engine: Engine, store: ObjectStore, tenant: TenantId, id_: uuid.UUID, clean_here: CleanHere, now: datetime
) -> Receipt:
    """Every step after the first.  Raises UnderHold, NotYetForgotten and RegistryInUse; nothing is lost by it."""
    with transaction(engine) as session:
        enter(session, tenant)
        intent = _intent(session, tenant, id_)
        served = _stop(session, tenant, intent, now)
    if intent.finished_at is None:
        if intent.prefix:  # until the rows are gone
            store.clear(intent.prefix)
        here = clean_here(served)
        with transaction(engine) as session:
            enter(session, tenant)
            _delete_rows(session, tenant, _intent(session, tenant, id_), here, now)
        compact(engine)
    with transaction(engine) as session:
        enter(session, tenant)
        return _receipt(session, tenant, _intent(session, tenant, id_), now)


def receipts(session: Session, tenant: TenantId) -> list[Receipt]:
    """Everybody of a tenant who was forgotten, or is to be, the first first."""
    rows = select(Forgetting).where(Forgetting.tenant_id == tenant).order_by(Forgetting.begun_at, Forgetting.id)
    return [_shown(session, tenant, one) for one in session.scalars(rows)]


def receipts_of(session: Session, tenant: TenantId, user: str, secret: str) -> list[Receipt]:
    """Each time that a user of that name was forgotten, or is to be, the first first."""
    mine = (Forgetting.tenant_id == tenant, Forgetting.person.in_(_digests(tenant, user, secret)))
    rows = select(Forgetting).where(*mine).order_by(Forgetting.begun_at, Forgetting.id)
    return [_shown(session, tenant, one) for one in session.scalars(rows)]


def unfinished(engine: Engine) -> list[tuple[TenantId, uuid.UUID]]:
    """Whom somebody began to forget, of all tenants: for upkeep, which goes on with it."""
    with reading(engine) as session, across(session, Across.UPKEEP):
        rows = select(Forgetting.tenant_id, Forgetting.id).where(Forgetting.finished_at.is_(None))
        return [row.tuple() for row in session.execute(rows.order_by(Forgetting.begun_at))]


def anybody(engine: Engine, since: datetime, until: datetime) -> bool:
    """Whether somebody of any tenant began to be forgotten after one moment, up to another."""
    with reading(engine) as session, across(session, Across.UPKEEP):
        between = (Forgetting.begun_at > since, Forgetting.begun_at <= until)
        return session.scalar(select(Forgetting.id).where(*between).limit(1)) is not None


def _begin(session: Session, tenant: TenantId, wish: Wish, now: datetime) -> Forgetting | None:
    """Write the intent down and take the name off the user's row; None where there is no such user."""
    keep_holds(session, tenant)  # before the user's row, as whoever puts a hold on them locks both
    mine = (User.tenant_id == tenant, User.name == wish.user)
    user = session.scalar(select(User).where(*mine).with_for_update())
    if user is None:
        return None
    check_free(session, tenant, user.id, f"{wish.tenant}/{wish.user}")
    intent = Forgetting(
        id=uuid.uuid4(), tenant_id=tenant, person=_digests(tenant, wish.user, wish.secret)[0], user_id=user.id,
        prefix=user_prefix(wish.tenant, user.opaque), deleted={}, begun_at=now,
        actor=wish.actor if wish.actor != wish.user else "the user", reason=wish.reason,
    )  # fmt: skip
    session.add(intent)
    user.name = f"{NAMELESS}{intent.id.hex}"
    session.flush()
    _stop(session, tenant, intent, now)
    return intent


def _known(session: Session, tenant: TenantId, wish: Wish, finished: bool) -> Forgetting | None:
    """The last time that somebody of that name was forgotten, or is still to be."""
    person = Forgetting.person.in_(_digests(tenant, wish.user, wish.secret))
    state = Forgetting.finished_at.is_not(None) if finished else Forgetting.finished_at.is_(None)
    rows = select(Forgetting).where(Forgetting.tenant_id == tenant, person, state)
    return session.scalar(rows.order_by(Forgetting.begun_at.desc()).limit(1))


def _is_there(engine: Engine, tenant: TenantId, user: str) -> bool:
    with reading(engine) as session:
        enter(session, tenant)
        return session.scalar(select(User.id).where(User.tenant_id == tenant, User.name == user)) is not None


def _intent(session: Session, tenant: TenantId, id_: uuid.UUID) -> Forgetting:
    """An intent as it is now, locked: nobody else does the same step."""
    mine = (Forgetting.tenant_id == tenant, Forgetting.id == id_)
    return session.scalars(select(Forgetting).where(*mine).with_for_update()).one()


def _stop(session: Session, tenant: TenantId, intent: Forgetting, now: datetime) -> list[str]:
    """End what is under way: jobs, schedules, uploads; gives the names of the user's versions.  Raises UnderHold."""
    if intent.user_id is None or intent.prefix is None:
        return []
    check_free(session, tenant, intent.user_id, f"the user whom {intent.id} is about")
    adapters = adapters_of(tenant, intent.user_id)
    open_ = (Job.tenant_id == tenant, Job.adapter_id.in_(adapters), Job.state.in_(BUSY))
    scheduled = (Schedule.tenant_id == tenant, Schedule.adapter_id.in_(adapters))
    # In the order in which a tick locks, and whoever publishes; from the last on nobody adds a job.
    for theirs in (
        select(Schedule.adapter_id).where(*scheduled).order_by(Schedule.adapter_id),
        select(Job.id).where(*open_).order_by(Job.id),
        adapters.order_by(Adapter.id),
    ):
        session.execute(theirs.with_for_update()).all()
    over = {"state": CANCELLED, "fence": Job.fence + 1, "lease_until": None, "worker": None, "error": None}
    session.execute(update(Job).where(*open_).values(**over, finished_at=now))
    if gone := session.scalars(delete(Schedule).where(*scheduled).returning(Schedule.adapter_id)).all():
        intent.deleted = {**intent.deleted, "schedules": {"count": len(gone)}}
    below = (Upload.tenant_id == tenant, Upload.prefix.startswith(f"{intent.prefix}/", autoescape=True))
    session.execute(update(Upload).where(*below).values(sweeping=True))
    names = select(AdapterVersion.served_name)
    owned = (AdapterVersion.tenant_id == tenant, AdapterVersion.adapter_id.in_(adapters))
    return list(session.scalars(names.where(*owned)))


def _delete_rows(session: Session, tenant: TenantId, intent: Forgetting, here: Facts, now: datetime) -> None:
    """Delete every row of the user's, and write down how many.  Raises UnderHold, NotYetForgotten."""
    if intent.user_id is None or intent.prefix is None:
        return
    _stop(session, tenant, intent, now)
    below = (Upload.tenant_id == tenant, Upload.prefix.startswith(f"{intent.prefix}/", autoescape=True))
    last = session.scalar(select(func.max(Upload.lease_until)).where(*below))
    if last is not None and last >= now:
        raise NotYetForgotten("an upload of theirs was under way and may arrive", f"{last:%Y-%m-%d %H:%M:%S} UTC")
    session.execute(delete(Upload).where(*below))
    # Outlives their events: SQLite counts on from the highest number there is, and gives out none of theirs again.
    note(session, tenant, "user being forgotten", intent.id, {}, now)
    session.flush()
    intent.deleted = delete_rows(session, tenant, intent.user_id) | intent.deleted | here
    intent.user_id = intent.prefix = None  # before the file is compacted, or it would still hold them


def _receipt(session: Session, tenant: TenantId, intent: Forgetting, now: datetime) -> Receipt:
    """The intent as a receipt, once it holds nothing of the user's but the digest of their name."""
    if intent.finished_at is None:
        intent.prefix, intent.finished_at = None, now  # an earlier release left the prefix until now
        note(session, tenant, "user forgotten", intent.id, {}, now)
        session.flush()
    return _shown(session, tenant, intent)


def _shown(session: Session, tenant: TenantId, one: Forgetting) -> Receipt:
    name = session.scalars(select(Tenant.name).where(Tenant.id == tenant)).one()
    return Receipt(
        one.id, name, one.person, one.actor, one.reason, one.begun_at, one.finished_at, one.deleted
    )  # fmt: skip


def _names(text: str, user: str) -> bool:
    """Whether a text names a user; a name of two or three letters may be part of any word."""
    alone = rf"(?<![a-z0-9]){re.escape(user)}(?![a-z0-9])"
    return user in text if len(user) > 3 else re.search(alone, text) is not None


def _digests(tenant: TenantId, user: str, secret: str) -> list[str]:
    """What receipts say instead of the name: under the secret, and as it was before there was one."""
    salts = dict.fromkeys((tenant.bytes + secret.encode(), tenant.bytes))
    return [hashlib.scrypt(user.encode(), salt=salt, dklen=32, **_COST).hex() for salt in salts]
