"""From many references to versions in few statements, and from a tenant's alias to everybody's."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import Row, select, tuple_
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from registry import queries
from registry.errors import NotFound, VersionGone
from registry.fleet import Where
from registry.living import living
from registry.models import Adapter, AdapterVersion, Alias, SharedBase, Tombstone, User
from registry.names import Reference, TenantId, check_plain
from registry.resolved import Resolved
from registry.session import reading

PAGE = 500  # references in a statement, and versions that it gives
_FACTS = (
    AdapterVersion.number, AdapterVersion.state, AdapterVersion.served_name, AdapterVersion.prefix,
    AdapterVersion.sha256, AdapterVersion.files,
)  # fmt: skip


def resolve_page(engine: Engine, wanted: Sequence[Reference]) -> dict[Reference, Resolved | NotFound]:
    """What each reference means now, or that it means nothing: a few statements for each tenant among them."""
    found: dict[Reference, Resolved | NotFound] = {one: one.not_found() for one in wanted}
    by_tenant = defaultdict(list)
    for one in wanted:
        by_tenant[one.tenant].append(one)
    for name, references in by_tenant.items():
        try:
            with reading(engine) as session:
                found |= versions_of(session, queries.tenant_id(session, name), references)
        except NotFound as error:
            found |= dict.fromkeys(references, error)
    return found


def resolve_all(engine: Engine, tenant: str, alias: str, where: Where) -> Iterator[Resolved]:
    """What an alias of every adapter of a tenant that is meant points to now, page by page, by user and adapter.

    Raises NameRefused, NotFound.
    """
    check_plain("alias", alias)
    after = ("", "")
    while True:
        with reading(engine) as session:
            page = versions_at(session, queries.tenant_id(session, tenant), tenant, alias, where, after)
        yield from page
        if len(page) < PAGE:
            return
        after = (page[-1].reference.user, page[-1].reference.adapter)


def versions_of(
    session: Session, tenant: TenantId, wanted: Sequence[Reference]
) -> dict[Reference, Resolved | VersionGone]:
    """The versions that references of one tenant mean now; those that mean none are left out."""
    pinned = {(one.user, one.adapter, one.number): one for one in wanted if one.number}
    moving = {(one.user, one.adapter, one.alias): one for one in wanted if not one.number}
    found = _by_number(session, tenant, pinned) if pinned else {}
    return found | (_by_alias(session, tenant, moving) if moving else {})


def versions_at(
    session: Session, tenant: TenantId, name: str, alias: str, where: Where, after: tuple[str, str]
) -> list[Resolved]:
    """A page of the versions that an alias of a tenant's adapters points to, after a user and adapter, in order."""
    rows = session.execute(
        select(User.name, Adapter.name, *_FACTS)
        .select_from(User)
        .join(Adapter, Adapter.user_id == User.id)
        .join(Alias, Alias.adapter_id == Adapter.id)
        .join(AdapterVersion, AdapterVersion.id == Alias.version_id)
        .join(SharedBase, SharedBase.id == AdapterVersion.base_id)
        .where(User.tenant_id == tenant, Alias.name == alias, tuple_(User.name, Adapter.name) > after, *where.terms())
        .where(living())
        .order_by(User.name, Adapter.name)
        .limit(PAGE)
    )
    return [Resolved(Reference(name, user, adapter, alias=alias), *facts) for user, adapter, *facts in rows]


def _by_number(
    session: Session, tenant: TenantId, wanted: Mapping[tuple[str, str, int], Reference]
) -> dict[Reference, Resolved | VersionGone]:
    users, adapters, numbers = (set(part) for part in zip(*wanted, strict=True))
    rows = session.execute(
        select(User.name, Adapter.name, AdapterVersion.number, *_FACTS, Tombstone.at, Tombstone.reason)
        .select_from(User)
        .join(Adapter, Adapter.user_id == User.id)
        .join(AdapterVersion, AdapterVersion.adapter_id == Adapter.id)
        .outerjoin(Tombstone, Tombstone.version_id == AdapterVersion.id)
        .where(User.tenant_id == tenant, User.name.in_(users), Adapter.name.in_(adapters))
        .where(AdapterVersion.number.in_(numbers))
    )
    return _asked(wanted, rows)


def _by_alias(
    session: Session, tenant: TenantId, wanted: Mapping[tuple[str, str, str], Reference]
) -> dict[Reference, Resolved | VersionGone]:
    users, adapters, aliases = (set(part) for part in zip(*wanted, strict=True))
    rows = session.execute(
        select(User.name, Adapter.name, Alias.name, *_FACTS)
        .select_from(User)
        .join(Adapter, Adapter.user_id == User.id)
        .join(Alias, Alias.adapter_id == Adapter.id)
        .join(AdapterVersion, AdapterVersion.id == Alias.version_id)
        .where(User.tenant_id == tenant, User.name.in_(users), Adapter.name.in_(adapters), Alias.name.in_(aliases))
    )
    return _asked(wanted, rows)


def _asked(wanted: Mapping[Any, Reference], rows: Iterable[Row[Any]]) -> dict[Reference, Resolved | VersionGone]:
    """Of rows that may also pair one reference's user with another's version, those that were asked for."""
    return {
        reference: _meant(reference, *facts)
        for user, adapter, which, *facts in rows
        if (reference := wanted.get((user, adapter, which)))
    }


def _meant(reference: Reference, *facts: Any) -> Resolved | VersionGone:  # a row of `_FACTS`, and of its tombstone
    *version, at, why = facts if len(facts) > len(_FACTS) else (*facts, None, None)
    return VersionGone(str(reference), f"{at:%Y-%m-%d}", why) if at else Resolved(reference, *version)
