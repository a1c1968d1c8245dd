"""Adding data: bytes first, row second, and no debris."""

import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import select
from sqlalchemy.engine import Engine

from registry import freshness, queries
from registry.datasets import Content, add_dataset
from registry.errors import UploadSwept
from registry.models import Dataset, Freshness, Upload
from registry.names import Reference
from registry.session import reading, transaction
from registry.store import FolderStore
from registry.uploads import UPLOAD_LEASE, sweep
from tests.conftest import looking
from tests.registry.conftest import NOW

ALICE = Reference.parse("acme/alice")
DATA = b'{"text": "hello"}\n'
HELLO = Content(hashlib.sha256(DATA).hexdigest(), DATA, 1)


def rows(engine: Engine) -> list[Dataset]:
    """Every dataset there is."""
    with looking(engine) as session:
        return list(session.scalars(select(Dataset)))


def test_data_is_stored_once_however_often_it_is_added(engine: Engine, store: FolderStore) -> None:
    """Adding it again makes it the newest, and heals a store that has lost it."""
    add_dataset(engine, store, ALICE, HELLO, NOW)
    (first,) = rows(engine)
    store.delete(first.key)

    add_dataset(engine, store, ALICE, HELLO, NOW + timedelta(days=1))

    (row,) = rows(engine)
    assert (row.key, row.added_at - first.added_at) == (first.key, timedelta(days=1))
    assert list(store.keys("")) == [row.key]
    assert store.get(row.key) == DATA
    with looking(engine) as session:
        assert session.query(Upload).count() == 0


def test_what_is_added_last_is_the_newest_whatever_a_machines_clock_says(engine: Engine, store: FolderStore) -> None:
    """A host that is a minute behind would add data that nobody is ever trained on."""
    newer = Content(hashlib.sha256(b"{}").hexdigest(), b"{}", 1)
    for content in (HELLO, newer, HELLO, newer):
        add_dataset(engine, store, ALICE, content, NOW - timedelta(minutes=content is newer))

        with reading(engine) as session:
            tenant = queries.tenant_id(session, "acme")
            owner = queries.holder(session, tenant, "alice", "default")
            assert queries.newest_dataset(session, tenant, owner).digest == content.digest
            assert freshness.newest(session, tenant, owner.user.id) == queries.newest_dataset(session, tenant, owner).id


def test_an_adapter_that_is_made_while_data_comes_knows_of_it(engine: Engine, store: FolderStore) -> None:
    """Each was blind to the other, and the new adapter not outdated until the next data came."""
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite has one writer at a time")
    add_dataset(engine, store, ALICE, HELLO, NOW)
    newer = Content(hashlib.sha256(b"{}").hexdigest(), b"{}", 1)
    with ThreadPoolExecutor(1) as pool:
        with transaction(engine) as session:
            queries.ensure_adapter(session, Reference.parse("acme/alice/notes"), NOW)
            adding = pool.submit(add_dataset, engine, store, ALICE, newer, NOW + timedelta(days=1))
            with suppress(TimeoutError):
                adding.result(0.5)
        adding.result(30)

    with looking(engine) as session:
        known = session.scalars(select(Dataset.digest).join(Freshness, Freshness.newest_id == Dataset.id)).all()
    assert known == [newer.digest] * 2


def test_the_same_data_under_another_adapter_at_once_waits_its_turn(engine: Engine, store: FolderStore) -> None:
    """The first held the data and the second its user's turn: each waited for the other, until one was given up."""
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite has one writer at a time")
    add_dataset(engine, store, ALICE, HELLO, NOW)
    notes, others = Reference.parse("acme/alice/notes"), list[Future[None]]()

    class Meeting(FolderStore):
        """Somebody else comes while data is stored."""

        def put_new(self, key: str, data: bytes) -> bool:
            others.append(pool.submit(add_dataset, engine, store, notes, HELLO, NOW))
            with suppress(TimeoutError):
                others[0].result(0.3)
            return super().put_new(key, data)

    with ThreadPoolExecutor(1) as pool:
        add_dataset(engine, Meeting(store.root), ALICE, HELLO, NOW)
        others[0].result(30)


def test_what_a_killed_ingest_left_is_swept(
    engine: Engine, store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The object before its row, and the file that was only half written."""
    with monkeypatch.context() as patched:
        patched.setattr("registry.datasets.ensure_dataset", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            add_dataset(engine, store, ALICE, HELLO, NOW)
    (key,) = store.keys("")
    Path(store.root, key).with_name(".put-dead").write_bytes(b"half")

    assert sweep(engine, store, NOW + UPLOAD_LEASE) == []
    assert sweep(engine, store, NOW + 2 * UPLOAD_LEASE) == [key.rpartition("/")[0]]

    assert list(os.walk(store.root)) == [(str(store.root), [], [])]


def test_an_ingest_slower_than_the_sweeper_is_told_and_adds_no_row(engine: Engine, store: FolderStore) -> None:
    """Else the row would name bytes that are gone; done again, it goes through."""

    class SweptStore(FolderStore):
        """The sweeper comes after the upload."""

        def put_new(self, key: str, data: bytes) -> bool:
            wrote = super().put_new(key, data)
            sweep(engine, store, NOW + 2 * UPLOAD_LEASE)
            return wrote

    with pytest.raises(UploadSwept, match="do it again"):
        add_dataset(engine, SweptStore(store.root), ALICE, HELLO, NOW)
    assert rows(engine) == []
    add_dataset(engine, store, ALICE, HELLO, NOW)

    assert [row.key for row in rows(engine)] == list(store.keys(""))


def test_of_two_that_add_equal_content_at_once_one_is_kept_and_the_other_swept(
    engine: Engine, store: FolderStore
) -> None:
    """Neither fails, and the sweeper takes only what no row names."""

    class Overtaken(FolderStore):
        """Another process adds the same while this one uploads."""

        def put_new(self, key: str, data: bytes) -> bool:
            add_dataset(engine, store, ALICE, HELLO, NOW)
            return super().put_new(key, data)

    add_dataset(engine, Overtaken(store.root), ALICE, HELLO, NOW)
    (row,) = rows(engine)
    assert len(list(store.keys(""))) == 2

    sweep(engine, store, NOW + 2 * UPLOAD_LEASE)

    assert list(store.keys("")) == [row.key]


def test_of_two_additions_that_overlap_the_newest_is_the_one_asked_for_last(engine: Engine, store: FolderStore) -> None:
    """Who is outdated goes by the data that would be trained on, whichever upload took longer."""
    later = Content("b" * 64, b"later", 1)

    class Overtaken(FolderStore):
        """Newer data comes while this one uploads."""

        def put_new(self, key: str, data: bytes) -> bool:
            add_dataset(engine, store, ALICE, later, NOW + timedelta(seconds=30))
            return super().put_new(key, data)

    add_dataset(engine, Overtaken(store.root), ALICE, HELLO, NOW)

    with reading(engine) as session:
        tenant = queries.tenant_id(session, "acme")
        trained_on = queries.newest_dataset(session, tenant, queries.holder(session, tenant, "alice", "default"))
        (told,) = freshness.outdated(session, tenant).rows
    assert told.newest == trained_on.digest == later.digest
