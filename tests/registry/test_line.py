"""Who is next: nobody starves, many jobs never block a few, and limits hold under claims at once."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import event
from sqlalchemy.engine import Engine

from registry import jobs, queries, shares
from registry.errors import QuotaReached, QuotaRefused
from registry.jobs import PATIENCE, ClaimedJob
from registry.line import Turn, allot
from registry.models import Facts
from registry.names import JobId, TenantId
from registry.orders import STEP, place_in_line
from registry.session import reading, transaction
from tests.registry.conftest import LEASE, NOW, enqueue

MINUTE = timedelta(minutes=1)


def ask(engine: Engine, tenant: str, count: int, now: datetime = NOW, group: str = "g") -> None:
    """A job for each of a tenant's users."""
    with transaction(engine) as session:
        for number in range(count):
            enqueue(session, f"{tenant}/user{number}", 1, group, now)


def limit(engine: Engine, tenant: str, **changed: object) -> None:
    """Set a tenant's quota."""
    facts: Facts = dict(changed)
    with transaction(engine) as session:
        shares.set_quota(session, queries.tenant_id(session, tenant), facts, NOW)


def claim(engine: Engine, seats: int, now: datetime = NOW, group: str | None = None) -> list[ClaimedJob]:
    """One claim."""
    with transaction(engine) as session:
        return jobs.claim(session, "w", LEASE, seats, now, group=group)


def close(engine: Engine, claimed: list[ClaimedJob], now: datetime = NOW) -> None:
    """They are trained."""
    with transaction(engine) as session:
        for job in claimed:
            jobs.close(session, job, "published", now)


def tenants(claimed: list[ClaimedJob]) -> Counter[str]:
    """How many jobs of each tenant."""
    return Counter(job.reference.tenant for job in claimed)


turns = st.lists(
    st.builds(
        Turn,
        st.integers(0, 2**128 - 1).map(lambda number: TenantId(UUID(int=number))),
        st.sampled_from([0.5, 1.0, 2.0, 3.0]),
        st.floats(0, 50),
        st.integers(1, 40),
        st.just(NOW),
    ),
    max_size=8,
    unique_by=lambda turn: turn.tenant,
)


@given(turns, st.integers(0, 64))
def test_seats_go_to_whoever_was_served_least_and_none_is_left_while_somebody_has_room(
    turns: list[Turn], seats: int
) -> None:
    """No tenant with room is more than one of its own steps behind another that was given a seat."""
    given_ = allot(seats, turns)

    assert sum(given_.values()) == min(seats, sum(turn.room for turn in turns))
    ends = {turn.tenant: turn.served + given_.get(turn.tenant, 0) / turn.weight for turn in turns}
    for poor in turns:
        if given_.get(poor.tenant, 0) < poor.room:
            for rich in turns:
                if given_.get(rich.tenant, 0):
                    assert ends[rich.tenant] - 1 / rich.weight <= ends[poor.tenant] + 1e-9


@given(st.integers(-99, 99), st.integers(-99, 99))
def test_whoever_waits_long_enough_is_before_any_priority(low: int, high: int) -> None:
    """A step of priority is worth an hour: no stream of urgent jobs holds one up for ever."""
    later = NOW + max(0, high - low) * STEP + MINUTE

    assert place_in_line(NOW, low) < place_in_line(later, high)


def test_the_higher_priority_goes_first_until_the_other_has_waited_for_it(engine: Engine) -> None:
    """Two steps are two hours."""
    with transaction(engine) as session:
        (plain,) = enqueue(session, "acme/plain", 1)
    for minutes, user in ((119, "sooner"), (121, "later")):
        with transaction(engine) as session:
            enqueue(session, f"acme/{user}", 1, now=NOW + minutes * MINUTE, priority=2)

    order = [claim(engine, 1, NOW + 3 * STEP)[0].reference.user for _ in range(3)]

    assert plain.state == "queued"
    assert order == ["sooner", "plain", "later"]


def test_ten_jobs_are_not_behind_ten_thousand(engine: Engine) -> None:
    """The first cohort has both tenants in it, though one's jobs are all older."""
    ask(engine, "acme", 60)
    ask(engine, "globex", 5, NOW + MINUTE)

    assert tenants(claim(engine, 16)) == {"acme": 11, "globex": 5}


def test_cohorts_take_turns_where_tenants_cannot_share_one(engine: Engine) -> None:
    """One worker, two bases: who was served less is next."""
    ask(engine, "acme", 40, group="one")
    ask(engine, "globex", 16, NOW + MINUTE, group="two")

    order = []
    while claimed := claim(engine, 8):
        order.append(claimed[0].group)
        close(engine, claimed)

    assert order[:4] == ["one", "two", "one", "two"]
    assert len(order) == 7


def test_a_tenant_with_twice_the_weight_gets_twice_the_seats(engine: Engine) -> None:
    """Over any stretch in which both wait."""
    ask(engine, "acme", 40)
    ask(engine, "globex", 40)
    limit(engine, "globex", weight=2.0)

    served: Counter[str] = Counter()
    for _ in range(5):
        claimed = claim(engine, 9)
        served += tenants(claimed)
        close(engine, claimed)

    assert served == {"acme": 15, "globex": 30}


def test_a_limit_of_running_jobs_holds_whoever_claims(engine: Engine) -> None:
    """Eight workers at once, and nobody else is held up by it."""
    ask(engine, "acme", 30)
    ask(engine, "globex", 30)
    limit(engine, "acme", max_running=5)

    with ThreadPoolExecutor(8) as pool:
        claimed = [job for got in pool.map(lambda _: claim(engine, 8), range(16)) for job in got]

    assert tenants(claimed) == {"acme": 5, "globex": 30}
    assert len({job.id for job in claimed}) == 35
    with transaction(engine) as session:
        assert jobs.waiting(session, NOW) == {}


def test_a_tenant_who_asks_for_the_first_time_is_counted_whenever_it_comes(engine: Engine) -> None:
    """Between two statements of the count: every tick and every cohort at work counts, and broke."""
    ask(engine, "acme", 1)
    newcomers = ["globex"]

    @event.listens_for(engine, "before_cursor_execute")
    def come(_: Any, __: Any, text: str, *___: Any) -> None:  # SQLAlchemy's own
        if "FROM jobs" in text or "FROM shares" in text:
            if seen and newcomers:
                ask(engine, newcomers.pop(), 1)
            seen.append(text)

    seen: list[str] = []
    with reading(engine) as session:
        counted = jobs.waiting(session, NOW)
    event.remove(engine, "before_cursor_execute", come)

    assert counted in ({"g": 1}, {"g": 2})


def test_a_limit_of_versions_holds_for_any_day(engine: Engine) -> None:
    """Also for jobs that are asked for by name; and what runs counts as the version that it will be."""
    ask(engine, "acme", 6)
    limit(engine, "acme", max_versions=3)
    first = claim(engine, 2)
    close(engine, first)

    assert len(claim(engine, 8)) == 1
    with transaction(engine) as session:
        everybody = [JobId(job.id) for job, *_ in queries.recent_jobs(session, queries.tenant_id(session, "acme"))]
        assert jobs.claim(session, "w", LEASE, 8, NOW, only=everybody) == []
    assert len(claim(engine, 8, NOW + timedelta(hours=25))) == 3


def test_a_limit_of_waiting_jobs_holds_under_requests_at_once(engine: Engine) -> None:
    """More are refused in words; the same job again is no second one once there is room."""
    ask(engine, "acme", 1)
    limit(engine, "acme", max_waiting=10)

    def one(number: int) -> bool:
        try:
            with transaction(engine) as session:
                enqueue(session, f"acme/more{number}", 1)
        except QuotaReached:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(one, range(24)))

    assert sum(made) == 9


@pytest.mark.parametrize("changed", [{"weight": 0.0}, {"weight": float("nan")}, {"max_running": -1}])
def test_a_quota_that_is_none_is_refused(engine: Engine, changed: dict[str, float]) -> None:
    """With what to give instead."""
    ask(engine, "acme", 1)
    with pytest.raises(QuotaRefused, match="give"):
        limit(engine, "acme", **changed)


def test_a_cohort_fills_up_with_its_own_until_others_wait_much_longer(engine: Engine) -> None:
    """Else one group's steady stream would hold up another for ever, on a single worker."""
    ask(engine, "initech", 1, NOW, group="other")
    ask(engine, "acme", 1, NOW + PATIENCE, group="mine")
    ask(engine, "globex", 1, NOW + PATIENCE + MINUTE, group="mine")

    (job,) = claim(engine, 1, NOW + 2 * PATIENCE, group="mine")
    close(engine, [job])

    assert job.reference.tenant == "acme"
    assert claim(engine, 1, NOW + 2 * PATIENCE, group="mine") == []
    assert claim(engine, 1, NOW + 2 * PATIENCE)[0].group == "other"


def test_two_claims_at_once_never_take_two_jobs_of_one_adapter(engine: Engine) -> None:
    """The second waits for the first, or the older data could win."""
    with transaction(engine) as session:
        for user in range(6):
            enqueue(session, f"acme/user{user}", 3)

    with ThreadPoolExecutor(8) as pool:
        claimed = [job for got in pool.map(lambda _: claim(engine, 3), range(16)) for job in got]

    assert Counter(job.reference.user for job in claimed) == Counter(f"user{user}" for user in range(6))


def test_an_urgent_job_does_not_overtake_its_adapters_own_that_is_just_taken(engine: Engine) -> None:
    """A claim beside the first sees neither that it has taken the adapter, nor anybody before the urgent one."""
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite has one writer at a time")
    with transaction(engine) as session:
        enqueue(session, "acme/alice", 1)
    with transaction(engine) as first:
        (taken,) = jobs.claim(first, "first", LEASE, 1, NOW)
        with transaction(engine) as session:
            (urgent,) = enqueue(session, "acme/alice", 2, priority=1, first=1)
        assert claim(engine, 1) == []

    assert claim(engine, 1) == []
    close(engine, [taken])
    assert [job.id for job in claim(engine, 1)] == [urgent.job_id]
