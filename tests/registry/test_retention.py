"""What a policy keeps, what a collection removes, and what a reader is told."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from registry import aliases, collection, fleet, holds, queries, retention
from registry.client import Client
from registry.datasets import Content, add_dataset
from registry.errors import PromotionRefused, RetentionRefused, StoreUnavailable, VersionGone
from registry.eviction import evict_gone
from registry.models import AdapterVersion, Dataset, RetentionPolicy, Tombstone
from registry.names import Reference, TenantId
from registry.publishing import publish
from registry.session import transaction
from registry.store import FolderStore
from registry.uploads import sweep
from tests.conftest import looking
from tests.registry.conftest import NOW, Claim, finished
from tests.registry.twins import tenant_of

SAID: Any = {"actor": "me", "reason": "because", "now": NOW}  # keywords of unlike types
ALICE = Reference.parse("acme/alice")
Keep = Callable[..., TenantId]


@pytest.fixture
def six(engine: Engine, store: FolderStore, claim: Claim) -> Keep:
    """Alice has six versions, a day apart, the last of them refused; what is called sets the policy."""
    for number, job in enumerate(claim(6)):
        store.put_new(job.dataset_key, f"data {number}".encode())
        made = finished(f"weights {number}", accepted=number < 5)
        publish(engine, store, job, made, NOW + timedelta(days=number))

    def keep(newest: int | None = None, days: int | None = None) -> TenantId:
        with transaction(engine) as session:
            tenant = queries.tenant_id(session, "acme")
            retention.set_policy(session, tenant, newest, days, **SAID)
            return tenant

    return keep


def left(engine: Engine) -> set[int]:
    """The numbers of the versions that are kept."""
    with looking(engine) as session:
        gone = set(session.scalars(select(Tombstone.version_id)))
        return {version.number for version in session.scalars(select(AdapterVersion)) if version.id not in gone}


LATER = NOW + timedelta(days=6)
KEPT = [
    ((None, None), {1, 2, 3, 4, 5, 6}),
    ((1, None), {5, 6}),  # 5 is at latest, 6 the newest
    ((3, None), {4, 5, 6}),
    ((None, 3), {4, 5, 6}),
    ((None, 1), {5, 6}),
    ((2, 4), {3, 4, 5, 6}),
    ((9, None), {1, 2, 3, 4, 5, 6}),
    ((None, 10**6), {1, 2, 3, 4, 5, 6}),  # before all dates that there are
]


@pytest.mark.parametrize(("policy", "kept"), KEPT)
def test_a_policy_keeps_what_any_of_its_rules_keeps(
    engine: Engine, store: FolderStore, six: Keep, policy: tuple[int | None, int | None], kept: set[int]
) -> None:
    """A dry run says the same and changes nothing; a second collection finds nothing."""
    tenant = six(*policy)
    before = sorted(store.keys(""))
    planned = collection.plan(engine, tenant, LATER)
    assert (left(engine), sorted(store.keys(""))) == ({1, 2, 3, 4, 5, 6}, before)

    done = collection.collect(engine, store, tenant, LATER)

    assert left(engine) == kept
    assert {one.label for one in done.versions} == {one.label for one in planned.versions}
    assert (done.size, len(done.versions)) == (planned.size, 6 - len(kept))
    assert len([key for key in store.keys("") if key.endswith("manifest.json")]) == len(kept)
    assert collection.collect(engine, store, tenant, LATER).versions == []


def test_of_two_who_set_a_policy_at_once_the_later_sets_it(engine: Engine, six: Keep) -> None:
    """The first policy that a tenant has, and one instead of it."""
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite has one writer at a time")
    for newest in (2, 4):
        with ThreadPoolExecutor(1) as pool:
            with transaction(engine) as session:
                tenant = queries.tenant_id(session, "acme")
                retention.set_policy(session, tenant, newest, None, **SAID)
                session.flush()
                later = pool.submit(six, newest + 1, newest)
                with suppress(TimeoutError):
                    later.result(0.3)
            later.result(30)

        with looking(engine) as session:
            assert session.scalars(select(RetentionPolicy)).one().days == newest


def test_pinned_aliased_and_held_versions_stay(engine: Engine, store: FolderStore, six: Keep) -> None:
    """And go once nothing keeps them any more."""
    tenant = six(1)
    with transaction(engine) as session:
        queries.tenant_id(session, "acme")
        retention.pin(session, tenant, Reference.parse("acme/alice:1"), **SAID)
        aliases.promote(session, tenant, Reference.parse("acme/alice:2"), "production", **SAID)
    collection.collect(engine, store, tenant, LATER)
    assert left(engine) == {1, 2, 5, 6}
    with transaction(engine) as session:
        queries.tenant_id(session, "acme")
        retention.unpin(session, tenant, Reference.parse("acme/alice:1"), **SAID)
        aliases.promote(session, tenant, Reference.parse("acme/alice:5"), "production", **SAID)
        holds.hold(session, tenant, "alice", **SAID)
    collection.collect(engine, store, tenant, LATER)
    assert left(engine) == {1, 2, 5, 6}
    with transaction(engine) as session:
        queries.tenant_id(session, "acme")
        holds.unhold(session, tenant, "alice", **SAID)

    collection.collect(engine, store, tenant, LATER)

    assert left(engine) == {5, 6}


def test_a_removed_version_keeps_its_number_and_its_reader_is_told(
    engine: Engine, store: FolderStore, six: Keep, claim: Claim, tmp_path: Path
) -> None:
    """Pull, promote, pin and going back are refused in one line; the next version is number 7."""
    client = Client(engine, store, tmp_path / "cache")
    pulled = client.pull("acme/alice:1")
    tenant = six(1)
    collection.collect(engine, store, tenant, LATER)
    first = Reference.parse("acme/alice:1")

    with pytest.raises(VersionGone, match=r"acme/alice:1 was removed on 2026-03-07 \(kept are the newest 1\)"):
        client.resolve("acme/alice:1")
    acts: list[Callable[[Session], object]] = [
        lambda session: aliases.promote(session, tenant, first, "production", **SAID),
        lambda session: aliases.rollback(session, tenant, ALICE, "latest", **SAID),
        lambda session: retention.pin(session, tenant, first, **SAID),
    ]
    for act in acts:
        with pytest.raises(VersionGone), transaction(engine) as session:
            queries.tenant_id(session, "acme")
            act(session)
    assert client.resolve("acme/alice").number == 5
    assert evict_gone(engine, tmp_path / "cache") == [pulled.name]
    assert not pulled.exists()
    with pytest.raises(VersionGone):  # until then this machine knew what it had pulled, and asked nobody
        client.pull("acme/alice:1")


def test_a_fleet_goes_back_to_nothing_that_was_removed(engine: Engine, store: FolderStore, six: Keep) -> None:
    """Its alias stays where it is."""
    tenant = six(1)
    with transaction(engine) as session:
        queries.tenant_id(session, "acme")
        aliases.promote(session, tenant, Reference.parse("acme/alice:1"), "production", **SAID)
        fleet.promote_all(session, tenant, "production", "latest", fleet.Where(), **SAID)
    collection.collect(engine, store, tenant, LATER)

    with pytest.raises(PromotionRefused), transaction(engine) as session:
        queries.tenant_id(session, "acme")
        fleet.roll_back_all(session, tenant, "production", **SAID)

    assert Client(engine, store, Path("unused")).resolve("acme/alice@production").number == 5


def test_data_that_only_removed_versions_needed_goes_and_can_come_again(
    engine: Engine, store: FolderStore, claim: Claim
) -> None:
    """Never the newest, nor what an open job is to learn from."""
    with transaction(engine) as session:
        tenant = queries.ensure_adapter(session, ALICE, NOW).tenant_id
        retention.set_policy(session, tenant, 1, None, **SAID)
    first = Content("a" * 64, b"first", 1)
    for day, content in enumerate((first, Content("b" * 64, b"second", 1), Content("c" * 64, b"third", 1))):
        add_dataset(engine, store, ALICE, content, NOW + timedelta(days=day))

    done = collection.collect(engine, store, tenant, LATER)

    assert len(done.datasets) == 2
    assert [store.get(key) for key in store.keys("")] == [b"third"]
    sweep(engine, store, LATER + timedelta(hours=1))
    add_dataset(engine, store, ALICE, first, LATER + timedelta(hours=2))
    with looking(engine) as session:
        again = session.scalars(
            select(Dataset).where(Dataset.removed_at.is_(None), Dataset.digest == first.digest)
        ).one()
    assert store.get(again.key) == b"first"


def test_data_whose_user_is_put_under_hold_while_a_collection_runs_stays(
    engine: Engine, store: FolderStore, six: Keep
) -> None:
    """It is marked already, and its turn comes after the versions'; it goes once the hold is lifted."""

    class Slow(FolderStore):
        """A lawyer comes while the version goes."""

        def clear(self, prefix: str) -> int:
            if prefix == version:
                hold(engine)
            return super().clear(prefix)

    tenant, key = six(5), two_datasets(engine, store)
    version = Client(engine, store, Path("unused")).resolve("acme/alice:1").prefix

    collection.collect(engine, Slow(store.root), tenant, LATER)

    assert store.size(key)
    lift(engine)
    sweep(engine, store, LATER + timedelta(hours=1))
    assert store.size(key) is None


def test_the_sweep_leaves_collected_data_whose_user_is_under_hold_since(engine: Engine, store: FolderStore) -> None:
    """The collection could not reach the store; the sweep that goes on with it comes again after the hold."""

    class Away(FolderStore):
        """For whoever clears."""

        def clear(self, prefix: str) -> int:
            raise StoreUnavailable("s3://x", "500", "try again")

    key = two_datasets(engine, store)
    with transaction(engine) as session:
        tenant = queries.tenant_id(session, "acme")
        retention.set_policy(session, tenant, 1, None, **SAID)
    with pytest.raises(StoreUnavailable):
        collection.collect(engine, Away(store.root), tenant, LATER)
    hold(engine)

    assert sweep(engine, store, LATER + timedelta(hours=1)) == []

    assert store.size(key)
    lift(engine)
    assert sweep(engine, store, LATER + timedelta(hours=2)) == [key.rpartition("/")[0]]


def two_datasets(engine: Engine, store: FolderStore) -> str:
    """Alice's data, and newer data; returns where the first lies."""
    for day, digest in enumerate("ab"):
        add_dataset(engine, store, ALICE, Content(digest * 64, digest.encode(), 1), NOW + timedelta(days=day))
    (key,) = [key for key in store.keys("") if "/datasets/a" in key]
    return key


def hold(engine: Engine) -> None:
    """Put alice under hold."""
    with transaction(engine) as session:
        holds.hold(session, queries.tenant_id(session, "acme"), "alice", **SAID)


def lift(engine: Engine) -> None:
    """And no more."""
    with transaction(engine) as session:
        holds.unhold(session, queries.tenant_id(session, "acme"), "alice", **SAID)


def test_a_policy_that_cannot_be_meant_is_refused(engine: Engine, six: Keep) -> None:
    """Zero would keep nothing."""
    for newest, days in ((0, None), (None, 0), (-1, None), (None, 10**7)):
        with pytest.raises(RetentionRefused):
            six(newest, days)
    assert tenant_of(engine, "acme")


def test_a_node_that_follows_the_feed_is_told_what_a_collection_removes(
    engine: Engine, store: FolderStore, six: Keep, tmp_path: Path
) -> None:
    """By number and served name: enough to drop it from an inference server."""
    client = Client(engine, store, tmp_path / "cache")
    names = {number: client.resolve(f"acme/alice:{number}").served_name for number in range(1, 7)}
    tenant = six(1)
    cursor = client.changes_from_now("acme")
    kept = left(engine)
    collection.collect(engine, store, tenant, LATER)

    told = client.changes("acme", after=cursor).rows

    gone = {number: name for number, name in names.items() if number in kept - left(engine)}
    assert gone
    assert {one.kind for one in told} == {"version removed"}
    assert {one.number: one.served_name for one in told} == gone
    assert {(one.user, one.adapter) for one in told} == {("alice", "default")}
