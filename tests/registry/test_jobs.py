"""The queue: everything once, nothing lost, whoever dies."""

import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from sqlalchemy.engine import Engine

from registry import jobs, queries
from registry.errors import LeaseLost
from registry.jobs import MAX_DEATHS, MAX_ERRORS, SUSPECT
from registry.models import Job
from registry.session import reading, transaction
from tests.conftest import looking, tampering
from tests.registry.conftest import LEASE, NOW, Claim, enqueue

USERS = [f"user{number}" for number in range(20)]


def test_the_same_work_is_one_job(engine: Engine) -> None:
    """Equal data, base and recipe: nothing new to train."""
    with transaction(engine) as session:
        (first,) = enqueue(session, "acme/alice", 1)
        (second,) = enqueue(session, "acme/alice", 1)

    assert first.job_id == second.job_id
    assert not second.unchanged


def test_finished_work_is_reported_as_unchanged(engine: Engine, claim: Claim) -> None:
    """A second run of everything makes no second version."""
    (job,) = claim()
    with transaction(engine) as session:
        jobs.close(session, job, "published", NOW)

    with transaction(engine) as session:
        (again,) = enqueue(session, "acme/alice", 1)

    assert again.unchanged


def test_failed_work_can_be_asked_for_again(engine: Engine, claim: Claim) -> None:
    """The reason may be mended by now."""
    (job,) = claim()
    with transaction(engine) as session:
        jobs.fail(session, job, "no space", NOW)

    with transaction(engine) as session:
        (again,) = enqueue(session, "acme/alice", 1)

    assert (again.job_id, again.state, again.unchanged) == (job.id, "queued", False)


def test_a_job_that_is_put_off_waits_without_an_attempt(engine: Engine, claim: Claim) -> None:
    """A worker that is too small leaves it to others: for a while to nobody, unless it is asked for by name."""
    (job,) = claim()
    with transaction(engine) as session:
        jobs.put_off(session, job, "needs 9 GiB", NOW + LEASE, NOW)

    with transaction(engine) as session:
        assert jobs.claim(session, "small", LEASE, 1, NOW) == []
        assert jobs.waiting(session, NOW) == {}
    with looking(engine) as session:
        left = session.get_one(Job, job.id)
        assert (left.attempts, left.error) == (0, "needs 9 GiB")
    with transaction(engine) as session:
        (asked,) = jobs.claim(session, "large", LEASE, 1, NOW, [job.id])
        assert asked.attempts == 1
        jobs.put_off(session, asked, "needs 9 GiB", NOW + LEASE, NOW)
    with transaction(engine) as session:
        assert [one.id for one in jobs.claim(session, "large", LEASE, 1, NOW + 2 * LEASE)] == [job.id]


def test_a_claim_takes_only_jobs_that_can_share_a_cohort(engine: Engine) -> None:
    """The oldest job decides the group; others wait for the next cohort."""
    with transaction(engine) as session:
        for user in ("alice", "ann"):
            enqueue(session, f"acme/{user}", 1, group="one")
        for user in ("bob", "bill", "ben"):
            enqueue(session, f"acme/{user}", 1, group="two", now=NOW + timedelta(seconds=1))
    with reading(engine) as session:
        assert jobs.waiting(session, NOW) == {"one": 2, "two": 3}

    with transaction(engine) as session:
        first = jobs.claim(session, "w", LEASE, 10, NOW)
    with transaction(engine) as session:
        second = jobs.claim(session, "w", LEASE, 2, NOW)

    assert {job.group for job in first} == {"one"}
    assert {job.group for job in second} == {"two"}
    assert [len(first), len(second)] == [2, 2]
    with reading(engine) as session:
        assert jobs.waiting(session, NOW) == {"two": 1}


def test_a_claim_can_ask_for_more_of_one_group(engine: Engine) -> None:
    """A cohort with a free slot takes who fits beside the others, however long somebody else has waited."""
    with transaction(engine) as session:
        enqueue(session, "acme/alice", 1, group="one")
        enqueue(session, "acme/bob", 1, group="two", now=NOW + timedelta(seconds=1))

    with transaction(engine) as session:
        (job,) = jobs.claim(session, "w", LEASE, 10, NOW, group="two")
    with transaction(engine) as session:
        assert jobs.claim(session, "w", LEASE, 10, NOW, group="two") == []

    assert job.reference.label == "acme/bob"


def test_two_jobs_of_one_adapter_are_worked_off_one_after_the_other(engine: Engine) -> None:
    """In a cohort they would be one name twice, and on two workers the older data could win."""
    with transaction(engine) as session:
        (older,) = enqueue(session, "acme/alice", 1)
        newer = enqueue(session, "acme/alice", 2, now=NOW + timedelta(seconds=1))[1]

    with transaction(engine) as session:
        (first,) = jobs.claim(session, "w1", LEASE, 10, NOW)
    with transaction(engine) as session:
        assert jobs.claim(session, "w2", LEASE, 10, NOW) == []
        assert jobs.waiting(session, NOW) == {}
        jobs.close(session, first, "published", NOW)
    with transaction(engine) as session:
        (second,) = jobs.claim(session, "w2", LEASE, 10, NOW)

    assert (first.id, second.id) == (older.job_id, newer.job_id)


def test_jobs_given_up_do_not_hide_those_behind_them(engine: Engine) -> None:
    """A claim that only buries the dead goes on to the living."""
    with transaction(engine) as session:
        (poison,) = enqueue(session, "acme/alice", 1, group="one")
        (sound,) = enqueue(session, "acme/bob", 1, group="two", now=NOW + timedelta(seconds=1))
    with tampering(engine) as session:
        session.get_one(Job, poison.job_id).attempts = MAX_DEATHS

    with transaction(engine) as session:
        (claimed,) = jobs.claim(session, "w", LEASE, 10, NOW)

    assert claimed.id == sound.job_id
    with looking(engine) as session:
        assert session.get_one(Job, poison.job_id).state == "failed"


def test_many_workers_never_get_the_same_job(engine: Engine) -> None:
    """Each of 60 jobs goes to exactly one of 12 claims at once."""
    with transaction(engine) as session:
        for number in range(60):
            enqueue(session, f"acme/user{number}", 1)

    def take(worker: int) -> list[object]:
        taken: list[object] = []
        while True:
            with transaction(engine) as session:
                claimed = jobs.claim(session, f"w{worker}", LEASE, 5, NOW)
            if not claimed:
                return taken
            taken += [job.id for job in claimed]

    with ThreadPoolExecutor(12) as pool:
        taken = [job for got in pool.map(take, range(12)) for job in got]

    assert len(taken) == len(set(taken)) == 60


def test_many_requests_at_once_make_one_user_and_one_job(engine: Engine) -> None:
    """Creation races end in one row, not in an error."""

    def ask(_: int) -> object:
        with transaction(engine) as session:
            return enqueue(session, "acme/alice", 1)[0].job_id

    with ThreadPoolExecutor(12) as pool:
        ids = set(pool.map(ask, range(24)))

    assert len(ids) == 1


def test_a_dead_workers_job_is_taken_after_its_lease(engine: Engine, claim: Claim) -> None:
    """With a new fence, so that a worker that was only slow changes nothing any more."""
    (job,) = claim()
    with transaction(engine) as session:
        assert jobs.claim(session, "early", LEASE, 1, NOW + LEASE) == []
    with transaction(engine) as session:
        (again,) = jobs.claim(session, "late", LEASE, 1, NOW + LEASE + timedelta(seconds=1))

    assert (again.id, again.fence, again.attempts) == (job.id, job.fence + 1, 2)
    with transaction(engine) as session:
        assert jobs.renew(session, [job], LEASE, NOW) == []
    with pytest.raises(LeaseLost), transaction(engine) as session:
        jobs.fail(session, job, "slow", NOW)


def test_a_renewed_lease_keeps_the_job(engine: Engine, claim: Claim) -> None:
    """A long training is not a dead one."""
    (job,) = claim()

    with transaction(engine) as session:
        assert jobs.renew(session, [job], LEASE, NOW + LEASE) == [job.id]
    with transaction(engine) as session:
        assert jobs.claim(session, "thief", LEASE, 1, NOW + LEASE + timedelta(seconds=1)) == []


def test_leases_of_many_tenants_are_renewed_together_but_for_the_lost(engine: Engine, claim: Claim) -> None:
    """One that another worker took meanwhile is left as it is."""
    held = [job for name in ("acme/alice", "globex/bob", "acme/cleo", "initech/dan") for job in claim(1, name)]
    later = NOW + LEASE + timedelta(seconds=1)
    with transaction(engine) as session:
        (taken,) = jobs.claim(session, "thief", LEASE, 1, later, [held[2].id])

    with transaction(engine) as session:
        kept = jobs.renew(session, held, LEASE, later + LEASE)

    assert sorted(kept) == sorted(job.id for job in held if job.id != taken.id)
    with looking(engine) as session:
        until = {job.id: job.lease_until for job in session.query(Job)}
    assert until == dict.fromkeys(kept, later + 2 * LEASE) | {taken.id: later + LEASE}


def test_a_job_that_kills_its_workers_fails_for_good(engine: Engine, claim: Claim) -> None:
    """Else one poisonous dataset would take the fleet down for ever."""
    (job,) = claim()
    moment = NOW
    for _ in range(MAX_DEATHS):
        moment += 2 * LEASE
        with transaction(engine) as session:
            last = jobs.claim(session, "w", LEASE, 1, moment)

    assert last == []
    with looking(engine) as session:
        row = session.get_one(Job, job.id)
        assert (row.state, row.error and "its worker died" in row.error) == ("failed", True)


def test_a_job_that_kills_its_workers_takes_nobody_along(engine: Engine) -> None:
    """Those who shared a cohort with it share its deaths, and are tried in ever smaller ones: it alone fails."""
    with transaction(engine) as session:
        poison, *others = (enqueue(session, f"acme/{user}", 1)[0] for user in USERS)
    moment, done, sizes = NOW, set[uuid.UUID](), list[int]()
    for _ in range(4 * len(USERS)):
        moment += 2 * LEASE
        with transaction(engine) as session:
            taken = jobs.claim(session, "w", LEASE, 32, moment)
        sizes += [len(taken)] if poison.job_id in {job.id for job in taken} else []
        assert len({job.attempts for job in taken}) < 2 or not any(job.suspect for job in taken)
        if poison.job_id not in {job.id for job in taken}:
            for job in taken:
                with transaction(engine) as session:
                    jobs.close(session, job, "published", moment)
                done.add(job.id)

    assert done == {job.job_id for job in others}
    assert sizes[:2] == [20, 20]
    assert all(size <= most for size, most in zip(sizes[2:], (8, 2, 1), strict=True))
    with looking(engine) as session:
        assert session.get_one(Job, poison.job_id).state == "failed"


def test_a_job_that_breaks_its_cohorts_takes_nobody_along(engine: Engine) -> None:
    """An error is written down with all who shared it; the last of them is shared with nobody."""
    with transaction(engine) as session:
        poison, *others = (enqueue(session, f"acme/{user}", 1)[0] for user in USERS)
    moment, done = NOW, set[uuid.UUID]()
    for _ in range(2 * len(USERS)):
        moment += jobs.LONGEST_PAUSE
        with transaction(engine) as session:
            taken = jobs.claim(session, "w", LEASE, 32, moment)
            breaks = poison.job_id in {job.id for job in taken}
            for job in taken:
                if breaks:
                    jobs.release(session, job, moment, "TypeError: 7")
                else:
                    jobs.close(session, job, "published", moment)
                    done.add(job.id)

    assert done == {job.job_id for job in others}
    with looking(engine) as session:
        assert session.get_one(Job, poison.job_id).state == "failed"


def test_a_suspect_is_not_let_into_a_cohort_at_work(engine: Engine, claim: Claim) -> None:
    """Whoever asks for more of a group has others beside it."""
    (job,) = claim()
    moment = NOW
    for _ in range(SUSPECT - 1):
        moment += 2 * LEASE
        with transaction(engine) as session:
            jobs.claim(session, "w", LEASE, 1, moment)

    moment += 2 * LEASE
    with transaction(engine) as session:
        assert jobs.claim(session, "w", LEASE, 10, moment, group="g") == []
        assert [one.id for one in jobs.claim(session, "w", LEASE, 10, moment)] == [job.id]


def test_a_released_job_waits_again(engine: Engine, claim: Claim) -> None:
    """A worker that shuts down in good order costs no attempt."""
    (job,) = claim()
    with transaction(engine) as session:
        jobs.release(session, job, NOW)

    with transaction(engine) as session:
        (again,) = jobs.claim(session, "w", LEASE, 1, NOW)

    assert again.attempts == 1


def test_a_job_that_broke_its_worker_waits_again_and_remembers_why(engine: Engine, claim: Claim) -> None:
    """An error costs an attempt, and the last one is the reason once there are none left."""
    (job,) = claim()
    moment = NOW
    for _ in range(MAX_ERRORS):
        with transaction(engine) as session:
            jobs.release(session, job, moment, "out of memory")
        moment += jobs.LONGEST_PAUSE
        with transaction(engine) as session:
            job = next(iter(jobs.claim(session, "w", LEASE, 1, moment)), job)

    with looking(engine) as session:
        row = session.get_one(Job, job.id)
        assert (row.state, row.attempts) == ("failed", MAX_ERRORS)
        assert "3 errors, the last of them: out of memory" in str(row.error)


def test_deaths_and_errors_are_counted_apart(engine: Engine, claim: Claim) -> None:
    """Two deaths and an error are neither five nor three; and putting a job back counts as nothing."""
    (job,) = claim()
    moment = NOW
    for _ in range(MAX_DEATHS - 1):
        moment += 2 * LEASE
        with transaction(engine) as session:
            (job,) = jobs.claim(session, "w", LEASE, 1, moment)
    for error in (None, "out of memory", "out of memory", None):
        with transaction(engine) as session:
            jobs.release(session, job, moment, error)
        moment += jobs.LONGEST_PAUSE
        with transaction(engine) as session:
            assert [one.id for one in jobs.claim(session, "w", LEASE, 10, moment, group="g")] == []  # a suspect still
            (job,) = jobs.claim(session, "w", LEASE, 1, moment)

    with looking(engine) as session:
        row = session.get_one(Job, job.id)
        assert (row.state, row.errors, row.attempts - row.errors) == ("running", 2, MAX_DEATHS)


def test_counts_and_recent_jobs_tell_one_tenant_from_another(engine: Engine, claim: Claim) -> None:
    """The status page of a tenant shows nothing of the next."""
    claim(2)
    with transaction(engine) as session:
        enqueue(session, "globex/eve", 3)

    with reading(engine) as session:
        acme = queries.tenant_id(session, "acme")
        assert queries.job_counts(session, acme) == {"running": 2}
        assert queries.job_counts(session) == {"running": 2, "queued": 3}
        assert {tenant for _, tenant, _, _ in queries.recent_jobs(session, acme)} == {"acme"}
