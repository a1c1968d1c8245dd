"""Publishers of one adapter who share a transaction come to what they would come to one after the other."""

import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import event, select
from sqlalchemy.engine import Engine
from sqlalchemy.exc import IntegrityError, OperationalError

from registry import aliases, jobs, protection, queries, together, writes
from registry.errors import DatabaseUnavailable, LeaseLost
from registry.jobs import ClaimedJob
from registry.models import AdapterVersion, Event, Freshness, Job
from registry.names import Reference
from registry.parcels import Parcel
from registry.publishing import Finished, Published, place, publish, publish_together
from registry.session import transaction
from registry.store import FolderStore
from registry.together import Outcome
from registry.uploads import UPLOAD_LEASE, sweep
from tests.conftest import looking, set_up, tampering
from tests.faults.invariants import check_no_intent_is_left, check_nothing_is_left, check_readers_see_whole_versions
from tests.registry.conftest import LEASE, NOW, Claim, enqueue, finished

ALICE, TWIN = Reference.parse("acme/alice"), Reference.parse("acme/twin")
PUBLISHERS = 12
Work = list[tuple[ClaimedJob, Finished]]
LATER = NOW + 2 * LEASE


class Meeting(FolderStore):
    """A store whose users wait for each other before the last file, so that they come to their commit together."""

    def __init__(self, root: Path, meet: Callable[[], object]) -> None:
        super().__init__(root)
        self.meet = meet

    def put_new(self, key: str, data: bytes) -> bool:
        """Once all are there."""
        if key.endswith("manifest.json"):
            self.meet()
        return super().put_new(key, data)


@pytest.fixture
def work(store: FolderStore, claim: Claim) -> Work:
    """Alice's jobs, all claimed."""
    return jobs_of(store, claim, ALICE)


def jobs_of(store: FolderStore, claim: Claim, reference: Reference) -> Work:
    """As many of anybody's."""
    held = claim(PUBLISHERS, reference.label)
    for job in held:
        store.put_new(job.dataset_key, b"data")
    return [(job, finished(str(number))) for number, job in enumerate(held)]


def publish_meeting(
    engine: Engine, store: FolderStore, work: Work, action: Callable[[], None] | None = None
) -> list[Future[Published]]:
    """Each by a thread of its own; they meet before their commit, and then something else happens first."""
    barrier = threading.Barrier(len(work), action)
    meeting = Meeting(store.root, lambda: barrier.wait(60))
    with ThreadPoolExecutor(len(work)) as threads:
        return [threads.submit(publish, engine, meeting, job, done, NOW) for job, done in work]


def history(engine: Engine, reference: Reference) -> list[object]:
    """An adapter's versions, moves, events and what is live, without ids."""
    with looking(engine) as session:
        tenant = queries.tenant_id(session, reference.tenant)
        adapter = queries.holder(session, tenant, reference.user, reference.adapter).adapter.id
        made = queries.versions(session, tenant, adapter)
        number = {version.id: version.number for version in made}
        moves = queries.alias_moves(session, tenant, adapter)
        told = session.scalars(select(Event).order_by(Event.txid, Event.id)).all()
        live = session.scalar(select(Freshness.dataset_id).where(Freshness.adapter_id == adapter))
        return [
            [(one.number, one.sha256, one.state, one.loss, one.gain) for one in made],
            [
                (one.from_id and number[one.from_id], number[one.to_id], one.actor, one.reason, one.kind)
                for one in moves
            ],
            [(one.kind, one.body) for one in told if one.subject in {str(version.id) for version in made}],
            queries.aliases(session, tenant, adapter),
            [one.number for one in made if one.dataset_id == live],
        ]


def replayed(engine: Engine, store: FolderStore, claim: Claim, work: Work) -> list[object]:
    """What the twin has, once as many jobs of equal age and content were published one after the other.

    In the order in which the joined ones got their numbers.
    """
    twins = [job for job, _ in jobs_of(store, claim, TWIN)]
    with tampering(engine) as session:
        row = {job.id: job for job in session.scalars(select(Job))}
        for (job, _), twin in zip(work, twins, strict=True):
            row[twin.id].created_at = row[job.id].created_at
    with looking(engine) as session:
        numbers = dict(session.execute(select(AdapterVersion.job_id, AdapterVersion.number)).tuples().all())
    pairs = [(numbers[job.id], twin, done) for (job, done), twin in zip(work, twins, strict=True)]
    for _, twin, done in sorted(pairs, key=lambda pair: pair[0]):
        publish(engine, store, twin, done, NOW)
    return history(engine, TWIN)


def shuffled(engine: Engine, work: Work, chance: random.Random) -> Work:
    """Some refused, each asked for at another time, in no order."""
    with tampering(engine) as session:
        for job in session.scalars(select(Job)):
            job.created_at = NOW - timedelta(minutes=chance.randrange(20))
    chance.shuffle(work)
    return [(job, replace(done, accepted=chance.random() < 0.7)) for job, done in work]


@pytest.mark.parametrize("seed", range(4))
def test_however_they_meet_it_is_as_one_after_the_other(
    engine: Engine, store: FolderStore, claim: Claim, work: Work, seed: int
) -> None:
    """Numbers, moves of `latest` (in batches of any size, also past versions that were asked for later) and events."""
    chance = random.Random(seed)
    work = shuffled(engine, work, chance)
    if seed == 3:
        with transaction(engine) as session:
            tenant = queries.tenant_id(session, "acme")
            protection.protect(session, tenant, "latest", actor="ops", reason="by hand", now=NOW)
    left = list(work)
    while left:
        size = chance.randint(1, 6)
        found = publish_together(engine, store, left[:size], NOW)
        assert all(isinstance(one, Published) for one in found.values())
        left = left[size:]

    assert history(engine, ALICE) == replayed(engine, store, claim, work)
    check_nothing_is_left(engine, store)


def test_threads_that_meet_share_transactions_and_nothing_else(
    engine: Engine, store: FolderStore, claim: Claim, work: Work
) -> None:
    """Each is told of its own version; the whole is as one after the other."""
    work, raised = shuffled(engine, work, random.Random(5)), list[str]()

    @event.listens_for(engine, "before_cursor_execute")
    def count(_: object, __: object, statement: str, *___: object) -> None:
        raised.extend([statement] if statement.startswith("UPDATE adapters") else [])

    done = [one.result() for one in publish_meeting(engine, store, work)]

    assert len(raised) < PUBLISHERS
    assert sorted(one.number for one in done) == list(range(1, PUBLISHERS + 1))
    with looking(engine) as session:
        rows = {row.job_id: row for row in session.scalars(select(AdapterVersion))}
    assert [one.id for one in done] == [rows[job.id].id for job, _ in work]
    assert [one.sha256 for one in done] == [place(job, done)[0] for job, done in work]
    assert history(engine, ALICE) == replayed(engine, store, claim, work)


def test_what_befalls_one_is_told_to_that_one(engine: Engine, store: FolderStore, work: Work) -> None:
    """A lease that is lost just before the commit, a row that the database does not take: the others are published."""
    lost, broken = work[3][0], work[5][0]
    work[5] = (broken, replace(work[5][1], reason=None))  # type: ignore[arg-type]  # what no row may have

    def steal() -> None:
        with transaction(engine) as session:
            assert jobs.claim(session, "rival", LEASE, 1, LATER, [lost.id])

    told = [one.exception() for one in publish_meeting(engine, store, work, steal)]

    assert [type(one) for one in told if one] == [LeaseLost, IntegrityError]
    assert [bool(one) for one in told] == [number in (3, 5) for number in range(PUBLISHERS)]
    check_readers_see_whole_versions(engine, store, ALICE, newest=PUBLISHERS)
    sweep(engine, store, NOW + 2 * UPLOAD_LEASE)
    check_nothing_is_left(engine, store)


@pytest.mark.parametrize("answer_lost", [True, False])
def test_a_database_that_fails_in_a_joined_transaction_is_told_to_all_and_all_may_try_again(
    engine: Engine, store: FolderStore, work: Work, monkeypatch: pytest.MonkeyPatch, answer_lost: bool
) -> None:
    """Nobody is published, or everybody is; then everybody, once."""
    settle, broken = together.settle, list[int]()

    def fail_once(engine: Engine, parcels: Sequence[Parcel]) -> list[Outcome]:
        if broken or len(parcels) == 1:
            return settle(engine, parcels)
        broken.append(len(parcels))
        if answer_lost:
            settle(engine, parcels)
            raise DatabaseUnavailable("here", "the answer was lost", "wait")

        @event.listens_for(engine, "before_cursor_execute", once=True)
        def fail(*_: object) -> None:
            raise OperationalError("a statement", {}, Exception("it went away"))

        return settle(engine, parcels)

    monkeypatch.setattr(together, "settle", fail_once)
    told = [one.exception() for one in publish_meeting(engine, store, work)]

    assert broken == [sum(isinstance(one, DatabaseUnavailable) for one in told)]
    assert broken == [sum(one is not None for one in told)]
    check_readers_see_whole_versions(engine, store, ALICE)
    again = [publish(engine, store, job, done, NOW) for job, done in work]
    assert sorted(one.number for one in again) == list(range(1, PUBLISHERS + 1))
    check_readers_see_whole_versions(engine, store, ALICE)
    check_nothing_is_left(engine, store)


def test_two_threads_that_publish_one_job_are_told_the_same_version(
    engine: Engine, store: FolderStore, work: Work
) -> None:
    """In one transaction too."""
    work = [work[0], work[1], work[0], work[0], work[1]]

    done = [one.result() for one in publish_meeting(engine, store, work)]

    assert done == [done[0], done[1], done[0], done[0], done[1]]
    assert {done[0].number, done[1].number} == {1, 2}


def test_a_first_latest_that_somebody_points_meanwhile_is_moved_on(
    postgres_url: str, store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is nothing yet that a publisher could lock."""
    engine = set_up(postgres_url)
    with transaction(engine) as session:
        asked = enqueue(session, "acme/alice", 2)
    with transaction(engine) as session:
        refused, good = [jobs.claim(session, "worker", LEASE, 1, NOW, [one.job_id])[0] for one in asked]
    publish(engine, store, refused, finished("refused", accepted=False), NOW)
    write, left = writes.write, [Reference.parse("acme/alice:1")]

    def promote_first(*given: object) -> None:
        if left:
            with transaction(engine) as session:
                tenant, first = queries.tenant_id(session, "acme"), left.pop()
                aliases.promote(session, tenant, first, "latest", actor="me", reason="by hand", now=NOW, force=True)
        write(*given)  # type: ignore[arg-type]  # as it is

    monkeypatch.setattr(together, "write", promote_first)

    assert publish(engine, store, good, finished("good"), NOW).number == 2

    moves = history(engine, ALICE)[1]
    assert moves == [(1, 2, "gate", "because", "moved"), (None, 1, "me", "by hand", "moved")]
    engine.dispose()


KILLED = """
import os, signal, sys
from pathlib import Path
from uuid import UUID
from registry import jobs, together
from registry.session import open_database, transaction
from registry.store import FolderStore
from tests.registry.conftest import LEASE, NOW, finished
from tests.registry.test_joined import publish_meeting

url, root, where = sys.argv[1:4]
engine, held = open_database(url), []
for one in sys.argv[4:]:
    with transaction(engine) as session:
        held += jobs.claim(session, "doomed", LEASE, 1, NOW, [UUID(one)])
write, settle = together.write, together.settle
def die(*joined):
    print(*joined, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
def writing(session, writes):
    write(session, writes)
    if where == "before" and len(writes[0].rows) > 1:
        die(*[row["job_id"] for row in writes[0].rows])
def settling(engine, parcels):
    found = settle(engine, parcels)
    if where == "after" and len(parcels) > 1:
        die(*[parcel.job.id for parcel in parcels])
    return found
together.write, together.settle = writing, settling
publish_meeting(engine, FolderStore(Path(root)), [(job, finished(str(job.id))) for job in held])
"""


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_kill_in_a_joined_transaction_loses_nobody_and_publishes_nobody_twice(
    engine: Engine, store: FolderStore, where: str
) -> None:
    """SIGKILL just before and just after its COMMIT: all who were in it are there, or none."""
    with transaction(engine) as session:
        asked = [one.job_id for one in enqueue(session, "acme/alice", PUBLISHERS)]
    url = engine.url.render_as_string(hide_password=False)
    command = [sys.executable, "-c", KILLED, url, str(store.root), where, *map(str, asked)]
    dead = subprocess.run(command, cwd=Path(__file__).parents[2], timeout=100, capture_output=True, text=True)
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    joined = set(dead.stdout.split())
    with looking(engine) as session:
        there = {str(job) for job in session.scalars(select(AdapterVersion.job_id))}
    assert len(joined) > 1
    assert joined & there == (joined if where == "after" else set())
    check_readers_see_whole_versions(engine, store, ALICE, newest=PUBLISHERS)

    later, again = NOW + UPLOAD_LEASE + LEASE, list[ClaimedJob]()
    for one in asked:
        with transaction(engine) as session:
            again += jobs.claim(session, "next", LEASE, 1, later, [one])
    found = publish_together(engine, store, [(job, finished(str(job.id))) for job in again], later)

    assert all(isinstance(one, Published) for one in found.values())
    with looking(engine) as session:
        made = session.execute(select(AdapterVersion.number, AdapterVersion.job_id)).tuples().all()
    assert sorted(number for number, _ in made) == list(range(1, PUBLISHERS + 1))
    assert {job for _, job in made} == set(asked)
    for sweeps in (1, 2):
        sweep(engine, store, later + 2 * sweeps * UPLOAD_LEASE)
    check_no_intent_is_left(engine)
    check_readers_see_whole_versions(engine, store, ALICE)
