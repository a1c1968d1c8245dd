"""Forgetting, where others are at work with the registry meanwhile; what is left of a user: tests/flows."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.engine import Engine

from registry import fleet, forgetting, holds, jobs, overview, queries, queue, schedules
from registry.client import Client
from registry.errors import NameRefused, NamesakeLeft, NotYetForgotten, UnderHold
from registry.fleet import Where
from registry.forgetting import Wish
from registry.models import Adapter, Job, Schedule, User
from registry.names import Reference
from registry.orders import GIVEN_UP
from registry.publishing import declare, publish
from registry.search import Search
from registry.session import transaction
from registry.store import FolderStore
from registry.tenancy import enter
from registry.timing import Timing
from tests.conftest import looking
from tests.registry.conftest import NOW, Claim, finished, forget

LATER = NOW + timedelta(hours=1)
ALICE = Wish("acme", "alice", "", "me", "request")


def test_who_came_under_the_name_of_somebody_being_forgotten_is_asked_about_apart(
    engine: Engine, store: FolderStore, claim: Claim
) -> None:
    """A receipt for the one is none for the other, and going on with the one forgets nobody else."""
    declare(engine, claim()[0], "d" * 64, NOW)
    with pytest.raises(NotYetForgotten):
        forget(engine, store, "alice")
    with transaction(engine) as session:
        queries.ensure_adapter(session, Reference.parse("acme/alice"), NOW)

    with pytest.raises(NamesakeLeft, match="run it again"):
        forget(engine, store, "alice", LATER)

    assert users(engine) == ["alice"]
    assert forget(engine, store, "alice", LATER).deleted["users"] == {"count": 1}
    assert users(engine) == []


def test_two_who_forget_somebody_at_once_get_the_receipt_of_that(engine: Engine, store: FolderStore) -> None:
    """Not that of a namesake who was forgotten long ago, with whom the second would be told that it is done."""
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite has one writer at a time")
    for moment in (NOW, LATER):
        with transaction(engine) as session:
            queries.ensure_adapter(session, Reference.parse("acme/alice"), moment)
        if moment == NOW:
            forget(engine, store, "alice", NOW)
    with ThreadPoolExecutor(1) as pool:
        with transaction(engine) as session:
            begun = forgetting._begin(session, queries.tenant_id(session, "acme"), ALICE, LATER)
            second = pool.submit(forget, engine, store, "alice", LATER)
            with suppress(TimeoutError):
                second.result(0.5)
        receipt = second.result(30)

    assert begun
    assert (receipt.id, receipt.begun_at, users(engine)) == (begun.id, LATER, [])


@pytest.mark.parametrize("user", ["a", "al", "7", "a-b", "a.b", "a_"])
def test_a_reason_may_hold_the_letters_of_a_short_name_and_not_the_name(user: str) -> None:
    """Names have marks in them too: the receipt keeps the reason."""
    for reason in (user, f"for {user.upper()}.", f"({user}) asked"):
        with pytest.raises(NameRefused):
            Wish("acme", user, "", "me", reason)

    Wish("acme", user, "", "me", f"x{user}x of request 17")


@pytest.mark.parametrize("held", [Schedule, Job])
def test_who_forgets_waits_for_a_tick_or_publisher_and_holds_nothing_that_they_need(
    engine: Engine, store: FolderStore, claim: Claim, held: type[Schedule | Job]
) -> None:
    """They lock a schedule or job first and the adapter after it; the other way round it would be a deadlock."""
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite has one writer at a time")
    claim()
    with transaction(engine) as session:
        tenant = queries.tenant_id(session, "acme")
        alice = queries.holder(session, tenant, "alice", "default")
        schedules.put(session, tenant, alice, Timing.on_data(), "base", {}, NOW)
    with ThreadPoolExecutor(1) as pool:
        with transaction(engine) as other:
            enter(other, tenant)
            other.scalars(select(held).with_for_update(key_share=True)).one()
            forgetting = pool.submit(forget, engine, store, "alice")
            with suppress(TimeoutError):
                forgetting.result(0.5)

            other.scalars(select(Adapter).with_for_update(read=True, key_share=True, nowait=True)).one()
        forgetting.result(30)

    assert users(engine) == []


def test_a_hold_that_is_being_put_is_waited_for_and_holds(engine: Engine, store: FolderStore, claim: Claim) -> None:
    """Both lock the tenant before the user; the other way round it was a deadlock, and one of them failed."""
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite has one writer at a time")
    claim()
    said: Any = {"actor": "me", "reason": "case 17", "now": NOW}  # keywords of unlike types
    with ThreadPoolExecutor(1) as pool:
        with transaction(engine) as session:
            tenant = queries.tenant_id(session, "acme")
            holds.hold(session, tenant, None, **said)
            holds.unhold(session, tenant, None, **said)
            forgetting = pool.submit(forget, engine, store, "alice")
            with suppress(TimeoutError):
                forgetting.result(0.5)

            holds.hold(session, tenant, "alice", **said)
        with pytest.raises(UnderHold, match="case 17"):
            forgetting.result(30)

    assert users(engine) == ["alice"]


def users(engine: Engine) -> list[str]:
    """Everybody there is."""
    with looking(engine) as session:
        return list(session.scalars(select(User.name)))


def test_who_is_being_forgotten_is_in_no_list_and_nobody_elses_work_fails_for_it(
    engine: Engine, store: FolderStore, claim: Claim, tmp_path: Path
) -> None:
    """It may take a quarter of an hour, or as long as a hold is on their tenant: their bytes are gone at once."""
    done, broken, under_way = claim(3)
    for job in (done, *claim(1, "acme/bob")):
        publish(engine, store, job, finished(), NOW)
    with transaction(engine) as session:
        jobs.fail(session, broken, "broke", NOW)
    declare(engine, under_way, "d" * 64, NOW)
    client = Client(engine, store, tmp_path / "cache")
    with pytest.raises(NotYetForgotten):
        forget(engine, store, "alice")

    pulled = [(str(one.reference), one.error) for one in client.pull_all("acme")]

    assert pulled == [("acme/bob@latest", None)]
    assert {one.user for one in client.search("acme", Search(Where())).rows} == {"bob"}
    assert {one.user for one in client.outdated("acme", base="f").rows} == {"bob"}
    assert {one.user for one in client.changes("acme").rows} == {"bob", None}
    with transaction(engine) as session:
        acme = queries.tenant_id(session, "acme")
        assert [one.user for one in queries.listing(session, acme)] == ["bob"]
        assert [one.user for one in overview.costs(session, acme)] == ["bob"]
        assert queue.retry(session, acme, queue.Wanted(GIVEN_UP), NOW) == []
        said: Any = {"actor": "me", "reason": "all of them", "now": NOW}  # keywords of unlike types
        assert fleet.promote_all(session, acme, "production", "latest", Where(), **said).count == 1
