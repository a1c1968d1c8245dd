"""Versions of a tenant by what they are: whose, from when, on which base, where an alias points, how well they did.

Pages begin at the place of the last row in the order of an index, so that what lies before costs nothing.
"""

import operator
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from registry.errors import NameRefused
from registry.fleet import Where
from registry.living import living
from registry.models import Adapter, AdapterVersion, Alias, SharedBase, User
from registry.names import TenantId, VersionId, check_plain
from registry.pages import Page, Place, beyond, check_limit, read_cursor, write_cursor

# What the order goes by, and whether down.
ORDERS = {
    "newest": ("created_at", True), "oldest": ("created_at", False),
    "most-gain": ("gain", True), "least-gain": ("gain", False),
    "most-loss": ("loss", True), "least-loss": ("loss", False),
}  # fmt: skip
_FOUND = (  # the columns of a Found
    User.name, Adapter.name, AdapterVersion.number, AdapterVersion.state, SharedBase.digest,
    AdapterVersion.loss, AdapterVersion.gain, AdapterVersion.created_at, AdapterVersion.served_name,
)  # fmt: skip
_NO_HELPERS = select(func.set_config("max_parallel_workers_per_gather", "0", True))
_BOUND = re.compile(r"(gain|loss)([<>]=?)([-+]?[0-9]{1,9}(?:\.[0-9]{1,9})?)", re.ASCII)
_OWN = "alias=NAME, state=accepted, state=refused, gain>NUMBER, loss<NUMBER and so on with >, >=, < or <="
_COMPARED = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}


@dataclass(frozen=True)
class Search:
    """Which versions are meant, those that every condition holds for, and in which order."""

    where: Where
    alias: str = ""  # that points to them now
    state: str = ""  # accepted or refused
    bounds: tuple[tuple[str, str, float], ...] = ()  # gain or loss, one of _COMPARED, and the number
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
    source, version_id = _source(wanted)
    order = (getattr(source, column), version_id)
    asked = (
        select(*_FOUND, *order)
        .select_from(source)
        .where(source.tenant_id == tenant, order[0].is_not(None), *_terms(session, wanted, source), living())
        .join(Adapter, Adapter.id == source.adapter_id)
        .join(User, User.id == Adapter.user_id)
        .join(SharedBase, SharedBase.id == source.base_id)
    )
    if wanted.alias:
        asked = asked.join(AdapterVersion, AdapterVersion.id == version_id)
    if place := read_cursor(after, "search", tenant, wanted):
        asked = asked.where(beyond(order, _read(place), down))
    sorted_ = asked.order_by(*(one.desc() if down else one.asc() for one in order)).limit(limit + 1)
    _by_one_process(session)
    rows = session.execute(sorted_).all()
    found = [Found(*row[:-2]) for row in rows[:limit]]
    cursor = write_cursor(_place(*rows[limit - 1][-2:]), "search", tenant, wanted) if len(rows) > limit else None
    return Page(found, cursor)


def _by_one_process(session: Session) -> None:
    """Have PostgreSQL start no helpers in this transaction: for a page they take longer to come than to be of use."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(_NO_HELPERS)


def _source(wanted: Search) -> tuple[type[AdapterVersion | Alias], InstrumentedAttribute[VersionId]]:
    """Where the figures are read in order, and the column of the version's id: at an alias, from its copies.

    In the order of all versions, the first that is at the alias may come after millions that are not.
    """
    return (Alias, Alias.version_id) if wanted.alias else (AdapterVersion, AdapterVersion.id)


def _terms(session: Session, wanted: Search, source: type[AdapterVersion | Alias]) -> list[ColumnElement[bool]]:
    """The conditions on a version or an alias, its user and its adapter."""
    terms = replace(wanted.where, base="").terms(source)
    if wanted.where.base:  # the bases are few: looked up first, so that the index by base is used
        named = SharedBase.digest.startswith(wanted.where.base, autoescape=True)
        same = session.scalars(select(SharedBase.id).where(named)).all()
        terms.append(source.base_id == same[0] if len(same) == 1 else source.base_id.in_(same))
    if wanted.alias:
        terms.append(Alias.name == wanted.alias)
    if wanted.state:
        terms.append(AdapterVersion.state == wanted.state)
    for name, side, number in wanted.bounds:
        terms.append(_COMPARED[side](getattr(source, name), number))
    return terms


def _taken(name: str, conditions: Sequence[str]) -> tuple[str, list[str]]:
    """The value of a condition, empty where there is none, and the other conditions.  Raises NameRefused."""
    mine = [text for text in conditions if text.startswith(f"{name}=")]
    if len(mine) > 1 or f"{name}=" in mine:
        raise NameRefused("condition", mine[-1], f"each once: {_OWN}")
    return mine[0].partition("=")[2] if mine else "", [text for text in conditions if text not in mine]


def _place(value: object, version: VersionId) -> Place:
    return [value.isoformat() if isinstance(value, datetime) else value, str(version)]


def _read(place: Place) -> Place:
    value, version = place
    return [datetime.fromisoformat(value) if isinstance(value, str) else value, uuid.UUID(version)]
