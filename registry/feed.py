"""What has changed since somebody last asked: moved aliases, new and removed versions, in an order that loses nothing.

Events get their numbers while their transactions run and appear when these commit, so that a reader who goes by the
numbers alone misses what a slower transaction adds later under a lower one.  On PostgreSQL an event therefore holds the
number of its transaction too; a reader goes by both, and stops before the oldest transaction that still runs: nothing
can appear any more in front of what it has read.  SQLite has one writer: numbers are in the order of commits there,
and forgetting a user leaves an event above all of theirs, so that none is given out twice.
"""

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import BigInteger, String, cast, func, select, tuple_
from sqlalchemy.orm import Session

from registry.errors import CursorRefused
from registry.living import living
from registry.models import Adapter, AdapterVersion, AliasMove, Event, User
from registry.names import TenantId, VersionId
from registry.pages import Page, check_limit, read_cursor, write_cursor

PUBLISHED, MOVED, FLEET_MOVED, REMOVED = "version published", "alias moved", "fleet moved", "version removed"
KINDS = (PUBLISHED, MOVED, FLEET_MOVED, REMOVED)
_UNTOLD, _TOLD = -1, 0  # how far an event was told; above 0 it is the last move that was told of a fleet's


@dataclass(frozen=True)
class Change:
    """What happened to one version; whose it was is None once its user is forgotten."""

    kind: str  # version published, alias moved, version removed
    at: datetime
    user: str | None
    adapter: str | None
    number: int | None
    alias: str | None  # the one that moved
    served_name: str | None
    cursor: str  # what comes after this


class _Place(NamedTuple):
    """Where in the feed: an event, and how far that was told."""

    txid: int
    id: int
    told: int


class _Step(NamedTuple):
    """One change as it was written down."""

    event: Event
    move: AliasMove | None  # of a fleet's
    place: _Place


def changes(session: Session, tenant: TenantId, *, after: str = "", limit: int = 1000) -> Page[Change]:
    """The changes after a cursor; the page's cursor is where to go on, also when there is nothing yet.

    Whoever goes on from cursor to cursor is told each once.  A fleet's move is told as one move of each adapter.
    Raises NameRefused, CursorRefused.
    """
    check_limit(limit)
    horizon = _horizon(session, tenant)
    place = _Place(*(read_cursor(after, "changes", tenant) or (0, 0, _UNTOLD)))
    if place > horizon:
        raise CursorRefused(after, "it is ahead of this database, which is another one or was restored")
    events = _events(session, tenant, place, horizon, limit + 1)
    steps: list[_Step] = []
    for event in events:
        told = place.told if (event.txid, event.id) == place[:2] else _UNTOLD
        steps += _steps(session, tenant, event, told, limit - len(steps))
        if len(steps) == limit:
            break
    rows = _described(session, tenant, steps)
    if len(steps) == limit:
        return Page(rows, rows[-1].cursor)
    end = _Place(events[-1].txid, events[-1].id, _TOLD) if len(events) > limit else horizon
    return Page(rows, write_cursor(list(end), "changes", tenant))


def now(session: Session, tenant: TenantId) -> str:
    """The cursor of the present: only what has not been committed yet comes after it."""
    return write_cursor(list(_horizon(session, tenant)), "changes", tenant)


def _horizon(session: Session, tenant: TenantId) -> _Place:
    """In front of this place nothing can appear any more."""
    if session.get_bind().dialect.name == "postgresql":
        oldest = func.pg_snapshot_xmin(func.pg_current_snapshot())
        return _Place(session.scalars(select(cast(cast(oldest, String), BigInteger))).one(), 0, _UNTOLD)
    last = session.scalar(select(func.max(Event.id)).where(Event.tenant_id == tenant))
    return _Place(0, (last or 0) + 1, _UNTOLD)


def _events(session: Session, tenant: TenantId, start: _Place, end: _Place, limit: int) -> Sequence[Event]:
    order = (Event.txid, Event.id)
    between = (tuple_(*order) >= tuple(start[:2]), tuple_(*order) < tuple(end[:2]))
    found = select(Event).where(Event.tenant_id == tenant, *between, Event.kind.in_(KINDS))
    return session.scalars(found.order_by(*order).limit(limit)).all()


def _steps(session: Session, tenant: TenantId, event: Event, told: int, limit: int) -> Iterator[_Step]:
    """What of an event was not told yet."""
    if told == _TOLD:
        return
    if event.kind != FLEET_MOVED:
        yield _Step(event, None, _Place(event.txid, event.id, _TOLD))
        return
    mine = (AliasMove.tenant_id == tenant, AliasMove.name == event.body["alias"], AliasMove.fleet_id == event.id)
    moves = select(AliasMove).where(*mine, AliasMove.id > told).order_by(AliasMove.id).limit(limit)
    for move in session.scalars(moves):
        yield _Step(event, move, _Place(event.txid, event.id, move.id))


def _described(session: Session, tenant: TenantId, steps: Sequence[_Step]) -> list[Change]:
    """The changes, with the names of whose they are."""
    subjects = [step.move.to_id if step.move else _version_id(step.event.subject) for step in steps]
    rows = session.execute(
        select(AdapterVersion.id, AdapterVersion.number, AdapterVersion.served_name, Adapter.name, User.name)
        .join(Adapter, Adapter.id == AdapterVersion.adapter_id)
        .join(User, User.id == Adapter.user_id)
        .where(AdapterVersion.tenant_id == tenant, AdapterVersion.id.in_(set(subjects)), living())
    )
    known = {version: (number, served, adapter, user) for version, number, served, adapter, user in rows.tuples()}
    told = []
    for (event, move, place), subject in zip(steps, subjects, strict=True):
        body = event.body
        number, served, adapter, user = known.get(subject, (body.get("number"), body.get("served_name"), None, None))
        kind, alias = (MOVED, move.name) if move else (event.kind, body.get("alias"))
        cursor = write_cursor(list(place), "changes", tenant)
        told.append(Change(kind, event.at, user, adapter, number, alias, served, cursor))
    return told


def _version_id(subject: str) -> VersionId:
    try:
        return VersionId(uuid.UUID(subject))
    except ValueError:  # what wrote the event named something else
        return VersionId(uuid.UUID(int=0))
