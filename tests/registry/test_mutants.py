"""The code with any one tenant filter deleted, against a database that keeps tenants apart by itself."""

import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from sqlalchemy import create_engine, inspect, select, text
from sqlalchemy.engine import Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from registry import (
    aliases,
    collection,
    erasure,
    feed,
    fleet,
    following,
    forgetting,
    freshness,
    growth,
    holds,
    jobs,
    lookups,
    orders,
    overview,
    protection,
    queries,
    queue,
    resolving,
    retention,
    schedules,
    search,
    shares,
    together,
    uploads,
)
from registry.client import Client
from registry.errors import RegistryError
from registry.forgetting import Wish
from registry.jobs import ClaimedJob
from registry.models import AdapterVersion, Base
from registry.names import Reference, TenantId
from registry.parcels import addressed
from registry.publishing import publish
from registry.queries import Holder
from registry.schedules import Due, Terms
from registry.search import Search
from registry.session import open_database, transaction
from registry.store import FolderStore
from registry.timing import Timing
from tests.conftest import looking
from tests.registry.conftest import LEASE, NOW, finished
from tests.registry.mutants import Mutant, alive, mutants
from tests.registry.twins import OURS, TABLES, THEIRS, busy, tenant_of
from tests.servers import APPLICATION

Calls = dict[str, set[str]]  # functions that each thing to do has run, as module.function

UNDO = "done, and to be undone"
PARTS = 4
LEAKING = 3  # mutants of a part at least that must leak without row-level security, or the test has no teeth


def doings(session: Session, job: ClaimedJob) -> dict[str, Callable[[], object]]:
    """Everything that the registry does for one tenant in a transaction: what each shows is what it gives back."""
    now = NOW + timedelta(minutes=1)
    who: Any = {"actor": "me", "reason": "because", "now": NOW}  # keywords of unlike types
    mine, alice = queries.tenant_id(session, OURS), Reference.parse(f"{OURS}/alice")
    engine = session.get_bind().engine  # a look-up has a connection of its own
    holder = queries.holder(session, mine, "alice", "default")
    adapter, first = holder.adapter.id, Reference.parse(f"{OURS}/alice:1")
    version = queries.version(session, mine, alice)
    base = queries.ensure_base(session, name="tiny", revision="main", digest="b" * 64, parameters=7, now=NOW)
    dataset = queries.newest_dataset(session, mine, holder)
    order = orders.Order(dataset, base, {}, "r" * 64, "g")
    facts: Any = {"digest": dataset.digest, "key": "k", "examples": 1, "size": 1}
    return {
        "tenant": lambda: (mine, holder, version, dataset, order.fingerprint),
        "ensure": lambda: queries.ensure_adapter(session, alice, NOW),
        "ensure new": lambda: queries.ensure_adapter(session, Reference(OURS, "alice", "notes"), NOW),
        "ensure dataset": lambda: queries.ensure_dataset(session, mine, holder, now=NOW, **facts),
        "versions": lambda: (queries.versions(session, mine, adapter), queries.version(session, mine, first)),
        "aliases": lambda: (queries.aliases(session, mine, adapter), queries.alias_moves(session, mine, adapter)),
        "scores": lambda: queries.scores(session, mine, version),
        "lineage": lambda: queries.lineage(session, mine, version),
        "listing": lambda: queries.listing(session, mine),
        "counts": lambda: (queries.job_counts(session, mine), queries.recent_jobs(session, mine)),
        "seen": lambda: (
            overview.waiting(session, now, mine),
            overview.holdings(session, NOW, mine),
            overview.failures(session, NOW, mine),
            overview.ended(session, NOW, mine),
        ),
        "costs": lambda: overview.costs(session, mine),
        "job": lambda: queries.job(session, mine, job.id),
        "lookup": lambda: lookups.find(engine, mine, alice),
        "lookup many": lambda: lookups.find_many(engine, mine, ["alice"], "default", "latest"),
        "search": lambda: search.search(session, mine, Search.parse(["alias=latest"])),
        "outdated": lambda: freshness.outdated(session, mine, base="c"),
        "changes": lambda: feed.changes(session, mine),
        "latest": lambda: aliases.promote(session, mine, first, "latest", **who),
        "enqueue": lambda: orders.enqueue(session, mine, holder, order, now),
        "renew": lambda: jobs.renew(session, [job], LEASE, now),
        "release": lambda: jobs.release(session, job, now, "error"),
        "fail": lambda: jobs.fail(session, job, "reason", now),
        "promote": lambda: aliases.promote(session, mine, Reference.parse(f"{OURS}/alice:2"), "production", **who),
        "rollback": lambda: aliases.rollback(session, mine, alice, "latest", **who),
        "protect": lambda: protection.protect(session, mine, "canary", **who),
        "protected": lambda: (protection.protected(session, mine), protection.is_protected(session, mine, "latest")),
        "unprotect": lambda: protection.unprotect(session, mine, "frozen", **who),
        "fleet": lambda: fleet.promote_all(session, mine, "production", "latest", fleet.Where(), **who),
        "fleet back": lambda: fleet.roll_back_all(session, mine, "production", **who),
        "resolve": lambda: resolving.versions_of(session, mine, [alice, first]),
        "resolve all": lambda: resolving.versions_at(session, mine, OURS, "latest", fleet.Where(), ("", "")),
        "schedules": lambda: schedules.schedules(session, mine),
        "put": lambda: schedules.put(session, mine, holder, Timing.every("2h"), "other", {}, NOW),
        "pause": lambda: schedules.pause(session, mine, holder, True, NOW),
        "remove": lambda: schedules.remove(session, mine, holder, NOW),
        "wake": lambda: schedules.wake(session, mine, holder.user.id, NOW),
        "queue": lambda: (
            queue.listed(session, mine, queue.Wanted(queue.STATES)),
            queue.why_waiting(session, mine, queries.job(session, mine, job.id), now),
            growth.pair_of(session, mine, adapter),
            shares.room(session, shares.share(session, mine), now),
            shares.full_until(session, mine, adapter, 1, now),
        ),
        "cancel": lambda: (
            queue.cancel(session, mine, holder, "reason", now),
            queue.retry(session, mine, queue.Wanted(queue.STATES), now),
            shares.set_quota(session, mine, {"max_versions": 3, "max_waiting": 1}, now),
        ),
        **goings(session, mine, holder, who),
    }


def goings(session: Session, mine: TenantId, holder: Holder, who: Any) -> dict[str, Callable[[], object]]:
    """What the registry does for one tenant to let things go."""
    later, bert = NOW + timedelta(days=1), Wish(OURS, "bert", "", "me", "asked to")
    second, kept = Reference.parse(f"{OURS}/alice:2"), Reference.parse(f"{OURS}/alice:1")
    return {
        "set policy": lambda: retention.set_policy(session, mine, 1, None, **who),
        "pin": lambda: retention.pin(session, mine, second, **who),
        "unpin": lambda: retention.unpin(session, mine, kept, **who),
        "kept": lambda: (retention.policy(session, mine), retention.pins(session, mine), holds.holds(session, mine)),
        "hold": lambda: holds.hold(session, mine, "bert", **who),
        "unhold": lambda: holds.unhold(session, mine, "alice", **who),
        "collect": lambda: collection._mark(session, mine, later),
        "forget": lambda: forgetting._begin(session, mine, bert, NOW),
        "receipts": lambda: forgetting.receipts(session, mine),
        "erase": lambda: erasure.delete_rows(session, mine, holder.user.id),
    }


NAMES = [
    "tenant", "ensure", "ensure new", "ensure dataset", "versions", "aliases", "scores", "lineage", "listing", "counts",
    "seen", "costs",
    "job", "lookup", "lookup many", "search", "outdated", "changes", "latest", "enqueue", "renew", "release", "fail",
    "promote", "rollback", "protect", "protected", "unprotect", "fleet", "fleet back", "resolve", "resolve all",
    "schedules", "put", "pause", "remove", "wake", "queue", "cancel",
    "set policy", "pin", "unpin", "kept", "hold", "unhold", "collect", "forget", "receipts", "erase",
]  # fmt: skip


@contextmanager
def noting(calls: Calls, name: str) -> Iterator[None]:
    """Write down which functions run inside."""
    called = calls.setdefault(name, set())

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            called.add(f"{frame.f_globals.get('__name__')}.{frame.f_code.co_name}")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(before)


def reaching(mutant: Mutant, calls: Calls) -> list[str]:
    """What runs the mutated function; whatever does not is as it was."""
    return [name for name, called in calls.items() if f"registry.{mutant.module}.{mutant.function}" in called]


def observe(
    engine: Engine, store: FolderStore, cache: Path, job: ClaimedJob, names: Sequence[str], calls: Calls | None = None
) -> str:
    """What globex sees when it does what there is to do, each thing in a transaction that is undone; in words."""
    seen: list[object] = []
    calls = {} if calls is None else calls
    for name in names:
        given_up = (RuntimeError, RegistryError, SQLAlchemyError, ValueError)
        with suppress(*given_up), noting(calls, name), transaction(engine) as session:
            given = doings(session, job)[name]()
            session.flush()
            seen += [name, _words(given), _words(list(session.identity_map.values()))]
            raise RuntimeError(UNDO)
    with suppress(RegistryError, SQLAlchemyError):
        seen.append(Client(engine, store, cache).resolve(f"{OURS}/alice@production"))
    with suppress(RegistryError, SQLAlchemyError):
        seen += [publish(engine, store, job, finished("new of globex"), NOW) for _ in range(2)]
    return repr(_words(seen))


@dataclass(frozen=True)
class Loot:
    """Rows of acme that somebody got hold of, and its running job under globex's name."""

    holder: Holder
    version: AdapterVersion
    job: ClaimedJob
    prefix: str


def intrusions(session: Session, loot: Loot) -> dict[str, Callable[[], object]]:
    """Globex asks for what is acme's, by its keys: nothing but the filter on the tenant stands between."""
    mine, adapter = queries.tenant_id(session, OURS), loot.holder.adapter.id
    job, now, soon = loot.job, NOW + timedelta(minutes=1), NOW + timedelta(days=1)
    said: Any = {"actor": "eve", "reason": "because", "now": NOW}  # keywords of unlike types
    parcel = replace(addressed(job, finished("eve's"), NOW), prefix=loot.prefix)
    row = {"id": uuid.uuid4(), "adapter_id": adapter}
    return {
        "versions": lambda: queries.versions(session, mine, adapter),
        "aliases": lambda: queries.aliases(session, mine, adapter),
        "moves": lambda: queries.alias_moves(session, mine, adapter),
        "scores": lambda: queries.scores(session, mine, loot.version),
        "lineage": lambda: queries.lineage(session, mine, loot.version),
        "dataset": lambda: queries.newest_dataset(session, mine, loot.holder),
        "dataset key": lambda: queries.dataset_key(session, mine, loot.holder, job.dataset_digest),
        "seen": lambda: (
            overview.waiting(session, now, mine),
            overview.holdings(session, NOW, mine),
            overview.failures(session, NOW, mine),
            overview.ended(session, NOW, mine),
        ),
        "costs": lambda: overview.costs(session, mine),
        "job": lambda: queries.job(session, mine, job.id),
        "renew": lambda: jobs.renew(session, [job], LEASE, soon),
        "release": lambda: jobs.release(session, job, now, "error"),
        "move": lambda: aliases.move(session, mine, loot.version, "production", **said),
        "before": lambda: aliases._before(session, mine, adapter, "latest"),
        "pause": lambda: schedules.pause(session, mine, loot.holder, True, NOW),
        "remove": lambda: schedules.remove(session, mine, loot.holder, NOW),
        "put": lambda: schedules.put(session, mine, loot.holder, Timing.every("2h"), "eve", {}, NOW),
        "wake": lambda: schedules.wake(session, mine, loot.holder.user.id, soon),
        "hold": lambda: schedules.hold(session, _due(mine, loot), "eve", soon),
        "cancel": lambda: queue.cancel(session, mine, loot.holder, "eve", soon),
        "growth": lambda: growth.pair_of(session, mine, adapter),
        "full": lambda: shares.full_until(session, mine, adapter, 1, now),
        "settle": lambda: uploads.settle(session, mine, loot.prefix),
        "declare": lambda: uploads.declare(session, mine, loot.prefix, soon),
        "already": lambda: list(together._standing(session, mine, [parcel]).values()),
        "take": lambda: list(together._take(session, mine, [parcel]).values()),
        "close": lambda: together._close(session, mine, [parcel]),
        "numbers": lambda: list(together._numbers(session, mine, [parcel]).values()),
        "follow": lambda: [move.earlier for move in following.follow(session, mine, [(row, soon)]).values()],
        "fence": lambda: jobs.check_fence(session, job),
        "gone": lambda: retention.gone(session, mine, adapter),
        "living": lambda: retention.check_living(session, mine, loot.version, "foreign"),
        "free": lambda: holds.check_free(session, mine, loot.holder.user.id, "foreign"),
        "lock": lambda: retention.lock_aliases(session, mine, [adapter]),
        "there": lambda: queries.still_there(session, mine, loot.holder),
        "erase": lambda: erasure.delete_rows(session, mine, loot.holder.user.id),
    }


def intrude(engine: Engine, loot: Loot, names: Sequence[str], calls: Calls | None = None) -> dict[str, str]:
    """What came of each attempt, committed where it went through."""
    found = {}
    calls = {} if calls is None else calls
    for name in names:
        given: object = "refused"
        with suppress(RegistryError, SQLAlchemyError, KeyError), noting(calls, name), transaction(engine) as session:
            given = _words(intrusions(session, loot)[name]())
        found[name] = repr(given)
    return found


INTRUSIONS = [
    "versions", "aliases", "moves", "scores", "lineage", "dataset", "dataset key", "job", "renew", "release", "move",
    "before", "pause", "remove", "put", "wake", "hold", "cancel", "growth", "full", "settle", "declare", "already",
    "take", "close", "numbers", "follow", "fence", "gone", "living", "free", "lock", "there", "erase",
]  # fmt: skip


def _due(tenant: TenantId, loot: Loot) -> Due:
    """Acme's schedule under globex's name."""
    whose = Reference.parse(f"{THEIRS}/alice")
    return Due(whose, "base", {}, tenant, loot.holder.adapter.id, Terms(), None)


def loot_of(engine: Engine, job: ClaimedJob) -> Loot:
    """Everything that an intruder could ask with."""
    with transaction(engine) as session:
        theirs = queries.tenant_id(session, THEIRS)
        holder = queries.holder(session, theirs, "alice", "default")
        version = queries.version(session, theirs, Reference.parse(f"{THEIRS}/alice:2"))
        prefix = f"t/{THEIRS}/x"
        uploads.declare(session, theirs, prefix, NOW)
        return Loot(holder, version, job, prefix)


def _words(row: object) -> object:
    if isinstance(row, Base):
        return {column.key: getattr(row, column.key) for column in inspect(type(row)).column_attrs}
    if isinstance(row, list | tuple):
        return [_words(one) for one in row]
    return vars(row) if hasattr(row, "__dict__") else row


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(900)  # two copies of a database for each filter
@pytest.mark.parametrize("part", range(PARTS))
def test_every_mutant_without_a_tenant_filter_still_sees_and_changes_nothing_foreign(
    twins: Engine, store: FolderStore, tmp_path: Path, part: int
) -> None:
    """Row-level security holds whatever filter is deleted; as a superuser, whom it does not bind, the same leak."""
    ours, theirs = busy(twins, OURS), busy(twins, THEIRS)
    loot = loot_of(twins, replace(theirs, tenant_id=ours.tenant_id))
    foreign, before = marks(twins), belongings(twins)
    done, tried = Calls(), Calls()
    with copied(twins) as engine:
        assert OURS in (sane := observe(engine, store, tmp_path, ours, NAMES, done))
        assert not leaks(sane, foreign)
        nothing = intrude(engine, loot, INTRUSIONS, tried)
        assert belongings(engine) == before

    leaking = set()
    for mutant in mutants()[part::PARTS]:
        doing, trying = reaching(mutant, done), reaching(mutant, tried)
        expected = {name: nothing[name] for name in trying}
        with alive(mutant), copied(twins) as engine:
            assert not leaks(observe(engine, store, tmp_path, ours, doing), foreign), mutant
            assert intrude(engine, loot, trying) == expected, mutant
            assert belongings(engine) == before, mutant
        with alive(mutant), copied(twins, "postgres") as engine:
            loose = intrude(engine, loot, trying) != expected
            if loose or leaks(observe(engine, store, tmp_path, ours, doing), foreign):
                leaking.add(str(mutant))
    # The others are held by a second filter, or by an id that a caller cannot come by through the first.
    assert len(leaking) >= LEAKING, leaking


@contextmanager
def copied(engine: Engine, role: str = APPLICATION) -> Iterator[Engine]:
    """A database with the same rows, as that role sees it."""
    engine.dispose()
    name = f"copy_{uuid.uuid4().hex}"
    admin = create_engine(engine.url.set(username="postgres", database="postgres"), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name} TEMPLATE {engine.url.database}"))
        copy = open_database(engine.url.set(username=role, database=name).render_as_string(hide_password=False))
        yield copy
        copy.dispose()
        connection.execute(text(f"DROP DATABASE {name}"))
    admin.dispose()


def leaks(seen: str, foreign: set[str]) -> set[str]:
    """Which of another tenant's facts stand in what was seen."""
    return {mark for mark in foreign if mark in seen}


def marks(engine: Engine) -> set[str]:
    """What only acme's rows hold: its name, every id, opaque names, served names, digests."""
    theirs = tenant_of(engine, THEIRS)
    found = {THEIRS, str(theirs)}
    with looking(engine) as session:
        for table in TABLES.values():
            for row in session.execute(select(table).where(table.c.tenant_id == theirs)).mappings():
                found |= {str(row[key]) for key in ("id", "opaque", "served_name", "fingerprint") if key in row}
    return {mark for mark in found if len(mark) > 3}


def belongings(engine: Engine) -> str:
    """Every row of acme, to the last value."""
    theirs = tenant_of(engine, THEIRS)
    with looking(engine) as session:
        return repr(
            [sorted(map(repr, session.execute(select(t).where(t.c.tenant_id == theirs)))) for t in TABLES.values()]
        )
