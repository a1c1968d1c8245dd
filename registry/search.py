"""Versions of a tenant by what they are: whose, from when, on which base, where an alias points, how well they did.

Pages begin at the place of the last row in the order of an index, so that what lies before costs nothing.
"""

import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from registry.errors import NameRefused
from registry.fleet import Where
from registry.models import Adapter, AdapterVersion, Alias, SharedBase, User
from registry.names import TenantId, check_plain
from registry.pages import Page, Place, beyond, check_limit, read_cursor, write_cursor
from registry.session import among

# What the order goes by, and whether down.
ORDERS: dict[str, tuple[InstrumentedAttribute[Any], bool]] = {  # columns of unlike types
    "newest": (AdapterVersion.created_at, True), "oldest": (AdapterVersion.created_at, False),
    "most-gain": (AdapterVersion.gain, True), "least-gain": (AdapterVersion.gain, False),
    "most-loss": (AdapterVersion.loss, True), "least-loss": (AdapterVersion.loss, False),
}  # fmt: skip
_FEW = 10_000  # versions that are fetched and sorted sooner than they are come across among all
_FIGURES = {"gain": AdapterVersion.gain, "loss": AdapterVersion.loss}
_BOUND = re.compile(r"(gain|loss)([<>])=?([-+]?[0-9]{1,9}(?:\.[0-9]{1,9})?)", re.ASCII)
_OWN = "alias=NAME, state=accepted, state=refused, gain>NUMBER, gain<NUMBER, loss>NUMBER, loss<NUMBER"


@dataclass(frozen=True)
class Search:
    """Which versions are meant, those that every condition holds for, and in which order."""

    where: Where
    alias: str = ""  # that points to them now
    state: str = ""  # accepted or refused
    bounds: tuple[tuple[str, str, float], ...] = ()  # gain or loss, < or >, and the number
    order: str = "newest"

    @classmethod
    def parse(cls, conditions: Sequence[str] = (), order: str = "newest") -> "Search":
        """Read conditions such as `alias=production` and `gain<0.1`, besides those of a fleet.  Raises NameRefused."""
        if order not in ORDERS:
            raise NameRefused("order", order, ", ".join(ORDERS))
        bounds = [found.groups() for text in conditions if (found := _BOUND.fullmatch(text))]
        others = [text for text in conditions if not _BOUND.fullmatch(text)]
        if odd := next((text for text in others if text.startswith(("gain", "loss"))), None):
            raise NameRefused("condition", odd, _OWN)
        alias, others = _taken("alias", others)
        state, others = _taken("state", others)
        if state not in ("", "accepted", "refused"):
            raise NameRefused("condition", f"state={state}", _OWN)
        figures = tuple((name, side, float(number)) for name, side, number in bounds)
        return cls(Where.parse(others), alias and check_plain("alias", alias), state, figures, order)


@dataclass(frozen=True)
class Found:
    """One version."""

    user: str
    adapter: str
    number: int
    state: str
    base: str  # digest
    loss: float | None  # on the user's held-out examples
    gain: float | None  # how far that is below the base's
    created_at: datetime
    served_name: str


def search(session: Session, tenant: TenantId, wanted: Search, *, after: str = "", limit: int = 100) -> Page[Found]:
    """The versions that are meant, a page at a time.  Raises NameRefused, CursorRefused.

    Those without a score are left out of an order by gain or loss.
    """
    check_limit(limit)
    column, down = ORDERS[wanted.order]
    order = (column, AdapterVersion.id)
    asked = (
        select(AdapterVersion, User.name, Adapter.name, SharedBase.digest)
        .where(AdapterVersion.tenant_id == tenant, column.is_not(None), *_terms(session, tenant, wanted))
        .join(Adapter, Adapter.id == AdapterVersion.adapter_id)
        .join(User, User.id == Adapter.user_id)
        .join(SharedBase, SharedBase.id == AdapterVersion.base_id)
    )
    if place := read_cursor(after, "search", tenant, wanted):
        asked = asked.where(beyond(order, _read(place), down))
    sorted_ = asked.order_by(*(one.desc() if down else one.asc() for one in order)).limit(limit + 1)
    rows = session.execute(sorted_).tuples().all()
    found = [_found(*row) for row in rows[:limit]]
    cursor = write_cursor(_place(rows[limit - 1][0], column), "search", tenant, wanted) if len(rows) > limit else None
    return Page(found, cursor)


def _terms(session: Session, tenant: TenantId, wanted: Search) -> list[ColumnElement[bool]]:
    """The conditions on a version, its user, adapter, base and an alias."""
    terms = wanted.where.terms()
    if wanted.where.base:  # the bases are few: looked up first, so that the index by base is used
        same = session.scalars(select(SharedBase.id).where(SharedBase.digest.startswith(wanted.where.base))).all()
        terms.append(AdapterVersion.base_id == same[0] if len(same) == 1 else AdapterVersion.base_id.in_(same))
    if wanted.alias:
        terms.append(_pointed_to(session, tenant, wanted.alias))
    if wanted.state:
        terms.append(AdapterVersion.state == wanted.state)
    for name, side, number in wanted.bounds:
        terms.append(_FIGURES[name] < number if side == "<" else _FIGURES[name] > number)
    return terms


def _pointed_to(session: Session, tenant: TenantId, alias: str) -> ColumnElement[bool]:
    """That an alias points to a version: looked up from the alias's rows where they are few, else from each version.

    PostgreSQL takes the two for unrelated and would read every version of a tenant for a common alias.
    """
    mine = (Alias.tenant_id == tenant, Alias.name == alias)
    some = session.scalars(select(Alias.version_id).where(*mine).limit(_FEW + 1)).all()
    if len(some) <= _FEW:
        return among(session, AdapterVersion.id, some)
    same = select(Alias.version_id).where(*mine, Alias.adapter_id == AdapterVersion.adapter_id)
    return AdapterVersion.id == same.scalar_subquery()


def _taken(name: str, conditions: Sequence[str]) -> tuple[str, list[str]]:
    """The value of a condition, empty where there is none, and the other conditions.  Raises NameRefused."""
    mine = [text for text in conditions if text.startswith(f"{name}=")]
    if len(mine) > 1 or f"{name}=" in mine:
        raise NameRefused("condition", mine[-1], f"each once: {_OWN}")
    return mine[0].partition("=")[2] if mine else "", [text for text in conditions if text not in mine]


def _place(version: AdapterVersion, column: InstrumentedAttribute[Any]) -> Place:  # of any type
    value = getattr(version, column.key)
    return [value.isoformat() if isinstance(value, datetime) else value, str(version.id)]


def _read(place: Place) -> Place:
    value, version = place
    return [datetime.fromisoformat(value) if isinstance(value, str) else value, uuid.UUID(version)]


def _found(version: AdapterVersion, user: str, adapter: str, base: str) -> Found:
    return Found(
        user, adapter, version.number, version.state, base, version.loss, version.gain, version.created_at,
        version.served_name,
    )  # fmt: skip
