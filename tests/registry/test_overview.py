"""What whoever looks after the factory asks: of one tenant, of all, and what has happened since the last look."""

from dataclasses import replace
from datetime import datetime, timedelta

from sqlalchemy import insert
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from registry import jobs, overview, queries, workers
from registry.models import Event
from registry.names import Reference, TenantId
from registry.overview import Tail
from registry.publishing import publish
from registry.session import reading, transaction
from registry.store import FolderStore
from tests.conftest import set_up
from tests.registry.conftest import LEASE, NOW, Claim, enqueue, finished


def test_who_waits_runs_and_failed_is_told_by_tenant(engine: Engine, claim: Claim) -> None:
    """Jobs of a dead worker wait; a tenant that asks sees its own."""
    working, dead, bad = claim(3, worker="gpu-1")
    with transaction(engine) as session:
        jobs.fail(session, bad, "acme/alice: no examples; add some", NOW)
        enqueue(session, "globex/eve", 1, now=NOW - timedelta(hours=2))
        jobs.renew(session, [working], timedelta(hours=1), NOW)
    later = NOW + LEASE + timedelta(seconds=1)

    with reading(engine) as session:
        waiting = overview.waiting(session, later)
        holdings = overview.holdings(session, later)
        acme = queries.tenant_id(session, "acme")
        failures = overview.failures(session, NOW, acme)
        own = overview.waiting(session, later, acme)

    assert [(one.tenant, one.jobs, later - one.oldest > LEASE) for one in waiting] == [
        ("globex", 1, True), ("acme", 1, True)
    ]  # fmt: skip
    assert [(one.worker, one.tenant, one.jobs) for one in holdings] == [("gpu-1", "acme", 1)]
    assert [(one.user, one.why) for one in failures] == [("alice", "acme/alice: no examples; add some")]
    assert [(one.tenant, one.jobs) for one in own] == [("acme", 1)]
    assert dead.id != working.id


def test_costs_are_summed_by_user_and_of_one_tenant(engine: Engine, store: FolderStore, claim: Claim) -> None:
    """Versions that nobody measured count as versions, and cost nothing."""
    for reference, spent in (("acme/alice", 2.5), ("acme/bob", None), ("globex/alice", 2.5)):
        for job in claim(2, reference):
            done = finished(f"weights of {reference} {job.id}")
            publish(engine, store, job, replace(done, tokens=1000 if spent else None, device_seconds=spent), NOW)

    with reading(engine) as session:
        acme = queries.tenant_id(session, "acme")
        found = overview.costs(session, acme)
        since = overview.costs(session, acme, NOW + timedelta(seconds=1))

    assert [(one.user, one.versions, one.tokens, one.device_seconds) for one in found] == [
        ("alice", 2, 2000, 5.0), ("bob", 2, None, None)
    ]  # fmt: skip
    assert since == []


def test_a_worker_is_heard_of_while_it_speaks(engine: Engine) -> None:
    """One row a worker, written over; who is silent is not counted, and who leaves is gone."""
    for seconds, slots in ((0, 4), (20, 8)):
        with transaction(engine) as session:
            workers.tell(session, "gpu-1", "cuda", slots, {"phase": "train"}, NOW + timedelta(seconds=seconds))
    with reading(engine) as session:
        (found,) = workers.present(session, NOW + timedelta(seconds=45))
        assert (found.slots, found.started_at) == (8, NOW)
        assert workers.present(session, NOW + timedelta(seconds=51)) == []
    with transaction(engine) as session:
        workers.tell(session, "gpu-2", "cuda", 8, {}, NOW + timedelta(days=2))  # who comes clears what is forgotten
    with transaction(engine) as session:
        workers.leave(session, "gpu-2")
        assert workers.present(session, NOW) == []


def test_each_event_is_counted_once(engine: Engine, store: FolderStore, claim: Claim) -> None:
    """What was there before the first look is not; what the bodies say is what metrics observe."""
    tail = Tail()
    claim(1, "acme/bob")
    looks = [kinds(engine, tail)]
    (job,) = claim(1)
    looks.append(kinds(engine, tail))
    publish(engine, store, job, finished(), NOW + timedelta(minutes=2))
    looks += [kinds(engine, tail), kinds(engine, tail)]

    assert looks == [[], ["job claimed"], ["version published"], []]


def test_a_body_says_how_long_it_took(engine: Engine, store: FolderStore) -> None:
    """From asking to the claim, and to the version."""
    tail = Tail()
    kinds(engine, tail)
    with transaction(engine) as session:
        enqueue(session, "acme/alice", 1)
    with transaction(engine) as session:
        (job,) = jobs.claim(session, "w", LEASE, 1, NOW + timedelta(seconds=30))
    publish(engine, store, job, finished(), NOW + timedelta(seconds=90))

    with reading(engine) as session:
        claimed, published = tail.read(session, NOW)

    assert (claimed.tenant, claimed.body["waited"]) == ("acme", 30)
    assert (published.body["seconds"], published.body["accepted"]) == (90, True)


def overtake(engine: Engine, tail: Tail, kind: str, now: datetime = NOW) -> None:
    """A job is claimed; before that is committed, something else happens and is read."""
    with transaction(engine) as session:
        acme = queries.ensure_adapter(session, Reference.parse("acme/alice"), NOW).tenant_id
    kinds(engine, tail)
    with transaction(engine) as slow:
        queries.tenant_id(slow, "acme")
        add(slow, acme, "job claimed")
        with transaction(engine) as quick:
            queries.tenant_id(quick, "acme")
            add(quick, acme, kind)
        assert kinds(engine, tail, now) == [kind]


def test_an_event_whose_transaction_ended_late_is_counted_too(postgres_url: str) -> None:
    """On PostgreSQL ids are given out before the COMMIT: a later one may be seen sooner."""
    engine, tail = set_up(postgres_url), Tail()
    overtake(engine, tail, "job failed")

    assert kinds(engine, tail) == ["job claimed"]
    assert kinds(engine, tail, NOW + overview.LATE * 2) == []
    assert kinds(engine, tail) == []
    engine.dispose()


def test_an_event_about_long_ago_hides_none_whose_transaction_ended_late(postgres_url: str) -> None:
    """A version is dated when it was asked to be published; its upload may take longer than any transaction."""
    engine, tail, later = set_up(postgres_url), Tail(), NOW + 2 * overview.LATE
    overtake(engine, tail, "version published", later)

    assert kinds(engine, tail, later + timedelta(seconds=1)) == ["job claimed"]
    engine.dispose()


def kinds(engine: Engine, tail: Tail, now: datetime = NOW) -> list[str]:
    """What happened since the last look."""
    with reading(engine) as session:
        return [one.kind for one in tail.read(session, now)]


def add(session: Session, tenant: TenantId, kind: str) -> None:
    """One event, sent to the database at once."""
    session.execute(insert(Event).values(tenant_id=tenant, kind=kind, subject="x", body={}, at=NOW))
