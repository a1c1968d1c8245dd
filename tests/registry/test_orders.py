"""Training that is asked for by many at once: as if each had asked alone, in turn."""

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from registry import jobs, queries, shares
from registry.errors import NotFound, QuotaReached
from registry.models import Event, Job
from registry.names import Reference, TenantId
from registry.orders import Asked, Enqueued, Order, enqueue, enqueue_many, newest_datasets
from registry.publishing import publish
from registry.session import reading, transaction
from registry.store import FolderStore
from tests.conftest import looking
from tests.registry.conftest import LEASE, NOW, finished

USERS = 8
LATER = NOW + timedelta(hours=3)


def asked(session: Session, tenant: str, users: Sequence[int], data: int, priority: int = 0) -> list[Asked]:
    """What so many users ask for, each on a dataset of that number."""
    base = queries.ensure_base(session, name="tiny", revision="main", digest="b" * 64, parameters=7, now=NOW)
    made = []
    for user in users:
        holder = queries.ensure_adapter(session, Reference(tenant, f"user{user}"), NOW)
        digest = f"{data:02}{user:02}" * 16
        facts = {"digest": digest, "key": f"t/{tenant}/{digest}", "examples": 3, "size": 9}
        dataset = queries.ensure_dataset(session, holder.tenant_id, holder, now=NOW + timedelta(hours=data), **facts)  # type: ignore[arg-type]
        made.append(Asked(holder.adapter.id, Order(dataset, base, {"rank": 8}, "r" * 64, "g"), priority))
    return made


def one_by_one(session: Session, tenant: TenantId, some: Sequence[Asked]) -> list[Enqueued | QuotaReached]:
    """The same, each in a call of its own."""
    found: list[Enqueued | QuotaReached] = []
    for one in some:
        try:
            found += enqueue_many(session, tenant, [one], LATER)
        except QuotaReached as error:
            found.append(error)
    return found


def told(found: Sequence[Enqueued | QuotaReached]) -> list[object]:
    """All but ids."""
    return [str(one) if isinstance(one, QuotaReached) else (one.state, one.unchanged, one.number) for one in found]


@pytest.mark.parametrize("seed", range(6))
def test_many_at_once_come_to_what_they_come_to_alone(engine: Engine, seed: int) -> None:
    """New, waiting, running, failed and cancelled jobs, priorities, and room for some: in twins of one tenant."""
    outcomes, states, notes = [], [], []
    for tenant, ask in (("acme", enqueue_many), ("globex", None)):
        chance = random.Random(seed)
        before = chance.sample(range(USERS), 5)
        with transaction(engine) as session:
            some = asked(session, tenant, before, 1, priority=chance.randint(0, 2))
            id_ = queries.tenant_id(session, tenant)
            there = enqueue_many(session, id_, some, NOW)
        ids = [one.job_id for one in there if isinstance(one, Enqueued)]
        with transaction(engine) as session:
            taken = [jobs.claim(session, "worker", LEASE, 1, NOW, [id_])[0] for id_ in ids[:3]]
            for job in taken[:2]:
                jobs.fail(session, job, "broken", NOW)
        if chance.random() < 0.7:
            with transaction(engine) as session:
                shares.set_quota(session, queries.tenant_id(session, tenant), {"max_waiting": 5}, NOW)
        with transaction(engine) as session:
            again = asked(session, tenant, range(USERS), 1, priority=chance.randint(0, 3))
            id_ = queries.tenant_id(session, tenant)
            outcomes.append(told(ask(session, id_, again, LATER) if ask else one_by_one(session, id_, again)))
        with looking(engine) as session:
            mine = session.query(Job).filter(Job.tenant_id == id_)
            facts = [
                (job.state, job.priority, job.attempts, job.errors, job.created_at, job.in_line_since) for job in mine
            ]
            states.append(sorted(facts, key=str))
            notes.append(sorted(one.kind for one in session.query(Event).filter(Event.tenant_id == id_)))

    assert outcomes[0] == outcomes[1]
    assert states[0] == states[1]
    assert notes[0] == notes[1]


def test_many_who_ask_for_the_same_at_once_get_the_same(engine: Engine) -> None:
    """Whoever loses the race for one of them takes what the other made."""
    with transaction(engine) as session:
        some = asked(session, "acme", range(USERS), 1)
        tenant = queries.tenant_id(session, "acme")

    def ask(turn: int) -> list[str]:
        with transaction(engine) as session:
            queries.tenant_id(session, "acme")
            found = enqueue_many(session, tenant, some if turn % 2 else some[::-1], NOW)
            return sorted(str(one.job_id) for one in found if isinstance(one, Enqueued))

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(ask, range(12)))

    assert len(answers[0]) == USERS
    assert all(answer == answers[0] for answer in answers)


def test_many_take_no_more_statements_than_two(engine: Engine) -> None:
    """New ones, and then the same again."""
    if engine.dialect.name == "sqlite":
        pytest.skip("writes row by row")
    new_of_two, known_of_two = statements(engine, "small", 2), statements(engine, "small", 2)
    new, known = statements(engine, "large", USERS), statements(engine, "large", USERS)

    assert (new, known) == (new_of_two, known_of_two)


def statements(engine: Engine, tenant: str, users: int) -> int:
    """How many it takes to enqueue so many."""
    seen: list[str] = []
    with transaction(engine) as session:
        some = asked(session, tenant, range(users), 1)
        id_ = queries.tenant_id(session, tenant)
        session.flush()
        event.listen(engine, "before_cursor_execute", hear := lambda *given: seen.append(given[2]))
        enqueue_many(session, id_, some, NOW)
        event.remove(engine, "before_cursor_execute", hear)
    return len(seen)


def test_what_is_asked_for_last_is_served_whatever_a_machines_clock_says(engine: Engine, store: FolderStore) -> None:
    """Its version would be there and `latest` stay at the one before, where the host that asks is a minute behind."""
    for data, moment in ((1, NOW), (2, NOW - timedelta(minutes=1)), (1, NOW - timedelta(minutes=2))):
        with transaction(engine) as session:
            (one,) = asked(session, "acme", [0], data)
            wanted = replace(one, order=replace(one.order, recipe_digest=f"{moment:%M}" * 32))
            enqueue_many(session, queries.tenant_id(session, "acme"), [wanted], moment)
        with transaction(engine) as session:
            (job,) = jobs.claim(session, "w", LEASE, 1, LATER)
        number = publish(engine, store, job, finished(str(moment)), LATER).number

        with reading(engine) as session:
            tenant = queries.tenant_id(session, "acme")
            assert queries.version(session, tenant, Reference("acme", "user0", alias="latest")).number == number


def test_the_newest_data_of_many_are_those_of_each(engine: Engine) -> None:
    """And who has none, or is nobody, is told so."""
    with transaction(engine) as session:
        for data in (1, 3, 2):
            asked(session, "acme", range(4), data)
        asked(session, "globex", range(4), 9)
        queries.ensure_adapter(session, Reference("acme", "empty"), NOW)
        tenant = queries.tenant_id(session, "acme")
        wanted = [Reference("acme", name) for name in ("user0", "user3", "empty", "nobody")]
        found = newest_datasets(session, tenant, wanted)

        for one in wanted[:2]:
            holder = queries.holder(session, tenant, one.user, one.adapter)
            assert found[one] == (holder.adapter.id, queries.newest_dataset(session, tenant, holder))
    missing = [found[one] for one in wanted[2:]]
    assert all(isinstance(one, NotFound) for one in missing)
    assert [str(one) for one in missing] == [
        "there is no dataset of acme/empty; add one: lora data add acme/empty FILE",
        "there is no adapter acme/nobody; add its data first: lora data add acme/nobody FILE",
    ]


def test_one_who_asks_alone_is_refused_by_an_error(engine: Engine) -> None:
    """Many are told."""
    with transaction(engine) as session:
        (one,) = asked(session, "acme", [1], 1)
        tenant = queries.tenant_id(session, "acme")
        shares.set_quota(session, tenant, {"max_waiting": 0}, NOW)
        holder = queries.holder(session, tenant, "user1", "default")
        with pytest.raises(QuotaReached):
            enqueue(session, tenant, holder, one.order, NOW)


def test_a_base_keeps_the_name_that_every_machine_knows(engine: Engine) -> None:
    """Folders of one machine replace one another, but no hub id: jobs of all tenants load the base by its name."""
    asked = ["/home/a/base", "org/base", "/home/b/base", "org/again"]
    names = []
    for name in asked:
        with transaction(engine) as session:
            base = queries.ensure_base(session, name=name, revision="main", digest="c" * 64, parameters=7, now=NOW)
            names.append(base.name)

    assert names == ["/home/a/base", "org/base", "org/base", "org/again"]
