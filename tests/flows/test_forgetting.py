"""A user who is forgotten: no byte of theirs is left, nobody else's has changed, and the receipt says what went."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, text
from sqlalchemy.engine import URL, Engine, make_url

from flows.factory import Factory, add_data, now, request_training
from flows.settings import FactorySettings
from flows.talk import find
from flows.upkeep import clean_home, forget, keep_up
from lora_core.recipe import Recipe
from lora_core.saves import file_stem
from registry import aliases, forgetting, holds, jobs, orders, progress, queries, retention, schedules
from registry.errors import LeaseLost, NameRefused, NotFound, NotYetForgotten, StoreUnavailable, UnderHold
from registry.forgetting import Wish
from registry.jobs import ClaimedJob
from registry.models import Base, Job
from registry.names import Reference
from registry.publishing import Published, declare, publish, publish_together, upload
from registry.s3_store import S3Store
from registry.session import reading, transaction
from registry.store import FolderStore
from registry.timing import Timing
from registry.uploads import UPLOAD_LEASE
from tests.conftest import looking, tampering
from tests.faults.worker import BASE, finished

CANARY = "c4n4ry"  # part of everything that is the user's, in any letter case
ALICE, BOB = f"alice-{CANARY}", "bob"
LEASE = timedelta(hours=1)


def wish(user: str = ALICE, reason: str = "request 4711", secret: str = "a secret of the operator") -> Wish:
    """That alice be forgotten."""
    return Wish("acme", user, secret, "an operator", reason)


@pytest.fixture(params=["folder", "s3"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new store of each kind in turn."""
    if request.param == "folder":
        return str(tmp_path / "store")
    url: str = request.getfixturevalue("s3_url")
    return url


def factory_on(database: URL, store_url: str) -> Factory:
    """A factory on an empty registry and store, as the application's role."""
    url = database.render_as_string(hide_password=False)
    made = Factory(FactorySettings(database_url=url, store_url=store_url))
    made.settings.home_folder.mkdir(parents=True, exist_ok=True)
    made.store.set_up()
    return made


@pytest.fixture
def factory(engine: Engine, store_url: str) -> Iterator[Factory]:
    """Alice and bob with everything that a user can have, on each database and store."""
    made = factory_on(engine.url, store_url)
    if isinstance(made.store, S3Store):  # where a plain DELETE hides the bytes and keeps them
        on: Any = {"Status": "Enabled"}
        made.store.client.put_bucket_versioning(Bucket=made.store.bucket, VersioningConfiguration=on)
    for user in (ALICE, BOB):
        furnish(made, user)
    yield made
    made.engine.dispose()


@pytest.fixture
def small(home: Path, tmp_path: Path) -> Iterator[Factory]:
    """The same on SQLite and a folder."""
    made = factory_on(make_url(f"sqlite:///{home / 'registry.db'}"), str(tmp_path / "store"))
    for user in (ALICE, BOB):
        furnish(made, user)
    yield made
    made.engine.dispose()


def furnish(factory: Factory, user: str) -> None:
    """Two versions, aliases with a past, a failed and a waiting job, schedule, pin; a pulled copy, a save, states."""
    reference, home = Reference("acme", user), factory.settings.home_folder
    for number in (1, 2):
        publish(factory.engine, factory.store, claimed(factory, user, f"{number}"), made_of(user, number), now())
    fail(factory, claimed(factory, user, "bad"), f"bad row: {user}'s words")
    asked(factory, user, "next")
    with transaction(factory.engine) as session:
        tenant = queries.tenant_id(session, "acme")
        first = replace(reference, number=1)
        said: Any = {"actor": "me", "reason": f"{user} said so", "now": now()}  # keywords of unlike types
        aliases.promote(session, tenant, first, "production", **said)
        retention.pin(session, tenant, first, **said)
        holder = queries.holder(session, tenant, user, "default")
        schedules.put(session, tenant, holder, Timing.every("1h"), "tiny", {"note": user}, now())
    factory.client.pull(reference)
    for folder, name in (("saves", file_stem(reference.label)), ("states/eager/x", f"row of {user}")):
        (home / folder).mkdir(parents=True, exist_ok=True)
        (home / folder / f"{name}.safetensors").write_text(f"numbers of {user}")


def asked(factory: Factory, user: str, what: str) -> orders.Enqueued:
    """A job on data that nobody has seen before."""
    file = factory.settings.home_folder / f"{user}.jsonl"
    file.write_text("".join(json.dumps({"text": f"{user} {what} line {line}"}) + "\n" for line in range(5)))
    add_data(factory, Reference("acme", user), [str(file)])
    file.unlink()
    with transaction(factory.engine) as session:
        return request_training(session, Reference("acme", user), BASE, Recipe())


def claimed(factory: Factory, user: str, what: str) -> ClaimedJob:
    """Such a job in a worker's hands."""
    job = asked(factory, user, what)
    with transaction(factory.engine) as session:
        return jobs.claim(session, f"worker of {user}", LEASE, 1, now(), [job.job_id])[0]


def made_of(user: str, number: int) -> Any:
    """What a training came to, with the user's name in its weights, metadata, scores and verdict."""
    done = finished(f"weights of {user} {number}")
    return replace(done, reason=f"better for {user}", scores={"candidate": {"loss": 1.0, "of": user}})


def fail(factory: Factory, job: ClaimedJob, why: str) -> None:
    """A job whose error quotes the data."""
    with transaction(factory.engine) as session:
        jobs.fail(session, job, why, now())


def test_no_byte_of_a_forgotten_user_is_left_and_nobody_elses_has_changed(factory: Factory) -> None:
    """Database files or dumps, store with every object version, and home are read through for what was planted."""
    assert found(factory).keys() == {"database", "store", "home"}, "nothing was planted"
    before = belongings(factory, BOB)

    receipt = forget(factory, wish())

    assert found(factory) == {}
    assert belongings(factory, BOB) == before
    assert CANARY not in repr(receipt)
    counts = {kind: facts["count"] for kind, facts in receipt.deleted.items()}
    assert counts == {
        "adapters": 1, "alias moves": 3, "aliases": 2, "datasets": 4, "events": counts["events"], "jobs": 4,
        "pins": 1, "schedules": 1, "scores": 2, "users": 1, "versions": 2,
        "pulled copies on this machine": 1, "saves on this machine": 1, "states on this machine": 2,
    }  # fmt: skip


def test_nor_is_what_stands_for_them_in_keys_left_in_the_file(small: Factory) -> None:
    """Logs and listings of the store know a user by it; and a registry that is at work is not closed for years."""
    with reading(small.engine) as session:
        opaque = session.scalars(text("SELECT opaque FROM users WHERE name = :name"), {"name": ALICE}).one()
    assert opaque.encode() in database_bytes(small.engine)

    forget(small, wish())

    assert opaque.encode() not in database_bytes(small.engine)


def found(factory: Factory) -> dict[str, str]:
    """Where what was planted is still to be seen, with a piece of it."""
    home = factory.settings.home_folder
    there = {"database": database_bytes(factory.engine), "store": store_bytes(factory), "home": folder_bytes(home)}
    marks = {name: content.lower().find(CANARY.encode()) for name, content in there.items()}
    return {name: repr(there[name][at - 40 : at + 40]) for name, at in marks.items() if at >= 0}


def database_bytes(engine: Engine) -> bytes:
    """A SQLite file with all that lies beside it; every row of a PostgreSQL as text."""
    if engine.dialect.name == "sqlite":
        file = Path(str(engine.url.database))
        return b"".join(path.read_bytes() for path in file.parent.glob(f"{file.name}*"))
    with looking(engine) as session:
        tables = [*Base.metadata.tables, "alembic_version"]
        return "\n".join(
            row for name in tables for row in session.scalars(text(f"SELECT t::text FROM {name} t"))
        ).encode()


def store_bytes(factory: Factory) -> bytes:
    """Every object and its key; on S3 every version of each, and what is uploaded in parts."""
    store = factory.store
    if isinstance(store, FolderStore):
        return folder_bytes(store.root)
    assert isinstance(store, S3Store)
    content = b""
    for page in store.client.get_paginator("list_object_versions").paginate(Bucket=store.bucket):
        for one in page.get("Versions", []):
            kept = store.client.get_object(Bucket=store.bucket, Key=one["Key"], VersionId=one["VersionId"])
            content += one["Key"].encode() + kept["Body"].read()
    parts = store.client.list_multipart_uploads(Bucket=store.bucket).get("Uploads", [])
    return content + repr(parts).encode()


def folder_bytes(folder: Path) -> bytes:
    """Every file below a folder, and every path."""
    paths = sorted(folder.rglob("*"))
    return b"\n".join(os.fsencode(path) + (path.read_bytes() if path.is_file() else b"") for path in paths)


def belongings(factory: Factory, user: str) -> list[str]:
    """Every row, object and kept file that names a user, to the last byte, and the rows of the whole factory."""
    home, shared = factory.settings.home_folder, ("runs", "bases", "tenants")
    with looking(factory.engine) as session:
        tables = Base.metadata.tables.items()
        rows = [
            repr(row)
            for name, table in tables
            for row in session.execute(select(table))
            if name in shared or user in repr(row)
        ]
        opaque = session.scalars(text("SELECT opaque FROM users WHERE name = :name"), {"name": user}).one()
    objects = [f"{key} {factory.store.get(key)!r}" for key in factory.store.keys(f"t/acme/u/{opaque}")]
    files = [(home / "saves" / f"{file_stem(f'acme/{user}')}.safetensors").read_text()]
    return sorted(rows) + sorted(objects) + files


def test_a_user_of_the_same_name_starts_afresh(small: Factory) -> None:
    """Number 1 again, nothing of the past; and forgetting them again is another receipt."""
    first = forget(small, wish())
    with pytest.raises(NotFound):
        small.client.resolve(f"acme/{ALICE}")

    done = publish(small.engine, small.store, claimed(small, ALICE, "new"), made_of(ALICE, 1), now())

    assert done.number == 1
    assert forget(small, wish()).id != first.id
    assert found(small) == {}


def test_who_has_the_name_of_somebody_forgotten_is_heard_as_themselves_on_every_machine(
    small: Factory, tmp_path: Path
) -> None:
    """One that keeps the forgotten version of that number knows nothing of it: that was done elsewhere."""
    elsewhere = Factory(small.settings.model_copy(update={"home": tmp_path / "elsewhere"}))
    assert find(elsewhere, f"acme/{ALICE}:1").folder.is_dir()
    forget(small, wish())
    done = publish(small.engine, small.store, claimed(small, ALICE, "new"), made_of(ALICE, 1), now())

    heard = find(elsewhere, f"acme/{ALICE}")

    assert (heard.name, heard.folder.name) == (f"acme/{ALICE}:1", done.served_name)


def test_once_forgotten_the_receipt_is_all_that_a_repetition_gives(small: Factory) -> None:
    """Whoever asks with the name is answered; the receipt alone tells no name."""
    receipt = forget(small, wish())

    assert forget(small, wish()) == receipt
    with reading(small.engine) as session:
        tenant = queries.tenant_id(session, "acme")
        assert forgetting.receipts_of(session, tenant, ALICE, wish().secret) == [receipt]
        assert forgetting.receipts_of(session, tenant, ALICE, "another secret") == []
        assert forgetting.receipts_of(session, tenant, BOB, wish().secret) == []
    with pytest.raises(NotFound):
        forget(small, wish("carol"))


def test_a_receipt_from_before_there_was_a_secret_is_found_with_one(small: Factory) -> None:
    """Setting LORA_RECEIPT_SECRET later loses no answer."""
    receipt = forget(small, wish(secret=""))

    with reading(small.engine) as session:
        tenant = queries.tenant_id(session, "acme")
        assert forgetting.receipts_of(session, tenant, ALICE, "a secret") == [receipt]


def test_a_reason_that_names_the_user_is_refused_and_so_is_an_actor_kept(small: Factory) -> None:
    """The receipt would keep what it says is gone."""
    with pytest.raises(NameRefused):
        wish(reason=f"{ALICE.upper()} wrote to us")

    assert forget(small, replace(wish(), actor=ALICE)).actor == "the user"


def test_a_worker_that_had_the_job_publishes_nothing(small: Factory) -> None:
    """Its fence is past: whether it has begun to upload or not."""
    early = claimed(small, ALICE, "in work")
    forget(small, wish())
    with pytest.raises(LeaseLost):
        publish(small.engine, small.store, early, made_of(ALICE, 3), now())

    assert found(small) == {}


def test_a_worker_that_publishes_many_together_publishes_the_others(small: Factory) -> None:
    """And brings nothing of the forgotten one into the store."""
    gone, other = (claimed(small, user, "in work") for user in (ALICE, BOB))
    forget(small, wish())

    outcomes = publish_together(small.engine, small.store, [(gone, made_of(ALICE, 3)), (other, made_of(BOB, 3))], now())

    assert isinstance(outcomes[gone.id], LeaseLost)
    assert isinstance(outcomes[other.id], Published)
    assert found(small) == {}


def test_a_worker_that_had_the_job_saves_no_progress_in_the_store(small: Factory) -> None:
    """While it trains on, unknowing; what it saved before goes."""
    job = claimed(small, ALICE, "in work")
    progress.keep(small.engine, small.store, job, "1", ALICE.encode(), now() - 2 * UPLOAD_LEASE)
    forget(small, wish())
    with pytest.raises(LeaseLost):
        progress.keep(small.engine, small.store, job, "2", ALICE.encode(), now())

    assert found(small) == {}


def test_what_cannot_be_swept_is_told_and_holds_nothing_up(small: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    """One leftover that the store will not delete, and the rest of upkeep is done all the same."""
    job = claimed(small, "bob", "in work")
    prefix = declare(small.engine, job, "0" * 64, now())
    upload(small.store, prefix, made_of("bob", 3).files)
    works = small.store.clear

    def refuse(below: str) -> int:
        if below == prefix:
            raise StoreUnavailable("s3://x", "AccessDenied", "allow s3:DeleteObject")
        return works(below)

    later = now() + 2 * UPLOAD_LEASE
    monkeypatch.setattr("flows.upkeep.now", lambda: later)
    monkeypatch.setattr(small.store, "clear", refuse)

    assert keep_up(small) == ["sweeping: " + str(StoreUnavailable("s3://x", "AccessDenied", "allow s3:DeleteObject"))]
    assert (small.settings.home_folder / "tidied").is_file()  # the jobs after it were done


def test_a_home_that_cannot_be_written_holds_up_no_upkeep(
    small: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where registry and store are elsewhere: its trouble is told like any other, and ends no worker."""
    prefix = declare(small.engine, claimed(small, "bob", "in work"), "0" * 64, now())
    upload(small.store, prefix, made_of("bob", 3).files)
    later, elsewhere = now() + 2 * UPLOAD_LEASE, small.settings
    monkeypatch.setattr("flows.upkeep.now", lambda: later)
    (tmp_path / "file").touch()
    home = tmp_path / "file" / "home"
    homeless = Factory(FactorySettings(home=home, database_url=elsewhere.database, store_url=elsewhere.store))

    (told,) = keep_up(homeless)

    assert told.startswith("tidying: [Errno 20] Not a directory")
    assert list(small.store.keys(prefix)) == []


def test_a_home_is_tidied_also_after_its_clock_was_ahead(small: Factory) -> None:
    """A machine that began with a wrong date would keep what is of nobody any more for as long."""
    save, stamp = small.settings.home_folder / "saves" / "nobody.pt", small.settings.home_folder / "tidied"
    save.parent.mkdir(parents=True, exist_ok=True)
    save.touch()
    stamp.touch()
    os.utime(stamp, (2**32, 2**32))

    assert keep_up(small) == []

    assert not save.exists()
    assert stamp.stat().st_mtime < 2**32


def test_an_upload_under_way_is_waited_for(small: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What arrives late goes too, before the receipt says that all is gone; upkeep finishes it."""
    job = claimed(small, ALICE, "in work")
    prefix = declare(small.engine, job, "0" * 64, now())
    with pytest.raises(NotYetForgotten):
        forget(small, wish())
    upload(small.store, prefix, made_of(ALICE, 3).files)
    with pytest.raises(LeaseLost):
        publish(small.engine, small.store, job, made_of(ALICE, 3), now())
    with pytest.raises(NotFound):
        small.client.resolve(f"acme/{ALICE}")
    assert [bool(trouble) for trouble in keep_up(small)] == [True]

    later = now() + 2 * UPLOAD_LEASE
    monkeypatch.setattr("flows.upkeep.now", lambda: later)

    assert keep_up(small) == []
    assert found(small) == {}
    assert forget(small, wish()).finished_at == later


def test_who_is_under_hold_is_not_forgotten(small: Factory) -> None:
    """Of the user or of the tenant; lifted, it goes."""
    for whom in (ALICE, None):
        with transaction(small.engine) as session:
            tenant = queries.tenant_id(session, "acme")
            holds.hold(session, tenant, whom, actor="legal", reason="case 17", now=now())
        before = belongings(small, ALICE)
        with pytest.raises(UnderHold, match="case 17"):
            forget(small, wish())
        assert belongings(small, ALICE) == before
        with transaction(small.engine) as session:
            holds.unhold(session, tenant, whom, actor="legal", reason="closed", now=now())

    forget(small, wish())

    assert found(small) == {}


AHEAD = b"2999-03-01T10:00:00+00:00"


@pytest.mark.parametrize("left", [b"", b"2026-03-0", b"2026-03-01", b"2026-03-01T10:00:00.1", b"\xff\x00", AHEAD])
def test_a_torn_stamp_means_that_states_never_went(small: Factory, left: bytes) -> None:
    """As a full disk leaves one, or a clock that was ahead: states go once more, and the stamp is whole again."""
    home = small.settings.home_folder
    stamp, state = home / "states-cleared", home / "states" / "eager" / "x" / "a row.safetensors"
    forget(small, wish())
    assert stamp.is_file()
    stamp.write_bytes(left)
    state.parent.mkdir(parents=True, exist_ok=True)
    state.write_text("numbers")

    cleaned = clean_home(small)

    assert cleaned["states on this machine"]["count"] == 1
    assert datetime.fromisoformat(stamp.read_text()).tzinfo
    assert clean_home(small) == {}
    assert [file.name for file in home.glob("states-cleared*")] == ["states-cleared"]


def test_every_table_that_leads_to_a_user_is_cleared() -> None:
    """A new table of users' rows fails here until forgetting knows it."""
    leading, tables = {"users"}, Base.metadata.tables.values()
    for _ in tables:
        leading |= {table.name for table in tables for key in table.foreign_keys if key.column.table.name in leading}

    assert leading == {
        "users", "datasets", "adapters", "adapter_versions", "aliases", "alias_moves", "jobs", "evaluations",
        "schedules", "uploads", "pins", "tombstones", "holds",
        "freshness",  # whose rows go with their adapters'
    }  # fmt: skip


def test_a_machine_drops_what_is_of_nobody_and_keeps_the_rest(small: Factory) -> None:
    """Elsewhere than where the user was forgotten: pulled copies, saves, and states, which go once more a day on."""
    with tampering(small.engine) as session:
        session.execute(text("UPDATE jobs SET state = 'failed' WHERE state = 'queued' AND worker IS NULL"))
        kept = {job.adapter_id for job in session.scalars(select(Job).where(Job.state == "queued"))}
    assert not kept
    pulled = small.client.pull(f"acme/{BOB}")

    cleaned = clean_home(small)

    assert {kind: facts["count"] for kind, facts in cleaned.items()} == {"saves on this machine": 2}
    assert pulled.is_dir()
