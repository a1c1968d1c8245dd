"""Forgetting and collecting, killed at every point: whoever comes after finishes, and nothing else is touched."""

import multiprocessing
import os
import signal
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import pytest
from sqlalchemy import select

from flows.factory import Factory
from flows.settings import FactorySettings
from flows.upkeep import clean_home
from registry import collection, jobs, queries, retention
from registry.errors import VersionGone
from registry.forgetting import Receipt, Wish, forget
from registry.models import Dataset, Forgetting, Tombstone, Upload, User
from registry.publishing import publish
from registry.session import transaction
from registry.store import open_store
from registry.tenancy import enter
from registry.uploads import sweep
from tests.conftest import looking, set_up
from tests.faults.points import Fault, Points, watch_database, watch_store
from tests.faults.trials import every, sample
from tests.faults.worker import finished
from tests.registry.conftest import LEASE, NOW, enqueue
from tests.registry.twins import tenant_of

KEPT = 1  # versions of each adapter
_SPAWN = multiprocessing.get_context("forkserver")
_SPAWN.set_forkserver_preload(["tests.faults.worker", "tests.faults.points", "boto3", "psycopg", "pytest"])


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "LORA_"))}


@dataclass(frozen=True)
class Chore:
    """What a process is to do, and what befalls it."""

    what: Literal["forget", "collect"]
    user: str
    database: str
    store: str
    fault: Fault | None = None
    environment: Mapping[str, str] = field(default_factory=_environment)

    def do(self, points: Points | None = None) -> Receipt | collection.Collected:
        """Do it, in this process."""
        factory = Factory(FactorySettings(database_url=self.database, store_url=self.store))
        if points:
            watch_database(factory.engine, points)
            factory.store = watch_store(factory.store, points)
        engine, store, later = factory.engine, factory.store, NOW + timedelta(days=1)
        try:
            if self.what == "forget":
                wish = Wish("acme", self.user, "", "me", "asked to")
                return forget(engine, store, wish, lambda served: clean_home(factory, served), later)
            return collection.collect(engine, store, tenant_of(engine, "acme"), later)
        finally:
            engine.dispose()


def run(chore: Chore) -> None:
    """The whole life of a child process."""
    os.environ.update(chore.environment)
    chore.do(Points(chore.fault, tell=lambda name: None))


class Site:
    """A registry and a store, and the users that are killed over there."""

    def __init__(self, database: str, store_url: str) -> None:
        self.engine, self.store, self.store_url = set_up(database), open_store(store_url), store_url
        self.database = self.engine.url.render_as_string(hide_password=False)
        self.store.set_up()
        self.furnish("bob")
        with transaction(self.engine) as session:
            said: Any = {"actor": "me", "reason": "cost", "now": NOW}  # keywords of unlike types
            retention.set_policy(session, queries.tenant_id(session, "acme"), KEPT, None, **said)
        self.chore("collect", "bob").do()
        self.neighbour = self.objects_of("bob")

    def chore(self, what: Literal["forget", "collect"], user: str) -> Chore:
        """Something to do here."""
        return Chore(what, user, self.database, self.store_url)

    def furnish(self, user: str) -> str:
        """Three versions, each on its own data; returns where the user's objects lie."""
        with transaction(self.engine) as session:
            asked = enqueue(session, f"acme/{user}", 3)
        for number, one in enumerate(asked):
            with transaction(self.engine) as session:
                (job,) = jobs.claim(session, "worker", LEASE, 1, NOW, [one.job_id])
                enter(session, job.tenant_id)
                moved = session.get_one(Dataset, job.dataset_id)
                moved.key = f"t/acme/u/{job.opaque}/datasets/{moved.digest}-1/examples.jsonl"
                moved.added_at = NOW + timedelta(seconds=number)
            self.store.put_new(moved.key, f"data {number} of {user}".encode())
            publish(self.engine, self.store, job, finished(f"weights {number} of {user}"), NOW)
        return f"t/acme/u/{job.opaque}"

    def killed(self, chore: Chore, number: int) -> bool:
        """SIGKILL at the Nth point; False if there is no Nth."""
        process = _SPAWN.Process(target=run, args=(replace(chore, fault=Fault(number, "kill")),))
        process.start()
        process.join(60)
        assert process.exitcode in (0, -signal.SIGKILL)
        return process.exitcode != 0

    def objects_of(self, user: str) -> dict[str, bytes]:
        """A user's objects, to the last byte."""
        with looking(self.engine) as session:
            opaque = session.scalars(select(User.opaque).where(User.name == user)).one()
        return {key: self.store.get(key) for key in self.store.keys(f"t/acme/u/{opaque}")}


def forgotten_at(site: Site, number: int) -> bool:
    """A new user is being forgotten, by a process that is killed at the Nth point, and then by another."""
    user = f"alice-{uuid.uuid4().hex[:8]}"
    prefix = site.furnish(user)
    chore = site.chore("forget", user)
    killed = site.killed(chore, number)
    with looking(site.engine) as session:
        begun = session.scalars(select(Forgetting).where(Forgetting.prefix == prefix)).first()
        named = session.scalars(select(User).where(User.name == user)).first()
    assert not (begun and named), "begun, and still to be found"
    receipt = chore.do()
    assert isinstance(receipt, Receipt)
    assert receipt.finished_at
    counts = {kind: receipt.deleted[kind]["count"] for kind in ("versions", "datasets", "jobs", "users")}
    assert counts == {"versions": 3, "datasets": 3, "jobs": 3, "users": 1}, "what was deleted is not told whole"
    assert list(site.store.keys(prefix)) == []
    assert site.objects_of("bob") == site.neighbour
    with looking(site.engine) as session:
        assert set(session.scalars(select(User.name))) == {"bob"}
        assert {one.user_id or one.prefix for one in session.scalars(select(Forgetting))} == {None}
    return killed


def collected_at(site: Site, number: int) -> bool:
    """A new user's old versions are being collected, by a process that is killed at the Nth point, then by another."""
    user = f"carol-{uuid.uuid4().hex[:8]}"
    prefix = site.furnish(user)
    chore = site.chore("collect", user)
    killed = site.killed(chore, number)
    client = Factory(FactorySettings(database_url=site.database, store_url=site.store_url)).client
    for number_ in (1, 2, 3):
        with suppress(VersionGone):  # else it is whole, or pulling it raises ObjectMissing
            client.pull(f"acme/{user}:{number_}")
    assert client.resolve(f"acme/{user}").number == 3
    chore.do()
    for hours in (1, 2):
        sweep(site.engine, site.store, NOW + timedelta(days=1, hours=hours))
    left = {key.removeprefix(f"{prefix}/").partition("/")[0] for key in site.store.keys(prefix)}
    assert left == {"default", "datasets"}
    assert len(list(site.store.keys(prefix))) == 3, "the newest version's two files and its data"
    with looking(site.engine) as session:
        assert None not in set(session.scalars(select(Tombstone.cleared_at)))
        assert session.scalars(select(Upload)).all() == []
    assert site.objects_of("bob") == site.neighbour
    return killed


Trial = Callable[[Site, int], bool]
TRIALS = {"forget": forgotten_at, "collect": collected_at}


@pytest.fixture
def site(database_url: str, tmp_path: Path) -> Site:
    """A registry of each kind in turn and a folder, with a neighbour."""
    return Site(database_url, str(tmp_path / "store"))


@pytest.mark.parametrize("what", TRIALS)
def test_killed_at_points_of_each_stretch_it_is_finished_by_the_next(site: Site, what: str) -> None:
    """A seeded sample; the long test goes through them."""
    happened = sum(TRIALS[what](site, number) for number in sample(7, 90, 3))

    assert happened >= 2


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("what", TRIALS)
def test_killed_at_every_ninth_point_it_is_finished_by_the_next(site: Site, what: str) -> None:
    """Until there is no such point."""
    assert every(lambda number: TRIALS[what](site, number), stride=9) > 6


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("what", TRIALS)
def test_killed_on_an_s3_server_it_is_finished_by_the_next(postgres_url: str, s3_url: str, what: str) -> None:
    """Every HTTP request is a point too."""
    site = Site(postgres_url, s3_url)

    assert every(lambda number: TRIALS[what](site, number), stride=23) > 3
