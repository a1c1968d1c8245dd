"""The two transactions of publishing, for one job or for many: each comes to what it would come to alone, or is told.

Many are one after the other, in the order in which they were asked for: numbers, moves of `latest` and events are those
of publishing them in turn.  Readers see the last move only, which they cannot tell from having looked too late; each is
written down all the same, so that a rollback goes to the version before, whoever was published with it.
"""

import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from itertools import groupby
from typing import TypeVar

from sqlalchemy import case, func, select, update
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from registry import uploads
from registry.errors import ContentDiffers, LeaseLost, RegistryError
from registry.following import GATE, Moves, follow, moved
from registry.models import Adapter, AdapterVersion, Evaluation, Event, Facts, Job
from registry.names import LATEST, JobId, TenantId
from registry.parcels import Parcel, Published
from registry.protection import is_protected
from registry.session import reading, transaction
from registry.tenancy import enter
from registry.writes import Rows, write

Outcome = Published | Exception  # of one job: what it became, or why it did not
Found = TypeVar("Found")
_FACTS = (
    AdapterVersion.id, AdapterVersion.number, AdapterVersion.state, AdapterVersion.served_name, AdapterVersion.prefix,
    AdapterVersion.sha256, AdapterVersion.size,
)  # fmt: skip
Act = Callable[[Session, TenantId, Sequence[Parcel]], Mapping[Parcel, Found]]


def declare(engine: Engine, parcels: Sequence[Parcel]) -> list[Outcome | None]:
    """Write down the intents to upload; what is over already instead: published before, or not ours any more."""
    return _all_or_each(engine, parcels, _declare)


def settle(engine: Engine, parcels: Sequence[Parcel]) -> list[Outcome]:
    """Make the versions exist, in one transaction.  Raises DatabaseUnavailable, with nobody published or everybody."""
    found = _all_or_each(engine, parcels, _settle)
    lost = [parcel for parcel, one in zip(parcels, found, strict=True) if isinstance(one, LeaseLost)]
    again = _look_again(engine, lost) if lost else {}
    return [again.get(parcel) or one for parcel, one in zip(parcels, found, strict=True)]


def _look_again(engine: Engine, lost: Sequence[Parcel]) -> Mapping[Parcel, Outcome | None]:
    """Whether they were published meanwhile, by a call whose answer was lost."""
    try:
        with reading(engine) as session:
            return _by_tenant(session, lost, _standing)
    except RegistryError as error:  # of no concern to those who are published
        return dict.fromkeys(lost, error)


def _all_or_each(engine: Engine, parcels: Sequence[Parcel], act: Act[Outcome | Found]) -> list[Outcome | Found]:
    """All in one transaction; where the rows of one cannot be written, each in its own, once more: that is its trouble.

    It is nobody's where somebody pointed a first `latest` meanwhile; then once more is enough.
    """
    try:
        return _at_once(engine, parcels, act)
    except RegistryError:
        raise
    except Exception:  # whatever it is
        return [_alone(engine, parcel, act) for parcel in parcels]


def _alone(engine: Engine, parcel: Parcel, act: Act[Outcome | Found]) -> Outcome | Found:
    try:
        return _at_once(engine, [parcel], act)[0]
    except Exception as error:
        return error


def _at_once(engine: Engine, parcels: Sequence[Parcel], act: Act[Found]) -> list[Found]:
    with transaction(engine) as session:
        found = _by_tenant(session, parcels, act)
    return [found[parcel] for parcel in parcels]


def _by_tenant(session: Session, parcels: Sequence[Parcel], act: Act[Found]) -> dict[Parcel, Found]:
    """All lock in one order, tenant by tenant, so that there is no deadlock."""
    found: dict[Parcel, Found] = {}
    ordered = sorted(parcels, key=lambda parcel: (parcel.job.tenant_id, parcel.job.id))
    for tenant, own in groupby(ordered, key=lambda parcel: parcel.job.tenant_id):
        enter(session, tenant)
        found |= act(session, tenant, list(own))
    return found


def _declare(session: Session, tenant: TenantId, parcels: Sequence[Parcel]) -> dict[Parcel, Outcome | None]:
    found = _standing(session, tenant, parcels)
    begun = {parcel.prefix: parcel.job.id for parcel in parcels if not found[parcel]}
    swept = uploads.declare_many(session, tenant, begun, max(parcel.now for parcel in parcels))
    return {parcel: _lost(parcel) if parcel.prefix in swept else found[parcel] for parcel in parcels}


def _standing(session: Session, tenant: TenantId, parcels: Sequence[Parcel]) -> dict[Parcel, Outcome | None]:
    """What came of each before; None of those that are still ours.  Nobody takes or cancels the jobs until the end."""
    ids = {parcel.job.id for parcel in parcels}
    fences = select(Job.id, Job.fence).where(Job.tenant_id == tenant, Job.id.in_(ids))
    fence = dict(session.execute(fences.order_by(Job.id).with_for_update(read=True)).tuples().all())
    mine = (AdapterVersion.tenant_id == tenant, AdapterVersion.job_id.in_(ids))
    rows = session.execute(select(AdapterVersion.job_id, *_FACTS).where(*mine)).mappings()
    made = {row["job_id"]: dict(row) for row in rows}
    return {
        parcel: _standing_of(parcel, made.get(parcel.job.id), ours=fence.get(parcel.job.id) == parcel.job.fence)
        for parcel in parcels
    }


def _standing_of(parcel: Parcel, made: Facts | None, ours: bool) -> Outcome | None:
    if made and made["sha256"] == parcel.digest:
        return _published(made)
    if not ours:
        return _lost(parcel)
    return ContentDiffers(str(parcel.job.id), made["number"]) if made else None


def _settle(session: Session, tenant: TenantId, parcels: Sequence[Parcel]) -> dict[Parcel, Outcome]:
    """One tenant's part.

    The adapters' row locks make their publishers wait in line, so that numbers have no gaps; what can be done before
    they are taken comes before, and what needs them in as few steps as the database can take.
    """
    lost: dict[Parcel, Outcome] = {parcel: _lost(parcel) for parcel in parcels}
    asked_at = _take(session, tenant, parcels)
    if not asked_at:
        return lost
    in_turn = sorted(asked_at, key=lambda parcel: asked_at[parcel])
    _close(session, tenant, in_turn)
    free = not is_protected(session, tenant, LATEST)
    numbers = _numbers(session, tenant, in_turn)
    rows = {parcel: parcel.row | {"number": numbers[parcel]} for parcel in in_turn}
    candidates = [(rows[parcel], asked_at[parcel]) for parcel in in_turn if free and parcel.finished.accepted]
    moves = follow(session, tenant, candidates)
    scores = [row for parcel in in_turn for row in _scores(parcel, rows[parcel])]
    events = [one for parcel in in_turn for one in _told(parcel, rows[parcel], asked_at[parcel], moves)]
    added = [Rows(AdapterVersion, list(rows.values())), Rows(Evaluation, scores), Rows(Event, events)]
    write(session, [*added, *moved(moves)])
    return lost | {parcel: _published(row) for parcel, row in rows.items()}


def _take(session: Session, tenant: TenantId, parcels: Sequence[Parcel]) -> dict[Parcel, datetime]:
    """Those whose job is still ours and whose upload the sweeper has not begun on, with when they were asked for.

    Both stay locked.  Of two of the same job the second is lost.
    """
    ids = {parcel.job.id for parcel in parcels}
    running = select(Job.id, Job.fence, Job.created_at).where(
        Job.tenant_id == tenant, Job.id.in_(ids), Job.state == "running"
    )
    found = session.execute(running.order_by(Job.id).with_for_update(key_share=True)).tuples()
    asked_at = {(job, fence): at for job, fence, at in found}
    ours: dict[JobId, Parcel] = {}
    for parcel in parcels:
        if (parcel.job.id, parcel.job.fence) in asked_at:
            ours.setdefault(parcel.job.id, parcel)
    settled = uploads.settle_many(session, tenant, [parcel.prefix for parcel in ours.values()])
    return {one: asked_at[one.job.id, one.job.fence] for one in ours.values() if one.prefix in settled}


def _close(session: Session, tenant: TenantId, parcels: Sequence[Parcel]) -> None:
    """End the jobs."""
    accepted = Job.id.in_([parcel.job.id for parcel in parcels if parcel.finished.accepted])
    ended = update(Job).where(Job.tenant_id == tenant, Job.id.in_([parcel.job.id for parcel in parcels]))
    state = case((accepted, "published"), else_="refused")
    now = max(parcel.now for parcel in parcels)
    session.connection().execute(ended.values(state=state, finished_at=now, lease_until=None, error=None))


def _numbers(session: Session, tenant: TenantId, in_turn: Sequence[Parcel]) -> Mapping[Parcel, int]:
    """Raise each adapter's head by its jobs among these, which get the numbers on the way there."""
    adapters = {parcel.job.adapter_id for parcel in in_turn}
    ids = [parcel.job.id for parcel in in_turn]
    own = select(func.count(Job.id)).where(Job.tenant_id == tenant, Job.adapter_id == Adapter.id, Job.id.in_(ids))
    theirs = select(Adapter.id).where(Adapter.tenant_id == tenant, Adapter.id.in_(adapters))
    locked = theirs.order_by(Adapter.id).with_for_update(key_share=True)  # nobody waits who adds what refers to them
    raised = update(Adapter).where(Adapter.tenant_id == tenant, Adapter.id.in_(locked))
    raised = raised.values(head=Adapter.head + own.scalar_subquery())
    rows = session.connection().execute(raised.returning(Adapter.id, Adapter.head))
    heads = dict(rows.tuples().all())
    numbers: dict[Parcel, int] = {}
    for parcel in reversed(in_turn):
        numbers[parcel] = heads[parcel.job.adapter_id]
        heads[parcel.job.adapter_id] -= 1
    return numbers


def _scores(parcel: Parcel, row: Facts) -> list[Facts]:
    return [
        {"id": uuid.uuid4(), "tenant_id": row["tenant_id"], "version_id": row["id"], "subject": subject,
         "metrics": {name: _plain(value) for name, value in metrics.items()}}
        for subject, metrics in parcel.finished.scores.items()
    ]  # fmt: skip


def _plain(value: object) -> object:
    """A figure as every database takes it: none where it is no number."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _told(parcel: Parcel, row: Facts, asked_at: datetime, moves: Moves) -> list[Facts]:
    """The events of a version: that it is there, and that `latest` moved to it if it did."""
    done = parcel.finished
    body = {
        "number": row["number"], "accepted": done.accepted, "reason": done.reason, "tokens": done.tokens,
        "device_seconds": done.device_seconds, "seconds": (parcel.now - asked_at).total_seconds(),
    }  # fmt: skip
    told = [("version published", body)]
    if row["id"] in moves:
        told.append(("alias moved", {"alias": LATEST, "number": row["number"], "actor": GATE}))
    return [
        {"tenant_id": row["tenant_id"], "kind": kind, "subject": str(row["id"]), "body": body, "at": parcel.now}
        for kind, body in told
    ]  # fmt: skip


def _lost(parcel: Parcel) -> LeaseLost:
    return LeaseLost(str(parcel.job.id), parcel.job.fence)


def _published(row: Facts) -> Published:
    return Published(
        row["id"], row["number"], row["state"] == "accepted", row["served_name"], row["prefix"], row["sha256"],
        row["size"],
    )  # fmt: skip
