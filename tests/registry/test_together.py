"""Many jobs published at once come to what each would come to alone, whatever becomes of the others."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta

import pytest
from sqlalchemy import select, text
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from registry import jobs, protection, queries, together
from registry.errors import ContentDiffers, DatabaseUnavailable, LeaseLost, StoreUnavailable
from registry.jobs import ClaimedJob
from registry.models import AdapterVersion, Alias, AliasMove, Evaluation, Event, Freshness, Job, Upload
from registry.names import Reference
from registry.publishing import Finished, Published, declare, place, publish, publish_together
from registry.session import transaction
from registry.store import FolderStore
from registry.tenancy import enter
from registry.uploads import UPLOAD_LEASE, sweep
from tests.conftest import looking, tampering
from tests.faults.invariants import check_nothing_is_left, check_readers_see_whole_versions
from tests.registry.conftest import LEASE, NOW, Claim, finished

USERS = ("acme/alice", "acme/bob", "globex/eve", "globex/mallory", "acme/carol")
Work = list[tuple[ClaimedJob, Finished]]


@pytest.fixture
def work(store: FolderStore, claim: Claim) -> Work:
    """A job of every user, with files of its own; the gate refuses the second's."""
    return work_of(store, claim, USERS)


def work_of(store: FolderStore, claim: Claim, users: Sequence[str]) -> Work:
    """The same of any users."""
    found = [(claim(1, user)[0], finished(str(number), accepted=number != 1)) for number, user in enumerate(users)]
    for job, _ in found:
        store.put_new(job.dataset_key, b"data")
    return found


def facts(engine: Engine, work: Work) -> list[tuple[object, ...]]:
    """What publishing leaves in the registry of these jobs, without ids: versions, aliases, jobs, scores and events."""
    with looking(engine) as session:
        mine = AdapterVersion.job_id.in_([job.id for job, _ in work])
        versions = session.scalars(select(AdapterVersion).where(mine)).all()
        scores = {
            one.id: sorted(
                (row.subject, repr(row.metrics))
                for row in session.scalars(select(Evaluation).where(Evaluation.version_id == one.id))
            )
            for one in versions
        }
        moves = {move.to_id: (move.kind, move.from_id, move.reason) for move in session.scalars(select(AliasMove))}
        latest = {alias.version_id for alias in session.scalars(select(Alias))}
        states = {job.id: job.state for job in session.scalars(select(Job))}
        noted = [(event.subject, event.kind, repr(event.body)) for event in session.scalars(select(Event))]
    return sorted(
        (
            one.sha256, one.number, one.state, one.size, one.tokens, one.device_seconds, one.id in latest,
            states[one.job_id], moves.get(one.id), scores[one.id],
            sorted(what for subject, *what in noted if subject == str(one.id)),
        )
        for one in versions
    )  # fmt: skip


def test_together_or_one_by_one_comes_to_the_same(engine: Engine, store: FolderStore, claim: Claim, work: Work) -> None:
    """Versions, numbers, scores, aliases, jobs and events: the batch is an optimisation and nothing else."""
    others = work_of(store, claim, [f"{user}-too" for user in USERS])

    later = NOW + LEASE / 2
    found = publish_together(engine, store, work, later)
    for job, done in others:
        publish(engine, store, job, done, later)

    assert facts(engine, work) == facts(engine, others)
    assert f"'tokens': 1200, 'device_seconds': 3.5, 'seconds': {(LEASE / 2).total_seconds()}" in repr(
        facts(engine, work)
    )
    assert len(facts(engine, work)) == len(work)
    assert [found[job.id] for job, _ in work] == [publish(engine, store, job, done, NOW) for job, done in work]
    check_nothing_is_left(engine, store)
    for job, done in work:
        if done.accepted:
            check_readers_see_whole_versions(engine, store, job.reference)


def test_a_second_version_moves_latest_and_a_protected_one_stays(
    engine: Engine, store: FolderStore, claim: Claim
) -> None:
    """Adapters that have a version already, and those of a tenant that moves `latest` by hand."""
    pairs = [claim(2, user) for user in USERS[:4]]
    publish_together(engine, store, [(first, finished("first")) for first, _ in pairs], NOW)
    with transaction(engine) as session:
        globex = queries.tenant_id(session, "globex")
        protection.protect(session, globex, "latest", actor="ops", reason="by hand", now=NOW)

    second = [(job, finished("second")) for _, job in pairs]
    found = publish_together(engine, store, second, NOW)

    assert [_number(found[job.id]) for job, _ in second] == [2] * 4
    with looking(engine) as session:
        rows = select(AdapterVersion.number).join(Alias, Alias.version_id == AdapterVersion.id)
        assert sorted(session.scalars(rows)) == [1, 1, 2, 2]


def test_one_that_went_elsewhere_does_not_hold_up_the_others(engine: Engine, store: FolderStore, work: Work) -> None:
    """A lease that was lost, an upload that the sweeper took, other content than before: each is its own trouble."""
    (alice, done), (bob, refused), (eve, _), *rest = work
    with transaction(engine) as session:
        jobs.claim(session, "fast", LEASE, 1, NOW + 2 * LEASE, [alice.id])
    declare(engine, bob, place(bob, refused)[0], NOW)
    sweep(engine, store, NOW + 2 * UPLOAD_LEASE)
    publish(engine, store, eve, finished("what it came to before"), NOW)

    found = publish_together(engine, store, work, NOW)

    assert isinstance(found[alice.id], LeaseLost)
    assert isinstance(found[bob.id], LeaseLost)
    assert isinstance(found[eve.id], ContentDiffers)
    assert [_number(found[job.id]) for job, _ in rest] == [1, 1]
    assert done.accepted
    prefix = place(alice, done)[1]
    assert list(store.keys(prefix)) == []  # alice's bytes never came there: perhaps she is forgotten
    with looking(engine) as session:
        assert prefix not in set(session.scalars(select(Upload.prefix)))


def test_an_adapters_two_jobs_get_numbers_in_turn(engine: Engine, store: FolderStore, claim: Claim) -> None:
    """In the order in which they were asked for."""
    first, second = claim(2)

    found = publish_together(engine, store, [(first, finished("one")), (second, finished("two"))], NOW)

    assert sorted(_number(found[job.id]) for job in (first, second)) == [1, 2]


def test_a_store_that_takes_some_publishes_those(engine: Engine, store: FolderStore, work: Work) -> None:
    """Of the others the trouble is told; they keep their jobs, and are published the next time."""
    away = {place(job, done)[1] for job, done in work[::2]}
    whole = store.put_new

    def put_some(key: str, data: bytes) -> bool:
        if key.endswith("manifest.json") and key.rpartition("/")[0] in away:
            raise StoreUnavailable("here", "is full", "make room")
        return whole(key, data)

    store.put_new = put_some  # type: ignore[method-assign]  # a store that is full for some
    found = publish_together(engine, store, work, NOW)

    assert [isinstance(found[job.id], StoreUnavailable) for job, _ in work] == [True, False, True, False, True]
    store.put_new = whole  # type: ignore[method-assign]
    again = publish_together(engine, store, work, NOW + timedelta(seconds=1))
    assert [_number(again[job.id]) for job, _ in work] == [1] * 5
    check_nothing_is_left(engine, store)


@pytest.mark.parametrize("answer_lost", [True, False])
def test_a_commit_that_fails_or_whose_answer_is_lost_is_made_good_by_another_try(
    engine: Engine, store: FolderStore, work: Work, answer_lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everybody or nobody; then everybody, once."""
    _break_second(monkeypatch, together, answer_lost)
    with pytest.raises(DatabaseUnavailable):
        publish_together(engine, store, work, NOW)

    assert len(facts(engine, work)) == (len(work) if answer_lost else 0)
    monkeypatch.undo()
    found = publish_together(engine, store, work, NOW)
    assert [_number(found[job.id]) for job, _ in work] == [1] * 5
    assert len(facts(engine, work)) == len(work)
    check_nothing_is_left(engine, store)


def _break_second(monkeypatch: pytest.MonkeyPatch, module: object, after: bool) -> None:
    """The second transaction fails, before or after its commit."""
    calls = [0]

    @contextmanager
    def breaking(engine: Engine) -> Iterator[Session]:
        calls[0] += 1
        broken = calls[0] == 2
        with transaction(engine) as session:
            yield session
            if broken and not after:
                raise DatabaseUnavailable("here", "it went away", "wait")
        if broken:
            raise DatabaseUnavailable("here", "it went away", "wait")

    monkeypatch.setattr(module, "transaction", breaking)


def _number(outcome: Published | Exception) -> int:
    assert isinstance(outcome, Published), outcome
    return outcome.number


def test_a_heartbeat_and_a_publisher_of_the_same_jobs_wait_for_each_other_in_one_order(
    engine: Engine, store: FolderStore, claim: Claim
) -> None:
    """Both lock every job of a cohort; in two orders each would sooner or later hold what the other waits for."""
    users = [f"acme/u{number}" for number in range(12)]
    held = [claim(1, user)[0] for user in users]
    beating = threading.Event()

    def beat() -> None:
        while not beating.is_set():
            with transaction(engine) as session:
                jobs.renew(session, sorted(held, key=lambda job: job.id, reverse=True), LEASE, NOW)

    with ThreadPoolExecutor(1) as threads:
        heart = threads.submit(beat)
        found = publish_together(engine, store, [(job, finished(str(job.id))) for job in held], NOW)
        beating.set()
        heart.result()

    assert [_number(found[job.id]) for job in held] == [1] * len(held)


def test_a_publisher_who_waits_for_new_data_holds_nothing_that_this_needs(
    engine: Engine, store: FolderStore, claim: Claim
) -> None:
    """Both write what is known of a user's adapters, in one order: in two each would wait for the other."""
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite has one writer at a time")
    work = work_of(store, claim, [f"acme/alice/a{number}" for number in range(6)])
    known = select(Freshness).where(Freshness.adapter_id.in_([job.adapter_id for job, _ in work]))
    known = known.order_by(Freshness.adapter_id)
    with transaction(engine) as session:
        for number in range(60):  # with as many PostgreSQL reads the whole table, as its rows lie there
            queries.ensure_adapter(session, Reference.parse(f"acme/bob/b{number}"), NOW)
    with tampering(engine) as owner:
        owner.execute(text("ANALYZE freshness"))
    with ThreadPoolExecutor(1) as pool:
        with transaction(engine) as adding:
            enter(adding, work[0][0].tenant_id)
            adding.scalars(known.limit(1).with_for_update()).one()
            publishing = pool.submit(publish_together, engine, store, work, NOW)
            with suppress(TimeoutError):
                publishing.result(0.7)

            assert len(adding.scalars(known.with_for_update(nowait=True)).all()) == 6
        published = [one for one in publishing.result(30).values() if isinstance(one, Published) and one.accepted]
    with looking(engine) as session:
        trained_on = session.scalars(select(Freshness.dataset_id).where(Freshness.dataset_id.is_not(None))).all()
    assert len(trained_on) == len(published) == 5
