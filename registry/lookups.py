"""What inference hosts ask all day: which version does a reference mean now, of one adapter or of thousands.

Each is one statement along four keys (user, adapter, alias, version) that reads only what a host needs.  It is made
once and asked at a glance (`glance.py`): making it and its rows, and a transaction, would take longer than PostgreSQL.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC
from functools import cache
from typing import Any

from sqlalchemy import ColumnElement, Engine, Select, and_, bindparam, func, select

from registry.errors import VersionGone
from registry.glance import Row, glance
from registry.listed import listed
from registry.models import Adapter, AdapterVersion, Alias, AliasMove, Facts, Tombstone, User
from registry.names import Reference, TenantId

_PART, _AT_ONCE = 2_500, 4  # users in one statement, and statements at the same time
Found = tuple[int, str, str, str, str, Facts]  # number, state, served name, prefix, SHA-256 of the manifest, files

_FACTS = (
    AdapterVersion.number, AdapterVersion.state, AdapterVersion.served_name, AdapterVersion.prefix,
    AdapterVersion.sha256,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Current:
    """Where one user's adapter is now: enough to see whether a host has it, and to ask for it if not."""

    number: int
    state: str
    served_name: str
    prefix: str
    sha256: str  # of the manifest


def find(engine: Engine, tenant: TenantId, reference: Reference) -> Found:
    """What a reference means now, by number or by alias.  Raises NotFound, VersionGone for one that was removed."""
    exact = {"number": reference.number} if reference.number else {"alias": reference.alias}
    asked = {"tenant": tenant, "user": reference.user, "adapter": reference.adapter, **exact}
    rows = glance(engine, tenant, _one(reference.number is not None), asked)
    if not rows:
        raise reference.not_found()
    facts = rows[0]
    if reference.number:  # what an alias points to is never removed
        *facts, removed_at, rule = facts
        if removed_at:
            raise VersionGone(str(reference), f"{removed_at.astimezone(UTC):%Y-%m-%d}", rule)
    found: Found = tuple(facts)
    return found


def find_many(engine: Engine, tenant: TenantId, users: Sequence[str], adapter: str, alias: str) -> dict[str, Current]:
    """Where an alias of each of these users' adapters of that name is; who has none is left out.

    Thousands are asked for in parts at once: one statement has one of PostgreSQL's processors.  Where a fleet moved
    meanwhile they are asked for again: nobody sees it half-way.
    """
    ordered = sorted(users)  # as they lie in the index: neighbours are read together
    parts = [ordered[start : start + _PART] for start in range(0, len(ordered), _PART)]

    def ask(part: Sequence[str]) -> Sequence[Row]:
        asked = {"tenant": tenant, "users": json.dumps(part), "adapter": adapter, "alias": alias}
        return glance(engine, tenant, _many(engine.dialect.name), asked)

    def last_fleet() -> Sequence[Row]:
        return glance(engine, tenant, _last_fleet(), {"tenant": tenant, "alias": alias})

    if len(parts) <= 1:
        answers = [ask(part) for part in parts]
    else:
        with ThreadPoolExecutor(_AT_ONCE, "lookup") as threads:
            seen, answers = last_fleet(), list(threads.map(ask, parts))
            while seen != (moved := last_fleet()):
                seen, answers = moved, list(threads.map(ask, parts))
    return {user: Current(*facts) for rows in answers for user, *facts in rows}


@cache
def _one(by_number: bool) -> Select[Any]:  # a Found
    """The version of one user's adapter, by its number or an alias."""
    mine = (User.tenant_id == bindparam("tenant"), User.name == bindparam("user"))
    adapter = select(*_FACTS, AdapterVersion.files).select_from(User).where(*mine).join(Adapter, _named())
    if by_number:
        number = AdapterVersion.number == bindparam("number")
        version = adapter.join(AdapterVersion, (AdapterVersion.adapter_id == Adapter.id) & number)
        buried = version.outerjoin(Tombstone, Tombstone.version_id == AdapterVersion.id)
        return buried.add_columns(Tombstone.at, Tombstone.reason)
    return adapter.join(Alias, _aliased()).join(AdapterVersion, AdapterVersion.id == Alias.version_id)


@cache
def _many(dialect: str) -> Select[Any]:  # a user's name, and the columns of a Current
    """For any number of users in one parameter: PostgreSQL goes along the keys, whatever it thinks their number is."""
    asked = listed(dialect, "users")
    mine = (User.tenant_id == bindparam("tenant"), User.name == asked.c.value)
    users = select(User.name, *_FACTS).select_from(asked.join(User, and_(*mine))).where(*mine)
    adapters = users.join(Adapter, _named()).join(Alias, _aliased())
    return adapters.join(AdapterVersion, AdapterVersion.id == Alias.version_id)


@cache
def _last_fleet() -> Select[Any]:  # a number
    """Which move of a fleet was the last of an alias: each has a higher number than those that were over before it."""
    mine = (AliasMove.tenant_id == bindparam("tenant"), AliasMove.name == bindparam("alias"))
    return select(func.max(AliasMove.fleet_id)).where(*mine, AliasMove.fleet_id.is_not(None))


def _named() -> ColumnElement[bool]:
    return and_(Adapter.user_id == User.id, Adapter.name == bindparam("adapter"))


def _aliased() -> ColumnElement[bool]:
    """By the whole key of the alias: for a part of it PostgreSQL would read all aliases of that name."""
    return and_(Alias.adapter_id == Adapter.id, Alias.name == bindparam("alias"))
