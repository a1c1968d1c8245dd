"""What is on its way into the store: left alone while its lease lasts, cleared once it is dead."""

import hashlib
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

from registry import jobs, publishing
from registry.errors import LeaseLost, StoreUnavailable
from registry.models import Job, Upload
from registry.publishing import publish
from registry.session import transaction
from registry.store import FolderStore
from registry.uploads import UPLOAD_LEASE, sweep
from tests.conftest import looking
from tests.registry.conftest import LEASE, NOW, Claim, finished, versions


def test_the_sweeper_leaves_a_live_upload_alone(engine: Engine, store: FolderStore, claim: Claim) -> None:
    """An intent under lease is somebody's work."""
    (job,) = claim()
    prefix = publishing.declare(engine, job, "d" * 64, NOW)
    publishing.upload(store, prefix, finished().files)

    assert sweep(engine, store, NOW + UPLOAD_LEASE) == []
    assert len(list(store.keys(prefix))) == 2


def test_what_arrives_after_the_sweep_is_cleared_by_the_next(engine: Engine, store: FolderStore, claim: Claim) -> None:
    """A slow publisher may still be uploading when its prefix is swept."""
    (job,) = claim()
    prefix = publishing.declare(engine, job, "d" * 64, NOW)
    publishing.upload(store, prefix, finished().files)
    later = NOW + 2 * UPLOAD_LEASE
    assert sweep(engine, store, later) == [prefix]
    store.put_new(f"{prefix}/late.bin", b"late")

    assert sweep(engine, store, later) == []
    assert sweep(engine, store, later + 2 * UPLOAD_LEASE) == [prefix]
    sweep(engine, store, later + 4 * UPLOAD_LEASE)

    assert list(store.keys("")) == []
    with looking(engine) as session:
        assert session.query(Upload).count() == 0


def test_a_slow_sweeper_deletes_nothing_that_was_committed_meanwhile(
    engine: Engine, store: FolderStore, claim: Claim
) -> None:
    """Two sweepers, and a publisher that tries again: what has a row keeps its bytes."""
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite has one writer at a time: the second sweeper waits for the first")
    (job,) = claim()
    publishing.declare(engine, job, hashlib.sha256(finished().files["manifest.json"]).hexdigest(), NOW)
    later = NOW + 2 * UPLOAD_LEASE

    class Slow(FolderStore):
        """While it is about to clear, another sweeper comes and goes."""

        def clear(self, prefix: str) -> int:
            assert sweep(engine, store, later) == []
            return super().clear(prefix)

    sweep(engine, Slow(store.root), later)
    with pytest.raises(LeaseLost):
        publish(engine, store, job, finished(), later)
    with transaction(engine) as session:
        (again,) = jobs.claim(session, "next", LEASE, 1, later)
    done = publish(engine, store, again, finished(), later)
    sweep(engine, store, later)

    assert len(list(store.keys(done.prefix))) == 2


def test_a_publisher_slower_than_the_sweeper_cannot_commit(engine: Engine, store: FolderStore, claim: Claim) -> None:
    """Else its row would name bytes that are gone."""
    (job,) = claim()
    content = finished()

    class SweptStore(FolderStore):
        """The sweeper comes after the last upload."""

        def put_new(self, key: str, data: bytes) -> bool:
            wrote = super().put_new(key, data)
            if key.endswith("manifest.json"):
                sweep(engine, store, NOW + 2 * UPLOAD_LEASE)
            return wrote

    with pytest.raises(LeaseLost):
        publish(engine, SweptStore(store.root), job, content, NOW)

    assert versions(engine) == []
    with looking(engine) as session:
        assert session.get_one(Job, job.id).state == "running"


def test_a_versions_bytes_outlive_an_intent_that_was_declared_again(
    engine: Engine, store: FolderStore, claim: Claim
) -> None:
    """A commit whose answer was lost may still be under way when its publisher tries again and declares once more."""
    (job,) = claim()
    done = publish(engine, store, job, finished(), NOW)
    publishing.declare(engine, job, done.sha256, NOW)

    assert sweep(engine, store, NOW + 2 * UPLOAD_LEASE) == []

    assert len(list(store.keys(done.prefix))) == 2
    with looking(engine) as session:
        assert session.query(Upload).count() == 0


def test_no_statement_of_a_sweep_grows_with_what_there_is_to_sweep(
    engine: Engine, store: FolderStore, claim: Claim
) -> None:
    """PostgreSQL takes 65,535 parameters: with as many dead uploads nothing was swept any more."""
    for job in claim(30):
        publishing.declare(engine, job, "d" * 64, NOW)
    most: list[int] = []

    def count(*told: Any) -> None:  # a cursor's statement, its parameters, and whether these are of many
        *_, parameters, _, many = told
        most.append(0 if many else len(parameters))

    event.listen(engine, "before_cursor_execute", count)
    sweep(engine, store, NOW + 2 * UPLOAD_LEASE)

    assert 0 < max(most) < 10


def test_a_prefix_that_cannot_be_cleared_does_not_hold_up_the_others(
    engine: Engine, store: FolderStore, claim: Claim
) -> None:
    """The trouble is told at the end, and the next sweep tries it again."""
    first, second = sorted(
        publishing.declare(engine, job, "d" * 64, NOW) for job in (*claim(), *claim(reference="acme/bob"))
    )
    for prefix in (first, second):
        publishing.upload(store, prefix, finished().files)

    class Stuck(FolderStore):
        """One prefix cannot be cleared."""

        def clear(self, prefix: str) -> int:
            if prefix == first:
                raise StoreUnavailable("s3://x", "500", "try again")
            return super().clear(prefix)

    with pytest.raises(StoreUnavailable):
        sweep(engine, Stuck(store.root), NOW + 2 * UPLOAD_LEASE)

    assert {key.rpartition("/")[0] for key in store.keys("")} == {first}
    assert sweep(engine, store, NOW + 4 * UPLOAD_LEASE) == [first]
