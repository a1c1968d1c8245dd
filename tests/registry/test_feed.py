"""The feed of changes: each is told once, to whoever goes on from cursor to cursor."""

import threading
import time
import uuid
from contextlib import ExitStack, suppress
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from registry import aliases, feed, fleet, queries
from registry.errors import CursorRefused, NameRefused
from registry.feed import Change
from registry.fleet import Where
from registry.names import Reference
from registry.pages import Page, write_cursor
from registry.publishing import publish
from registry.queries import note
from registry.session import reading, transaction
from registry.store import FolderStore
from tests.conftest import tampering
from tests.registry.conftest import NOW, Claim, finished, forget

WHO: Any = {"actor": "me", "reason": "because", "now": NOW}  # keywords of unlike types


def page(engine: Engine, after: str = "", limit: int = 1000, tenant: str = "acme") -> Page[Change]:
    """One page of a tenant's feed."""
    with reading(engine) as session:
        return feed.changes(session, queries.tenant_id(session, tenant), after=after, limit=limit)


def followed(engine: Engine, after: str = "", limit: int = 1000) -> list[Change]:
    """All there is, from cursor to cursor."""
    found: list[Change] = []
    while (some := page(engine, after, limit)).rows:
        found, after = [*found, *some.rows], str(some.cursor)
    return found


def words(changes: list[Change]) -> list[tuple[str, str | None, int | None, str | None]]:
    """What each says."""
    return [(one.kind, one.user, one.number, one.alias) for one in changes]


@pytest.mark.parametrize("limit", [1, 2, 1000])
def test_a_node_learns_of_versions_and_moves_in_their_order(
    engine: Engine, store: FolderStore, claim: Claim, limit: int
) -> None:
    """Published, moved by hand, and as part of a fleet: whatever the size of its pages."""
    for user in ("alice", "bob"):
        for job in claim(2, f"acme/{user}"):
            publish(engine, store, job, finished(str(job.id)), NOW)
    with transaction(engine) as session:
        tenant = queries.tenant_id(session, "acme")
        aliases.promote(session, tenant, Reference.parse("acme/bob:1"), "canary", **WHO)
        fleet.promote_all(session, tenant, "production", "latest", Where(), **WHO)

    found = followed(engine, limit=limit)

    expected = [
        (kind, user, number, alias)
        for user in ("alice", "bob")
        for number in (1, 2)
        for kind, alias in (("alias moved", "latest"), ("version published", None))
    ]
    assert sorted(words(found)[:8]) == sorted(expected)
    assert words(found)[8:9] == [("alias moved", "bob", 1, "canary")]
    assert sorted(words(found)[9:]) == [("alias moved", user, 2, "production") for user in ("alice", "bob")]
    assert all(one.served_name for one in found)
    for place, one in enumerate(found):  # whoever stopped anywhere goes on right there
        assert words(followed(engine, one.cursor)) == words(found[place + 1 :])


def test_events_of_a_server_that_had_counted_further_are_told_once_they_are_put_first(
    engine: Engine, store: FolderStore, claim: Claim
) -> None:
    """As the operations page says of a dump that is restored elsewhere: they would wait until this one comes so far."""
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite counts no transactions")
    first, second = claim(2)
    publish(engine, store, first, finished("one"), NOW)
    told = followed(engine)
    with tampering(engine) as session:
        session.execute(text("UPDATE events SET txid = txid + 1000000"))
    publish(engine, store, second, finished("two"), NOW)
    assert {one.number for one in followed(engine)} == {2}

    with tampering(engine) as session:
        session.execute(text("UPDATE events SET txid = 0"))

    assert words(followed(engine))[: len(told)] == words(told)
    assert {one.number for one in followed(engine)} == {1, 2}


def test_from_now_on_there_is_only_what_is_new(engine: Engine, store: FolderStore, claim: Claim) -> None:
    """And a page of nothing says where to go on."""
    first, second = claim(2)
    publish(engine, store, first, finished("one"), NOW)
    with reading(engine) as session:
        start = feed.now(session, queries.tenant_id(session, "acme"))

    nothing = page(engine, start)
    publish(engine, store, second, finished("two"), NOW)

    assert nothing.rows == []
    assert {one.number for one in followed(engine, str(nothing.cursor))} == {2}
    assert words(followed(engine, start)) == words(followed(engine, str(nothing.cursor)))


@pytest.mark.parametrize("cursor", ["x", "!", "é", "e30", "bnVsbA", "W10", "A" * 5000])
def test_what_is_no_cursor_is_refused(engine: Engine, claim: Claim, cursor: str) -> None:
    """With what to do."""
    claim()

    with pytest.raises(CursorRefused, match="begin anew"):
        page(engine, cursor)


def test_a_cursor_is_its_own_tenants_and_its_own_databases(engine: Engine, claim: Claim) -> None:
    """Another tenant's says nothing here, and one from the future tells that a backup was restored."""
    claim(1, "acme/alice")
    claim(1, "globex/alice")
    with reading(engine) as session:
        tenant = queries.tenant_id(session, "globex")
        ahead = write_cursor([2**60, 0, 0], "changes", tenant)

    with pytest.raises(CursorRefused, match="another question"):
        page(engine, str(page(engine).cursor), tenant="globex")
    with pytest.raises(CursorRefused, match="restored"):
        page(engine, ahead, tenant="globex")
    for limit in (0, 10_001):
        with pytest.raises(NameRefused, match="limit"):
            page(engine, limit=limit)


def test_a_slower_transaction_with_a_lower_number_is_not_missed(
    engine: Engine, store: FolderStore, claim: Claim
) -> None:
    """It took its number first and commits last: a reader waits for it, then is told both, once."""
    publish(engine, store, claim()[0], finished(), NOW)
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite has one writer: the slower one holds the other up")
    start = str(page(engine).cursor)
    with ExitStack() as slower:
        write(slower.enter_context(transaction(engine)), 1)
        with transaction(engine) as quicker:
            write(quicker, 2)
        early = page(engine, start)
    late = followed(engine, str(early.cursor))

    assert [one.number for one in [*early.rows, *late]] == [1, 2]
    assert early.rows == []


@pytest.mark.slow
def test_no_event_of_many_writers_is_missed_and_none_is_told_twice(
    engine: Engine, store: FolderStore, claim: Claim
) -> None:
    """Eight writers whose transactions overlap as they like, some undone; a reader asks all the while."""
    publish(engine, store, claim()[0], finished(), NOW)
    start, each = str(page(engine).cursor), 40
    over = threading.Event()
    told: list[Change] = []
    reader = threading.Thread(target=read_until, args=(engine, start, over, told))
    writers = [threading.Thread(target=write_many, args=(engine, number, each)) for number in range(1, 9)]
    reader.start()
    for one in writers:
        one.start()
    for one in writers:
        one.join()
    over.set()
    reader.join()

    written = {1000 * writer + turn for writer in range(1, 9) for turn in range(each) if turn % 10 != 9}
    assert sorted(one.number or 0 for one in told) == sorted(written)


def test_a_forgotten_users_removed_version_is_told_without_names(engine: Engine, claim: Claim) -> None:
    """What is left of it is the name under which engines served it."""
    claim()
    with transaction(engine) as session:
        tenant = queries.tenant_id(session, "acme")
        gone = uuid.uuid4()
        note(session, tenant, feed.REMOVED, gone, {"number": 3, "served_name": "default-abc"}, NOW)

    (told,) = followed(engine)

    assert (told.kind, told.user, told.number, told.served_name) == ("version removed", None, 3, "default-abc")


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_a_fleets_move_at_the_end_of_a_page_is_told_once(
    engine: Engine, store: FolderStore, claim: Claim, limit: int
) -> None:
    """Also where the moves before it were of somebody who is forgotten, so that the page is not full."""
    for user in ("alice", "bob"):
        publish(engine, store, claim(1, f"acme/{user}")[0], finished(user), NOW)
    start = str(page(engine).cursor)
    for user, alias in (("bob", "canary"), ("bob", "production"), ("alice", "production")):
        with transaction(engine) as session:
            tenant = queries.tenant_id(session, "acme")
            fleet.promote_all(session, tenant, alias, "latest", Where(user=user), **WHO)
    forget(engine, store, "bob")

    told, after = list[Change](), start
    for _ in range(4):
        some = page(engine, after, limit)
        told, after = [*told, *some.rows], str(some.cursor)

    assert words(told) == [("alias moved", "alice", 1, "production")]


def test_a_follower_is_told_what_comes_after_somebody_was_forgotten(
    engine: Engine, store: FolderStore, claim: Claim
) -> None:
    """The last events were theirs; their numbers are given to no others, which would lie behind the follower."""
    for user in ("alice", "bob"):
        publish(engine, store, claim(1, f"acme/{user}")[0], finished(user), NOW)
    start = str(page(engine).cursor)
    forget(engine, store, "bob")

    nothing = page(engine, start)
    publish(engine, store, claim(1, "acme/carol")[0], finished("carol"), NOW)

    assert nothing.rows == []
    assert {one.user for one in page(engine, str(nothing.cursor)).rows} == {"carol"}
    assert len(followed(engine, start)) == 2


def read_until(engine: Engine, after: str, over: threading.Event, told: list[Change]) -> None:
    """Go from cursor to cursor, and once more when it is over."""
    last = False
    while not last:
        last = over.is_set()
        while (some := page(engine, after, 7)).rows:
            told.extend(some.rows)
            after = str(some.cursor)
        after = str(some.cursor)


def write_many(engine: Engine, writer: int, count: int) -> None:
    """Events in transactions that stay open for a while; every tenth is undone."""
    for number in range(1000 * writer, 1000 * writer + count):
        with suppress(RuntimeError), transaction(engine) as session:
            write(session, number)
            time.sleep(0.001 * (number * 7919 % 13))
            if number % 10 == 9:
                raise RuntimeError("undone")


def write(session: Session, number: int) -> None:
    """Add an event of acme's in somebody's transaction, with a number to know it by."""
    note(session, queries.tenant_id(session, "acme"), feed.REMOVED, uuid.uuid4(), {"number": number}, NOW)
    session.flush()
