"""Who needs training again: adapters whose `latest` was not trained on what would be trained on now.

What `latest` was trained from, and which data is its user's newest, is kept a second time in a row beside each adapter
(`Freshness`) by whoever adds data or moves `latest`, in the same transaction.  Each writes columns of its own, so that
they wait for no more than that row and none undoes what the other wrote.
"""

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any

from sqlalchemy import BindParameter, ColumnElement, Select, Update, Uuid, bindparam, func, or_, select, update
from sqlalchemy.orm import Session

from registry.listed import listed
from registry.living import living
from registry.models import Adapter, AdapterVersion, AliasMove, Dataset, Freshness, Job, SharedBase, User
from registry.names import AdapterId, DatasetId, TenantId, UserId
from registry.pages import Page, Place, beyond, check_digest, check_limit, read_cursor, write_cursor

NEWER_DATA, OTHER_WAY, NEVER = "newer data", "other base or recipe", "never accepted"
_BY_WAY = (Freshness.base_id, Freshness.recipe_digest, Freshness.adapter_id)


@dataclass(frozen=True)
class Outdated:
    """One adapter that needs training: why, on which data, and what came of asking for that already."""

    user: str
    adapter: str
    why: str  # newer data, other base or recipe, never accepted
    newest: str  # digest of the data that would be trained on
    added_at: datetime
    job: str | None  # state of the job that asked for it last on that data: refused and failed ones leave it outdated


def outdated(
    session: Session, tenant: TenantId, *, base: str = "", recipe: str = "", after: str = "", limit: int = 1000
) -> Page[Outdated]:
    """The adapters of a tenant that need training, a page at a time: first those with newer data, then the others.

    `base` and `recipe` are the digests, or beginnings of them, of what would be trained with now; without them only the
    data counts.  An adapter whose user has no data is never outdated.  Raises NameRefused, CursorRefused.
    """
    check_limit(limit)
    question = ("outdated", tenant, check_digest("base", base), check_digest("recipe", recipe))
    place = read_cursor(after, *question) or []
    chosen: list[tuple[AdapterId, Place]] = []
    if len(place) < len(_BY_WAY):
        newer = session.scalars(_newer(tenant, place).limit(limit + 1))
        chosen = [(one, [str(one)]) for one in newer]
        place = []
    if len(chosen) <= limit and (base or recipe):
        ways = session.execute(_otherwise(session, tenant, base, recipe, place).limit(limit + 1 - len(chosen)))
        chosen += [(one, [str(base_id), digest, str(one)]) for base_id, digest, one in ways.tuples()]
    cursor = write_cursor(chosen[limit - 1][1], *question) if len(chosen) > limit else None
    return Page(_described(session, tenant, [one for one, _ in chosen[:limit]]), cursor)


def data_added(session: Session, tenant: TenantId, user: UserId) -> None:
    """A user's newest data may be another: for each of its adapters.

    Of two additions at once the second waits here, and then looks which data is the newest of both.
    """
    in_turn(session, user)
    own = select(Adapter.id).where(Adapter.tenant_id == tenant, Adapter.user_id == user)
    mine = (Freshness.tenant_id == tenant, Freshness.adapter_id.in_(own))
    session.execute(select(Freshness.adapter_id).where(*mine).order_by(Freshness.adapter_id).with_for_update()).all()
    rows = update(Freshness).where(*mine).values(newest_id=newest(session, tenant, user))
    session.execute(rows, execution_options={"synchronize_session": False})


def in_turn(session: Session, user: UserId) -> None:
    """Wait until nobody else adds data or an adapter for a user, up to the end of their transaction.

    At once, neither would see what the other adds, and the new adapter would know nothing of the new data.
    """
    if session.get_bind().dialect.name == "postgresql":  # SQLite has one writer
        session.execute(select(func.pg_advisory_xact_lock(user.int & (1 << 63) - 1)))


def latest_moved(tenant: TenantId, version: AdapterVersion) -> Update:
    """That `latest` of an adapter is another version, as a statement."""
    rows = update(Freshness).where(Freshness.tenant_id == tenant, Freshness.adapter_id == version.adapter_id)
    return rows.values(
        dataset_id=version.dataset_id, base_id=version.base_id, recipe_digest=version.recipe_digest
    )  # fmt: skip


def latests_moved(session: Session, tenant: TenantId, alias: str, fleet_id: int) -> None:
    """`latest` of a fleet is another version, as its moves say."""
    same = (AliasMove.tenant_id == Freshness.tenant_id, AliasMove.adapter_id == Freshness.adapter_id)
    moved = (*same, AliasMove.name == alias, AliasMove.fleet_id == fleet_id)
    # In the order of whoever adds data, which a statement that changes rows does not promise to keep.
    theirs = select(Freshness.adapter_id).where(Freshness.tenant_id == tenant, *moved)
    session.execute(theirs.order_by(Freshness.adapter_id).with_for_update(of=Freshness)).all()
    rows = update(Freshness).where(Freshness.tenant_id == tenant, *moved)
    made_from = {
        "dataset_id": AdapterVersion.dataset_id,
        "base_id": AdapterVersion.base_id,
        "recipe_digest": AdapterVersion.recipe_digest,
    }
    there = rows.where(AdapterVersion.id == AliasMove.to_id).values(**made_from)
    session.execute(there, execution_options={"synchronize_session": False})


def newest(session: Session, tenant: TenantId, user: UserId) -> DatasetId | None:
    """The dataset that was added last for a user; None where there is none."""
    mine = select(Dataset.id).where(Dataset.tenant_id == tenant, Dataset.user_id == user)
    return session.scalar(mine.order_by(Dataset.added_at.desc(), Dataset.digest).limit(1))


def added_last(session: Session, tenant: TenantId, user: UserId, digest: str, now: datetime) -> datetime:
    """When data of that digest is added now: after all other data of its user, whatever the clocks of machines say.

    For whoever is `in_turn`.
    """
    others = (Dataset.tenant_id == tenant, Dataset.user_id == user, Dataset.digest != digest)
    last = session.scalar(select(func.max(Dataset.added_at)).where(*others))
    return now if last is None else max(now, last + datetime.resolution)


def _newer(tenant: TenantId, place: Place) -> Select[tuple[AdapterId]]:
    """Adapters whose user has data that `latest` was not trained on, by id."""
    newer = Freshness.newest_id.is_distinct_from(Freshness.dataset_id)
    rows = select(Freshness.adapter_id).where(Freshness.tenant_id == tenant, newer)
    if place:
        rows = rows.where(Freshness.adapter_id > uuid.UUID(place[0]))
    return rows.order_by(Freshness.adapter_id)


def _otherwise(
    session: Session, tenant: TenantId, base: str, recipe: str, place: Place
) -> Select[tuple[uuid.UUID | None, str | None, AdapterId]]:
    """Adapters trained on their newest data, but on another base or by another recipe, by these."""
    rows = select(Freshness.base_id, Freshness.recipe_digest, Freshness.adapter_id).where(
        Freshness.tenant_id == tenant, Freshness.newest_id == Freshness.dataset_id
    )
    others: list[ColumnElement[bool]] = []
    if base:
        same = session.scalars(select(SharedBase.id).where(SharedBase.digest.startswith(base, autoescape=True))).all()
        others.append(Freshness.base_id.not_in(same))
    if recipe:
        others.append(~Freshness.recipe_digest.startswith(recipe, autoescape=True))
    rows = rows.where(or_(*others))
    if place:
        rows = rows.where(beyond(_BY_WAY, [uuid.UUID(place[0]), place[1], uuid.UUID(place[2])]))
    return rows.order_by(*_BY_WAY)


def _described(session: Session, tenant: TenantId, chosen: Sequence[AdapterId]) -> list[Outdated]:
    """The adapters in the order they were chosen, with what there is to say about each."""
    connection = session.connection()
    ids = json.dumps([one.hex for one in chosen])
    rows = connection.execute(_facts(connection.dialect.name), {"tenant": tenant, "ids": ids})
    found = {
        one: Outdated(user, adapter, _why(newest_id, trained_on), digest, added_at, job)
        for one, user, adapter, newest_id, trained_on, digest, added_at, job in rows
    }
    return [found[one] for one in chosen if one in found]


@cache
def _facts(dialect: str) -> Select[Any]:  # an adapter's id, and what an Outdated is made of
    """For any number of adapters, along the keys."""
    mine: BindParameter[TenantId] = bindparam("tenant")
    asked = listed(dialect, "ids", Uuid())
    jobs = select(Job.state).where(Job.tenant_id == mine, Job.adapter_id == Adapter.id, Job.dataset_id == Dataset.id)
    state = jobs.order_by(Job.created_at.desc()).limit(1).scalar_subquery()
    return (
        select(Adapter.id, User.name, Adapter.name, Freshness.newest_id, Freshness.dataset_id,
               Dataset.digest, Dataset.added_at, state)
        .select_from(asked)
        .join(Adapter, Adapter.id == asked.c.value)
        .join(User, User.id == Adapter.user_id)
        .join(Freshness, Freshness.adapter_id == Adapter.id)
        .join(Dataset, Dataset.id == Freshness.newest_id)
        .where(Adapter.tenant_id == mine, living())
    )  # fmt: skip


def _why(newest: DatasetId, trained_on: DatasetId | None) -> str:
    if trained_on is None:
        return NEVER
    return NEWER_DATA if newest != trained_on else OTHER_WAY
