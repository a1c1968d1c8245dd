"""What a person does to the queue: look, cancel, let it be tried again."""

from datetime import timedelta

import pytest
from sqlalchemy import select, update
from sqlalchemy.engine import Engine

from registry import jobs, orders, queries, queue
from registry.errors import LeaseLost
from registry.jobs import FIRST_PAUSE, LONGEST_PAUSE, MAX_ERRORS, pause_after
from registry.models import Dataset, Job
from registry.publishing import publish
from registry.queue import STATES, Wanted
from registry.session import reading, transaction
from registry.store import FolderStore
from tests.conftest import looking
from tests.registry.conftest import LEASE, NOW, Claim, enqueue, finished


def cancel(engine: Engine) -> list[str]:
    """Cancel what alice has."""
    with transaction(engine) as session:
        tenant = queries.tenant_id(session, "acme")
        return queue.cancel(session, tenant, queries.holder(session, tenant, "alice", "default"), "by hand", NOW)


def states(engine: Engine) -> dict[str, str]:
    """Everybody's states, by user."""
    with reading(engine) as session:
        return {reference.user: job.state for reference, job in queue.listed(session, None, Wanted(STATES))}


def test_a_waiting_job_that_is_cancelled_is_taken_by_nobody(engine: Engine) -> None:
    """Until it is asked for again."""
    with transaction(engine) as session:
        (job,) = enqueue(session, "acme/alice", 1)

    assert cancel(engine) == ["queued"]
    with transaction(engine) as session:
        assert jobs.claim(session, "w", LEASE, 1, NOW) == []
        (again,) = enqueue(session, "acme/alice", 1)
    assert (again.job_id, again.state) == (job.job_id, "queued")


def test_the_worker_of_a_cancelled_job_is_told_and_publishes_nothing(
    engine: Engine, claim: Claim, store: FolderStore
) -> None:
    """At its next renewal; the neighbours' leases go on."""
    (job,) = claim()
    (other,) = claim(reference="acme/bob")

    assert cancel(engine) == ["running"]

    with transaction(engine) as session:
        assert jobs.renew(session, [job, other], LEASE, NOW) == [other.id]
    with pytest.raises(LeaseLost):
        publish(engine, store, job, finished(), NOW)
    assert states(engine) == {"alice": "cancelled", "bob": "running"}
    assert cancel(engine) == []


def test_what_failed_is_tried_again_by_tenant_and_reason(engine: Engine, claim: Claim) -> None:
    """Nobody else's, and with all its attempts."""
    for user, reason in (("alice", "no space left"), ("bob", "100% bad rows"), ("carol", "no space left")):
        (job,) = claim(reference=f"acme/{user}")
        with transaction(engine) as session:
            jobs.fail(session, job, reason, NOW)
    (theirs,) = claim(reference="globex/eve")
    with transaction(engine) as session:
        jobs.fail(session, theirs, "no space left", NOW)

    with transaction(engine) as session:
        tenant = queries.tenant_id(session, "acme")
        assert len(queue.retry(session, tenant, Wanted(("failed",), "NO SPACE"), NOW)) == 2
        assert queue.retry(session, tenant, Wanted(("failed",), "0% b_d"), NOW) == []
        assert len(queue.retry(session, tenant, Wanted(("failed",), user="bob"), NOW)) == 1

    assert states(engine) == {"alice": "queued", "bob": "queued", "carol": "queued", "eve": "failed"}
    with looking(engine) as session:
        assert {job.attempts for job in session.query(Job).filter_by(state="queued")} == {0}


def test_a_job_whose_data_retention_has_removed_is_not_tried_again(engine: Engine) -> None:
    """It could only fail; it says why, and what to do instead."""
    with transaction(engine) as session:
        enqueue(session, "acme/alice", 2)
    cancel(engine)
    with transaction(engine) as session:
        tenant = queries.tenant_id(session, "acme")
        gone, kept = session.scalars(select(Job).order_by(Job.id)).all()
        session.execute(update(Dataset).where(Dataset.id == gone.dataset_id).values(removed_at=NOW))

    with transaction(engine) as session:
        queries.tenant_id(session, "acme")
        assert queue.retry(session, tenant, Wanted(STATES), NOW) == [kept.id]

    with looking(engine) as session:
        found = {job.id: (job.state, job.error) for job in session.query(Job)}
    assert found == {gone.id: ("cancelled", queue.GONE), kept.id: ("queued", None)}


def test_a_job_that_broke_its_worker_is_left_alone_longer_each_time(engine: Engine, claim: Claim) -> None:
    """Others are taken meanwhile, and the reason why it waits is shown."""
    (job,) = claim()
    with transaction(engine) as session:
        jobs.release(session, job, NOW, "out of memory")

    with transaction(engine) as session:
        assert jobs.claim(session, "w", LEASE, 1, NOW + FIRST_PAUSE / 2) == []
        row = queries.job(session, queries.tenant_id(session, "acme"), job.id)
        assert "out of memory" in queue.why_waiting(session, job.tenant_id, row, NOW)
    with transaction(engine) as session:
        (again,) = jobs.claim(session, "w", LEASE, 1, NOW + FIRST_PAUSE)
    assert (again.attempts, again.errors) == (2, 1)
    assert again.errors < MAX_ERRORS
    pauses = [pause_after(job.id, errors) for errors in range(1, 20)]
    assert all(FIRST_PAUSE / 2 <= pause <= LONGEST_PAUSE for pause in pauses)
    assert pauses[0] < pauses[2] < pauses[4] <= pauses[-1] * 2
    assert len({pause_after(one.job_id, 1) for one in many(engine)}) > 5


def many(engine: Engine) -> list[orders.Enqueued]:
    """Jobs that could come back together."""
    with transaction(engine) as session:
        return enqueue(session, "acme/zoe", 8)


def test_a_page_of_the_line_goes_on_where_the_last_one_ended(engine: Engine) -> None:
    """In the order in which they would be taken."""
    with transaction(engine) as session:
        for user in range(7):
            enqueue(session, f"acme/user{user}", 1, now=NOW + timedelta(minutes=user))

    with transaction(engine) as session:
        tenant = queries.tenant_id(session, "acme")
        pages = [queue.listed(session, tenant, Wanted(limit=3, offset=offset)) for offset in (0, 3, 6)]
        assert "6 jobs of its tenant" in queue.why_waiting(session, tenant, pages[-1][0][1], NOW)

    assert [reference.user for page in pages for reference, _ in page] == [f"user{user}" for user in range(7)]
